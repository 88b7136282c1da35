"""The PDF: verdict, tables, a method that is the recipe's, stated omissions, no leftover of a template."""

from __future__ import annotations

import io
import json
import re
import shutil

import pypdf
import pytest
from report_helpers import pdf_of

from ptq.checkpoint.manifest import Manifest, read_manifest
from ptq.config import Recipe
from ptq.report import Sources
from ptq.report.facts import gather
from ptq.report.method import describe_method
from ptq.report.pdf import printable, report_data
from ptq.report.videos import make_clips
from ptq.report.wording import headline
from ptq.scheme import FORMATS, TRANSFORMS

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


def with_recipe(manifest: Manifest, *, scheme: dict | None = None, **solver) -> Manifest:
    """The manifest as a checkpoint would have it whose recipe differs in these keys."""
    recipe = manifest.recipe.model_dump()
    value = {**recipe, "scheme": recipe["scheme"] | (scheme or {}), "solver": recipe["solver"] | solver}
    return manifest.model_copy(update={"recipe": Recipe.model_validate(value)})


def test_the_method_names_only_what_was_on(job):
    manifest = read_manifest(job.checkpoint)
    titles = [step.title for step in describe_method(manifest)]
    assert "Smoothing and block Hadamard rotation" in titles and "Rounding to nearest" in titles
    assert "GPTQ rounding" not in titles and "Searched group scales" not in titles
    bare = with_recipe(manifest, scheme={"transform": "none"}, smoothing=(), residual=0.0)
    words = " ".join(f"{step.title} {step.text}" for step in describe_method(bare))
    assert "Hadamard" not in words and "Smoothing" not in words and "takes nothing else from them" in words
    assert "Residual" not in words and "Nothing is calibrated" in words and "Residual blocks" in titles
    rotated = {step.key: step for step in describe_method(with_recipe(manifest, scheme={"transform": "hadamard"}))}
    assert "blocks of 64" in rotated["hadamard"].text and "smoothed" not in rotated
    rich = with_recipe(manifest, rounding="gptq", clip_search=True)
    steps = {step.key: step for step in describe_method(rich)}
    assert {"gptq", "scales", "smoothed", "activations", "format-hif4"} <= steps.keys()
    replay = next(step for step in describe_method(rich) if step.title == "Block by block")
    assert "each record weighs the same" in replay.text
    assert "Exponents of smoothing tried for each input: 0.5, and none." in steps["smoothed"].text
    rows = [row.model_copy(update={"basis": "learned"}) for row in manifest.layers]
    learned = with_recipe(manifest, scheme={"transform": "learned", "block": 64}, smoothing=())
    steps = {step.key: step for step in describe_method(learned.model_copy(update={"layers": rows}))}
    assert "blocks of 64" in steps["learned"].text and f"learned for {len(rows)}" in steps["learned"].text
    assert "Exponents" not in steps["learned"].text and "hadamard" not in steps and "smoothed" not in steps


@pytest.mark.parametrize("format_name", list(FORMATS))
@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize(
    "solver", [{"rounding": "gptq", "clip_search": True}, {"rounding": "rtn"}], ids=["gptq", "rtn"]
)
def test_every_equation_that_a_step_names_is_in_the_template(job, format_name, transform, solver):
    from ptq.report.html import read_template

    manifest = read_manifest(job.checkpoint).model_copy(update={"format": format_name})
    template = read_template("report.typ")
    steps = describe_method(with_recipe(manifest, scheme={"transform": transform, "block": 64}, **solver))
    assert (transform in {step.key for step in steps}) == (transform != "none")
    for step in steps:
        assert not step.key or step.key == "records" or f'"{step.key}": $' in template, step


def test_settings_of_an_earlier_version_are_named(copy_job):
    """A manifest with the flat recipe keys of before: what today's recipes say is described, the rest is listed."""
    path = copy_job.checkpoint / "ptq_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"] = {
        "description": "old", "format": None, "rounding": "gptq", "rotation": 32, "smoothing": [0.5],
        "learned_transform": False, "clip_search": True, "bias_correction": True, "weight_scale_rule": None,
        "gptq": {"damping": 0.02, "act_order": False, "precision": "float32"},
        "activations": {"scale_rule": None, "ties": None},
        "records": {"weighting": "d_sigma2", "inputs": "original", "tokens_per_record": 128, "for_report": 2},
    }  # fmt: skip
    path.write_text(json.dumps(manifest))
    steps = describe_method(read_manifest(copy_job.checkpoint))
    assert steps[-1].title == "Further settings"
    assert "bias_correction = True" in steps[-1].text and "records.weighting = d_sigma2" in steps[-1].text
    assert not any(name in steps[-1].text for name in ("rotation", "precision", "inputs", "ties", "damping"))
    words = {step.key: step.text for step in steps}
    assert "blocks of 32" in words["smoothed"] and "scales" in words
    assert "Damping 0.02" in words["gptq"] and "in their natural order" in words["gptq"]
    assert LEFTOVERS.search(text_of(pdf_of(copy_job.evaluation, copy_job.checkpoint))) is None


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
