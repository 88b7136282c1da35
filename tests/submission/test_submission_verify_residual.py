"""Residual blocks in an archive: named among its limits, and found where weights, manifest or recipe tell another story."""

from __future__ import annotations

import pytest
from submission_helpers import MANIFEST

from ptq.checkpoint.manifest import read_manifest

SCHEME = "format, transform and quantized layers, from the tensors"


def test_residual_blocks_are_named_in_the_readme(unpacked) -> None:
    said = (unpacked / "README.md").read_text()
    coverage = read_manifest(unpacked / "weights").coverage
    assert f"which adds {coverage.residual_share:.2%} to" in said and 0.03 < coverage.residual_share < 0.08
    assert "whether an activation may have two such words" in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": {"blocks.0.attn1.to_q": [7]}}, "have the numbers 0 to 2; found [7]"),
        ({"layers": {"blocks.0.attn1.to_q": [1, 1]}}, "each once; found [1, 1]"),
        ({"layers": {"blocks.77.attn1.to_q": [1]}}, "blocks.77.attn1.to_q, which is not packed"),
        (
            {"layers": {f"blocks.{i}.ffn.net.2": list(range(8)) for i in range(6)}},
            "more than the 5.0000% of the recipe",
        ),
    ],
)
def test_residual_blocks_that_the_weights_or_the_recipe_do_not_allow(tampered, change, words) -> None:
    """With a manifest that says the same."""
    layers = change["layers"]
    tampered.edit(
        "weights/transformer/config.json", lambda config: config["quantization_config"]["residual"].update(change)
    )

    def claim(manifest) -> None:
        own = [row for row in manifest["layers"] if row["expert"] == "transformer"]
        for row in own:
            row["residual_blocks"] = layers.get(f"blocks.{row['block']}.{row['layer']}", [])
        if "blocks.77.attn1.to_q" in layers:
            manifest["layers"].append({**own[0], "block": 77, "layer": "attn1.to_q", "residual_blocks": [1]})

    tampered.edit(MANIFEST, claim)
    tampered.redo_manifest()
    assert words in tampered.problems()[SCHEME]


def test_residual_blocks_that_the_manifest_hides(tampered) -> None:
    def hide(manifest) -> None:
        for row in manifest["layers"]:
            row["residual_blocks"] = []

    tampered.edit(MANIFEST, hide)
    tampered.redo_derived()
    assert "list other residual blocks" in tampered.problems()[SCHEME]


def test_a_recipe_that_hides_them(tampered) -> None:
    tampered.edit(MANIFEST, lambda manifest: manifest["recipe"]["solver"].update(residual=0.0))
    tampered.redo_derived()
    assert "solver.residual = 0" in tampered.problems()[SCHEME]


def test_a_share_of_residual_products_that_is_not_theirs(tampered) -> None:
    tampered.edit(MANIFEST, lambda manifest: manifest["coverage"].update(residual_share=0.01))
    tampered.redo_derived()
    assert "residual_share = 0.01" in tampered.problems()["the W4A4 coverage, from the tensors"]
