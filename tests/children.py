"""Child processes of tests: to be killed, or to run beside each other."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

PRELOADED = [
    "ptq.calibration.run",
    "ptq.generation.worker",
    "ptq.quantization.run",
    "ptq.scheme.native_hif4",
    "ptq.scheme.native_mxfp4",
    "diffusers.pipelines.wan.pipeline_wan",
    "diffusers.pipelines.wan.pipeline_wan_i2v",
]
"""Imported once, in the server that all children of a test process are forked from; it never runs a tensor operation. Seconds of
each child otherwise, and the first that starts the server decides."""


def start_child(target: Callable[..., Any], *arguments: Any, **options: Any) -> BaseProcess:
    """A started process that runs `target`, a function of a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    child = context.Process(target=target, args=arguments, kwargs=options)
    child.start()
    return child
