"""The PDF: verdict, tables, a method that is the recipe's, stated omissions, no leftover of a template."""

from __future__ import annotations

import io
import json
import re
import shutil

import pypdf
import pytest
from report_helpers import pdf_of

from ptq.checkpoint.manifest import read_manifest
from ptq.report import Sources
from ptq.report.facts import gather
from ptq.report.method import describe_method
from ptq.report.pdf import printable, report_data
from ptq.report.videos import make_clips
from ptq.report.wording import headline

LEFTOVERS = re.compile(r"\b(TODO|TBD|FIXME|XXX|lorem|ipsum|placeholder|undefined|None|nan|NaN|null)\b|\{\{|\}\}|\?\?")


def text_of(document: bytes) -> str:
    """Text of all pages with white space and line-end hyphens made plain."""
    pages = [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(document)).pages]
    return re.sub(r"\s+", " ", " ".join(pages).replace("\u00ad", "").replace("-\n", "-"))


@pytest.fixture(scope="module")
def document(job) -> bytes:
    return pdf_of(job.evaluation, job.checkpoint)


def squeezed(text: str) -> str:
    """Without any white space: typesetting moves it."""
    return re.sub(r"\s+", "", text)


def test_the_pdf_has_the_verdict_and_the_tables(job, document):
    text = text_of(document)
    assert squeezed(headline(gather(Sources(job.evaluation)))) in squeezed(text)
    for heading in ("Results", "Method, as it ran", "Checkpoint", "Ablations", "Limitations", "Reproduction", "Hashes"):
        assert heading in text
    content = job.content()
    loss = content["dimensions"]["temporal_flickering"]["relative_loss"]
    shown = f"{100 * loss['value']:+.2f} % [{100 * loss['low']:+.2f}, {100 * loss['high']:+.2f}]".replace("-", "−")
    assert squeezed(shown) in squeezed(text)
    assert content["candidate"]["checkpoint_digest"] in squeezed(text)


def test_no_leftover_of_a_template_survives(document):
    found = LEFTOVERS.search(text_of(document))
    assert found is None, found


def test_missing_figures_are_stated_omissions(copy_job):
    shutil.rmtree(copy_job.checkpoint)
    shutil.rmtree(copy_job.run("candidate"))
    text = text_of(pdf_of(copy_job.evaluation))
    assert LEFTOVERS.search(text) is None
    assert "The packed checkpoint was not found" in text and "there are no frames to show" in text
    assert "The candidate run" in text and "cannot be listed" in text


def test_same_artifacts_same_bytes(job, document):
    assert pdf_of(job.evaluation, job.checkpoint) == document


def test_the_method_names_only_what_was_on(job):
    manifest = read_manifest(job.checkpoint)
    titles = [step.title for step in describe_method(manifest)]
    assert "Block Hadamard rotation" in titles and "Smoothing" in titles and "Rounding to nearest" in titles
    assert "GPTQ rounding" not in titles and "Bias correction" not in titles
    bare = manifest.model_copy(update={"recipe": {**manifest.recipe, "rotation": 0, "smoothing": []}})
    words = " ".join(f"{step.title} {step.text}" for step in describe_method(bare))
    assert "Hadamard" not in words and "Smoothing" not in words and "takes nothing else from them" in words
    full = {"rounding": "gptq", "clip_search": True, "bias_correction": True}
    rich = manifest.model_copy(update={"recipe": {**manifest.recipe, **full}})
    expected = {"gptq", "scales", "bias", "rotation", "smoothing", "weighting", "activations", "format-hif4"}
    assert expected <= {step.key for step in describe_method(rich)}
    rows = [row.model_copy(update={"basis": "learned"}) for row in manifest.layers]
    learned = {**manifest.recipe, "rotation": 64, "smoothing": [], "learned_transform": True}
    steps = {
        step.key: step for step in describe_method(manifest.model_copy(update={"recipe": learned, "layers": rows}))
    }
    assert "blocks of 64" in steps["learned"].text and f"learned for {len(rows)}" in steps["learned"].text
    assert "rotation" not in steps and "smoothing" not in steps


def test_every_equation_that_a_step_names_is_in_the_template(job):
    from ptq.report.html import read_template

    manifest = read_manifest(job.checkpoint)
    full = {"rounding": "gptq", "clip_search": True, "bias_correction": True}
    template = read_template("report.typ")
    equal = {**full, "records": {"weighting": "uniform", "inputs": "original"}}
    learned = {**full, "rotation": 64, "learned_transform": True}
    for fmt, recipe in (("hif4", full), ("hif4", equal), ("hif4", learned), ("mxfp4", {**full, "rounding": "rtn"})):
        changed = manifest.model_copy(update={"format": fmt, "recipe": {**manifest.recipe, **recipe}})
        for step in describe_method(changed):
            assert not step.key or step.key == "records" or f'"{step.key}": $' in template, step


def test_an_unknown_recipe_key_is_named(job):
    manifest = read_manifest(job.checkpoint)
    changed = manifest.model_copy(update={"recipe": {**manifest.recipe, "second_pass": True, "wheels": 0}})
    text = describe_method(changed)[-1].text
    assert "second_pass = yes" in text and "wheels" not in text


def test_ablations_are_shown_when_given(job, tmp_path):
    table = {
        "title": "Recipes on held-out records",
        "columns": ["recipe", "error"],
        "rows": [["rtn", 0.0123], ["full", 0.0045]],
    }
    (tmp_path / "a.json").write_text(json.dumps(table))
    facts = gather(Sources(job.evaluation, ablation=tmp_path / "a.json"))
    data = report_data(facts, make_clips(facts, 0), tmp_path)
    assert data["tables"]["ablation"]["rows"] == [["rtn", "0.0123"], ["full", "0.0045"]]
    assert not any("ablation" in text for text in data["limits"])


def test_scripts_without_glyphs_are_named_not_dropped():
    assert printable({"a": ["Größe ≤ 1 − ε, Привет"]}) == {"a": ["Größe ≤ 1 − ε, Привет"]}
    named = printable("before 模糊，低质量 JPEG 残留 after")
    assert named.startswith("before [14 characters") and named.endswith("after") and "sha256" in named
