"""What a report knows: equal to the artifacts, found where they lie, gaps stated, damage refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from report_helpers import SENSITIVITY, UNITS

from ptq.checkpoint.manifest import read_manifest
from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.report import Sources, evaluation_directories
from ptq.report.facts import gather
from ptq.report.method import describe_method
from ptq.report.wording import headline, held_out, limitations
from ptq.store.files import read_jsonl


def test_facts_are_the_artifacts(job):
    facts = gather(Sources(job.evaluation))
    assert facts.evaluation.as_json() == job.content()
    assert [line.as_json() for line in facts.units] == read_jsonl(job.evaluation / "units.jsonl") and len(
        facts.units
    ) == UNITS
    assert facts.checkpoint == job.checkpoint.resolve()
    assert facts.manifest == read_manifest(job.checkpoint) and facts.sensitivity.as_json() == SENSITIVITY
    assert facts.calibration.digest == facts.manifest.calibration["digest"]
    assert [a.name for a, b in facts.pairs] == [line.unit for line in facts.units]
    assert len(facts.omissions) == 1 and "--ablation" in facts.omissions[0]


def test_residual_blocks_are_the_first_limit_and_a_step_of_the_method(job):
    facts = gather(Sources(job.evaluation))
    share = facts.manifest.coverage.residual_share
    assert 0.1 < share < 0.3 and f"adds {share:.2%}" in limitations(facts)[0]
    assert facts.manifest.statement.startswith(
        f"Some input channels are multiplied in two 4-bit words, value and residual ({share:.2%}"
    )
    (step,) = [step for step in describe_method(facts.manifest) if step.title == "Residual blocks"]
    blocks = sum(len(row.residual_blocks) for row in facts.manifest.layers)
    assert f"{blocks} blocks of " in step.text and "at most 20.0% more" in step.text
    without = replace(
        facts,
        manifest=facts.manifest.model_copy(
            update={"coverage": facts.manifest.coverage.model_copy(update={"residual_share": 0.0})}
        ),
    )
    assert not any("Residual blocks" in text for text in limitations(without))


def test_a_moved_demo_directory_is_found_whole(job, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(job.root, moved)
    path = moved / "evaluation" / "hif4" / "evaluation.json"
    path.write_text(path.read_text().replace(str(job.root), "/nowhere/demo"))
    (directory,) = evaluation_directories(moved)
    facts = gather(Sources(directory))
    assert len(facts.pairs) == UNITS and facts.checkpoint == moved / "hif4" and facts.calibration is not None


def test_missing_artifacts_are_omissions(copy_job):
    shutil.rmtree(copy_job.checkpoint)
    shutil.rmtree(copy_job.run("candidate"))
    (copy_job.evaluation / "units.jsonl").unlink()
    facts = gather(Sources(copy_job.evaluation))
    assert facts.manifest is None and not facts.pairs
    stated = " ".join(facts.omissions)
    for word in ("packed checkpoint", "candidate run", "units.jsonl"):
        assert word in stated and word in " ".join(limitations(facts))
    assert "held-out" not in headline(facts) and "cannot be told" in held_out(facts)


def test_another_checkpoint_or_run_is_refused(job, packed):
    with pytest.raises(UsageError, match="judged a checkpoint with digest"):
        gather(Sources(job.evaluation, checkpoint=packed["mxfp4"]))
    with pytest.raises(UsageError, match="not the reference run"):
        gather(Sources(job.evaluation, reference=job.run("candidate")))


def test_overlap_with_calibration_prompts_is_counted(copy_job):
    assert gather(Sources(copy_job.evaluation)).overlap == 0
    path = copy_job.checkpoint / "ptq_manifest.json"
    manifest = json.loads(path.read_text())
    from ptq.prompts import caption_digest

    line = json.loads((copy_job.run("candidate") / "manifest-0of1.jsonl").read_text().splitlines()[3])
    manifest["calibration"]["samples"][0]["caption_digest"] = caption_digest(line["prompt"].upper())
    path.write_text(json.dumps(manifest))
    facts = gather(Sources(copy_job.evaluation))
    assert facts.overlap == 1 and "held-out" not in headline(facts)
    assert any("1 evaluated prompts were calibration prompts" in text for text in limitations(facts))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda c: c.pop("dimensions"), "dimensions"),
        (lambda c: c["aggregates"]["mean_signed"].update(value="0.1x"), "mean_signed.value"),
        (lambda c: c["dimensions"]["colour"].update(units=None), "colour.units"),
        (lambda c: c.update(verdict="MAYBE"), "verdict"),
        (lambda c: c["aggregates"].clear(), "aggregate"),
        (lambda c: c.update(limit=None), "limit"),
    ],
)
def test_a_damaged_evaluation_is_refused_with_the_place(copy_job, change, found):
    copy_job.edit(change)
    with pytest.raises(DamagedFileError, match=found):
        gather(Sources(copy_job.evaluation))


@pytest.mark.parametrize("text", ['{"suite": "ti', "[]", '{"limit": NaN}', ""])
def test_an_evaluation_that_is_no_object_is_refused(copy_job, text):
    (copy_job.evaluation / "evaluation.json").write_text(text)
    with pytest.raises(DamagedFileError, match=r"evaluation\.json"):
        gather(Sources(copy_job.evaluation))


def test_nan_in_an_evaluation_is_refused(copy_job):
    copy_job.edit(lambda c: c["aggregates"]["mean_signed"].update(value=float("nan")))
    with pytest.raises(DamagedFileError, match="finite"):
        gather(Sources(copy_job.evaluation))


def test_a_directory_without_evaluation_is_refused(tmp_path):
    with pytest.raises(PtqError, match="neither an evaluation directory"):
        evaluation_directories(tmp_path)


@pytest.mark.parametrize(
    ("table", "found"),
    [({"title": "x", "columns": ["a"]}, "rows"), ({"title": "x", "columns": ["a"], "rows": [[1, 2]]}, "1 cells")],
)
def test_a_wrong_ablation_table_is_refused(job, tmp_path, table, found):
    path = tmp_path / "ablation.json"
    path.write_text(json.dumps(table))
    with pytest.raises(PtqError, match=found):
        gather(Sources(job.evaluation, ablation=path))


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict", "words"),
    [
        (0.0012, -0.001, 0.0031, "PASS", "HiF4 loses 0.12 % of the original's score (loss between −0.10 and 0.31 %"),
        (-0.0003, -0.001, 0.0004, "PASS", "HiF4 scores 0.03 % above the original (loss between −0.10 and 0.04 %"),
        (-0.000001, -0.0, 0.0, "PASS", "HiF4 loses 0.00 % of the original's score (loss between 0.00 and 0.00 %"),
        (0.02, 0.01, 0.03, "FAIL", "HiF4 loses 2.00 % of the original's score (loss between 1.00 and 3.00 %"),
        (
            0.004,
            None,
            None,
            "INCONCLUSIVE",
            "HiF4 loses 0.40 % of the original's score (no interval could be computed)",
        ),
    ],
)
def test_the_headline_says_the_verdict(copy_job, value, low, high, verdict, words):
    copy_job.edit(lambda c: c["aggregates"].update(mean_signed={"value": value, "low": low, "high": high}))
    copy_job.edit(lambda c: c.update(verdict=verdict))
    sentence = headline(gather(Sources(copy_job.evaluation))).replace("\u00a0", " ")
    assert sentence.startswith(words)
    assert sentence.endswith(f"on {UNITS} held-out paired videos: {verdict}, the limit is 0.5 %.")
