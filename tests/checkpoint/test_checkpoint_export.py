"""Exports: what another tool reads back is what our runtime computes with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ptq import formats
from ptq.checkpoint.export import export_pipeline, msmodelslim_words
from ptq.checkpoint.shards import ShardSet
from ptq.checkpoint.targets import TARGETS
from ptq.cli.main import app
from ptq.errors import UsageError
from ptq.scheme import Scheme
from ptq.store.files import read_json
from ptq.wan.layout import read_layout

LAYER = "blocks.0.ffn.net.0.proj"


@pytest.fixture(scope="module")
def plain(random_pipelines, tmp_path_factory, quantize_with) -> dict[str, Path]:
    """Checkpoints without rotation and smoothing, which foreign tools can run; `floor`: inputs scaled as none of them does."""
    root = tmp_path_factory.mktemp("plain")
    model, plain = random_pipelines["TI2V-5B"], "scheme.transform=none"
    made = {"mxfp4": quantize_with(model, root, "mxfp4", (plain, "scheme.input_rule=even"), {})}
    made["hif4"] = quantize_with(model, root, "hif4", (plain,), {})
    (root / "floor").mkdir()
    made["floor"] = quantize_with(model, root / "floor", "mxfp4", (plain, "scheme.input_rule=floor"), {})
    return made


def decoded(checkpoint: Path, name: str) -> torch.Tensor:
    shards = ShardSet(checkpoint / "transformer")
    fmt = formats.get(read_json(checkpoint / "transformer/config.json")["quantization_config"]["format"])
    return fmt.dequantize(fmt.unpack(shards.read(f"{name}.weight_packed"), shards.read(f"{name}.weight_scale")))


def test_compressed_tensors_reads_the_same_weights(plain, tmp_path):
    compressed = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    assert compressed
    out = tmp_path / "ct"
    export_pipeline(plain["mxfp4"], read_layout(plain["mxfp4"]).experts, out, "compressed-tensors")
    config = read_json(out / "transformer/config.json")["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    shards = ShardSet(out / "transformer")
    state = {key: shards.read(f"{LAYER}.{key}") for key in ("weight_packed", "weight_scale")}
    compressor = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized")
    weight = compressor.decompress(state, scheme)["weight"]
    assert torch.equal(weight.float(), decoded(plain["mxfp4"], LAYER))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_scales_inputs_by_the_rule_that_is_asked_for(dtype):
    """By its own code: rule `even` gives its bits, on inputs with outliers; every other rule gives others."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.quant_scheme import MXFP4
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 128, generator=generator) * torch.randn(256, 1, generator=generator).exp()
    x[:, 3] *= 50
    x, arguments = x.to(dtype), MXFP4["input_activations"]
    theirs = fake_quantize(x, *compute_dynamic_scales_and_zp(x, arguments, torch.nn.Linear(128, 4)), arguments)
    equal = [
        rule
        for rule in formats.get("mxfp4").scale_rules
        if torch.equal(Scheme.of("mxfp4", input_rule=rule).quantize_input(x, None).to(dtype), theirs)
    ]
    assert equal == [TARGETS["compressed-tensors"].input_rule] == ["even"]


