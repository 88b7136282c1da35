from pathlib import Path

import pytest
from generation_helpers import make_samples, run
from random_model import make_random_pipeline


@pytest.fixture(scope="session")
def pipe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-expert text-to-video pipeline with random weights."""
    return make_random_pipeline(tmp_path_factory.mktemp("model") / "t2v", "T2V-A14B", layers=2, width=64, seed=1)


@pytest.fixture(scope="session")
def whole_run(pipe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four units made in one go by one process: what every other way of making them must equal."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(pipe_dir, out, make_samples(4)).done == 4
    return out
