"""Where streams and solves go, streams themselves, and blocks that are written in the background."""

from __future__ import annotations

import threading

import pytest
import torch

from ptq.errors import PtqError, UsageError
from ptq.quantization.block import solve_cost
from ptq.quantization.collect import InputCollector
from ptq.quantization.placing import check_place, choose_place, parse_streams, solve_device
from ptq.quantization.streams import Stream
from ptq.quantization.writer import BlockWriter

GPU = torch.device("cuda")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("need", "gpu", "ram", "place"),
    [
        (10, 10, 0, "gpu"),
        (11, 10, 11, "pinned"),
        (12, 10, 11, "disk"),
        (1, 0, 0, "disk"),
        (10, None, 10, "memory"),
        (11, None, 10, "disk"),
    ],
)
def test_streams_go_to_the_fastest_place_in_which_they_fit(need, gpu, ram, place):
    assert choose_place("auto", need, gpu=gpu, ram=ram) == place


@pytest.mark.parametrize("wanted", ["gpu", "pinned", "disk"])
def test_a_place_that_was_asked_for_is_taken(wanted):
    assert choose_place(wanted, 100, gpu=1, ram=1) == wanted


def test_each_device_has_its_places():
    assert [parse_streams(text, "cpu") for text in ("auto", "memory", "disk")] == ["auto", "memory", "disk"]
    assert [parse_streams(text, "cuda:1") for text in ("auto", "gpu", "pinned", "disk")] == [
        "auto",
        "gpu",
        "pinned",
        "disk",
    ]
    for text, device in (("gpu", "cpu"), ("memory", "cuda"), ("ram", "cpu")):
        with pytest.raises(UsageError, match=f"--streams takes auto, .* where the run is on {device}, found '{text}'"):
            parse_streams(text, device)


def test_a_full_disk_is_refused_where_streams_go_there():
    check_place("memory", 10, 5, "They", "Free some.")
    with pytest.raises(PtqError, match=r"They take 10 B.*the disk has 5 B\. Free some\."):
        check_place("disk", 10, 5, "They", "Free some.")


def test_small_solves_go_to_the_cpu():
    tiny = [torch.nn.Linear(192, 192), torch.nn.Linear(512, 192)]
    wide = torch.nn.Linear(1536, 1536, device="meta")
    assert [solve_device(GPU, solve_cost([linear])) for linear in tiny] == [CPU, CPU]
    assert solve_device(GPU, solve_cost([wide])) == GPU
    assert solve_device(CPU, solve_cost([wide])) == CPU


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_gives_back_what_was_put_and_leaves_nothing(place, dtype, tmp_path):
    stream = Stream(place, tmp_path / "streams")
    names = ["a", "b", "c"]
    values = {name: torch.randn(1, 7 + i, 64).to(dtype) for i, name in enumerate(names)}
    for name in names:
        stream[name] = values[name]
    seen = {}
    for name, hidden in zip(names, stream.visit(names, CPU), strict=True):
        seen[name] = hidden.clone()
        stream[name] = hidden * 2  # in place, while the next one is on its way
    assert all(torch.equal(seen[name], values[name]) and torch.equal(stream[name], values[name] * 2) for name in names)
    assert stream["a"].data_ptr() != values["a"].data_ptr()
    assert not list(tmp_path.glob("streams/*"))
    assert list(stream.visit([], CPU)) == []


class Slow:
    """A work directory whose writing waits until it may go on."""

    def __init__(self) -> None:
        self.go, self.saved, self.threads = threading.Event(), [], set()
        self.error = None

    def save_block(self, expert, index, tensors, info):
        assert self.go.wait(30)
        if self.error is not None:
            raise self.error
        self.saved.append(index)
        self.threads.add(threading.current_thread())

    def load_block(self, expert, index):
        return {f"{index}": index}, {}


def test_a_block_is_written_while_the_next_is_made():
    work = Slow()
    with BlockWriter(work, "transformer") as writer:
        writer.put(0, {}, {})
        assert work.saved == []  # and yet we are here
        work.go.set()
        writer.put(1, {}, {})
        assert work.saved[0] == 0
    assert work.saved == [0, 1] and writer.entries == {"0": 0, "1": 1}
    assert threading.main_thread() not in work.threads


@pytest.mark.parametrize("more", [0, 1])
def test_what_goes_wrong_in_writing_is_raised(more):
    work = Slow()
    work.error = PtqError("The disk is full.")
    work.go.set()
    with pytest.raises(PtqError, match="The disk is full"), BlockWriter(work, "transformer") as writer:
        writer.put(0, {}, {})
        for index in range(more):
            writer.put(1 + index, {}, {})
            pytest.fail("the next block must not be accepted")


def test_an_interruption_still_finishes_the_block_being_written():
    work = Slow()
    work.go.set()
    with pytest.raises(KeyboardInterrupt), BlockWriter(work, "transformer") as writer:
        writer.put(0, {}, {})
        raise KeyboardInterrupt
    assert work.saved == [0]


def test_the_hessian_of_bfloat16_inputs_is_exact_without_a_float32_copy_of_them(monkeypatch):
    from ptq.quantization import collect

    monkeypatch.setattr(collect, "TOKENS", 16)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    sizes = []
    real = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: sizes.append(len(self)) or real(self))
    collector = InputCollector(4, hessian=True)
    collector.update(x)
    assert max(size for size in sizes if size != 64) <= 16
    stats = collector.stats()
    torch.testing.assert_close(stats.h_kk.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)
    assert torch.equal(stats.absmax_k, real(x.abs().amax(0)))
