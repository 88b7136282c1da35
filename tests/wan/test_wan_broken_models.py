"""Models as people really have them, by every way in: refused in one paragraph that names what is wrong, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import ptq
from ptq.cli.main import app
from ptq.errors import PtqError
from ptq.tiny import assets_dir
from ptq.wan.loading import load_pipeline, resolve_model

EXPERTS = ("transformer", "transformer_2")


class Broken(NamedTuple):
    """What is done to a copy of `tiny`, and what the refusal says."""

    change: Callable[[Path], Any]
    says: tuple[str, ...]


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file; a value of ... removes its key."""

    def change(model: Path) -> None:
        value = json.loads((model / file).read_text()) | changes
        (model / file).write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))

    return change


def replace(file: str, text: str) -> Callable[[Path], Any]:
    return lambda model: (model / file).write_text(text)


def remove(name: str) -> Callable[[Path], Any]:
    return lambda model: shutil.rmtree(model / name) if (model / name).is_dir() else (model / name).unlink()


def weights(component: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors of a component, which become one file without index."""

    def apply(model: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted((model / component).glob("*.safetensors")):
            tensors |= load_file(file)
        for file in (model / component).glob("*.safetensors*"):
            file.unlink()
        changed = change(tensors)
        name = "model.safetensors" if component == "text_encoder" else "diffusion_pytorch_model.safetensors"
        save_file(tensors if changed is None else changed, model / component / name, {"format": "pt"})

    return apply


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


def each(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        for change in changes:
            change(model)

    return apply


def with_scales(tensors: dict[str, torch.Tensor]) -> None:
    """F8_E4M3 weights with one scale a Linear."""
    for name in [n for n, t in tensors.items() if n.startswith("blocks.") and n.endswith(".weight") and t.dim() == 2]:
        scale = tensors[name].float().abs().max() / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale.reshape(1)


def header(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda model: (model / file).write_bytes(change((model / file).read_bytes()))


def quantized_by(method: str) -> Callable[[Path], Any]:
    return each(*(edit(f"{expert}/config.json", quantization_config={"quant_method": method}) for expert in EXPERTS))


def marked(name: str, component: str = "transformer") -> Callable[[Path], None]:
    return weights(component, lambda tensors: tensors.update({name: torch.ones(1)}))


BROKEN = {
    "encoder-prefixed": Broken(
        weights("text_encoder", lambda tensors: {f"text_encoder.{name}": t for name, t in tensors.items()}),
        ("text_encoder", "23 of the 23", "text_encoder.encoder.block.0"),
    ),
    "encoder-incomplete": Broken(
        weights("text_encoder", drop("encoder.final_layer_norm.weight")),
        ("text_encoder lacks tensor encoder.final_layer_norm.weight",),
    ),
    "encoder-without-embedding": Broken(
        weights("text_encoder", drop("shared.weight")),
        ("text_encoder lacks tensor encoder.embed_tokens.weight",),
    ),
    "encoder-layers": Broken(edit("text_encoder/config.json", num_layers=1), ("text_encoder holds tensor",)),
    "encoder-shape": Broken(
        edit("text_encoder/config.json", d_ff=128), ("text_encoder: tensor", "asks for [128, 128]")
    ),
    "encoder-config": Broken(
        edit("text_encoder/config.json", d_kv="wide"), ("text_encoder/config.json does not describe",)
    ),
    "encoder-of-another-model": Broken(
        edit("text_encoder/config.json", d_model=64), ("text_encoder: tensor", "not of one model")
    ),
    "encoder-scaled-fp8": Broken(marked("scaled_fp8", "text_encoder"), ("text_encoder was quantized by an fp8 tool",)),
    "encoder-pickle": Broken(
        lambda model: (model / "text_encoder/model.safetensors").rename(model / "text_encoder/pytorch_model.bin"),
        ("text_encoder has neither", "never opened"),
    ),
    "vae-missing": Broken(remove("vae"), ("model_index.json names vae", "does not exist")),
    "vae-incomplete": Broken(weights("vae", drop("post_quant_conv.weight")), ("vae lacks tensor",)),
    "vae-class": Broken(edit("model_index.json", vae=["diffusers", "AutoencoderKL"]), ("expected AutoencoderKLWan",)),
    "vae-latents": Broken(edit("vae/config.json", z_dim="16"), ("vae/config.json", "z_dim")),
    "tokenizer-empty": Broken(
        each(remove("tokenizer"), lambda model: (model / "tokenizer").mkdir()), ("tokenizer has none of",)
    ),
    "tokenizer-unnamed": Broken(edit("model_index.json", tokenizer=...), ("model_index.json", "tokenizer")),
    "encoder-class": Broken(
        edit("model_index.json", text_encoder=["transformers", "NoSuchEncoder"]), ("NoSuchEncoder", "does not have")
    ),
    "scheduler-epsilon": Broken(
        edit("scheduler/scheduler_config.json", prediction_type="epsilon"), ("prediction_type = 'epsilon'",)
    ),
    "expert-fp8-scaled": Broken(
        each(*(weights(expert, with_scales) for expert in EXPERTS)),
        ("transformer was quantized by an fp8 tool", ".weight_scale", "Pass the unquantized model", "transformer_2"),
    ),
    "expert-fp8-cast": Broken(
        weights("transformer_2", lambda tensors: {n: t.to(torch.float8_e5m2) for n, t in tensors.items()}),
        ("transformer_2 was quantized by a cast to F8_E5M2",),
    ),
    "expert-int8": Broken(
        weights("transformer", lambda tensors: {n: t.to(torch.int8) for n, t in tensors.items()}),
        ("is I8", "F32, F16, BF16"),
    ),
    "fewer-layers": Broken(
        each(*(edit(f"{expert}/config.json", num_layers=4) for expert in EXPERTS)),
        ("num_layers = 4", "weights hold 6 blocks"),
    ),
    "more-layers": Broken(
        each(*(edit(f"{expert}/config.json", num_layers=8) for expert in EXPERTS)),
        ("num_layers = 8", "weights hold 6 blocks"),
    ),
    "endless-layers": Broken(
        edit("transformer/config.json", num_layers=10**9), ("transformer/config.json", "num_layers")
    ),
    "expert-shape": Broken(
        each(*(edit(f"{expert}/config.json", ffn_dim=448) for expert in EXPERTS)),
        ("blocks.0.ffn.net.0.proj.weight", "[448, 192]"),
    ),
    "expert-renamed": Broken(
        weights("transformer_2", lambda tensors: {f"model.{n}": t for n, t in tensors.items()}),
        ("transformer_2 lacks tensor", "holds tensor model."),
    ),
    "expert-truncated": Broken(
        lambda model: [f.write_bytes(f.read_bytes()[:-9]) for f in (model / "transformer").glob("*.safetensors")],
        ("is truncated",),
    ),
    "foreign-quantization": Broken(quantized_by("bitsandbytes"), ("transformer was quantized by bitsandbytes",)),
    "quantized-torchao": Broken(quantized_by("torchao"), ("quantized by torchao",)),
    "quantized-modelopt": Broken(quantized_by("modelopt"), ("quantized by NVIDIA ModelOpt",)),
    "quantized-unnamed": Broken(
        edit("transformer/config.json", quantization_config={}), ("quantized by a tool that calls itself",)
    ),
    "marked-nunchaku": Broken(marked("blocks.0.attn1.to_q.wscales"), ("Nunchaku",)),
    "marked-bitsandbytes": Broken(marked("blocks.0.attn1.to_q.weight.absmax"), ("bitsandbytes",)),
    "marked-compressed-tensors": Broken(marked("blocks.0.attn1.to_q.weight_packed"), ("compressed-tensors",)),
    "marked-comfy": Broken(marked("blocks.0.attn1.to_q.scale_weight"), ("ComfyUI",)),
    "no-boundary": Broken(edit("model_index.json", boundary_ratio=None), ('"boundary_ratio": null',)),
    "odd-boundary": Broken(
        edit("model_index.json", boundary_ratio=float("nan")), ("model_index.json", "NaN is not a finite")
    ),
    "preset-nan": Broken(edit("ptq_preset.json", flow_shift=float("nan")), ("ptq_preset.json", "NaN is not a finite")),
    "index-list": Broken(replace("model_index.json", "[]"), ("model_index.json",)),
    "config-null": Broken(replace("transformer/config.json", "null"), ("transformer/config.json",)),
}


@pytest.fixture
def tiny_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(assets_dir("tiny"), tmp_path / "model"))


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "p.txt").write_text("a red ball\n")
    return tmp_path / "outputs"


@pytest.fixture(scope="session")
def records(packed: dict[str, Path]) -> Path:
    """A finished calibration: it is read before the model is."""
    return packed["hif4"].parent / "hif4-records"


def commands(model: Path, records: Path, outputs: Path) -> list[list[str]]:
    """Each command with a model, with the machine's checks off: those of the model are no option."""
    tail = ["--out", str(outputs / "out"), "--device", "cpu", "--no-preflight"]
    return [
        ["calibrate", str(model), "--prompts", str(outputs / "p.txt"), *tail],
        ["quantize", str(model), "--calibration", str(records), "--format", "hif4", *tail],
        ["generate", str(model), "--prompt", "a red ball", *tail],
        ["generate", str(model), "--prompt", "a red ball", *tail, "--dry-run"],
    ]


def refusal_of(run: Callable[[], Any]) -> str:
    with pytest.raises(PtqError) as caught:
        run()
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1500 and caught.value.exit_code in (1, 2)
    return text


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_refused_by_every_way_in(case: str, tiny_copy: Path, records: Path, outputs: Path) -> None:
    change, says = BROKEN[case]
    change(tiny_copy)
    text = refusal_of(lambda: load_pipeline(tiny_copy))
    assert all(part in text for part in says), text
    for command in commands(tiny_copy, records, outputs):
        assert refusal_of(lambda: _raise(command)) == text  # noqa: B023
    assert [file.name for file in outputs.iterdir()] == ["p.txt"]


def _raise(command: list[str]) -> None:
    exception = CliRunner().invoke(app, command).exception
    if exception is not None:
        raise exception


def _tied(name: str, *, both: bool = False) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors["shared.weight"].clone()
        if not both:
            del tensors["shared.weight"]

    return weights("text_encoder", change)


@pytest.mark.parametrize(
    "change",
    [
        _tied("encoder.embed_tokens.weight"),
        _tied("encoder.embed_tokens.weight", both=True),
        weights("vae", lambda tensors: {name: tensor.half() for name, tensor in tensors.items()}),
        weights("transformer", lambda tensors: {name: tensor.float() for name, tensor in tensors.items()}),
        weights("transformer", lambda t: t.update({"blocks.0.attn2.norm_added_q.weight": torch.ones(192)})),
        edit("model_index.json", _name_or_path="x", feature_extractor=[None, None]),
        each(
            edit("model_index.json", transformer_2=[None, None], boundary_ratio=None),
            remove("transformer_2"),
            remove("ptq_preset.json"),
        ),
    ],
    ids=["tied", "tied-both", "half-vae", "float-expert", "norm-added-q", "further-keys", "one-expert"],
)
def test_whole_models_of_other_makes_pass(change: Callable[[Path], Any], tiny_copy: Path) -> None:
    change(tiny_copy)
    pipeline = load_pipeline(tiny_copy)
    assert torch.equal(pipeline.text_encoder.shared.weight, pipeline.text_encoder.encoder.embed_tokens.weight)
    assert pipeline.text_encoder.shared.weight.std() > 0


def test_a_model_of_one_expert_records_and_generates(tiny_copy: Path, records: Path, outputs: Path) -> None:
    """The layout of Wan 2.1, made of one expert of two."""
    edit("model_index.json", transformer_2=[None, None], boundary_ratio=None)(tiny_copy)
    remove("transformer_2")(tiny_copy)
    edit("ptq_preset.json", variant="T2V-1.3B", guidance_scale_2=None)(tiny_copy)
    for command in commands(tiny_copy, records, outputs)[::2]:
        command[command.index("--out") + 1] = str(outputs / command[0])
        result = CliRunner().invoke(app, [*command, "--steps", "4"])
        assert result.exit_code == 0, result.exception


@pytest.mark.parametrize("model", ["tiny", "tiny-i2v"])
def test_the_embedded_models_pass(model: str) -> None:
    assert set(resolve_model(model).components) == {
        "scheduler", "text_encoder", "tokenizer", "transformer", "transformer_2", "vae",
    }  # fmt: skip


@pytest.mark.parametrize("file", ["vae", "transformer", "transformer/config.json", "model_index.json"])
def test_a_part_of_a_pipeline_names_the_pipeline(file: str, tiny_copy: Path) -> None:
    text = refusal_of(lambda: resolve_model(str(tiny_copy / file)))
    assert f"{tiny_copy}" in text and "pass" in text.lower()


@pytest.mark.parametrize(
    ("name", "names", "says"),
    [
        ("wan.gguf", None, "quantized by GGUF"),
        ("wan.pth", None, "pickle"),
        ("wan.txt", None, "is a file and no model"),
        ("wan.safetensors", ["model.diffusion_model.blocks.0.self_attn.q.weight"], "convert_original_wan.py"),
        ("wan.safetensors", ["blocks.0.self_attn.q.weight", "scaled_fp8"], "fp8 tool"),
        ("wan.safetensors", ["blocks.0.attn1.to_q.weight"], "single file of weights"),
    ],
)
def test_single_files(name: str, names: list[str] | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "models" / name
    path.parent.mkdir()
    if names is None:
        path.write_bytes(b"never read")
    else:
        save_file(dict.fromkeys(names, torch.ones(1)) | {n: torch.ones(1) for n in names}, path)
    for model in (path, path.parent) if name == "wan.gguf" else (path,):
        assert says in refusal_of(lambda: resolve_model(str(model)))  # noqa: B023


@pytest.mark.parametrize(
    ("jsons", "files", "says"),
    [
        ({}, ["wan-Q4_K.gguf"], "was quantized by GGUF: it holds wan-Q4_K.gguf"),
        ({}, ["split/wan_fp8.safetensors"], "holds weights of another layout (split/wan_fp8.safetensors)"),
        ({}, [], "is not a diffusers pipeline directory"),
        (
            {f"{name}/config.json": {"_class_name": "WanModel", "in_dim": 16} for name in ("high_noise_model", "low_noise_model")},
            ["high_noise_model/a.safetensors"],
            "in its original layout",
        ),
    ],
)  # fmt: skip
def test_hub_repositories_of_other_layouts_are_refused_before_weights_are_fetched(
    jsons: dict[str, Any], files: list[str], says: str, tmp_path: Path, monkeypatch
) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def snapshot(model: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        for name, value in jsons.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(json.dumps(value))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda model: files)
    assert says in refusal_of(lambda: resolve_model("someone/wan-other"))
    assert asked == [["*.json"]]


def test_a_packed_checkpoint_is_checked_too(packed, copy_of) -> None:
    model = copy_of(packed["hif4"])
    assert resolve_model(str(model)).is_packed
    marked("blocks.0.attn1.to_q.extra", "transformer_2")(model)
    assert "transformer_2 holds tensor blocks.0.attn1.to_q.extra" in refusal_of(lambda: ptq.load_pipeline(model))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (marked("blocks.0.attn1.to_q.extra", "transformer_2"), "transformer_2 holds tensor blocks.0.attn1.to_q.extra"),
        (weights("vae", drop("encoder.conv_in.bias")), "vae lacks tensor encoder.conv_in.bias"),
    ],
)
def test_what_is_exported_is_checked_too(
    packed, copy_of, tmp_path: Path, change: Callable[[Path], Any], says: str
) -> None:
    model = copy_of(packed["hif4"])
    change(model)
    command = ["export", str(model), "--to", "bf16", "--out", str(tmp_path / "out")]
    assert says in refusal_of(lambda: _raise(command))
    assert not (tmp_path / "out").exists()
    missing = refusal_of(lambda: _raise(["export", "no/model", *command[2:]]))
    assert missing.startswith("no/model does not exist")  # and is no hub id
