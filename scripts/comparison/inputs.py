"""What both sides of a comparison read: prompt files, a picture, the embedded models cut to their first blocks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

CUT_BLOCKS = 2
EXPERTS = ("transformer", "transformer_2")
PROMPTS = {
    "calibration": (
        "a video of a little red disc moving to the bottom on a grey backdrop",
        "over a white background, a large magenta disk drifts right",
    ),
    "held-out": (
        "a big tangerine pyramid moves to the top over a striped background",
        "a huge cyan hoop glides left over a bright background",
    ),
}
"""Of the tiny world, so that the suite `tiny` can score them."""


def make_inputs(checkout: Path, out: Path) -> None:
    """Write what both sides read: prompt files, images, and the embedded models of `checkout` cut to their first blocks."""
    from PIL import Image

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name, prompts in PROMPTS.items():
        (out / f"{name}.txt").write_text("\n".join(prompts) + "\n")
        Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(out / f"{name}.png")
        lines = ({"id": f"{i:03d}", "prompt": prompt, "image": f"{name}.png"} for i, prompt in enumerate(prompts))
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for source, target in (("tiny", "cut"), ("tiny-i2v", "cut-i2v")):
        shutil.copytree(checkout / "ptq/tiny/assets" / source, out / target)
        for expert in EXPERTS:
            _cut(out / target / expert)


def _cut(expert: Path) -> None:
    from safetensors.torch import load_file, save_file

    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps(config | {"num_layers": CUT_BLOCKS}, indent=2))
    (weights,) = expert.glob("*.safetensors")
    kept = {
        name: t
        for name, t in load_file(weights).items()
        if not name.startswith("blocks.") or int(name.split(".")[1]) < CUT_BLOCKS
    }
    save_file(kept, weights, metadata={"format": "pt"})
