"""The quantization_config object: size, strictness, which layers it names; manifests and file digests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq import formats
from ptq.checkpoint.manifest import MANIFEST_FILE, read_manifest, verify_files
from ptq.checkpoint.quantization_config import PackedConfig
from ptq.errors import DamagedFileError, PtqError
from ptq.runtime import QuantSpec
from ptq.wan.block import READERS

LINEARS = [linear for linears in READERS.values() for linear in linears]


def config(format_name: str = "hif4", blocks: tuple[int, ...] = (), **spec) -> PackedConfig:
    return PackedConfig.build(QuantSpec(format_name, **spec), LINEARS, blocks)


def test_it_stays_small_for_the_largest_model() -> None:
    value = config("mxfp4", (0, 1, 17, 38, 39), rotation=128, smooth=True).model_dump(mode="json")
    assert len(json.dumps(value, indent=2)) < 2000


@pytest.mark.parametrize("format_name", ["hif4", "mxfp4"])
def test_round_trip_keeps_the_numerics(format_name: str) -> None:
    for rotation in (0, 16, 32, 64, 128):
        built = config(format_name, (3,), rotation=rotation, smooth=True)
        read = PackedConfig.parse(json.loads(json.dumps(built.model_dump(mode="json"))))
        assert read == built
        assert (read.spec.format, read.spec.rotation, read.spec.smooth) == (format_name, rotation, True)
    for rule in formats.get(format_name).scale_rules:
        built = config(format_name, scale_rule=rule)
        assert PackedConfig.parse(built.model_dump(mode="json")).spec.scale_rule == rule
    assert config(format_name).spec.scale_rule == formats.get(format_name).scale_rules[0]


def changed(path: str, value: object) -> dict:
    result = config("mxfp4", rotation=32).model_dump(mode="json")
    *parents, leaf = path.split(".")
    node = result
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    return result


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("ignore", ["proj_out"]),
        ("weights.swizzle", True),
        ("transform.matrices", "file"),
        ("input_activations.static", 1),
        ("format_version", 3),
        ("format", "int4"),
        ("weights.group_size", 16),
        ("weights.scale_layout", "hif4-pto-u32-v1"),
        ("weights.nibble_order", "high_first"),
        ("input_activations.dynamic", False),
        ("input_activations.format", "hif4"),
        ("input_activations.scale_rule", "imaginary"),
        ("input_activations.ties", "odd"),
        ("transform.block_size", 48),
        ("transform.type", "none"),
        ("transform", {"type": "learned", "block_size": 32, "smooth": True}),
        ("transform", {"type": "learned", "block_size": 16, "smooth": False}),
        ("targets", [3]),
    ],
)
def test_what_is_not_understood_is_refused(path: str, value: object) -> None:
    PackedConfig.parse(changed("format_version", 1))
    with pytest.raises(PtqError) as caught:
        PackedConfig.parse(changed(path, value), "here/config.json")
    assert "here/config.json" in str(caught.value)


def test_layers_are_targets_outside_the_protected_blocks() -> None:
    names = ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q", "blocks.10.attn1.to_q", "blocks.0.attn1.norm_q", "proj_out"]
    names += ["condition_embedder.time_embedder.linear_1", "blocks.0.attn1.to_q.inner", "blocks.0.attn1xto_q"]
    assert config(blocks=(1,)).layer_names(names) == ["blocks.0.attn1.to_q", "blocks.10.attn1.to_q"]


def test_manifest_lists_every_file(packed: dict[str, Path]) -> None:
    for format_name, checkpoint in packed.items():
        manifest = verify_files(checkpoint)
        files = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {MANIFEST_FILE}
        assert set(manifest.files) == files and manifest.format == format_name
        assert manifest.coverage.bits_per_quantized_value == {"hif4": 4.5, "mxfp4": 4.25}[format_name]
    assert read_manifest(packed["hif4"]).digest != read_manifest(packed["mxfp4"]).digest


def test_changed_missing_and_added_files_are_named(packed: dict[str, Path], copy_of) -> None:
    checkpoint = copy_of(packed["mxfp4"])
    (checkpoint / "added.txt").write_text("x")
    with pytest.raises(DamagedFileError, match=r"added\.txt is not listed"):
        verify_files(checkpoint)
    (checkpoint / "added.txt").unlink()
    index = checkpoint / "model_index.json"
    index.write_text(index.read_text() + " ")
    with pytest.raises(DamagedFileError, match=r"model_index\.json was changed"):
        verify_files(checkpoint)
    index.unlink()
    with pytest.raises(DamagedFileError, match=r"lacks model_index\.json"):
        verify_files(checkpoint)


def test_edited_manifest_is_refused(packed: dict[str, Path], copy_of) -> None:
    checkpoint = copy_of(packed["mxfp4"])
    value = json.loads((checkpoint / MANIFEST_FILE).read_text())
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(value | {"more": 1}))
    with pytest.raises(DamagedFileError, match="more"):
        read_manifest(checkpoint)
    with pytest.raises(PtqError, match="not a packed checkpoint"):
        read_manifest(checkpoint / "vae")