def test_the_guides_commands_and_what_they_leave(plain, tmp_path, monkeypatch):
    """Each export of the guide, of a checkpoint that fits it; the card of the packed checkpoint is not taken along."""
    guide = (Path(__file__).resolve().parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    lines = [line.split() for line in guide.splitlines() if line.startswith("ptq export ")]
    assert [line[line.index("--to") + 1] for line in lines] == list(TARGETS)
    monkeypatch.chdir(tmp_path)
    for line in lines:
        target, out = (line[line.index(option) + 1] for option in ("--to", "--out"))
        source = plain["hif4" if target == "msmodelslim" else "mxfp4"]
        result = CliRunner().invoke(app, ["export", str(source), "--to", target, "--out", out])
        assert result.exit_code == 0, result.output
        assert TARGETS[target].exact in " ".join(result.stderr.split())
        assert (source / "README.md").exists() and not (Path(out) / "README.md").exists()


def test_ignore_lists_every_dense_linear(plain, tmp_path):
    out = tmp_path / "ct"
    export_pipeline(plain["mxfp4"], read_layout(plain["mxfp4"]).experts, out, "compressed-tensors")
    ignored = set(read_json(out / "transformer/config.json")["quantization_config"]["ignore"])
    assert "proj_out" in ignored and "condition_embedder.time_proj" in ignored
    assert not any(name.startswith("blocks.") for name in ignored)


@pytest.mark.parametrize("name", ["mxfp4", "hif4"])
def test_bf16_equals_runtime_weights_and_loads_without_us(plain, tmp_path, name):
    from diffusers import WanTransformer3DModel

    out = tmp_path / "bf16"
    export_pipeline(plain[name], read_layout(plain[name]).experts, out, "bf16")
    model = WanTransformer3DModel.from_pretrained(out / "transformer", dtype=torch.float32)
    weight = model.get_submodule(LAYER).weight
    assert torch.equal(weight, decoded(plain[name], LAYER))


@pytest.mark.parametrize("name", ["hif4", "mxfp4"])
def test_bf16_undoes_the_change_of_basis(packed, random_pipelines, tmp_path, name):
    """hif4: rotation and smoothing; mxfp4: a learned transform."""
    from ptq.wan.loading import load_pipeline

    out = tmp_path / "bf16"
    export_pipeline(packed[name], read_layout(packed[name]).experts, out, "bf16")
    layer = load_pipeline(packed[name]).transformer.get_submodule(LAYER)
    shards = ShardSet(out / "transformer")
    exported = shards.read(f"{LAYER}.weight")
    assert torch.equal(exported, layer.dequantize().to(torch.bfloat16))
    assert not any(name.endswith((".smooth", ".transform")) for name in shards.entries)
    variant = {"hif4": "T2V-A14B", "mxfp4": "TI2V-5B"}[name]
    original = ShardSet(random_pipelines[variant] / "transformer").read(f"{LAYER}.weight").float()
    assert (exported.float() - original).norm() < 0.2 * original.norm()


def test_msmodelslim_word_by_hand():
    # e6m2 byte 0xA5; e8 lanes 0 and 7 set; e16 lanes 0 and 14 set.
    word = 0xA5 | (1 << 8) | (1 << 15) | (1 << 16) | (1 << 30)
    expected = (0xA5 << 24) | (0b10000001 << 16) | 0b1000000000000010
    result = msmodelslim_words(torch.tensor([[word]], dtype=torch.int32))
    assert result.item() & 0xFFFFFFFF == expected


def test_msmodelslim_export_keeps_elements(plain, tmp_path):
    out = tmp_path / "ms"
    export_pipeline(plain["hif4"], read_layout(plain["hif4"]).experts, out, "msmodelslim")
    ours, theirs = ShardSet(plain["hif4"] / "transformer"), ShardSet(out / "transformer")
    assert torch.equal(ours.read(f"{LAYER}.weight_packed"), theirs.read(f"{LAYER}.weight_packed"))
    words = ours.read(f"{LAYER}.weight_scale")
    assert torch.equal(theirs.read(f"{LAYER}.weight_scale"), msmodelslim_words(words))


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("hif4", "compressed-tensors", r"takes mxfp4.*this one is hif4\. Use --to bf16\."),
        (
            "hif4",
            "msmodelslim",
            r"transform smoothed, blocks of \d+.*residual blocks.*--set scheme\.transform=none --set solver\.residual=0 to export",
        ),
        (
            "mxfp4",
            "compressed-tensors",
            r"transform learned.*by the rule floor, and there by even.*--set scheme\.transform=none --set scheme\.input_rule=even",
        ),
        ("hif4", "gguf", "takes one of"),
    ],
)
def test_refusals_leave_nothing(packed, tmp_path, name, target, words):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=words):
        export_pipeline(packed[name], read_layout(packed[name]).experts, out, target)
    assert not out.exists()


def test_inputs_that_would_be_scaled_otherwise_are_refused(plain, tmp_path):
    words = r"by the rule floor, and there by even\. Quantize once more with --set scheme\.input_rule=even to export it, or use --to bf16"
    command = ["export", str(plain["floor"]), "--out", str(tmp_path / "out"), "--to"]
    assert re.search(words, str(CliRunner().invoke(app, [*command, "compressed-tensors"]).exception))
    with pytest.raises(UsageError, match=words):
        export_pipeline(plain["floor"], read_layout(plain["floor"]).experts, tmp_path / "out", "compressed-tensors")
    refused = str(CliRunner().invoke(app, [*command, "msmodelslim"]).exception)
    assert refused.endswith("this one is mxfp4. Use --to bf16.")  # compressed-tensors would not be exact either


def test_a_checkpoint_of_the_other_format_is_told_where_its_codes_fit(plain, tmp_path):
    for name, target, fitting in (
        ("hif4", "compressed-tensors", "msmodelslim"),
        ("mxfp4", "msmodelslim", "compressed-tensors"),
    ):
        with pytest.raises(UsageError, match=f"Use --to {fitting} or bf16"):
            export_pipeline(plain[name], read_layout(plain[name]).experts, tmp_path / "out", target)
