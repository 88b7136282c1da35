"""Options that several commands share, each written once: its name, its type, its limits and its help text.

A command takes one as `device: options.Device = None`; its default stands with the command. Where commands differ in
whether an option may be left out, they share the `typer.Option` and state the type themselves.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ptq.errors import FormatError
from ptq.known import find_format

MAX_SEED = 2**63 - 1
"""Of a seed as it is given; torch takes 64 bits."""


def _finite(value: float | None) -> float | None:
    """A comparison with NaN is false, so no range excludes it."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def number(name: str, low: float, high: float, help_text: str) -> Any:
    """An option that takes a finite number from `low` to `high`."""
    return typer.Option(name, min=low, max=high, callback=_finite, help=help_text)


def _fits(value: int | None) -> int | None:
    """Not by `max`, which the help would show with all 19 digits."""
    if value is not None and value > MAX_SEED:
        raise typer.BadParameter(f"{value} is more than {MAX_SEED}, the largest seed.")
    return value


def seed(help_text: str) -> Any:
    """The option that takes a seed."""
    return typer.Option("--seed", min=0, callback=_fits, help=help_text)


def _known_format(value: str | None) -> str | None:
    if value is not None:
        try:
            find_format(value)
        except FormatError as error:
            raise typer.BadParameter(str(error)) from error
    return value


def _known_device(value: str | None) -> str | None:
    if value is not None:
        from ptq.wan.preflight import check_device_name

        check_device_name(value)
    return value


def format_option(help_text: str) -> Any:
    """The option that takes the name of a format."""
    return typer.Option("--format", callback=_known_format, help=help_text)


MODEL_HELP = "`tiny`, a diffusers directory, or a hub id."
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Checkpoint = Annotated[Path, typer.Argument(help="Directory written by `ptq quantize`.", show_default=False)]

OUT = typer.Option("--out", help="Directory to write; the same command continues what is unfinished.")
NEW_OUT = typer.Option("--out", help="Directory to write; must not exist.")
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over instead of continuing.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan with estimates and stop.")]
Preflight = Annotated[
    bool, typer.Option("--preflight/--no-preflight", help="Check weights, disk and memory before starting.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, max=10_000, help="Timed rounds; the median counts.")]

PROMPTS = typer.Option("--prompts", help="Prompt file: .json (OpenS2V, VBench, any list), .jsonl or .txt.")
NumPrompts = Annotated[int | None, typer.Option("--num-prompts", min=1, help="Use the first N prompts.")]
PromptFormat = Annotated[
    str | None, typer.Option("--prompt-format", help="Format of the prompt file, instead of detecting it.")
]
MediaRoot = Annotated[
    list[Path] | None,
    typer.Option(
        "--media-root", metavar="DIR", help="Folder below which pictures and clips are; may be given several times."
    ),
]
Exclude = Annotated[
    Path | None, typer.Option("--exclude", help="Leave out prompts that this file has too, by id or caption.")
]
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="Leave out prompts without their image.")]

Preset = Annotated[
    str | None, typer.Option("--preset", help="lightning, icme2026 or mlperf-t2v. Single options go before it.")
]
Lora = Annotated[
    str | None,
    typer.Option("--lora", help="LoRA to merge, FILE[:strength]; the high-noise expert's, where there are two."),
]
Lora2 = Annotated[str | None, typer.Option("--lora-2", help="LoRA of the low-noise expert, FILE[:strength].")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, max=1000, help="Denoising steps.")]
Height = Annotated[int | None, typer.Option("--height", min=16, max=8192, help="Pixels.")]
Width = Annotated[int | None, typer.Option("--width", min=16, max=8192, help="Pixels.")]
NumFrames = Annotated[
    int | None, typer.Option("--num-frames", min=1, max=10_001, help="Frames of each video, 4 n + 1.")
]
FlowShift = Annotated[float | None, number("--flow-shift", 1e-3, 1e3, "Shift of the noise schedule.")]
GuidanceScale = Annotated[
    float | None, number("--guidance-scale", 0.0, 1e3, "Guidance of the high-noise (or only) expert.")
]
GuidanceScale2 = Annotated[float | None, number("--guidance-scale-2", 0.0, 1e3, "Guidance of the low-noise expert.")]
NegativePrompt = Annotated[str | None, typer.Option("--negative-prompt", help="Default: the model's.")]
SEED_HELP = "Base seed; each video adds its own number."
SampleSeed = Annotated[int, seed(SEED_HELP)]

Shard = Annotated[
    str | None,
    typer.Option("--shard", help="Do part i of N, from 0, as i/N. Default: what torchrun or SLURM says."),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", callback=_known_device, help="cuda, cuda:1, cpu. Default: the process's GPU, else the CPU."
    ),
]
Offload = Annotated[
    str, typer.Option("--offload", help="Weights to the CPU between uses: none, model, group or sequential.")
]
