#!/usr/bin/env python3
"""Train the embedded tiny pipeline: VAE, latents, shared denoiser, two experts, then the pipeline directory.

Every stage has a fixed seed, logs a JSONL line of its loss, writes checkpoints and continues from
them when it is run again. Runs on a CPU. See docs/tiny.md for the commands and the results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

STAGES = [
    "vae",
    "latents",
    "conditions",
    "trunk",
    "high",
    "low",
    "i2v-high",
    "i2v-low",
    "assemble",
    "evaluate",
    "figures",
]
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="checkpoints, latents and logs")
    parser.add_argument("--out", type=Path, default=ROOT / "ptq/tiny/assets", help="where the pipeline directory goes")
    parser.add_argument("--steps", type=int, default=2600, help="optimiser steps of this stage in all")
    parser.add_argument("--clips", type=int, default=3072, help="clips to encode (latents stage)")
    parser.add_argument("--units", type=int, default=64, help="held-out units (evaluate stage)")
    parser.add_argument("--batch", type=int, default=48, help="clips a step (trunk, high, low)")
    parser.add_argument("--init", type=Path, help="pipeline directory to start from (vae, latents, high, low)")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the peak learning rates")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks (trunk, high, low)")
    parser.add_argument("--freeze-at", type=int, default=1000, help="step from which only the VAE's decoder learns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.stage == "vae":
        from tiny_training import vae

        vae.train(args.work, args.steps, args.seed, args.freeze_at, args.init, args.rate)
    elif args.stage == "latents":
        from tiny_training import latents

        latents.encode_clips(args.work, args.clips, args.seed, args.init)
    elif args.stage == "conditions":
        from tiny_training import latents

        latents.encode_conditions(args.work, args.seed)
    elif args.stage in STAGES[3:8]:
        from tiny_training import denoiser

        denoiser.train(args.work, args.stage, args.steps, args.seed, args.batch, args.compile, args.init, args.rate)
    elif args.stage == "figures":
        from tiny_training import figures

        figures.curves(args.work, ROOT / "docs/img/tiny_loss.png")
        for evaluation in sorted(args.work.glob("evaluate-*.npz")):
            name = evaluation.stem.removeprefix("evaluate-").replace("-", "_")
            figures.contact(evaluation, ROOT / f"docs/img/{name}_contact.png")
    else:
        from tiny_training import assemble

        if args.stage == "assemble":
            assemble.assemble(args.work, args.out, args.seed)
        else:
            for directory in sorted(args.out.glob("tiny*")):
                assemble.evaluate(args.work, directory, args.units)


if __name__ == "__main__":
    main()
