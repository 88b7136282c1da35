"""Names, shapes and layouts of every variant, read from files, against the real diffusers classes; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from random_model import make_random_pipeline
from torch import nn

import ptq
from ptq.checkpoint.shards import ShardSet
from ptq.errors import DamagedFileError, PtqError, UsageError
from ptq.quantization.shared_inputs import find_shared_inputs
from ptq.store.calibration import DenoiserCall
from ptq.wan.layout import read_layout
from ptq.wan.loading import PIPELINE_FILES, resolve_model
from ptq.wan.replay import ExpertReplay, run_block
from ptq.wan.variants import VARIANTS, recognise

EXPECTED = {
    "T2V-A14B": (WanPipeline, ["transformer", "transformer_2"], 16, 16, 0.875),
    "I2V-A14B": (WanImageToVideoPipeline, ["transformer", "transformer_2"], 36, 16, 0.9),
    "TI2V-5B": (WanPipeline, ["transformer"], 48, 48, None),
    "T2V-1.3B": (WanPipeline, ["transformer"], 16, 16, None),
    "T2V-14B": (WanPipeline, ["transformer"], 16, 16, None),
    "I2V-14B": (WanImageToVideoPipeline, ["transformer"], 36, 16, None),
}
BY_VARIANT = pytest.mark.parametrize("variant", EXPECTED)


@BY_VARIANT
def test_layout_agrees_with_the_loaded_pipeline(random_pipelines: dict[str, Path], variant: str) -> None:
    pipeline_class, experts, channels_in, channels_out, boundary = EXPECTED[variant]
    layout = read_layout(random_pipelines[variant])
    pipeline = ptq.load_pipeline(random_pipelines[variant])
    assert type(pipeline) is pipeline_class and layout.pipeline_class == pipeline_class.__name__
    assert list(layout.experts) == experts and layout.boundary_ratio == boundary == pipeline.config.boundary_ratio
    assert layout.preset.variant == variant == layout.variant.name and not layout.is_packed
    assert pipeline.config.expand_timesteps == (variant == "TI2V-5B")
    for expert in experts:
        model = getattr(pipeline, expert)
        assert (model.config.in_channels, model.config.out_channels) == (channels_in, channels_out)
        assert layout.num_blocks(expert) == len(model.blocks) == 2
        for block in model.blocks:
            linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
            shapes = {name: tuple(module.weight.shape) for name, module in linears.items()}
            assert shapes == layout.linear_shapes(expert) and len(shapes) == (12 if variant == "I2V-14B" else 10)
    assert (getattr(pipeline, "transformer_2", None) is None) == (len(experts) == 1)


@BY_VARIANT
def test_the_distinct_inputs_are_what_the_linears_read(random_pipelines: dict[str, Path], variant: str) -> None:
    """Run a real block and group its Linears, in the order of their calls, by the tensor that they receive."""
    layout = read_layout(random_pipelines[variant])
    config = layout.experts["transformer"]
    replay = ExpertReplay(ShardSet(layout.path / "transformer"), config)
    block = replay.load_block(0)
    image = torch.randn(1, 5, 32) if variant == "I2V-14B" else None
    text = torch.randn(1, 6 if image is None else 512, 64)
    call = DenoiserCall(torch.randn(1, config["in_channels"], 3, 4, 4), torch.tensor([500.0]), text, image)
    hidden, context = replay.head("call", call)
    linears = {name: block.get_submodule(name) for name in layout.linear_shapes("transformer")}
    groups, unreached = find_shared_inputs(linears, lambda: run_block(block, hidden, context))
    expected = [item.linears for item in layout.block_inputs("transformer").values()]
    assert [group.names for group in groups] == expected and not unreached


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


@BY_VARIANT
def test_recognised_by_structure_alone(random_pipelines, copy_of, variant: str, capsys) -> None:
    """Without a preset of its own; what tells T2V-1.3B and T2V-14B apart is only the width."""
    directory = copy_of(random_pipelines[variant])
    assert read_layout(directory).preset.height == 64
    (directory / "ptq_preset.json").unlink()
    found = read_layout(directory)
    assert found.preset.height > 400 and found.preset.variant == found.variant.name
    assert found.variant.name == ("T2V-1.3B" if variant == "T2V-14B" else variant)  # 128 is nearer to 1536
    assert found.variant.experts == tuple(found.experts)
    assert "but another size" in capsys.readouterr().err


@BY_VARIANT
def test_released_sizes_are_recognised(variant: str) -> None:
    kind = VARIANTS[variant]
    assert all(recognise(structure, kind.heads * kind.head_dim) is kind for structure in kind.structures)


def test_a_5b_directory_may_name_the_image_pipeline(random_pipelines, copy_of) -> None:
    directory = copy_of(random_pipelines["TI2V-5B"])
    edit(directory / "model_index.json", _class_name="WanImageToVideoPipeline")
    layout = read_layout(directory)
    assert layout.variant.name == "TI2V-5B" and layout.needs_image


@pytest.mark.parametrize(
    ("variant", "index", "config", "found"),
    [
        ("T2V-14B", {}, {"in_channels": 48}, "channels: 48 in, 16 out"),
        ("T2V-14B", {"_class_name": "WanImageToVideoPipeline"}, {}, "WanImageToVideoPipeline, 1 expert"),
        ("I2V-14B", {}, {"image_dim": None}, "context: only one of added_kv_proj_dim and image_dim"),
        ("I2V-14B", {}, {"image_dim": None, "added_kv_proj_dim": None}, "noise, mask and image, context: text"),
    ],
)
def test_unknown_structures_are_refused_with_what_was_found(
    random_pipelines, copy_of, variant: str, index: dict, config: dict, found: str
) -> None:
    directory = copy_of(random_pipelines[variant])
    edit(directory / "model_index.json", **index)
    edit(directory / "transformer" / "config.json", **config)
    with pytest.raises(PtqError, match="none of the variants that are known") as caught:
        read_layout(directory)
    assert found in str(caught.value) and "Wan 2.1 (T2V-1.3B, T2V-14B, I2V-14B)" in str(caught.value)


@pytest.mark.parametrize(
    ("variant", "index", "found"),
    [
        ("T2V-14B", {"boundary_ratio": 0.9}, '"boundary_ratio": 0.9, but names one expert'),
        ("T2V-A14B", {"boundary_ratio": None}, '"boundary_ratio": null, but names two experts'),
        ("T2V-A14B", {"transformer": [None, None]}, "names transformer_2 but no transformer"),
        ("T2V-A14B", {"transformer_2": [None, None], "boundary_ratio": None}, '"transformer_2": null, but'),
        *(("T2V-A14B", {"boundary_ratio": odd}, "boundary_ratio: ") for odd in (0, 1, -1.0, 1e9, "0.9", True)),
        ("T2V-A14B", {"boundary_ratio": float("nan")}, "NaN is not a finite number"),
    ],
)
def test_the_index_contradicts_itself_or_the_directory(random_pipelines, copy_of, variant, index, found) -> None:
    directory = copy_of(random_pipelines[variant])
    edit(directory / "model_index.json", **index)
    with pytest.raises(PtqError) as caught:
        read_layout(directory)
    assert found in str(caught.value) and "model_index.json" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "epsilon"),
        ("use_flow_sigmas", False),
        ("use_dynamic_shifting", True),
        ("flow_shift", None),
        ("NaN", float("nan")),
        ("flow_shift", -3.0),
        ("num_train_timesteps", "1000"),
    ],
)
def test_schedulers_that_wan_cannot_use(random_pipelines, copy_of, key: str, value: object) -> None:
    directory = copy_of(random_pipelines["TI2V-5B"])
    edit(directory / "scheduler" / "scheduler_config.json", **{key: value})
    with pytest.raises(PtqError, match=rf"scheduler_config\.json .*{key}"):
        read_layout(directory)


def test_a_flow_matching_scheduler_needs_no_prediction_type(random_pipelines, copy_of) -> None:
    directory = copy_of(random_pipelines["TI2V-5B"])
    edit(directory / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    (directory / "scheduler" / "scheduler_config.json").write_text('{"shift": 5.0, "num_train_timesteps": 1000}')
    assert resolve_model(str(directory)).variant.name == "TI2V-5B"


@pytest.mark.parametrize(("key", "value"), [("num_layers", 3), ("ffn_dim", 320), ("text_dim", 32), ("eps", 1e-5)])
def test_experts_of_two_structures(random_pipelines, copy_of, key: str, value: float) -> None:
    directory = copy_of(random_pipelines["T2V-A14B"])
    edit(directory / "transformer_2" / "config.json", **{key: value})
    with pytest.raises(PtqError, match=f'transformer_2/config.json has "{key}": {value}.* not of one model'):
        read_layout(directory)


def test_a_preset_of_another_size_is_refused_where_the_size_is_a_released_one(random_pipelines, copy_of) -> None:
    directory = copy_of(random_pipelines["T2V-14B"])
    size = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
    edit(directory / "transformer" / "config.json", **size)
    with pytest.raises(PtqError, match=r'"variant": "T2V-14B", but .* the size of Wan 2\.1 T2V-1\.3B'):
        read_layout(directory)
    edit(directory / "ptq_preset.json", variant="T2V-1.3B", guidance_scale_2=3.0)
    with pytest.raises(PtqError, match=r'ptq_preset\.json has "guidance_scale_2": 3, but the model has one expert'):
        read_layout(directory)


def test_an_option_is_blamed_only_where_it_was_given(random_pipelines, copy_of) -> None:
    directory = copy_of(random_pipelines["I2V-14B"])
    with pytest.raises(UsageError, match="leave out --max-sequence-length"):
        read_layout(directory).resolve_preset(max_sequence_length=64)
    edit(directory / "ptq_preset.json", max_sequence_length=64)
    with pytest.raises(UsageError, match=r"correct max_sequence_length in .*ptq_preset\.json") as caught:
        read_layout(directory).resolve_preset()
    assert "--" not in str(caught.value)


def test_a_preset_of_another_variant_is_refused(random_pipelines, copy_of) -> None:
    """What an earlier version wrote into checkpoints of Wan 2.1, which it took for T2V-A14B."""
    directory = copy_of(random_pipelines["T2V-14B"])
    edit(directory / "ptq_preset.json", variant="T2V-A14B")
    with pytest.raises(PtqError, match=r"ptq_preset\.json says .*T2V-A14B.*has to be quantized again"):
        read_layout(directory)


@pytest.mark.parametrize(
    ("index", "config", "relative"),
    [
        ({"_class_name": "WanVACEPipeline"}, {}, "Wan VACE"),
        ({"_class_name": "WanAnimatePipeline"}, {}, "Wan Animate"),
        ({}, {"_class_name": "WanVACETransformer3DModel"}, "Wan VACE"),
        ({}, {"_class_name": "WanAnimateTransformer3DModel"}, "Wan Animate"),
        ({}, {"_class_name": "WanS2VTransformer3DModel"}, "Wan S2V"),
        ({}, {"vace_layers": [0, 5]}, "Wan VACE"),
        ({}, {"pos_embed_seq_len": 514}, "Wan FLF2V"),
    ],
)
def test_relatives_are_refused_by_name_before_weights_are_read(
    random_pipelines, copy_of, index: dict, config: dict, relative: str
) -> None:
    directory = copy_of(random_pipelines["T2V-A14B"])
    for file in directory.glob("transformer*/*.safetensors"):
        file.write_bytes(b"never read")
    edit(directory / "model_index.json", **index)
    edit(directory / "transformer_2" / "config.json", **config)
    with pytest.raises(PtqError, match=f"is a {relative} model") as caught:
        resolve_model(str(directory))
    assert "Supported are diffusers pipelines" in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_pipelines_are_refused_by_class(random_pipelines, copy_of) -> None:
    directory = copy_of(random_pipelines["T2V-14B"])
    edit(directory / "model_index.json", _class_name="SkyReelsV2Pipeline")
    with pytest.raises(PtqError, match=r"names the pipeline SkyReelsV2Pipeline\. Supported are"):
        read_layout(directory)


def test_a_hub_model_is_refused_before_its_weights_are_fetched(random_pipelines, copy_of, monkeypatch) -> None:
    import huggingface_hub

    directory, asked = copy_of(random_pipelines["T2V-14B"]), []

    def snapshot(model: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        asked.append(allow_patterns)
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert resolve_model("Wan-AI/Wan2.1-T2V-14B-Diffusers").variant.name == "T2V-14B"
    assert asked == [["*.json"], PIPELINE_FILES] and not any("bin" in part for part in PIPELINE_FILES)
    edit(directory / "model_index.json", _class_name="WanVACEPipeline")
    with pytest.raises(PtqError, match="Wan VACE"):
        resolve_model("Wan-AI/Wan2.1-VACE-14B-diffusers")
    assert asked[2:] == [["*.json"]]


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
