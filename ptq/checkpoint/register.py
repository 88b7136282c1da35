"""Makes diffusers know the "ptq" quantizer, without importing diffusers before the user does.

diffusers takes seconds to import and `ptq --help` must not. So `import ptq` registers at once when
`diffusers.quantizers.auto` is already loaded, and otherwise right after it has been executed, through an import hook.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

TARGET = "diffusers.quantizers.auto"
QUANTIZER = "ptq.checkpoint.diffusers_quantizer"
"""Adds itself to diffusers' tables where it is imported."""


def register_with_diffusers() -> None:
    """Register now or when diffusers is imported. Calling it again changes nothing."""
    module = sys.modules.get(TARGET)
    if module is not None and hasattr(module, "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        importlib.import_module(QUANTIZER)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds TARGET with the other finders and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TARGET:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


class _RegisteringLoader(importlib.abc.Loader):
    """Runs the real loader, then registers; where that module is what imports diffusers, it does so itself at its end."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        importlib.import_module(QUANTIZER)
