"""The process of one side of a comparison: `worker.py CHECKOUT` runs the jobs on its standard input, each in a fork of itself."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path


def work(checkout: Path) -> None:
    """The process of one side: jobs on its standard input, one child process for each; libraries are imported once."""
    jobs = json.load(sys.stdin)
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel  # noqa: F401
    from transformers import UMT5EncoderModel  # noqa: F401

    import ptq

    if not Path(str(ptq.__file__)).resolve().is_relative_to(checkout):
        raise SystemExit(f"PYTHONPATH names {checkout}, but ptq came from {ptq.__file__}.")
    for job in jobs:
        result = Path(job["name"])
        for path in (result, result.with_name(result.name + ".partial")):
            shutil.rmtree(path, ignore_errors=True)
        result.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            _child(job["command"], checkout, result.with_name(result.name + ".log"))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seconds = round(time.monotonic() - start, 1)
        line = {"key": job["key"], "code": code, "seconds": seconds}
        result.with_name(result.name + ".done").write_text(json.dumps(line))
        print(f"  {job['name']}: {seconds} s" + (f", exit code {code}" if code else ""), flush=True)


def _child(command: Sequence[str], checkout: Path, log: Path) -> None:
    """Run a command in this forked process, its output into a file; never returns."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    code = 1
    try:
        _run(command, checkout)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001  # whatever it is, the log has it
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(command: Sequence[str], checkout: Path) -> None:
    kind, *rest = command
    sys.argv = [kind, *rest]
    if kind == "ptq":
        from ptq.cli.main import run

        run()
    elif kind == "random-model":
        sys.path.insert(0, str(checkout / "scripts"))
        runpy.run_path(str(checkout / "scripts/make_random_wan.py"), run_name="__main__")
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("format")
        parser.add_argument("--set", action="append", default=[])
        parser.add_argument("--out", type=Path)
        args = parser.parse_args(rest)
        quantize_small_module(args.format, tuple(args.set), args.out)


def quantize_small_module(format_name: str, overrides: tuple[str, ...], out: Path) -> None:
    """Quantize a block of Linears that no Wan code knows, and write its tensors, its outputs and the errors of its layers."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    from ptq import quantize_module
    from ptq.config import load_recipe

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(128, 128, bias=i == 0) for i in range(3))
            self.up, self.down, self.odd = nn.Linear(128, 384), nn.Linear(384, 128), nn.Linear(100, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mixed = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2) / 12, dim=-1) @ self.v(x)
            x = x + self.down(nn.functional.gelu(self.up(x + mixed)))
            return torch.cat([x, self.odd(x[..., :100])], dim=-1)

    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(4)
    model = Block()
    channels = torch.linspace(-1.5, 2.5, 128).exp2()
    batches = [{"x": torch.randn(2, 48, 128, generator=generator) * channels} for _ in range(3)]
    report = quantize_module(model, batches, format_name, load_recipe(format_name, format_name, overrides))
    out.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out / "state_dict.safetensors"
    )
    with torch.no_grad():
        save_file({f"output.{i}": model(**batch) for i, batch in enumerate(batches)}, out / "outputs.safetensors")
    layers = [
        {"name": row.name, "shape": row.shape, "tokens": row.tokens, "stats": dict(row.stats)} for row in report.layers
    ]
    (out / "layers.json").write_text(
        json.dumps({"layers": layers, "skipped": sorted(report.skipped)}, indent=1, sort_keys=True)
    )


if __name__ == "__main__":
    work(Path(sys.argv[1]))
