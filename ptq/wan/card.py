"""README.md of a packed checkpoint: the model card that hubs and people read; `hf upload DIR` is then all it takes.

Written from the manifest by `ptq quantize`, and again with the verdict by `ptq report`; a card that somebody edited is left
as it is. It is no part of the weights: the manifest lists no digest of it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import yaml

from ptq.checkpoint.manifest import CARD_FILE, Manifest
from ptq.store.evaluation import Evaluation
from ptq.store.files import write_bytes
from ptq.store.lora import describe_loras
from ptq.ui import format_bytes
from ptq.wan.variants import VARIANTS, variant_title

BASE_LICENSE = "apache-2.0"
"""Of every Wan 2.1 and 2.2 model on the hub, and of the embedded ones."""


def write_card(directory: Path, manifest: Manifest, judged: Evaluation | None = None) -> bool:
    """Write the card into a checkpoint's directory, atomically; returns False where an edited one is kept.

    Args:
        judged: the evaluation that measured this checkpoint against its original; None before there is one.
    """
    path = directory / CARD_FILE
    if path.exists() and not is_ours(path.read_bytes()):
        return False
    write_bytes(path, model_card(manifest, judged).encode())
    return True


def is_ours(card: bytes) -> bool:
    """Whether a card is as it was written: its last line is the digest of all before it."""
    text, _, last = card.rstrip(b"\n").rpartition(b"\n")
    return last == _signed(text + b"\n")


def _signed(text: bytes) -> bytes:
    return f"<!-- written by wan-ptq, sha256 {hashlib.sha256(text).hexdigest()} -->".encode()


def model_card(manifest: Manifest, judged: Evaluation | None = None) -> str:
    """The card as Markdown with YAML front matter; arguments as of `write_card`."""
    from ptq.scheme import get_format

    title, pipeline = get_format(manifest.format).title, VARIANTS[manifest.variant].pipeline
    hub = manifest.base_model.get("hub_id")
    base = hub or f"a model in the structure of {variant_title(manifest.variant)}"
    table = "\n".join(f"| {name} | {value} |" for name, value in _rows(manifest, base, title).items())
    solver = manifest.recipe.solver
    tuned = f" {solver.tune.describe()}" if solver.tune else ""
    residual = f" {solver.describe_residual()}" if manifest.coverage.residual_share else ""
    text = f"""---
{_front_matter(manifest, title)}---

# {hub.rpartition("/")[2] if hub else "Wan"} in W4A4 {title}

Weights *and* activations of the transformer blocks' linear layers are 4-bit {title}; all else is the base model's, unchanged.
Made by post-training quantization with wan-ptq {manifest.package_version}.

| what | value |
|---|---|
{table}

## How to load it

```python
import ptq  # pip install wan-ptq; registers the checkpoint format with diffusers
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("this directory or its hub id")
```

On the command line, with the settings of `ptq_preset.json` (steps, guidance, size):
`ptq generate DIRECTORY --prompts prompts.txt --out videos`.

## What was measured

{_measured(judged)}

Error of the denoiser's output on the calibration records, relative to the original's (squared norm ratio):
{", ".join(f"{one.expert} {one.denoiser_error:.2e}" for one in manifest.experts)}.

## How it was made

{get_format(manifest.format).description} {manifest.recipe.describe_inputs()} {solver.describe()}.{tuned}{residual}
The resolved recipe, the errors of every layer and the sha256 of every file are in `ptq_manifest.json`. {manifest.statement}
"""
    return f"{text}{_signed(text.encode()).decode()}\n"


def _rows(manifest: Manifest, base: str, title: str) -> dict[str, str]:
    coverage, calibration = manifest.coverage, manifest.calibration
    packed = format_bytes(coverage.quantized_bytes + coverage.basis_bytes)
    made_from = "none"
    if calibration is not None:
        made_from = (
            f"{calibration['records']} recorded calls of the denoiser from {len(calibration['samples'])} prompts"
        )
    return {
        "base model": base,
        "format": f"{title}, {coverage.bits_per_quantized_value:g} bits a value ({coverage.bits_with_basis:.2f} with the change of basis)",
        "quantized Linears": f"{packed}, in bf16 {format_bytes(coverage.original_bytes)}",
        "in 4 bits": f"{coverage.parameter_share:.2%} of the Linear parameters, {coverage.flop_share:.2%} of the Linear FLOPs",
        **({"residual blocks": f"{coverage.residual_share:.2%} more products"} if coverage.residual_share else {}),
        "blocks in high precision": ", ".join(manifest.high_precision) or "none",
        "recipe": manifest.recipe_name,
        **({"LoRA, merged before quantizing": _cell(describe_loras(merged))} if (merged := manifest.loras) else {}),
        "calibration": made_from,
    }


def _cell(text: str) -> str:
    """A file's name in a table of Markdown."""
    return text.replace("|", "\\|").replace("`", "'")


def _front_matter(manifest: Manifest, title: str) -> str:
    hub = manifest.base_model.get("hub_id")
    from_image = VARIANTS[manifest.variant].image == "required"
    value = {
        "license": BASE_LICENSE,
        **({"base_model": hub, "base_model_relation": "quantized"} if hub else {}),
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video" if from_image else "text-to-video",
        "tags": ["wan-ptq", "quantized", "w4a4", "4-bit", title.lower(), "wan"],
    }
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _measured(judged: Evaluation | None) -> str:
    if judged is None:
        return "Not yet: `ptq generate` with the original and with this checkpoint, `ptq evaluate`, then `ptq report` writes the verdict here."
    loss, lines = judged.deciding, []
    for name in ("cache", "attention_backend"):
        one, other = [(side.settings or {}).get(name) for side in (judged.reference, judged.candidate)]
        if one != other:
            lines.append(f"The two runs differ in {name} ({one or 'none'}, {other or 'none'}).")
    if judged.overlap:
        lines.append(f"{judged.overlap} of the prompts were calibration prompts: this is not held out.")
    if loss is not None:
        interval = (
            "" if loss.low is None or loss.high is None else f" (95 % interval {loss.low:+.2%} to {loss.high:+.2%})"
        )
        limit = "" if judged.limit is None else f", limit {judged.limit:.1%}"
        lines.append(f"Verdict: **{judged.verdict or 'none'}**. Mean relative loss {loss.value:+.2%}{interval}{limit}.")
    lines.append(f"Suite {judged.suite}; paired videos: {judged.units}, prompts: {judged.prompts}.")
    if not judged.dimensions:
        return " ".join([*lines, "It scores no dimension: only how far the videos are apart was measured."])
    rows = [
        f"| {name} | {one.reference:.4f} | {one.candidate:.4f} | {'-' if one.relative_loss is None else f'{one.relative_loss.value:+.2%}'} |"
        for name, one in judged.dimensions.items()
    ]
    table = "\n".join(["| dimension | original | this checkpoint | relative loss |", "|---|---|---|---|", *rows])
    return " ".join(lines) + f"\n\n{table}"
