"""Checks of the machine before long work: device, disk, memory, and a trial checkpoint.

Every problem is found in one go and told in one paragraph each, so that a machine is made right once. What is needed is
estimated (`estimates.py`), so memory can be refused wrongly: `--no-preflight` skips the checks.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from ptq import ui
from ptq.checkpoint.manifest import package_versions
from ptq.errors import PtqError, UsageError
from ptq.store.files import sweep_once, write_bytes


@dataclass(frozen=True)
class Needs:
    """Estimated bytes: on the disk of the output, of RAM, and of the GPU (0 on a CPU)."""

    disk: int = 0
    ram: int = 0
    vram: int = 0


TRIAL_FILE = "preflight.json"
"""In the folder of a run's locks: with what the trial checkpoint was made and run there, so that the same command, run
again, does not repeat it."""


def preflight(
    estimate: Callable[[], Needs], out: Path, device: str, format_name: str = "hif4", *, state: Path | None = None
) -> None:
    """Check everything that can be checked in a few seconds; the model was checked when it was found (`check.py`).

    Args:
        estimate: gives what the work to come needs; called only where the device can be used.
        out: where results go; the trial checkpoint is written beside it.
        device: where the work runs.
        format_name: format of the trial checkpoint.
        state: where a run that is continued keeps its locks; the trial is noted there.

    Raises:
        PtqError: one or more problems, a paragraph each.
    """
    problems = check_device(device)
    if not problems:
        needs = estimate()
        problems += check_room(needs, out)
        problems += check_gpu(needs, device) if device != "cpu" else []
    if not problems:
        problems += check_trial(out, device, format_name, state)
    if problems:
        count = "One problem" if len(problems) == 1 else f"{len(problems)} problems"
        text = "\n\n".join(problems)
        raise PtqError(f"{count} found before starting (--no-preflight skips these checks).\n\n{text}")


def check_trial(out: Path, device: str, format_name: str, state: Path | None) -> list[str]:
    """The trial checkpoint, unless `state` notes that it passed with the same machine, device, format and libraries."""
    made_with = {"host": platform.node(), "device": device, "format": format_name, "versions": package_versions()}
    text = json.dumps(made_with, indent=2).encode()
    note, folder = None if state is None else state / TRIAL_FILE, existing_parent(out.absolute().parent)
    sweep_once(folder)  # also where no trial follows: what a process left that could not even empty its own
    if note is not None and note.is_file() and note.read_bytes() == text:
        return []
    from ptq.wan.trial import run_trial

    try:
        run_trial(folder, format_name, device)
    except PtqError as error:
        return [str(error)]
    if note is not None:
        write_bytes(note, text)
    return []


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
        f"About {ui.format_bytes(needs.vram)} of GPU memory are needed on {device}, and {ui.format_bytes(free)} of {ui.format_bytes(total)} are free. Choose a stronger --offload (model, group, sequential), a smaller --height, --width or --num-frames, or another GPU."
    ]


def existing_parent(path: Path) -> Path:
    """The path itself, or its nearest ancestor that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
