"""The quantization_config object: size, strictness, which layers it names; manifests and file digests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptq import formats
from ptq.checkpoint.manifest import CARD_FILE, MANIFEST_FILE, read_manifest, verify_files
from ptq.checkpoint.quantization_config import PackedConfig
from ptq.config.recipe import Recipe, RecordSettings, SchemeSettings, SolverSettings
from ptq.errors import DamagedFileError, PtqError
from ptq.scheme import Scheme
from ptq.wan.block import READERS

LINEARS = tuple(linear for linears in READERS.values() for linear in linears)

TRANSFORMS = [
    ("none", 0),
    *(("hadamard", size) for size in (16, 32, 64, 128)),
    *(("smoothed", size) for size in (0, 16, 32, 64, 128)),
    ("learned", 64),
    ("learned", 128),
]


def config(format_name: str = "hif4", blocks: tuple[int, ...] = (), **scheme) -> PackedConfig:
    return PackedConfig(Scheme.of(format_name, **scheme), LINEARS, blocks)


def test_it_stays_small_for_the_largest_model() -> None:
    value = config("mxfp4", (0, 1, 17, 38, 39), transform="smoothed", block=128).to_dict()
    assert len(json.dumps(value, indent=2)) < 2000


@pytest.mark.parametrize("format_name", ["hif4", "mxfp4"])
def test_round_trip_keeps_the_numerics(format_name: str) -> None:
    for transform, block in TRANSFORMS:
        built = config(format_name, (3,), transform=transform, block=block)
        read = PackedConfig.parse(json.loads(json.dumps(built.to_dict())))
        assert read == built
        scheme = read.scheme
        assert (scheme.format, scheme.transform.kind, scheme.transform.block) == (built.scheme.format, transform, block)
    for rule in formats.get(format_name).scale_rules:
        built = config(format_name, input_rule=rule)
        assert PackedConfig.parse(built.to_dict()).scheme.input_rule == rule
    assert config(format_name).scheme.input_rule == formats.get(format_name).scale_rules[0]


@pytest.mark.parametrize(
    ("transform", "block", "stored"),
    [
        ("none", 0, {"type": "none", "block_size": 0, "smooth": False}),
        ("hadamard", 32, {"type": "hadamard", "block_size": 32, "smooth": False}),
        ("smoothed", 32, {"type": "hadamard", "block_size": 32, "smooth": True}),
        ("smoothed", 0, {"type": "none", "block_size": 0, "smooth": True}),
        ("learned", 64, {"type": "learned", "block_size": 64, "smooth": False}),
    ],
)
def test_the_object_is_the_one_of_earlier_versions(transform: str, block: int, stored: dict) -> None:
    """Word for word, so that checkpoints of earlier versions are read and theirs are read by them."""
    assert config("mxfp4", (3,), transform=transform, block=block, input_rule="even").to_dict() == {
        "quant_method": "ptq",
        "format_version": 1,
        "format": "mxfp4",
        "weights": {"group_size": 32, "nibble_order": "low_first", "scale_layout": "e8m0-u8"},
        "input_activations": {"format": "mxfp4", "dynamic": True, "scale_rule": "even", "ties": "even"},
        "transform": stored,
        "targets": list(LINEARS),
        "high_precision_blocks": [3],
    }


def changed(path: str, value: object) -> dict:
    result = config("mxfp4", transform="hadamard", block=32).to_dict()
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
        ("input_activations.ties", "away"),
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
        files = {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()} - {
            MANIFEST_FILE,
            CARD_FILE,
        }
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


def test_manifest_of_an_earlier_version_is_read(packed: dict[str, Path], copy_of) -> None:
    """Its recipe in today's words, and what today's recipes cannot say beside it; both are of the reading, not the file."""
    checkpoint = copy_of(packed["mxfp4"])
    value = json.loads((checkpoint / MANIFEST_FILE).read_text())
    earlier = {"description": "", "format": "mxfp4", "rounding": "gptq", "rotation": 64, "smoothing": [0.5]}
    earlier |= {"learned_transform": False, "clip_search": True, "bias_correction": False, "weight_scale_rule": None}
    earlier |= {"gptq": {"damping": 0.02, "act_order": True, "precision": "float32"}}
    earlier |= {"activations": {"scale_rule": "even", "ties": None}}
    records = {"inputs": "original", "tokens_per_record": 64, "hessian_tokens": None, "for_report": 2}
    earlier |= {"records": records | {"weighting": "d_sigma2"}}
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(value | {"recipe": earlier}))
    manifest = read_manifest(checkpoint)
    assert manifest.recipe == Recipe(
        format="mxfp4",
        scheme=SchemeSettings(transform="smoothed", block=64, input_rule="even"),
        solver=SolverSettings(rounding="gptq", smoothing=(0.5,), clip_search=True, damping=0.02),
        records=RecordSettings(tokens_per_record=64),
    )
    assert manifest.earlier_keys == {"records.weighting": "d_sigma2"}
    assert manifest.model_dump(mode="json") == value | {"recipe": manifest.recipe.model_dump(mode="json")}
    assert manifest.digest == read_manifest(packed["mxfp4"]).digest


def test_edited_manifest_is_refused(packed: dict[str, Path], copy_of) -> None:
    checkpoint = copy_of(packed["mxfp4"])
    value = json.loads((checkpoint / MANIFEST_FILE).read_text())
    (checkpoint / MANIFEST_FILE).write_text(json.dumps(value | {"more": 1}))
    with pytest.raises(DamagedFileError, match="more"):
        read_manifest(checkpoint)
    with pytest.raises(PtqError, match="not a packed checkpoint"):
        read_manifest(checkpoint / "vae")
