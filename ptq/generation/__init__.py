"""Generation: work units and their seeds, sharded and resumable runs, verified video files.

Importing this package loads neither torch nor diffusers; they come with the first unit that has to be made.
"""

from ptq.generation.plan import Plan, plan_run
from ptq.generation.run import Summary, run_generation
from ptq.generation.settings import ModelIdentity, Settings, identify_model
from ptq.generation.status import RunStatus, read_status
from ptq.generation.units import Unit, make_units, safe_name, unit_seed
from ptq.store.sharding import Shard, detect_shard, parse_shard

__all__ = [
    "ModelIdentity",
    "Plan",
    "RunStatus",
    "Settings",
    "Shard",
    "Summary",
    "Unit",
    "detect_shard",
    "identify_model",
    "make_units",
    "parse_shard",
    "plan_run",
    "read_status",
    "run_generation",
    "safe_name",
    "unit_seed",
]
