"""Reports of imported VBench results: no runs, no checkpoint, and nothing claimed that they cannot show."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest
from report_helpers import page_of, pdf_of

from ptq.evaluation import evaluate_imported
from ptq.report import Sources
from ptq.report.facts import gather
from ptq.report.reproduce import reproduction
from ptq.report.wording import headline, meaning
from ptq.store.files import read_json

DIMENSIONS = ["aesthetic_quality", "motion_smoothness"]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    for name, loss in (("ref", 0.0), ("cand", 0.02)):
        scores = np.random.default_rng(0).uniform(0.5, 0.9, 30) * (1 - loss)
        rows = [{"video_path": f"v/{i:02d}-0.mp4", "video_results": float(s)} for i, s in enumerate(scores)]
        content = {dimension: [float(scores.mean()), rows] for dimension in DIMENSIONS}
        (folder / f"{name}.json").write_text(json.dumps(content))
    out = folder / "evaluation"
    evaluate_imported(folder / "ref.json", folder / "cand.json", out, format="hif4", dimensions=DIMENSIONS)
    return out


def test_the_report_claims_only_what_was_imported(evaluation):
    facts = gather(Sources(evaluation))
    sentence = headline(facts).replace("\u00a0", " ")
    assert sentence.startswith("HiF4 loses 2.00 %") and sentence.endswith(
        "30 imported videos: FAIL, the limit is 0.5 %."
    )
    assert "paired by file name" in meaning(facts) and "same noise" not in meaning(facts)
    page = page_of(evaluation)
    assert "<video" not in page and "nothing proves" in page and "motion smoothness" in page
    for file in read_json(evaluation / "evaluation.json")["vbench"]["files"]:
        assert file["sha256"] in page
    assert pdf_of(evaluation).startswith(b"%PDF")


def test_the_import_command_names_files_and_dimensions(evaluation):
    line = next(line for line in reproduction(gather(Sources(evaluation))).commands if line.startswith("ptq evaluate"))
    parts = shlex.split(line.partition(" --vbench-python")[0])
    files = [read_json(evaluation / "evaluation.json")[role]["file"] for role in ("reference", "candidate")]
    index = parts.index("--import-vbench")
    assert parts[index + 1 : index + 3] == files
    assert parts[parts.index("--dimensions") + 1] == ",".join(DIMENSIONS) and "--vbench-python" not in line
