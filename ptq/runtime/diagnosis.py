"""Facts about the machine that decide how quantized models run here."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from ptq.config import installed_recipes
from ptq.runtime.backends import advice, machine_of, preview

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "numba")


def machine_facts() -> dict[str, str]:
    """Name -> value, in reading order: versions, processors, backends, memory, disk."""
    from ptq.version import __version__

    facts = {"wan-ptq": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["CPU"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used by torch"
    facts["GPU"] = _gpu()
    machine = machine_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    facts |= {f"backend for {name}": text for name, text in preview(machine).items()}
    facts["recipe to take"] = advice(machine)
    facts |= {f"recipe {name}": recipe.description for name, recipe in installed_recipes().items()}
    memory = psutil.virtual_memory()
    facts["memory"] = f"{memory.available / 1e9:.1f} GB available of {memory.total / 1e9:.1f} GB"
    facts["disk here"] = f"{shutil.disk_usage('.').free / 1e9:.1f} GB free"
    return facts


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none usable by torch; models run on the CPU"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}, {(gpu_memory() or 0) / 1e9:.0f} GB)"


def gpu_memory() -> int | None:
    """Bytes of the first GPU; None without one."""
    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else None
