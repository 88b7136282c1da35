from pathlib import Path

import numpy as np
import pytest
import torch
from calibration_helpers import record
from once import made_once
from PIL import Image
from random_model import make_random_pipeline


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random pipeline of each variant."""
    variants = ("T2V-A14B", "I2V-A14B", "TI2V-5B")

    def make(root: Path) -> None:
        for variant in variants:
            make_random_pipeline(root / variant, variant, layers=1, width=64, dtype=torch.float32)

    root = made_once(tmp_path_factory, "calibration-models", make)
    return {variant: root / variant for variant in variants}


@pytest.fixture(scope="session")
def t2v(pipelines: dict[str, Path]) -> Path:
    return pipelines["T2V-A14B"]


@pytest.fixture(scope="session")
def whole(t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts recorded in one go: what every interrupted or shared recording must equal."""
    return made_once(tmp_path_factory, "calibration-whole", lambda out: record(t2v, out, 5))


@pytest.fixture(scope="session")
def first_frame() -> np.ndarray:
    """uint8 [32, 32, 3] with structure."""
    return np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def image_file(first_frame: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "frame.png"
    Image.fromarray(first_frame).save(path)
    return path
