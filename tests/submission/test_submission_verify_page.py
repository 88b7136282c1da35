"""What an archive says of its weights, in texts, claims and manifest, follows from the files in it; anything else is found."""

from __future__ import annotations

from typing import Any

import pytest
from submission_helpers import MANIFEST, TEXTS


@pytest.mark.parametrize("name", ["README.md", "reproduce.sh", "recipe.yaml", "prompts.jsonl", "weights/README.md"])
def test_an_edited_text(tampered, name: str) -> None:
    data = (tampered.root / name).read_bytes()
    tampered.write(name, data + b"# and more\n")
    assert f"{name} is not what manifest, evaluation and runs give" in tampered.problems()[TEXTS]


@pytest.mark.parametrize(
    "change",
    [
        {"format": "mxfp4"},
        {"budget_scope": "per-expert"},
        {"limit": 0.1},
        {"verdict": None},
        {"variant": "TI2V-5B"},
        {"failing_gate_allowed": None},
    ],
    ids=str,
)
def test_other_claims_in_submission_json(tampered, change: dict[str, Any]) -> None:
    before = tampered.read("submission.json")["failing_gate_allowed"]
    change = {key: not before if key == "failing_gate_allowed" else value for key, value in change.items()}
    tampered.edit("submission.json", lambda claims: claims.update(change))
    assert "submission.json is not what" in tampered.problems()[TEXTS]


def test_a_replaced_recipe(tampered) -> None:
    tampered.edit(MANIFEST, lambda manifest: manifest["recipe"]["scheme"].update(transform="hadamard", block=64))
    tampered.redo_derived()
    problems = tampered.problems()
    assert (
        "recipe of the manifest say HiF4, transform hadamard"
        in problems["format, transform and quantized layers, from the tensors"]
    )


def test_a_protected_block_that_the_tensors_do_not_show(tampered) -> None:
    config = "weights/transformer/config.json"
    tampered.edit(config, lambda value: value["quantization_config"].update(high_precision_blocks=[0]))
    tampered.edit(MANIFEST, lambda manifest: manifest["high_precision"].append("transformer:0"))
    tampered.redo_manifest()
    assert "the tensors say []" in tampered.problems()["protected blocks are within the budget, from the tensors"]


def test_another_coverage(tampered) -> None:
    tampered.edit(MANIFEST, lambda manifest: manifest["coverage"].update(flop_share=0.999))
    tampered.redo_derived()
    assert "the manifest says flop_share = 0.999" in tampered.problems()["the W4A4 coverage, from the tensors"]


def test_another_original_model(tampered) -> None:
    tampered.edit(MANIFEST, lambda manifest: manifest["base_model"]["configs"].update(transformer="0" * 64))
    assert (
        "not that of the original model"
        in tampered.problems()["format, transform and quantized layers, from the tensors"]
    )


@pytest.mark.parametrize(
    "change",
    [{"hub_id": "Wan-AI/Wan2.2-T2V-A14B-Diffusers"}, {"files": {}}, {"variant": "TI2V-5B"}],
    ids=["hub_id", "files", "variant"],
)
def test_another_original_model_in_words(tampered, change: dict[str, Any]) -> None:
    tampered.edit(MANIFEST, lambda manifest: manifest["base_model"].update(change))
    tampered.redo_derived()
    assert list(tampered.problems()) == ["the reference run is of the original model"]


@pytest.mark.parametrize("key", ["layers", "blocks", "experts"])
def test_errors_left_out_of_the_manifest(tampered, key: str) -> None:
    def leave_one_out(manifest: dict[str, Any]) -> None:
        rows = manifest[key]
        rows.remove(next(row for row in rows if not row.get("residual_blocks")))

    tampered.edit(MANIFEST, leave_one_out)
    tampered.redo_derived()
    problem = tampered.problems()["format, transform and quantized layers, from the tensors"]
    assert "the manifest lists the errors of" in problem and key in problem


def test_another_statement(tampered) -> None:
    tampered.edit(MANIFEST, lambda manifest: manifest.update(statement="Certified lossless."))
    tampered.redo_derived()
    assert "'Certified lossless.'" in tampered.problems()["the checkpoint's files have the digests of its manifest"]
