"""Stage ``figures``: the loss curves and the contact sheets of docs/tiny.md, from the logs and the last evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .denoiser import STAGES


def read(path: Path, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of ``key`` in a JSONL log; a resumed run's lines replace those it repeats."""
    points: dict[int, float] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if key in row and "step" in row:
                points[row["step"]] = row[key]
    steps = sorted(points)
    return steps, [points[s] for s in steps]


def curves(work: Path, image: Path) -> None:
    """PSNR of the VAE and loss of every denoiser that has a log in ``work``; experts follow the trunk they started from."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(*read(work / "vae.jsonl", "psnr"))
    left.set(title="VAE, training clips", xlabel="step", ylabel="PSNR (dB)")
    trunk = max(read(work / "trunk.jsonl", "loss")[0], default=0)
    for stage in STAGES:
        steps, losses = read(work / f"{stage}.jsonl", "loss")
        if steps:
            right.plot([s + (0 if stage == "trunk" else trunk) for s in steps], losses, label=stage)
    right.set(title="Denoisers", xlabel="step", ylabel="flow-matching loss", ylim=(0, None))
    right.legend()
    image.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(image, dpi=90)
    plt.close(fig)


def contact(evaluation: Path, image: Path, rows: int = 12) -> None:
    """First ``rows`` clips of an ``evaluate-*.npz``, every second frame, each under its prompt."""
    data = np.load(evaluation)
    clips, prompts = data["clips"][:rows], data["prompts"][:rows]
    columns = 2
    lines = -(-len(clips) // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(9, 1.22 * lines), layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, clip, prompt in zip(axes.flat, clips, prompts, strict=False):
        shown = [np.pad(f, ((1, 1), (1, 1), (0, 0)), constant_values=255) for f in clip[::2]]
        axis.imshow(np.concatenate(shown, 1), interpolation="nearest")
        axis.set_title(str(prompt), fontsize=7, pad=2)
    image.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(image, dpi=75)
    plt.close(fig)
