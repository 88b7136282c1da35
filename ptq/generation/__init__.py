"""Generation: work units and their seeds, sharded and resumable runs, verified video files.

Importing this package loads neither torch nor diffusers; they come with the first unit that has to be made.
"""

from ptq.generation.dry_run import Plan, plan_run
from ptq.generation.prepare import (
    check_compile,
    estimate_memory,
    estimate_seconds,
    for_device,
    make_videos,
    read_samples,
    resolve_settings,
    start_from,
)
from ptq.generation.run import Summary, run_generation
from ptq.generation.settings import Settings, departures
from ptq.generation.status import RunStatus, read_status
from ptq.wan.identity import ModelIdentity, identify_model

__all__ = [
    "ModelIdentity",
    "Plan",
    "RunStatus",
    "Settings",
    "Summary",
    "check_compile",
    "departures",
    "estimate_memory",
    "estimate_seconds",
    "for_device",
    "identify_model",
    "make_videos",
    "plan_run",
    "read_samples",
    "read_status",
    "resolve_settings",
    "run_generation",
    "start_from",
]
