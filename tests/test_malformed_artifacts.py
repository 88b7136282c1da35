"""One list of mutations against every file between the stages: refused with one paragraph, soon, and nothing is written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from malformed import IN_LINES, Artifact, by, cases, line

from ptq.checkpoint.safetensors_file import read_header
from ptq.config import load_recipe
from ptq.quantization.workdir import FinishedBlock, WorkDir
from ptq.store.files import read_json
from ptq.store.schema import parse
from ptq.store.sensitivity import read_protection, read_sensitivity
from ptq.store.submission import read_submission

SHA = "0" * 64
STEP = {"index": 0, "timestep": 999.0, "sigma": 0.5, "d_sigma": 0.25, "expert": "transformer"}
CALIBRATION = {
    "variant": "T2V-A14B", "experts": {"transformer": SHA}, "preset": {"height": 32}, "prompts": {"name": "p", "sha256": SHA},
    "samples": [], "records_per_prompt": 2, "seed": 0, "schedule": [STEP], "complete": True, "files": {}, "digest": SHA,
}  # fmt: skip
RECORD = {
    "record": "0-0-cond", "file": "records/00000.safetensors", "sample_id": "a", "expert": "transformer", "step": 0,
    "timestep": 999.0, "sigma": 0.5, "d_sigma": 0.25, "branch": "cond",
}  # fmt: skip
RUN = {
    "schema": 1,
    "model": "m",
    "digest": SHA,
    "settings": {"steps": 3},
    "plan": {"units": 1, "samples_per_prompt": 1, "shards": 1},
}
LINE = {
    "unit": "d/a/0", "dataset": "d", "sample_id": "a", "k": 0, "prompt": "p", "score_prompt": "p", "seed": 1, "latent_sha256": SHA,
    "width": 32, "height": 32, "frames": 5, "fps": 8, "video": "videos/a-0.mp4", "video_sha256": SHA, "status": "done",
}  # fmt: skip
ESTIMATE = {"value": 0.001, "low": -0.002, "high": 0.003}
DIMENSION = {"reference": 0.9, "candidate": 0.8, "relative_loss": ESTIMATE, "points": ESTIMATE, "units": 1}
EVALUATION = {
    "schema": 1, "ptq_version": "1", "suite": "tiny", "format": "hif4", "limit": 0.005, "gate": "mean_signed",
    "bootstrap": {"resamples": 1000, "seed": 0, "confidence": 0.95, "method": "m"}, "reference": {}, "candidate": {}, "units": 1,
    "dimensions": {"colour": DIMENSION}, "aggregates": {"mean_signed": ESTIMATE}, "verdict": "PASS", "prompts": 1,
}  # fmt: skip
UNIT = {"unit": "d/a/0", "reference": {"colour": 1.0}, "candidate": {"colour": 0.5}, "paired": {}}
SENSITIVITY = {
    "metric": "error", "quantize_one": [{"expert": "transformer", "block": 0, "error": 0.1}], "picks": [], "comparison": {"none": 0.1},
}  # fmt: skip
MANIFEST = {
    "manifest_version": 1, "package_version": "1", "versions": {}, "format": "hif4", "variant": "T2V-A14B", "base_model": {},
    "recipe_name": "rtn", "recipe": load_recipe("rtn", "hif4").model_dump(mode="json"), "calibration": None, "high_precision": [],
    "budget_scope": "total", "experts": [], "layers": [], "signature": SHA, "seconds": 1.0, "peak_memory_bytes": 1, "files": {},
    "coverage": {
        "linear_parameters": 1, "quantized_parameters": 1, "parameter_share": 1.0, "flop_share": 1.0,
        "bits_per_quantized_value": 4.5, "quantized_bytes": 1, "basis_bytes": 0, "original_bytes": 2,
    },
    "blocks": [{"expert": "transformer", "block": 0, "stream_error": 0.1, "high_precision": False, "seconds": 1.0}],
}  # fmt: skip
PICKS = [{"expert": "transformer", "block": 0, "before": 0.2, "after": 0.1}]
SUBMISSION = {
    "budget_scope": "total", "checkpoint_digest": "d", "failing_gate_allowed": False, "format": "hif4",
    "high_precision": [], "limit": 0.005, "schema": 1, "variant": "T2V-A14B", "verdict": "PASS",
}  # fmt: skip
UNFINISHED = {key: value for key, value in CALIBRATION.items() if key != "digest"} | {"complete": False}
SIGNATURE = {
    "model": {"a": SHA}, "calibration": SHA, "format": "hif4", "recipe": MANIFEST["recipe"], "high_precision": {}, "seed": 0, "versions": {},
}  # fmt: skip
"""run.json of an unfinished checkpoint."""
HEADER = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}


def calibrated(folder: Path) -> tuple[object, ...]:
    return "quantize", "tiny", "--calibration", folder, "--format", "hif4", "--out", folder / "out", "--dry-run"


def recorded(folder: Path) -> tuple[object, ...]:
    return "calibrate", "tiny", "--prompts", folder / "../p.txt", "--device", "cpu", "--out", folder, "--no-preflight"


def generated(folder: Path) -> tuple[object, ...]:
    return "generate", "tiny", "--prompts", folder / "../p.txt", "--device", "cpu", "--out", folder, "--no-preflight"


def with_index(index: bytes) -> dict[str, Any]:
    """The settings of a set whose index has these bytes, as if they had been recorded."""
    return CALIBRATION | {"files": {"records.jsonl": hashlib.sha256(index).hexdigest()}}


def evaluated(folder: Path) -> tuple[object, ...]:
    return "evaluate", "--reference", folder, "--candidate", folder, "--out", folder / "out"


def reported(folder: Path) -> tuple[object, ...]:
    return "report", folder, "--html", folder / "out.html", "--checkpoint", folder


def inspected(folder: Path) -> tuple[object, ...]:
    return "inspect", folder


def read_block(folder: Path) -> None:
    """A finished block that is damaged is made again: here the reader itself."""
    path = folder / "00000.json"
    parse(FinishedBlock, read_json(path), path, "")


def safetensors(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data + bytes(4)


ARTIFACTS = {
    "calibration": Artifact("calibration.json", CALIBRATION, ("records_per_prompt",), calibrated, every=True),
    "schedule": Artifact("calibration.json", CALIBRATION, ("schedule", 0, "sigma"), calibrated),
    "recording": Artifact("calibration.json", CALIBRATION, ("seed",), lambda f: ("status", f)),
    "recording-goes-on": Artifact("calibration.json", UNFINISHED, ("schedule", 0, "timestep"), recorded, beside={"../p.txt": "a red ball\n"}),
    "records": Artifact("records.jsonl", RECORD, ("step",), calibrated, line, IN_LINES, {"calibration.json": with_index}),
    "run-goes-on": Artifact("run.json", RUN, ("plan", "units"), generated, passes=frozenset({"missing"}), beside={"../p.txt": "a red ball\n"}),
    "run-of-other-settings": Artifact("run.json", RUN, ("settings", "steps"), generated, beside={"../p.txt": "a red ball\n"}, named="dir"),
    "unfinished-checkpoint": Artifact("out.partial/run.json", SIGNATURE, ("seed",), by(lambda f: WorkDir(f / "out", SIGNATURE).begin()), named="out.partial"),
    "run": Artifact("run.json", RUN, ("plan", "units"), evaluated, passes=frozenset({"missing"}), beside={"manifest-0of1.jsonl": LINE}),
    "run-status": Artifact("run.json", RUN, ("plan", "shards"), lambda f: ("status", f), passes=frozenset({"missing"}), beside={"manifest-0of1.jsonl": LINE}),
    "manifest-line": Artifact("manifest-0of1.jsonl", LINE, ("width",), evaluated, line, IN_LINES, {"run.json": RUN}, every=True),
    "evaluation": Artifact("evaluation.json", EVALUATION, ("units",), reported),
    "dimension": Artifact("evaluation.json", EVALUATION, ("dimensions", "colour", "units"), reported),
    "unit-line": Artifact("units.jsonl", UNIT, ("reference", "colour"), reported, line, IN_LINES | {"value null", "value negative", "missing", "extra"}, {"evaluation.json": EVALUATION}),
    "checkpoint": Artifact("ptq_manifest.json", MANIFEST, ("coverage", "quantized_bytes"), inspected),
    "checkpoint-block": Artifact("ptq_manifest.json", MANIFEST, ("blocks", 0, "block"), inspected),
    "checkpoint-recipe": Artifact("ptq_manifest.json", MANIFEST, ("recipe", "records", "for_report"), inspected, passes=frozenset({"missing"})),
    "sensitivity": Artifact("ptq_sensitivity.json", SENSITIVITY, ("quantize_one", 0, "error"), by(read_sensitivity)),
    "protection": Artifact("protection.json", PICKS, (0, "block"), by(read_protection)),
    "submission": Artifact("submission.json", SUBMISSION, ("limit",), by(read_submission), passes=frozenset({"value null"})),
    "block": Artifact("00000.json", {"block": MANIFEST["blocks"][0], "layers": []}, ("block", "stream_error"), by(read_block)),
    "safetensors": Artifact("a.safetensors", HEADER, ("a", "data_offsets", 0), by(lambda f: read_header(f / "a.safetensors")), safetensors, every=True),
    "safetensors-shape": Artifact("a.safetensors", HEADER, ("a", "shape", 0), by(lambda f: read_header(f / "a.safetensors")), safetensors),
}  # fmt: skip


@pytest.mark.parametrize(("name", "mutation"), cases(ARTIFACTS))
def test_what_is_malformed_is_refused(tmp_path: Path, name: str, mutation: str) -> None:
    (tmp_path / "dir").mkdir()
    ARTIFACTS[name].refused(tmp_path / "dir", mutation)
