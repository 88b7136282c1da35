"""Registration with diffusers: in whichever order the two are imported, and without importing anything heavy."""

from __future__ import annotations

import subprocess
import sys

import pytest

IS_REGISTERED = (
    "from diffusers.quantizers import auto\n"
    "from ptq.checkpoint.diffusers_quantizer import PtqConfig, PtqQuantizer\n"
    "assert auto.AUTO_QUANTIZER_MAPPING['ptq'] is PtqQuantizer\n"
    "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['ptq'] is PtqConfig\n"
)


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_package_first_even_when_somebody_only_looks_for_the_module() -> None:
    run(
        "import sys, importlib.util\nimport ptq\nassert 'torch' not in sys.modules\n"
        "importlib.util.find_spec('diffusers.quantizers.auto')\n"
        "import ptq.checkpoint.register as r; r.register_with_diffusers()\n"
        "assert sum(isinstance(f, r._Finder) for f in sys.meta_path) == 1\n" + IS_REGISTERED
    )


def test_diffusers_first() -> None:
    run(
        "from diffusers.quantizers import auto\nassert 'ptq' not in auto.AUTO_QUANTIZER_MAPPING\nimport ptq\n"
        + IS_REGISTERED
    )


def test_the_quantizers_module_first() -> None:
    run("import ptq.checkpoint.diffusers_quantizer\n" + IS_REGISTERED)


@pytest.mark.parametrize(
    "code",
    [
        "import ptq",
        "import sys\nsys.argv = ['ptq', '--help']\nfrom ptq.cli.main import run\ntry: run()\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    heavy = ["torch", "diffusers", "transformers", "av", "skimage", "matplotlib", "scipy"]
    run(f"{code}\nimport sys\nfound = [m for m in {heavy} if m in sys.modules]\nassert not found, found")
