"""Loading packed checkpoints through diffusers: the five traps of the format, sharding, saving again, fresh processes."""

from __future__ import annotations

import copy
import enum
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import ptq
from ptq.checkpoint.diffusers_quantizer import PtqConfig, PtqMethod, PtqQuantizer
from ptq.checkpoint.shards import ShardSet
from ptq.errors import DamagedFileError, PtqError
from ptq.runtime import QuantLinear
from ptq.store.files import sha256_file

BOTH = pytest.mark.parametrize("format_name", ["hif4", "mxfp4"])


def load_transformer(checkpoint: Path, dtype: torch.dtype = torch.float32, **kwargs) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(checkpoint / "transformer", dtype=dtype, **kwargs)


def quant_config(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "transformer" / "config.json").read_text())["quantization_config"]


def set_quant_config(checkpoint: Path, **changes) -> None:
    path = checkpoint / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(changes)
    path.write_text(json.dumps(config))


# Trap 1: diffusers calls `.value` on the method and compares it with strings.


def test_method_is_a_string_enum() -> None:
    assert issubclass(PtqMethod, str) and issubclass(PtqMethod, enum.Enum)
    assert PtqMethod.PTQ.value == "ptq" == PtqMethod.PTQ
    assert AUTO_QUANTIZER_MAPPING["ptq"] is PtqQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["ptq"] is PtqConfig


# Trap 2: modules that Wan keeps in float32 stay so when the rest is loaded in bf16.


