"""The dry run's memory against the storages that a run really holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantization_helpers import make_records
from random_model import make_random_pipeline
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptq.config import load_recipe
from ptq.quantization.job import Job
from ptq.quantization.plan import working_bytes
from ptq.quantization.run import quantize
from ptq.quantization.settings import QuantizeSettings
from ptq.store.calibration import CalibrationSet
from ptq.wan.layout import read_layout


class LiveStorages(TorchDispatchMode):
    """Sums the bytes of the storages made under it that are alive, behind whatever tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = StorageWeakRef(tensor.untyped_storage())
                self._alive[storage.cdata] = storage, tensor.untyped_storage().nbytes()
        if sum(size for _, size in self._alive.values()) > self.peak:
            self._alive = {key: one for key, one in self._alive.items() if not one[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "wide"
    return make_random_pipeline(path, "TI2V-5B", layers=1, width=512, ffn=1408)


@pytest.mark.parametrize(
    ("recipe", "size"), [("hif4", 128), ("hif4", 768), ("rtn", 128), ("rtn", 768), ("tuned", 128), ("tuned", 512)]
)
def test_estimated_memory_is_within_15_percent_of_the_storages_alive(
    wide: Path, tmp_path: Path, recipe: str, size: int
) -> None:
    torch.set_num_threads(1)
    made = {"height": size, "width": size, "num_frames": 5}
    records = make_records(wide, tmp_path / "records", prompts=2, records=1, **made)
    name, changes = ("rtn", ("solver.tune.steps=2",)) if recipe == "tuned" else (recipe, ())
    settings = QuantizeSettings("hif4", load_recipe(name, "hif4", changes), name, {})
    job = Job(read_layout(wide), CalibrationSet(records.directory), settings, tmp_path / "out")
    estimate = working_bytes(job, "transformer") + job.stream_bytes("transformer")
    with LiveStorages() as live:
        quantize(job)
    assert 0.85 * live.peak < estimate < 1.15 * live.peak, (
        f"{estimate / 1e6:.1f} MB estimated, {live.peak / 1e6:.1f} MB held"
    )
