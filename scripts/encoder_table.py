"""What the recipes give on a real pretrained text encoder: SQNR of its output after `quantize_module`, over three dampings.

    python scripts/encoder_table.py --model all-MiniLM-L6-v2 --prompts OpenS2V-5M_to_mm.json --out docs/data/encoder.json

Any directory that transformers' AutoModel loads. 384 prompts calibrate and 192 others are measured, of those that have 64 tokens or
more, cut there, so that there is no padding; 16 make a batch. Writes of each format, block size of the learned
transform and share of residual blocks the mean and the range over the dampings, in dB.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from ptq import quantize_module
from ptq.cli.common import quiet_libraries
from ptq.config import load_recipe
from ptq.prompts import read_prompts
from ptq.store.files import write_json

CALIBRATE, MEASURE, TOKENS, BATCH = 384, 192, 64, 16
DAMPINGS = (0.01, 0.03, 0.1)
VARIANTS = (
    ("rtn", "hif4", 0, 0.0),
    ("rtn", "mxfp4", 0, 0.0),
    *((name, fmt, size, 0.0) for size in (64, 128) for name, fmt in (("hif4", "hif4"), ("mxfp4", "mxfp4"))),
    ("hif4", "hif4", 128, 0.05),
    ("mxfp4", "mxfp4", 128, 0.05),
    ("hif4-fast", "hif4", 128, 0.0),
    ("hif4-fast", "hif4", 128, 0.05),
)
"""Recipe, format, block of the transform, share of residual blocks."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    quiet_libraries()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model, add_pooling_layer=False).float().eval()
    texts = [sample.prompt for sample in read_prompts(args.prompts).samples]
    ids = [tokenizer(text, truncation=True, max_length=TOKENS)["input_ids"] for text in texts]
    batches = [{"input_ids": part} for part in torch.tensor([one for one in ids if len(one) == TOKENS]).split(BATCH)]
    calibration, held_out = batches[: CALIBRATE // BATCH], batches[CALIBRATE // BATCH :][: MEASURE // BATCH]
    targets = outputs(model, held_out)
    table = []
    for name, fmt, size, residual in VARIANTS:
        rows = []
        for damping in DAMPINGS if size else DAMPINGS[:1]:
            keys = (f"scheme.block={size}", f"solver.damping={damping}", f"solver.residual={residual}") if size else ()
            quantized = copy.deepcopy(model)
            quantize_module(quantized, calibration, fmt, load_recipe(name, fmt, keys))
            rows.append(sqnr(targets, outputs(quantized, held_out)))
        figures = {"mean": sum(rows) / len(rows), "least": min(rows), "most": max(rows)}
        row = {"recipe": name, "format": fmt, "block": size, "residual": residual}
        table.append(row | {key: round(value, 2) for key, value in figures.items()})
        print(json.dumps(table[-1]), flush=True)
    write_json(args.out, table)


@torch.no_grad()
def outputs(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The encoder's last hidden states."""
    return [model(**batch).last_hidden_state.float() for batch in batches]


def sqnr(targets: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """In dB, over all tokens together."""
    error = sum(float((a - b).square().sum()) for a, b in zip(targets, found, strict=True))
    return 10 * math.log10(sum(float(a.square().sum()) for a in targets) / error)


if __name__ == "__main__":
    main()
