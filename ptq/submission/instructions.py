"""The texts inside a submission: README.md and reproduce.sh, written from what was really run."""

from __future__ import annotations

from ptq.checkpoint.manifest import Manifest
from ptq.report.cells import percent
from ptq.report.reproduce import Steps
from ptq.report.wording import residual_limit
from ptq.store.evaluation import PASS, Evaluation
from ptq.wan.variants import variant_title


def readme(manifest: Manifest, judged: Evaluation) -> str:
    """What the archive is, how to check it in a minute, how to make it again."""
    marked = "" if judged.verdict == PASS else "\n**This archive was packed although its gate did not pass.**\n"
    coverage = manifest.coverage
    loss = (
        "No loss is measured"
        if judged.gate is None
        else f"Mean relative loss {percent(judged.deciding).text} (95 % interval)"
    )
    residual = f"\n**{residual_limit(manifest)}**\n" if coverage.residual_share else ""
    return f"""# W4A4 {manifest.format.upper()} checkpoint of {variant_title(manifest.variant)}
{marked}
Verdict: **{judged.verdict or "none"}**. {loss}, limit {"none" if judged.limit is None else f"{judged.limit:.1%}"},
over {judged.units} paired videos, suite {judged.suite}.
High-precision blocks: {", ".join(manifest.high_precision) or "none"}. W4A4 share of Linear parameters
{coverage.parameter_share:.2%}, of Linear FLOPs {coverage.flop_share:.2%}; {coverage.bits_per_quantized_value} bits a value,
{coverage.bits_with_basis:.2f} with what the layers store of their basis.
{residual}
| path | content |
|---|---|
| weights/ | the packed checkpoint, loadable by diffusers after `import ptq`, with ptq_manifest.json |
| source/ | the package that made it and runs it |
| report/ | technical report (PDF) and the same facts as a page with videos |
| evaluation/ | verdict and the scores of every unit |
| runs/ | settings and manifests of both generation runs: prompts, seeds, hashes; small ones with videos, latents and frames |
| calibration/ | settings, prompts and digests of the calibration records, where they were beside the checkpoint |
| prompts.jsonl | prompts and seeds |
| recipe.yaml | the recipe as resolved |
| reproduce.sh | every step again |
| SHA256SUMS | checksums of all of the above (`sha256sum --check SHA256SUMS`) |

Check it: install wan-ptq from where you trust it, not from here, then `ptq verify submission.tar.gz`.
Use it: `import ptq; pipe = ptq.load_pipeline("weights")`.
"""


def reproduce_script(steps: Steps, manifest: Manifest) -> str:
    """A shell script with every step, from installing to the report: the commands that the report lists."""
    prompts = (manifest.calibration or {}).get("prompts", {})
    notes = "".join(f"# {text}\n" for text in steps.missing)
    _, *commands = steps.commands  # the first installs, here from the archive's own source
    lines = "\n".join(commands)
    return f"""#!/usr/bin/env bash
# Makes this submission again. Run it in an empty directory that holds the prompt files named below
# (calibration: {prompts.get("name")}, sha256 {prompts.get("sha256")}).
{notes}set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
python -m venv venv
venv/bin/pip install --constraint "$here/source/constraints.txt" torch "$here/source"
export PATH="$PWD/venv/bin:$PATH"
cp "$here/recipe.yaml" .
{lines}
"""
