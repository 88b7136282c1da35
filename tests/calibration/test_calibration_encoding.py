"""Records made with an encoder that is freed first are those of the whole pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
from calibration_helpers import make_plan

from ptq.calibration.prepare import record_plan
from ptq.calibration.run import calibrate
from ptq.wan import encoding
from ptq.wan.loading import load_pipeline


def records(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and "state" not in path.parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("variant", "guidance"), [("T2V-A14B", 4.0), ("I2V-A14B", 4.0), ("TI2V-5B", 4.0), ("T2V-A14B", 1.0)]
)
def test_records_are_those_of_the_whole_pipeline(
    pipelines, image_file: Path, tmp_path: Path, monkeypatch, variant: str, guidance: float
):
    image = image_file if variant == "I2V-A14B" else None
    plan = make_plan(pipelines[variant], 2, image=image, guidance_scale=guidance)
    assert record_plan(plan, tmp_path / "first")["complete"]
    assert calibrate(plan, lambda: load_pipeline(pipelines[variant]), tmp_path / "whole")["complete"]
    assert records(tmp_path / "first") == records(tmp_path / "whole")
    kept = list((tmp_path / "first" / "state" / "embeddings").iterdir())
    assert len(kept) == (3 if guidance > 1 else 2)

    def never(*_: object) -> None:
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(encoding, "load_encoder", never)
    (tmp_path / "first" / "records" / "00001.safetensors").unlink()
    assert record_plan(plan, tmp_path / "first")["complete"]
    assert records(tmp_path / "first") == records(tmp_path / "whole")
