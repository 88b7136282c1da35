"""Original-layout experts become diffusers pipelines with the same bytes, by the names that diffusers maps."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from ptq.checkpoint.shards import ShardSet
from ptq.errors import PtqError, UsageError
from ptq.wan.foreign import ORIGINAL_FOLDERS, find_original
from ptq.wan.loading import load_pipeline, resolve_model

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from convert_original_wan import convert_original

# Written from the names of the authors' code, independently of diffusers' table.
TO_ORIGINAL = [
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^proj_out", "head.head"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"^condition_embedder\.image_embedder\.norm1", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2", "img_emb.proj.4"),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
]


def original_name(name: str) -> str:
    for pattern, replacement in TO_ORIGINAL:
        name = re.sub(pattern, replacement, name)
    return name


def state_of(pipeline: Path, expert: str) -> dict[str, torch.Tensor]:
    shards = ShardSet(pipeline / expert)
    return {name: shards.read(name) for name in shards.entries}


@pytest.fixture(scope="module")
def release(random_pipelines, tmp_path_factory) -> Path:
    """A release directory as the authors publish it, made from the random T2V pipeline."""
    root = tmp_path_factory.mktemp("release") / "Wan2.2-T2V-A14B"
    for expert, folder in ORIGINAL_FOLDERS.items():
        (root / folder).mkdir(parents=True)
        state = state_of(random_pipelines["T2V-A14B"], expert)
        renamed = {original_name(name): tensor for name, tensor in state.items()}
        assert len(renamed) == len(state)
        save_file(renamed, root / folder / "diffusion_pytorch_model.safetensors")
        (root / folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "in_dim": 16}))
    (root / "Wan2.1_VAE.pth").write_bytes(b"never opened")
    return root


def test_a_release_converts_to_the_same_tensors(release, random_pipelines, tmp_path):
    base = random_pipelines["T2V-A14B"]
    out = convert_original(find_original(release), base, tmp_path / "out")
    for expert in ORIGINAL_FOLDERS:
        wanted, found = state_of(base, expert), state_of(out, expert)
        assert list(found) and all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert set(found) == set(wanted)
    load_pipeline(out)
    assert not list(tmp_path.glob("*.partial"))


def test_a_single_file_with_a_prefix_equals_diffusers_own_conversion(release, random_pipelines, tmp_path):
    base = random_pipelines["T2V-A14B"]
    files = {}
    for expert, folder in ORIGINAL_FOLDERS.items():
        state = load_file(release / folder / "diffusion_pytorch_model.safetensors")
        files[expert] = tmp_path / f"{expert}.safetensors"
        save_file({f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}, files[expert])
    out = convert_original(files, base, tmp_path / "out")
    for expert, file in files.items():
        model = WanTransformer3DModel.from_single_file(
            str(file), config=str(base), subfolder=expert, dtype=torch.bfloat16
        )
        ours = state_of(out, expert)
        for name, tensor in model.state_dict().items():
            assert torch.equal(ours[name].to(tensor.dtype), tensor), name


def test_a_release_is_recognised_and_the_command_is_named(release):
    with pytest.raises(PtqError) as caught:
        resolve_model(str(release))
    text = str(caught.value)
    assert "original layout" in text and "scripts/convert_original_wan.py" in text
    assert "--base Wan-AI/Wan2.2-T2V-A14B-Diffusers" in text


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ({"model_type": "t2v", "in_dim": 16, "dim": 1536}, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ({"model_type": "t2v", "in_dim": 16, "dim": 5120}, "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        ({"model_type": "i2v", "in_dim": 36, "dim": 5120}, "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers"),
        ({"model_type": "ti2v", "in_dim": 48, "dim": 3072}, "Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
        ({"model_type": "t2v", "in_dim": 99}, "a pipeline directory of the same variant"),
    ],
)
def test_a_release_of_one_expert_names_its_base(tmp_path, config, base):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", **config}))
    with pytest.raises(PtqError, match=f"--base {re.escape(base)} "):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "relative"),
    [
        ({"_class_name": "VaceWanModel", "model_type": "vace"}, "VACE"),
        ({"_class_name": "WanModel", "model_type": "animate"}, "Animate"),
        ({"_class_name": "WanModel_S2V", "model_type": "s2v"}, "S2V"),
        ({"_class_name": "WanModel", "model_type": "flf2v"}, "FLF2V"),
    ],
)
@pytest.mark.parametrize("folder", ["", "high_noise_model"])
def test_releases_of_relatives_are_refused_by_name(tmp_path, config, relative, folder):
    for name in (folder, "low_noise_model" if folder else ""):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(PtqError, match=f"is a Wan {relative} model.*Supported are"):
        resolve_model(str(tmp_path))


def test_a_release_of_wan_21_with_image_tokens_converts(random_pipelines, tmp_path):
    base, release = random_pipelines["I2V-14B"], tmp_path / "Wan2.1-I2V-14B-480P"
    state = state_of(base, "transformer")
    release.mkdir()
    save_file(
        {original_name(name): tensor for name, tensor in state.items()},
        release / "diffusion_pytorch_model.safetensors",
    )
    (release / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "i2v", "in_dim": 36}))
    found = state_of(convert_original(find_original(release), base, tmp_path / "out"), "transformer")
    assert set(found) == set(state) and all(torch.equal(found[name], state[name]) for name in state)
    assert sum("add_k_proj" in name for name in found) == 4


def test_a_pipeline_is_no_release(random_pipelines):
    assert find_original(random_pipelines["TI2V-5B"]) == {}
    resolve_model(str(random_pipelines["TI2V-5B"]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda state: state.pop("blocks.1.self_attn.q.weight"),
            r"1 tensors are missing .*blocks\.1\.attn1\.to_q\.weight",
        ),
        (lambda state: state.update({"blocks.0.ffn.0.scale_weight": torch.ones(1)}), r"1 are unknown .*scale_weight"),
        (lambda state: state.update({"head.head.bias": torch.ones(3)}), r"head\.head\.bias has shape \[3\]"),
    ],
)
def test_other_checkpoints_are_refused_by_tensor(release, random_pipelines, tmp_path, change, text):
    experts = find_original(release)
    state = load_file(experts["transformer"] / "diffusion_pytorch_model.safetensors")
    change(state)
    save_file(state, tmp_path / "changed.safetensors")
    with pytest.raises(PtqError, match=text):
        convert_original(
            {**experts, "transformer": tmp_path / "changed.safetensors"}, random_pipelines["T2V-A14B"], tmp_path / "out"
        )
    assert not list(tmp_path.glob("out*"))


def test_one_expert_twice_and_swapped_experts(release, random_pipelines, tmp_path):
    base, experts = random_pipelines["T2V-A14B"], find_original(release)
    first, second = experts
    with pytest.raises(UsageError, match="given for both experts"):
        convert_original({first: experts[first], second: experts[first]}, base, tmp_path / "out")
    copied = tmp_path / "renamed.safetensors"  # the same weights under other names, in another file
    state = load_file(experts[first] / "diffusion_pytorch_model.safetensors")
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}, copied)
    with pytest.raises(UsageError, match="hold the same weights"):
        convert_original({first: experts[first], second: copied}, base, tmp_path / "out")
    with pytest.raises(UsageError, match=r"given as transformer, the high-noise expert, but is called low"):
        convert_original({first: experts[second], second: experts[first]}, base, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_wrong_requests(release, random_pipelines, tmp_path):
    experts = find_original(release)
    with pytest.raises(UsageError, match="has transformer, but found transformer, transformer_2"):
        convert_original(experts, random_pipelines["TI2V-5B"], tmp_path / "out")
    with pytest.raises(PtqError, match=r"patch_embedding\.weight has shape"):
        convert_original(experts, random_pipelines["I2V-A14B"], tmp_path / "out")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        convert_original(experts, random_pipelines["T2V-A14B"], tmp_path / "taken")
    with pytest.raises(PtqError, match="never opened"):
        convert_original({**experts, "transformer": release}, random_pipelines["T2V-A14B"], tmp_path / "out")
