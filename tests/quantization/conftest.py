import shutil
from pathlib import Path

import pytest
from quantization_helpers import FULL, make_records, make_settings, run
from random_model import make_random_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts of three blocks, width 64, weights in several shards."""
    path = tmp_path_factory.mktemp("models") / "t2v"
    return make_random_pipeline(path, "T2V-A14B", layers=3, width=64, max_shard_bytes=200_000)


@pytest.fixture(scope="session")
def records(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(model, tmp_path_factory.mktemp("records") / "t2v").directory


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One expert of two blocks, one weight file: the cheapest model there is."""
    return make_random_pipeline(tmp_path_factory.mktemp("models") / "ti2v", "TI2V-5B", layers=2, width=64)


@pytest.fixture(scope="session")
def single_records(single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_records(single, tmp_path_factory.mktemp("records") / "ti2v").directory


@pytest.fixture
def single_copy(single: Path, tmp_path: Path) -> Path:
    """A private copy of the single-expert model, for tests that damage it."""
    return Path(shutil.copytree(single, tmp_path / "model"))


@pytest.fixture(scope="session")
def uninterrupted(model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipe ("rtn", "full") -> checkpoint made in one go."""
    root = tmp_path_factory.mktemp("whole")
    run(model, records, root / "rtn", make_settings("mxfp4"))
    run(model, records, root / "full", make_settings("hif4", *FULL))
    return {"rtn": root / "rtn", "full": root / "full"}
