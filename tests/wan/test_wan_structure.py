"""Names, shapes and layouts of the three Wan variants, read from files, against the real diffusers classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from torch import nn

import ptq
from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.wan.loading import resolve_model
from ptq.wan.random_model import make_random_pipeline
from ptq.wan.replay import input_modules
from ptq.wan.structure import INPUTS, LINEARS, read_layout

VARIANTS = {
    "T2V-A14B": (WanPipeline, ["transformer", "transformer_2"], 16, 16, 0.875),
    "I2V-A14B": (WanImageToVideoPipeline, ["transformer", "transformer_2"], 36, 16, 0.9),
    "TI2V-5B": (WanPipeline, ["transformer"], 48, 48, None),
}
BY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


@BY_VARIANT
def test_layout_agrees_with_the_loaded_pipeline(random_pipelines: dict[str, Path], variant: str) -> None:
    pipeline_class, experts, channels_in, channels_out, boundary = VARIANTS[variant]
    layout = read_layout(random_pipelines[variant])
    pipeline = ptq.load_pipeline(random_pipelines[variant])
    assert type(pipeline) is pipeline_class and layout.pipeline_class == pipeline_class.__name__
    assert list(layout.experts) == experts and layout.boundary_ratio == boundary == pipeline.config.boundary_ratio
    assert layout.preset.variant == variant and not layout.is_packed
    assert pipeline.config.expand_timesteps == (variant == "TI2V-5B")
    for expert in experts:
        model = getattr(pipeline, expert)
        assert (model.config.in_channels, model.config.out_channels) == (channels_in, channels_out)
        assert layout.num_blocks(expert) == len(model.blocks) == 2
        for block in model.blocks:
            linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
            assert set(linears) == set(LINEARS) and len(LINEARS) == 10
            shapes = {name: tuple(module.weight.shape) for name, module in linears.items()}
            assert shapes == layout.linear_shapes(expert)
    assert (getattr(pipeline, "transformer_2", None) is None) == (len(experts) == 1)


@BY_VARIANT
def test_seven_inputs_are_what_the_ten_linears_read(random_pipelines: dict[str, Path], variant: str) -> None:
    """Run a real model and group its Linears by the tensor that they receive."""
    model = ptq.load_pipeline(random_pipelines[variant]).transformer
    received: dict[str, list[tuple[int, str]]] = {"0": [], "1": []}
    keep: list[torch.Tensor] = []

    def record(block: str, name: str):
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            keep.append(inputs[0])  # so that no address is used twice
            received[block].append((inputs[0].data_ptr(), name))

        return hook

    for index, block in enumerate(model.blocks):
        for name in LINEARS:
            block.get_submodule(name).register_forward_pre_hook(record(str(index), name))
    with torch.no_grad():
        model(torch.randn(1, model.config.in_channels, 3, 4, 4), torch.tensor([500.0]), torch.randn(1, 6, 64))
    pointers = {}
    for block, found in received.items():
        groups: dict[int, list[str]] = {}
        for pointer, name in found:
            groups.setdefault(pointer, []).append(name)
        assert sorted(map(sorted, groups.values())) == sorted(sorted(names) for names in INPUTS.values())
        pointers[block] = next(pointer for pointer, names in groups.items() if "attn2.to_k" in names)
        assert input_modules(model.blocks[int(block)]).keys() == INPUTS.keys()
    assert pointers["0"] == pointers["1"]  # the text context is one tensor for all blocks


@BY_VARIANT
def test_preset_of_the_directory_wins_over_the_installed_one(random_pipelines, copy_of, variant: str) -> None:
    directory = copy_of(random_pipelines[variant])
    assert read_layout(directory).preset.height == 64
    (directory / "ptq_preset.json").unlink()
    preset = read_layout(directory).preset
    assert preset.variant == variant and preset.height > 400


def test_packed_checkpoint_is_recognised(packed: dict[str, Path]) -> None:
    assert all(read_layout(path).is_packed for path in packed.values())


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_directories_that_are_no_wan_pipeline(random_pipelines, copy_of, tmp_path: Path) -> None:
    with pytest.raises(PtqError, match=r"no model_index\.json"):
        read_layout(tmp_path)
    directory = copy_of(random_pipelines["TI2V-5B"])
    edit(directory / "transformer" / "config.json", _class_name="FluxTransformer2DModel")
    with pytest.raises(PtqError, match=r"is a FluxTransformer2DModel; expected a WanTransformer3DModel"):
        read_layout(directory)
    (directory / "transformer" / "config.json").unlink()
    with pytest.raises(PtqError, match=r"transformer/config\.json does not exist"):
        read_layout(directory)
    edit(directory / "model_index.json", transformer=[None, None])
    with pytest.raises(PtqError, match="lists no transformer"):
        read_layout(directory)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "ptq_preset.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_damaged_json_is_named(random_pipelines, copy_of, file: str, content: str) -> None:
    directory = copy_of(random_pipelines["TI2V-5B"])
    (directory / file).write_text(content)
    with pytest.raises(PtqError) as caught:
        read_layout(directory)
    assert file.split("/")[0] in str(caught.value)
    if content != "{}" and file != "ptq_preset.json":
        assert isinstance(caught.value, DamagedFileError)


@pytest.mark.parametrize("model", ["tinny", "./nowhere", "/no/where", "a/b/c"])
def test_unknown_model_names(model: str) -> None:
    with pytest.raises(UsageError, match="There is no model"):
        resolve_model(model)


def test_random_pipelines_are_deterministic_and_refuse_to_overwrite(random_pipelines, tmp_path: Path) -> None:
    from ptq.checkpoint.manifest import hash_files

    again = make_random_pipeline(tmp_path / "again", "TI2V-5B", max_shard_bytes=600_000)
    assert hash_files(again) == hash_files(random_pipelines["TI2V-5B"])
    other = make_random_pipeline(tmp_path / "other", "TI2V-5B", seed=1, max_shard_bytes=600_000)
    assert hash_files(other) != hash_files(again)
    with pytest.raises(UsageError, match="exists already"):
        make_random_pipeline(again, "TI2V-5B")
    with pytest.raises(UsageError, match="multiple of 64"):
        make_random_pipeline(tmp_path / "odd", "TI2V-5B", width=100)
    assert not (tmp_path / "odd").exists()
