import shutil
from pathlib import Path

import pytest
from once import made_once
from quantization_helpers import FULL, make_records, make_settings, run
from random_model import make_random_pipeline


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts of three blocks, width 64, weights in several shards."""
    size = {"layers": 3, "width": 64, "max_shard_bytes": 200_000}
    return made_once(tmp_path_factory, "t2v", lambda path: make_random_pipeline(path, "T2V-A14B", **size))


@pytest.fixture(scope="session")
def records(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "t2v-records", lambda out: make_records(model, out))


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One expert of two blocks, one weight file: the cheapest model there is."""
    return made_once(tmp_path_factory, "ti2v", lambda path: make_random_pipeline(path, "TI2V-5B", layers=2, width=64))


@pytest.fixture(scope="session")
def single_records(single: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "ti2v-records", lambda out: make_records(single, out))


@pytest.fixture
def single_copy(single: Path, tmp_path: Path) -> Path:
    """A private copy of the single-expert model, for tests that damage it."""
    return Path(shutil.copytree(single, tmp_path / "model"))


@pytest.fixture(scope="session")
def uninterrupted(model: Path, records: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipe ("rtn", "full") -> checkpoint made in one go."""

    def make(root: Path) -> None:
        run(model, records, root / "rtn", make_settings("mxfp4"))
        run(model, records, root / "full", make_settings("hif4", *FULL))

    root = made_once(tmp_path_factory, "t2v-checkpoints", make)
    return {"rtn": root / "rtn", "full": root / "full"}
