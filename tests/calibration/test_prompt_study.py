"""scripts/prompt_study.py: what it draws from one pool is what `ptq calibrate` would have recorded."""

import sys
from pathlib import Path

import torch
from calibration_helpers import record as calibrate

from ptq.store.calibration import CalibrationSet

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import prompt_study


def position(record):
    return int(Path(record.file).stem)


def test_a_draw_is_what_calibration_records(t2v, whole, tmp_path):
    calibrate(t2v, tmp_path / "pool", 6, records=12)  # every call of 6 steps
    pool = CalibrationSet(tmp_path / "pool")
    drawn, expected = prompt_study.draw(pool, 0, 5, 4), CalibrationSet(whole)
    assert drawn.records == expected.records and len(pool.records) == 6 * 12
    for one in expected.records:
        assert all(torch.equal(a, b) for a, b in zip(drawn.load(one), expected.load(one), strict=True) if b is not None)
    first, later = (prompt_study.draw(pool, start, 2, 2).records for start in (0, 3))
    assert [(position(r) + 3, r.step, r.branch) for r in first] == [(position(r), r.step, r.branch) for r in later]
    assert len(later) == 2 * 2


def test_the_summary_says_how_far_draws_differ():
    rows = [
        {"format": "hif4", "prompts": 8, "records_per_prompt": 4, "draw": i, "ratio": ratio}
        for i, ratio in enumerate((0.25, 0.5))
    ]
    assert prompt_study.summary(rows) == [
        {"format": "hif4", "records_per_prompt": 4, "prompts": 8, "draws": 2, "mean": 0.375, "least": 0.25, "most": 0.5}
    ]
