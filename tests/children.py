"""Child processes of tests: to be killed, or to run beside each other."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import Any

import ptq

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
    """A started process that runs `target`, a function of a module, with today's environment and the package of the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    here = dict(os.environ), ptq.__file__
    child = context.Process(target=_run_as_here, args=(*here, target, *arguments), kwargs=options)
    child.start()
    return child


def _run_as_here(
    environment: Mapping[str, str], package: str, target: Callable[..., Any], *arguments: Any, **options: Any
) -> None:
    """The server has the environment of when it started, and found the package from the folder of then."""
    os.environ.clear()
    os.environ.update(environment)
    assert ptq.__file__ == package, f"this child would test {ptq.__file__}, and the test {package}"
    target(*arguments, **options)
