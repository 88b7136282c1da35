"""Correctness, then speed, on the GPU of this machine: `python scripts/gpu_suite.py --out results/`.

First every kernel is compared with its torch reference; a failed check stops the run with exit code 1 before anything
is timed. Then the tables of docs/benchmarks.md are measured and written as JSON. Without a GPU: exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_correctness
import gpu_measure
import torch
import triton

from ptq import ui
from ptq.runtime.bench_linear import GPU_SHAPES, bench_linear
from ptq.store.files import write_json

CASES = [gpu_correctness.Case(512, n, k) for n, k in ((5120, 5120), (13824, 5120), (5120, 13824), (3072, 3072))]
WAN_5B = ((27280, 3072, 3072), (27280, 14336, 3072), (27280, 3072, 14336))
STEP_REPEATS = 3


def main() -> int:
    """Run the suite; the exit code is 0 only if every check passed and every table was written."""
    options = _parse()
    if not torch.cuda.is_available():
        ui.warn(
            "The GPU suite needs a CUDA device and torch finds none here (torch.cuda.is_available() is False). Run it on a machine with an H100, H200 or Blackwell GPU; `ptq bench linear` measures the CPU path."
        )
        return 2
    device = torch.device("cuda")
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    if not check(device, options.out):
        return 1
    for name, measure in tables(device, options.repeats, options.tune).items():
        ui.info(f"Measuring {name}.")
        rows = measure()
        write_json(options.out / f"{name}.json", {**environment(device), "rows": rows})
        columns = list(dict.fromkeys(key for row in rows for key in row))
        ui.table(name, columns, [[_shown(row.get(column, "")) for column in columns] for row in rows])
    return 0


def check(device: torch.device, out: Path) -> bool:
    """Every comparison with the references; writes correctness.json and names the failures."""
    checks = [*gpu_correctness.run(device, CASES), gpu_correctness.compiled_layer(device)]
    rows = [{**dataclasses.asdict(one), "passed": one.passed} for one in checks]
    write_json(out / "correctness.json", {**environment(device), "rows": rows})
    failed = [one for one in checks if not one.passed]
    for one in failed:
        ui.warn(f"{one.name}: {one.value:.3g} exceeds {one.limit:.3g}.")
    ui.info(f"{len(checks) - len(failed)} of {len(checks)} correctness checks passed.")
    return not failed


def tables(device: torch.device, repeats: int, tune: bool) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """Name -> measurement, in the order they run."""
    rows, width, ffn = GPU_SHAPES[1][0], GPU_SHAPES[1][2], GPU_SHAPES[1][1]

    def linears() -> list[dict[str, Any]]:
        result = bench_linear([*GPU_SHAPES, *WAN_5B], device, repeats)
        return [dataclasses.asdict(one) for one in result.measurements]

    found: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "linears": linears,
        "block": lambda: gpu_measure.block_linears(rows, width, ffn, device, repeats),
        "quantizer": lambda: gpu_measure.quantizer_bandwidth(rows, width, device, repeats),
        "denoiser_ti2v_5b": lambda: gpu_measure.denoiser_step(gpu_measure.TI2V_5B, device, STEP_REPEATS),
        "denoiser_a14b": lambda: gpu_measure.denoiser_step(gpu_measure.A14B, device, STEP_REPEATS),
    }
    if tune:
        shapes = (*GPU_SHAPES, *WAN_5B)
        found["tiles"] = lambda: [
            row for shape in shapes for row in gpu_measure.tile_candidates(*shape, device, repeats)[:3]
        ]
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _shown(value: object) -> str:
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else json.dumps(value)
        if isinstance(value, list | tuple)
        else str(value)
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="directory of the JSON tables")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds; the median counts")
    parser.add_argument("--tune", action="store_true", help="also measure tile candidates for kernels/tiles.py")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
