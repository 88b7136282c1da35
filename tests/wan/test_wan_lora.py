"""LoRAs that are merged into original models: what the options say, what a file may be, and the sums themselves."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import loras
import pytest
import torch
from safetensors.torch import save_file

from ptq.checkpoint.shards import ShardSet
from ptq.errors import PtqError, UsageError
from ptq.wan.layout import ModelLayout, read_layout
from ptq.wan.loading import load_pipeline
from ptq.wan.lora import choose_loras, recorded_loras
from ptq.wan.merge import MergedShards, merge_into


@pytest.fixture(scope="module")
def layout(random_pipelines) -> ModelLayout:
    """Two experts of two blocks, bf16."""
    return read_layout(random_pipelines["T2V-A14B"])


def test_layers_that_read_image_tokens(random_pipelines, tmp_path) -> None:
    """Models of one expert whose blocks have two Linears more; adapters for text-to-video leave these alone."""
    layout = read_layout(random_pipelines["I2V-14B"])
    linears = loras.block_linears(load_pipeline(layout.path).transformer)
    image = [name for name in linears if "add_" in name]
    assert len(linears) == 24 and len(image) == 4
    for names in (list(linears), [name for name in linears if name not in image]):
        pairs = loras.factors({name: linears[name] for name in names})
        file = loras.write(tmp_path / f"{len(names)}.safetensors", loras.original_names(pairs, alpha=2.0))
        shards = MergedShards(layout.path / "transformer", choose_loras(layout, str(file), None)["transformer"])
        assert sorted(shards.merged) == sorted(f"{name}.weight" for name in names)
        plain = ShardSet(layout.path / "transformer").read(f"{names[-1]}.weight").double()
        down, up = (factor.double() for factor in pairs[names[-1]])
        exact = plain + 0.5 * up @ down
        assert (shards.read(f"{names[-1]}.weight").double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.fixture(scope="module")
def linears(layout) -> dict[str, Any]:
    return loras.block_linears(load_pipeline(layout.path).transformer)


@pytest.fixture
def file(linears, tmp_path: Path) -> Path:
    return loras.write(tmp_path / "a.safetensors", loras.diffusers_names(loras.factors(linears)))


def peft_settings(linears: dict[str, Any], **settings: Any) -> dict[str, str]:
    """What PEFT writes beside the tensors."""
    values = {"r": 4, "target_modules": sorted(linears), **settings}
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in values.items()})}


CASES = ("diffusers", "original", "original, alpha", "two ranks", "bias", "settings of PEFT")


def case(name: str, linears: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    pairs = loras.factors(linears)
    if name.startswith("original"):
        return loras.original_names(pairs, 3.0 if "alpha" in name else None), None
    if name == "two ranks":
        pairs |= loras.factors(dict(list(linears.items())[:5]), rank=8, seed=1)
    tensors = loras.diffusers_names(pairs)
    if name == "bias":
        tensors |= {f"transformer.{n}.lora_B.bias": torch.randn(layer.out_features) for n, layer in linears.items()}
    settings = {"lora_alpha": 7, "use_rslora": True, "alpha_pattern": {"^blocks.0.attn1.to_q": 3}}
    return tensors, peft_settings(linears, **settings) if name == "settings of PEFT" else None


@pytest.mark.parametrize("name", CASES)
def test_the_merge_is_that_of_the_library(layout, linears, tmp_path, name: str) -> None:
    """As load_lora_weights and fuse_lora would merge, up to the order of rounding to bf16."""
    file = loras.write(tmp_path / "a.safetensors", *case(name, linears))
    ours = merge_into(load_pipeline(layout.path), layout, choose_loras(layout, None, f"{file}:0.7")).transformer_2
    theirs = load_pipeline(layout.path)
    theirs.load_lora_weights(file, adapter_name="x", load_into_transformer_2=True)
    theirs.fuse_lora(components=["transformer_2"], lora_scale=0.7)
    theirs.unload_lora_weights()
    plain = load_pipeline(layout.path).transformer_2.state_dict()
    wanted, changed = theirs.transformer_2.state_dict(), []
    for key, tensor in ours.state_dict().items():
        if not torch.equal(tensor, plain[key]):
            changed.append(key)
            assert (tensor - wanted[key]).abs().max() <= 2**-8 * wanted[key].abs().max(), key
        else:
            assert torch.equal(wanted[key], plain[key]), key
    assert len(changed) == len(linears) * (2 if name == "bias" else 1)


def test_the_sum_is_of_float32_in_the_stored_type(layout, linears, file) -> None:
    shards = MergedShards(layout.path / "transformer", choose_loras(layout, f"{file}:-0.5", None)["transformer"])
    plain = ShardSet(layout.path / "transformer")
    assert sorted(shards.merged) == sorted(f"{name}.weight" for name in linears)
    for name, (down, up) in loras.factors(linears).items():
        exact = plain.read(f"{name}.weight").double() - 0.5 * (up.double() @ down.double())
        merged = shards.read(f"{name}.weight")
        assert merged.dtype == torch.bfloat16
        assert (merged.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    for name in set(plain.entries) - set(shards.merged):
        assert torch.equal(plain.read(name), shards.read(name))


def test_one_expert_alone_is_said(layout, file, capsys) -> None:
    assert set(choose_loras(layout, str(file), None)) == {"transformer"}
    said = " ".join(capsys.readouterr().err.split())
    assert "transformer_2 runs without a LoRA" in said and "--lora-2" in said
    choose_loras(layout, None, str(file))
    assert "transformer runs without" in " ".join(capsys.readouterr().err.split())
    choose_loras(layout, str(file), str(file))
    assert choose_loras(layout, None, None) == {} and not capsys.readouterr().err


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf", "0", "10.5", "-11", "1e400", "strong", ""])
def test_strengths_that_cannot_be(layout, file, strength: str) -> None:
    with pytest.raises(UsageError, match=r"strength|no number") as refused:
        choose_loras(layout, f"{file}:{strength}", None)
    assert "\n" not in str(refused.value)


def test_a_file_whose_name_ends_like_a_strength(layout, file) -> None:
    odd = file.rename(file.with_name("a:0.5"))
    assert choose_loras(layout, str(odd), str(odd))["transformer"].strength == 1.0
    assert choose_loras(layout, f"{odd}:2", str(odd))["transformer"].strength == 2.0


def wrong_width(path: Path, linears: dict[str, Any]) -> None:
    pairs = {name: (torch.zeros(4, 2 * a.shape[1]), b) for name, (a, b) in loras.factors(linears).items()}
    loras.write(path, loras.diffusers_names(pairs))


def rank_0(path: Path, linears: dict[str, Any]) -> None:
    loras.write(path, loras.diffusers_names(loras.factors(linears, rank=0)))


def other_ranks(path: Path, linears: dict[str, Any]) -> None:
    pairs = {name: (a, torch.zeros(b.shape[0], 6)) for name, (a, b) in loras.factors(linears).items()}
    loras.write(path, loras.diffusers_names(pairs))


def other_layers(path: Path, linears: dict[str, Any]) -> None:
    pairs = {name.replace("blocks.1.", "blocks.7."): pair for name, pair in loras.factors(linears).items()}
    loras.write(path, loras.diffusers_names(pairs))


def long_bias(path: Path, linears: dict[str, Any]) -> None:
    tensors = loras.diffusers_names(loras.factors(linears))
    loras.write(path, tensors | {"transformer.blocks.0.attn1.to_q.lora_B.bias": torch.zeros(3)})


def no_lora(path: Path, linears: dict[str, Any]) -> None:
    save_file({"blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}, path)


def no_blocks(path: Path, linears: dict[str, Any]) -> None:
    save_file({"diffusion_model.head.head.lora_down.weight": torch.zeros(2, 2)}, path)


def empty(path: Path, linears: dict[str, Any]) -> None:
    save_file({}, path)


def half(path: Path, linears: dict[str, Any]) -> None:
    tensors = loras.diffusers_names(loras.factors(linears))
    loras.write(path, {name: tensor for name, tensor in tensors.items() if "lora_A" in name})


def not_finite(path: Path, linears: dict[str, Any]) -> None:
    tensors = loras.diffusers_names(loras.factors(linears))
    next(iter(tensors.values()))[0, 0] = torch.nan
    loras.write(path, tensors)


def dora(path: Path, linears: dict[str, Any]) -> None:
    tensors = loras.original_names(loras.factors(linears))
    loras.write(path, tensors | {"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(1)})


def pickled(path: Path, linears: dict[str, Any]) -> None:
    path.write_bytes(pickle.dumps(Trap()))


def zipped(path: Path, linears: dict[str, Any]) -> None:
    torch.save({"a": Trap()}, path)


def truncated(path: Path, linears: dict[str, Any]) -> None:
    loras.write(path, loras.diffusers_names(loras.factors(linears)))
    path.write_bytes(path.read_bytes()[:-100])


def text(path: Path, linears: dict[str, Any]) -> None:
    path.write_text("404: Not Found")


def pattern(path: Path, linears: dict[str, Any]) -> None:
    settings = peft_settings(linears, lora_alpha=4, alpha_pattern={"(a+)+$": 2})
    loras.write(path, loras.diffusers_names(loras.factors(linears)), settings)


def odd_alpha(path: Path, linears: dict[str, Any]) -> None:
    loras.write(path, loras.diffusers_names(loras.factors(linears)), peft_settings(linears, lora_alpha="4"))


class Trap:
    """Unpickling it leaves a file behind."""

    def __reduce__(self) -> Any:
        return os.system, ("touch opened",)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (wrong_width, r"does not fit .*/transformer: its factors of blocks\.0\.attn1\.to_. are .* the layer is"),
        (rank_0, "rank of at least 1"),
        (other_ranks, "one common rank"),
        (other_layers, r"changes blocks\.7\..*, which this model does not have"),
        (long_bias, "bias of blocks.0.attn1.to_q by .3. values"),
        (no_lora, "has no LoRA of a Wan transformer"),
        (no_blocks, "not a LoRA that diffusers can read"),
        (empty, "no LoRA tensors; found no tensor"),
        (half, r"expected lora_A\.weight and lora_B\.weight"),
        (not_finite, "NaN or infinite"),
        (dora, "is a DoRA"),
        (pickled, "pickle, which runs code"),
        (zipped, "pickle, which runs code"),
        (truncated, "truncated"),
        (text, "not a complete safetensors file"),
        (pattern, "alpha_pattern .* is an expression"),
        (odd_alpha, "alpha of .* expected a finite number"),
    ],
)
def test_files_that_are_refused(layout, linears, tmp_path, monkeypatch, make: Any, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "bad.safetensors", linears)
    with pytest.raises(PtqError, match=words) as refused:
        choose_loras(layout, "bad.safetensors", None)
    assert "\n" not in str(refused.value) and "bad.safetensors" in str(refused.value)
    assert not (tmp_path / "opened").exists()


def test_requests_that_are_refused(layout, packed, random_pipelines, file, tmp_path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        choose_loras(layout, str(tmp_path / "missing.safetensors"), None)
    with pytest.raises(UsageError, match="there is no file"):
        choose_loras(layout, str(tmp_path), None)
    with pytest.raises(UsageError, match=r"packed checkpoint.*load_lora_weights"):
        choose_loras(read_layout(packed["hif4"]), str(file), None)
    with pytest.raises(UsageError, match="one expert; leave out --lora-2"):
        choose_loras(read_layout(random_pipelines["TI2V-5B"]), None, str(file))


def test_changed_norms_are_said(layout, linears, tmp_path, capsys) -> None:
    tensors = loras.original_names(loras.factors(linears))
    for value, said in ((0.0, False), (1.0, True)):
        norm = {"diffusion_model.blocks.0.norm3.diff_b": torch.full((4,), value)}
        file = loras.write(tmp_path / f"{value}.safetensors", tensors | norm)
        choose_loras(layout, str(file), str(file))
        assert ("also changes 1 norms" in " ".join(capsys.readouterr().err.split())) == said


def test_where_the_file_of_records_is_looked_for(layout, file, tmp_path) -> None:
    chosen = choose_loras(layout, str(file), None)
    records = tmp_path / "records"
    records.mkdir()
    assert recorded_loras(records, chosen)["transformer"].path == str(file)
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(PtqError, match=r"a\.safetensors is not there. Put the file back, or into"):
        recorded_loras(records, chosen)
    (records / "a.safetensors").write_bytes(content)
    assert recorded_loras(records, chosen)["transformer"].path == str(records / "a.safetensors")
    (records / "a.safetensors").write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(PtqError, match="is not the LoRA that"):
        recorded_loras(records, chosen)