def test_float32_modules_stay_float32_in_a_bf16_load(packed: dict[str, Path]) -> None:
    model = load_transformer(packed["hif4"], torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    kept = [n for n in dtypes if "time_embedder" in n or "scale_shift_table" in n or ".norm2." in n]
    assert len(kept) >= 4 + 3
    assert {dtypes[name] for name in kept} == {torch.float32}
    assert dtypes["proj_out.weight"] == torch.bfloat16
    assert dtypes["blocks.0.attn1.to_q.weight_packed"] == torch.uint8
    assert dtypes["blocks.0.attn1.to_q.weight_scale"] == torch.int32
    assert dtypes["blocks.0.attn1.to_q.smooth"] == torch.bfloat16


# Trap 3: what diffusers only warns about is an error.


def rewrite(checkpoint: Path, change) -> None:
    """Apply `change` to the tensors of the transformer and write them as one shard, index included."""
    directory = checkpoint / "transformer"
    shards = ShardSet(directory)
    tensors = {name: shards.read(name) for name in shards.entries}
    change(tensors)
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    from safetensors.torch import save_file

    save_file(tensors, directory / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def test_missing_tensor_is_an_error(packed: dict[str, Path], copy_of) -> None:
    checkpoint = copy_of(packed["hif4"])
    rewrite(checkpoint, lambda tensors: tensors.pop("blocks.1.ffn.net.2.weight_scale"))
    with pytest.raises(DamagedFileError, match=r"lacks tensor blocks\.1\.ffn\.net\.2\.weight_scale"):
        load_transformer(checkpoint)


def test_unexpected_tensor_is_an_error(packed: dict[str, Path], copy_of) -> None:
    checkpoint = copy_of(packed["hif4"])
    rewrite(checkpoint, lambda tensors: tensors.update({"blocks.0.attn1.to_q.extra": torch.zeros(3)}))
    with pytest.raises(DamagedFileError, match=r"holds tensor blocks\.0\.attn1\.to_q\.extra"):
        load_transformer(checkpoint)


def test_tensor_of_another_shape_or_dtype_is_an_error(packed: dict[str, Path], copy_of) -> None:
    checkpoint = copy_of(packed["hif4"])
    name = "blocks.0.attn2.to_k.weight_packed"
    rewrite(checkpoint, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    with pytest.raises(DamagedFileError, match=r"diffusion_pytorch_model\.safetensors: tensor blocks\.0\.attn2\.to_k"):
        load_transformer(checkpoint)
    rewrite(checkpoint, lambda tensors: tensors.update({name: tensors[name].T.contiguous().view(torch.int8)}))
    with pytest.raises(DamagedFileError, match=r"blocks\.0\.attn2\.to_k\.weight_packed is I8"):
        load_transformer(checkpoint)


def test_remaining_meta_tensor_is_an_error(packed: dict[str, Path]) -> None:
    model = load_transformer(packed["hif4"])
    quantizer = PtqQuantizer(PtqConfig(**quant_config(packed["hif4"])))
    quantizer.postprocess_model(copy.deepcopy(model))
    model.blocks[0].attn1.to_q.weight_packed = torch.nn.Parameter(
        torch.empty(128, 64, dtype=torch.uint8, device="meta"), requires_grad=False
    )
    with pytest.raises(DamagedFileError, match=r"blocks\.0\.attn1\.to_q\.weight_packed was not loaded"):
        quantizer.postprocess_model(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2"),
        ({"format_version": None}, "format_version None"),
        ({"surprise": 1}, "surprise"),
        ({"format": "nvfp4"}, "format"),
    ],
)
def test_configuration_of_another_version_is_an_error(packed, copy_of, changes: dict, message: str) -> None:
    checkpoint = copy_of(packed["mxfp4"])
    set_quant_config(checkpoint, **changes)
    with pytest.raises(PtqError, match=message):
        load_transformer(checkpoint)


# Trap 4: printing and saving the configuration.


def test_configuration_can_be_printed_and_saved(packed: dict[str, Path], tmp_path: Path) -> None:
    model = load_transformer(packed["hif4"])
    expected = quant_config(packed["hif4"])
    config = model.config["quantization_config"]
    assert json.loads(config.to_json_string()) == expected  # calls to_diff_dict
    assert "hif4" in repr(config) and "hif4" in repr(model.config)
    model.save_config(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == expected


# Trap 5, and one import: fresh processes.


def in_fresh_process(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_loading_without_the_package_fails_loudly(packed: dict[str, Path]) -> None:
    code = "import sys\nfrom diffusers import WanTransformer3DModel\nWanTransformer3DModel.from_pretrained(sys.argv[1])"
    result = in_fresh_process(code, packed["hif4"] / "transformer")
    assert result.returncode != 0
    assert "Unknown quantization type" in result.stderr


def test_two_experts_in_a_fresh_process_with_one_import(packed: dict[str, Path], tmp_path: Path, generate) -> None:
    """diffusers is imported first, `import ptq` afterwards; the latents are those of this process, bit for bit."""
    code = (
        "import sys\nfrom diffusers import WanPipeline\nimport ptq\n"
        "p = WanPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "sys.path.insert(0, sys.argv[3])\nfrom conftest import GENERATE\nfrom safetensors.torch import save_file\n"
        "latents = p(**GENERATE, generator=torch.Generator().manual_seed(0)).frames\n"
        "save_file({'latents': latents}, sys.argv[2])"
    )
    result = in_fresh_process(code, packed["hif4"], tmp_path / "latents.safetensors", Path(__file__).parents[1])
    assert result.returncode == 0, result.stderr
    from safetensors.torch import load_file

    fresh = load_file(tmp_path / "latents.safetensors")["latents"]
    here = generate(ptq.load_pipeline(packed["hif4"]))
    assert torch.isfinite(here).all() and here.std() > 0.1
    assert torch.equal(fresh, here)


# Pipelines.


@BOTH
def test_both_ways_of_loading_give_the_same_pipeline(packed: dict[str, Path], format_name: str, generate) -> None:
    checkpoint = packed[format_name]
    ours = ptq.load_pipeline(checkpoint)
    theirs = WanPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    assert (ours.transformer_2 is None) == (format_name == "mxfp4")
    assert len(list((checkpoint / "transformer").glob("*.safetensors"))) > 2
    quantized = [name for name, m in ours.transformer.named_modules() if isinstance(m, QuantLinear)]
    assert len(quantized) == (20 if format_name == "hif4" else 10)
    assert torch.equal(generate(ours), generate(theirs))


def test_packed_checkpoint_differs_from_the_original_but_not_much(packed, random_pipelines, generate) -> None:
    original = generate(ptq.load_pipeline(random_pipelines["T2V-A14B"]))
    quantized = generate(ptq.load_pipeline(packed["hif4"]))
    error = ((original - quantized).norm() / original.norm()).item()
    assert 1e-4 < error < 0.2, error


def test_device_map(packed: dict[str, Path]) -> None:
    mapped, plain = load_transformer(packed["hif4"], device_map={"": "cpu"}), load_transformer(packed["hif4"])
    assert mapped.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(mapped.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_again_changes_no_byte(packed, tmp_path: Path, format_name: str, dtype: torch.dtype) -> None:
    source = packed[format_name] / "transformer"
    load_transformer(packed[format_name], dtype).save_pretrained(tmp_path, max_shard_size=120_000)
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert files == sorted(path.name for path in tmp_path.glob("*.safetensors")) and len(files) > 2
    assert [sha256_file(source / name) for name in files] == [sha256_file(tmp_path / name) for name in files]
    again, first = ShardSet(tmp_path), load_transformer(packed[format_name])
    assert {name: entry.file.name for name, entry in again.entries.items()} == {
        name: entry.file.name for name, entry in ShardSet(source).entries.items()
    }
    second = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.state_dict().items())


# Damage.


def some_shard(checkpoint: Path) -> Path:
    return sorted((checkpoint / "transformer").glob("*.safetensors"))[1]


def test_truncated_shard_is_refused(packed: dict[str, Path], copy_of) -> None:
    checkpoint = copy_of(packed["hif4"])
    shard = some_shard(checkpoint)
    last = max(ShardSet(checkpoint / "transformer").entries.values(), key=lambda e: (e.file == shard, e.start)).name
    shard.write_bytes(shard.read_bytes()[:-1])
    for load in (load_transformer, ptq.load_pipeline):
        with pytest.raises(DamagedFileError, match="truncated") as caught:
            load(checkpoint)
        assert shard.name in str(caught.value) and last in str(caught.value)


def test_edited_byte_is_refused(packed: dict[str, Path], copy_of) -> None:
    checkpoint = copy_of(packed["hif4"])
    entry = ShardSet(checkpoint / "transformer").entries["blocks.1.attn1.to_k.weight_packed"]
    shard = entry.file
    data = bytearray(shard.read_bytes())
    data[entry.start + entry.nbytes // 2] ^= 0x10
    shard.write_bytes(data)
    for load in (load_transformer, ptq.load_pipeline):
        with pytest.raises(DamagedFileError, match="checksum") as caught:
            load(checkpoint)
        assert shard.name in str(caught.value) and entry.name in str(caught.value)


def test_missing_shard_is_refused(packed: dict[str, Path], copy_of) -> None:
    checkpoint = copy_of(packed["hif4"])
    some_shard(checkpoint).unlink()
    with pytest.raises(PtqError, match=some_shard(packed["hif4"]).name):
        ptq.load_pipeline(checkpoint)
