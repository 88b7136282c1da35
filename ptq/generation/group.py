"""One video on several GPUs: diffusers' context parallelism (Ulysses) with one leading process.

The tokens of a video are split over the processes; each computes its part of every block and all heads' attention is
exchanged. The leader (rank 0) owns the run: units, locks, files, manifest. The others hold the same pipeline and follow:
they are sent each unit's embeddings, seed and image, make the same calls, and write nothing.

If one process fails in the middle, the others would wait for it forever, so such a failure ends the leader too
(`LostGroupError`), and the launcher stops the rest. Finished units are kept; the same command continues.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from ptq.errors import PtqError, UsageError
from ptq.generation.sampling import BrokenOutputError, Sampled, Sampler, StepCallback
from ptq.generation.settings import Settings

if TYPE_CHECKING:
    from ptq.generation.latent import FixedLatent
    from ptq.wan.encoding import TextEncoding

TIMEOUT = timedelta(hours=12)
"""Followers wait for the leader while it checks finished videos; a process that dies ends the group at once."""

_LOAD, _MAKE, _STOP = "load", "make", "stop"


class LostGroupError(PtqError):
    """The processes of a group are no longer in step; this run cannot go on in them."""


def check_group(settings: Settings, environ: Mapping[str, str], device: str, offload: str) -> None:
    """Refuse what cannot work before anything is loaded.

    Raises:
        UsageError: not started with as many processes, no GPU, or offloading asked for.
    """
    size, world = settings.context_parallel, environ.get("WORLD_SIZE", "1")
    if world != str(size):
        raise UsageError(
            f"--context-parallel {size} makes each video with {size} processes on {size} GPUs, but {world} were started. Start it as: torchrun --nproc-per-node {size} -m ptq.cli.main generate ... --context-parallel {size}"
        )
    if not device.startswith("cuda"):
        raise UsageError("--context-parallel needs a CUDA GPU for each process; diffusers supports it on no CPU.")
    if offload != "none":
        raise UsageError("--context-parallel keeps the weights on every GPU; leave out --offload.")


def join_group(device: str) -> int:
    """Join the processes that `torchrun` started (`check_group` has passed); returns this one's rank."""
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    return dist.get_rank()


class LeadingSampler(Sampler):
    """Makes units together with the followers."""

    def __init__(
        self,
        load: Callable[[], Any],
        settings: Settings,
        device: str,
        encoding: TextEncoding | None = None,
        fixed: FixedLatent | None = None,
    ) -> None:
        _send((_LOAD,))
        super().__init__(load(), settings, device, encoding=encoding, fixed=fixed)

    def sample(self, texts: Mapping[str, Any], seed: int, image: np.ndarray | None, on_step: StepCallback) -> Sampled:
        """See `Sampler.sample`.

        Raises:
            LostGroupError: anything but unusable output; the followers may be somewhere else now.
        """
        _send((_MAKE, texts, seed, image))
        try:
            return super().sample(texts, seed, image, on_step)
        except BrokenOutputError:  # all processes saw the same latents
            raise
        except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
            raise LostGroupError(
                f"A video that several GPUs were making failed ({type(error).__name__}: {error}). The group stops; run the same command again to continue."
            ) from error


def follow(load_sampler: Callable[[], Sampler]) -> None:
    """Make the units that the leader sends, until it stops; keeps nothing."""
    sampler: Sampler | None = None
    while True:
        kind, *arguments = _receive()
        if kind == _STOP:
            dist.destroy_process_group()
            return
        if kind == _LOAD or sampler is None:
            sampler = load_sampler()
        if kind == _MAKE:
            with contextlib.suppress(BrokenOutputError):  # the leader saw it too and records it
                texts, seed, image = arguments
                sampler.sample(texts, seed, image, on_step=lambda _: None)


def dismiss_group() -> None:
    """The leader's last word: followers return from `follow`."""
    _send((_STOP,))
    dist.destroy_process_group()


def _send(message: tuple[Any, ...]) -> None:
    dist.broadcast_object_list([message], src=0)


def _receive() -> tuple[Any, ...]:
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0)
    return box[0]
