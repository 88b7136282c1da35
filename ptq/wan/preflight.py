"""Checks of the machine before long work: device, disk, memory, and a trial checkpoint.

Every problem is found in one go and told in one paragraph each, so that a machine is made right once. What is needed is
estimated (`estimates.py`), so memory can be refused wrongly: `--no-preflight` skips the checks.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from ptq import ui
from ptq.errors import PtqError, UsageError


@dataclass(frozen=True)
class Needs:
    """Estimated bytes: on the disk of the output, of RAM, and of the GPU (0 on a CPU)."""

    disk: int = 0
    ram: int = 0
    vram: int = 0


def preflight(estimate: Callable[[], Needs], out: Path, device: str, format_name: str = "hif4") -> None:
    """Check everything that can be checked in a few seconds; the model was checked when it was found (`check.py`).

    Args:
        estimate: gives what the work to come needs; called only where the device can be used.
        out: where results go; the trial checkpoint is written beside it.
        device: where the work runs.
        format_name: format of the trial checkpoint.

    Raises:
        PtqError: one or more problems, a paragraph each.
    """
    from ptq.wan.trial import run_trial

    problems = check_device(device)
    if not problems:
        needs = estimate()
        problems += check_room(needs, out)
        problems += check_gpu(needs, device) if device != "cpu" else []
    if not problems:
        try:
            run_trial(existing_parent(out.absolute().parent), format_name, device)
        except PtqError as error:
            problems.append(str(error))
    if problems:
        count = "One problem" if len(problems) == 1 else f"{len(problems)} problems"
        text = "\n\n".join(problems)
        raise PtqError(f"{count} found before starting (--no-preflight skips these checks).\n\n{text}")


def check_device_name(device: str) -> None:
    """Raise UsageError where it is the name of no device."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise UsageError(f"--device takes cpu, cuda or cuda:<n>, found {device!r}.")


def check_device(device: str) -> list[str]:
    """Whether torch can use the device."""
    check_device_name(device)
    import torch

    kind = torch.device(device)
    if kind.type == "cpu":
        return []
    if not torch.cuda.is_available():
        return ["A GPU was asked for, but torch sees none. Check the driver and the torch build with `ptq doctor`."]
    if (kind.index or 0) >= torch.cuda.device_count():
        return [f"{device} does not exist: torch sees {torch.cuda.device_count()} GPU(s), counted from 0."]
    return []


def check_room(needs: Needs, out: Path) -> list[str]:
    """Disk and RAM."""
    problems = []
    folder = existing_parent(out.absolute())
    free = shutil.disk_usage(folder).free
    if needs.disk > free:
        problems.append(
            f"About {ui.format_bytes(needs.disk)} will be written to {out}, and {ui.format_bytes(free)} are free there. Free some space or choose another --out."
        )
    available = psutil.virtual_memory().available
    if needs.ram > available:
        problems.append(
            f"About {ui.format_bytes(needs.ram)} of RAM are needed, and {ui.format_bytes(available)} are available. Close other programs, start fewer processes on this machine, or use one with more memory."
        )
    return problems


def check_gpu(needs: Needs, device: str) -> list[str]:
    """GPU memory."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    if needs.vram <= free:
        return []
    return [
        f"About {ui.format_bytes(needs.vram)} of GPU memory are needed on {device}, and {ui.format_bytes(free)} of {ui.format_bytes(total)} are free. Choose --offload model or --offload sequential, a smaller --height, --width or --num-frames, or another GPU."
    ]


def existing_parent(path: Path) -> Path:
    """The path itself, or its nearest ancestor that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
