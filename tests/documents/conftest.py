"""What the commands of documents name, in one folder, and what the guide's first view makes of it: made once."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import loras
import numpy as np
import pytest
from once import made_once
from PIL import Image
from random_model import make_random_pipeline
from safetensors.numpy import save_file
from shown import first_view, is_run, run

from ptq.evaluation.suites import get_suite
from ptq.store.files import read_json, write_json
from ptq.wan.loading import find_model, load_pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluation"))
from evaluation_runs import moving_noise

MODELS = {
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "T2V-A14B",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "T2V-1.3B",
    "i2v-hif4": "I2V-A14B",
}
"""Names in the documents -> the variant of the random model that stands there."""
HELD_OUT = [
    "a small green triangle moves down on a grey background",
    "a large blue ring moves up on a white background",
]


@pytest.fixture(scope="session")
def named_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, prompts, pictures, LoRAs, noise and results of VBench under the names of the documents."""
    return made_once(tmp_path_factory, "named", make_files)


@pytest.fixture(scope="session")
def viewed(named_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder after the guide's first view: calibration, checkpoint, both runs."""

    def make(folder: Path) -> None:
        copy(named_files, folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            for line in filter(is_run, first_view()):
                assert run(line) == 0, line

    return made_once(tmp_path_factory, "viewed", make)


@pytest.fixture
def here(named_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of the folder of named files."""
    copy(named_files, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def copy(source: Path, target: Path) -> None:
    """A folder of its own for what commands write; models are links."""
    target.mkdir()
    for path in source.iterdir():
        if any(name.startswith(path.name) for name in (*MODELS, "MODEL")):
            (target / path.name).symlink_to(path)
        elif path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy(path, target)


def make_files(folder: Path) -> None:
    for name, variant in MODELS.items():
        make_small_model(folder / name, variant)
    (folder / "MODEL").symlink_to(folder / next(iter(MODELS)))
    (folder / "clips").mkdir()
    captions = [{"path": f"{i}.mp4", "cap": [f"a red ball number {i}"]} for i in range(32)]
    for name in ("OpenS2V-5M_to_mm.json", "prompts.json"):
        write_json(folder / name, captions)
    (folder / "prompts.txt").write_text("\n".join(one["cap"][0] for one in captions[:2]))
    for name in ("eval.txt", "mlperf.txt"):
        (folder / name).write_text("\n".join(HELD_OUT))
    Image.fromarray(moving_noise(1, 64, 64)[0]).save(folder / "ball.png")
    write_json(
        folder / "eval.json", [{"id": f"e{i}", "prompt": text, "image": "ball.png"} for i, text in enumerate(HELD_OUT)]
    )
    write_json(folder / "vbench.json", [{"prompt_en": text, "dimension": ["scene"]} for text in HELD_OUT])
    pipeline = load_pipeline(folder / "MODEL")
    for name, expert in (("high", pipeline.transformer), ("low", pipeline.transformer_2)):
        pairs = loras.factors(loras.block_linears(expert), std=0.05)
        for file in (f"{name}.safetensors", f"{name}_noise_model.safetensors"):
            loras.write(folder / file, loras.original_names(pairs))
    shape = find_model(str(folder / "MODEL")).latent_shape(32, 32, 5)
    save_file({"latents": np.random.default_rng(0).normal(size=shape).astype(np.float32)}, folder / "noise.safetensors")
    rows = [{"video_path": f"e{i}-{k}.mp4", "video_results": 0.5} for i in range(2) for k in range(5)]
    for name in ("original", "hif4"):
        results = {dimension: [0.5, rows] for dimension in get_suite("icme2026").gate}
        (folder / f"{name}_eval_results.json").write_text(json.dumps(results))


def make_small_model(path: Path, variant: str) -> None:
    """A random pipeline of two blocks an expert, whose own defaults are a few steps of a few pixels."""
    make_random_pipeline(path, variant, layers=2, width=64)
    preset = read_json(path / "ptq_preset.json")
    write_json(path / "ptq_preset.json", {**preset, "height": 32, "width": 32, "num_frames": 5, "steps": 4})
