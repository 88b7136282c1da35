"""Correctness, then speed, on the GPU of this machine: `python scripts/gpu_suite.py --out results/`.

First every kernel is compared with its torch reference, then the tables of docs/benchmarks.md are measured and written as JSON.
A stage that breaks or a check that fails stops nothing: the summary, the last ten lines, says so, and the exit code is 1.
`--quick`: one shape of each kind, two blocks. `--dry-run`: the suite itself, on a CPU. Without a GPU: exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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
from gpu_solve import solve_block

from ptq import ui
from ptq.runtime.bench_linear import GPU_SHAPES, bench_linear
from ptq.store.files import write_json

WAN_5B = ((27280, 3072, 3072), (27280, 14336, 3072), (27280, 3072, 14336))
STEP_REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        cases: of the checks. rows: of whole layers in the checks.
        shapes: [M, N, K] of single layers. block: rows, width, feed-forward width of a block's Linears.
        steps: table -> geometry of a denoiser call.
        compile_backend: of torch.compile in the steps.
        solved: recipes whose solve of a block is timed, each with its format.
    """

    cases: tuple[gpu_correctness.Case, ...]
    rows: tuple[int, ...]
    shapes: tuple[tuple[int, int, int], ...]
    block: tuple[int, int, int]
    steps: dict[str, dict[str, Any]]
    compile_backend: str = "inductor"
    solved: tuple[tuple[str, str], ...] = (("hif4", "hif4"), ("mxfp4", "mxfp4"))


FULL = Sizes(
    tuple(gpu_correctness.Case(512, n, k) for n, k in ((5120, 5120), (13824, 5120), (5120, 13824), (3072, 3072))),
    (1, 7, 63, 512),
    (*GPU_SHAPES, *WAN_5B),
    (GPU_SHAPES[1][0], GPU_SHAPES[1][2], GPU_SHAPES[1][1]),
    {"denoiser_ti2v_5b": gpu_measure.TI2V_5B, "denoiser_a14b": gpu_measure.A14B},
)
QUICK = dataclasses.replace(
    FULL,
    cases=FULL.cases[:1],
    rows=(7,),
    shapes=GPU_SHAPES[:1],
    steps={"denoiser_a14b_two_blocks": gpu_measure.A14B | {"layers": 2}},
    solved=(),
)
DRY = Sizes(
    (gpu_correctness.Case(17, 64, 128),),
    (1,),
    ((16, 64, 64),),
    (16, 128, 256),
    {"denoiser_small": gpu_measure.SMALL},
    "eager",
)
"""Sizes that the interpreter and a CPU take, to try the suite itself."""
Stage = Callable[[], list[dict[str, Any]]]
SUMMARY_LINES = 10


def main() -> int:
    """Run the suite; the exit code is 0 only if every check passed and every table was written."""
    options = _parse()
    if not torch.cuda.is_available() and not options.dry_run:
        ui.warn(
            "The GPU suite needs a CUDA device and torch finds none here (torch.cuda.is_available() is False). Run it on a machine with an H100, H200 or Blackwell GPU; `--dry-run` tries the suite itself on small shapes, and `ptq bench linear` measures the CPU path."
        )
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = DRY if options.dry_run else QUICK if options.quick else FULL
    repeats = 1 if options.dry_run else 5 if options.quick else options.repeats
    return run_stages(stages(device, sizes, repeats, options.tune), device, options.out)


def run_stages(named: dict[str, Stage], device: torch.device, out: Path) -> int:
    """Run every stage, whatever happened to those before it, and say at the end what came out; the exit code."""
    tables: dict[str, list[dict[str, Any]]] = {}
    broken: dict[str, str] = {}
    for name, measure in named.items():
        ui.info(f"Measuring {name}.")
        try:
            tables[name] = measure()
        except Exception as error:  # noqa: BLE001  (a stage that breaks must not cost the figures of the others)
            broken[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        rows = tables[name]
        write_json(out / f"{name}.json", {**environment(device), "rows": rows})
        columns = list(dict.fromkeys(key for row in rows for key in row))
        ui.table(name, columns, [[_shown(row.get(column, "")) for column in columns] for row in rows])
    failed = [row for row in tables.get("correctness", []) if not row["passed"]]
    for line in summary(tables, broken, failed):
        ui.info(line)
    return 1 if broken or failed else 0


def summary(tables: dict[str, list[dict[str, Any]]], broken: dict[str, str], failed: list[dict[str, Any]]) -> list[str]:
    """At most SUMMARY_LINES lines: what broke and what failed first, then the speedups of each table."""
    lines = [f"{name} BROKE: {reason}" for name, reason in broken.items()]
    checks = tables.get("correctness", [])
    if checks:
        names = f", FAILED: {'; '.join(row['name'] for row in failed)}"[:200] if failed else ""
        lines.append(f"correctness: {len(checks) - len(failed)} of {len(checks)} checks passed{names}")
    for name, rows in tables.items():
        shown = [f"{row['candidate']} {row['speedup']:.2f}x" for row in rows if "speedup" in row]
        shown += [f"{row['job']} {row['of copy']:.2f} of copy" for row in rows if "recipe" in str(row.get("job", ""))]
        shown += [f"{row['candidate']} {row['seconds']:.3g} s" for row in rows if row.get("input") == "whole block"]
        if shown:
            lines.append(f"{name}: {', '.join(shown)}"[:400])
    return lines[:SUMMARY_LINES]


def check(device: torch.device, sizes: Sizes) -> list[dict[str, Any]]:
    """Every comparison with the references."""
    checks = [
        *gpu_correctness.run(device, list(sizes.cases), sizes.rows),
        gpu_correctness.compiled_layer(device, sizes.compile_backend),
    ]
    return [{**dataclasses.asdict(one), "passed": one.passed} for one in checks]


def stages(device: torch.device, sizes: Sizes, repeats: int, tune: bool) -> dict[str, Stage]:
    """Name -> measurement, in the order they run: correctness first."""

    def linears() -> list[dict[str, Any]]:
        return [dataclasses.asdict(one) for one in bench_linear(sizes.shapes, device, repeats).measurements]

    rows, width, ffn = sizes.block
    found: dict[str, Stage] = {
        "correctness": lambda: check(device, sizes),
        "linears": linears,
        "block": lambda: gpu_measure.block_linears(rows, width, ffn, device, repeats),
        "quantizer": lambda: gpu_measure.quantizer_bandwidth(rows, width, device, repeats),
    }
    steps = min(repeats, STEP_REPEATS)
    for name, geometry in sizes.steps.items():
        found[name] = functools.partial(gpu_measure.denoiser_step, geometry, device, steps, sizes.compile_backend)
    if sizes.solved:
        found["solve"] = lambda: solve_block(sizes.solved, width, ffn, device)
    if tune:
        found["tiles"] = lambda: [
            row for shape in sizes.shapes for row in gpu_measure.tile_candidates(*shape, device, repeats)[:3]
        ]
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "none (dry run)",
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if on_gpu else "",
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
    parser.add_argument("--quick", action="store_true", help="one shape of each kind, two blocks of a step")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, with TRITON_INTERPRET=1")
    parser.add_argument("--tune", action="store_true", help="also measure tile candidates for kernels/tiles.py")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
