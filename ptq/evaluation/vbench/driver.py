"""Score one VBench dimension, or describe the installed VBench. Runs under VBench's own interpreter, as a plain script.

This file must not import ptq or anything but the standard library and VBench: `ptq evaluate` starts it by path in an
environment that has neither torch versions nor packages of ours. VBench's own command line is not used: it exits 0 when
it failed. Usage: `python driver.py probe OUT.json [ROOT]` or `python driver.py score JOB.json`.
Exit code 0 only when the result file exists and has the dimension; its rows are checked by the caller.
"""

import importlib
import inspect
import json
import os
import sys
from pathlib import Path


def probe(out, root):
    """Write where VBench is, its version and its cache folder. Imports no submodule, so it is fast."""
    if root:
        sys.path.insert(0, root)
    spec = importlib.util.find_spec("vbench")
    if spec is None or spec.origin is None:
        sys.exit(f"{sys.executable} cannot import vbench.")
    package = Path(spec.origin).resolve().parent
    cache = os.environ.get("VBENCH_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "vbench")
    found = {
        "package": str(package),
        "cache": cache,
        "version": installed_version(),
        "python": sys.version.split()[0],
    }
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def installed_version():
    """Version of the vbench distribution, or None in a plain checkout."""
    try:
        return importlib.metadata.version("vbench")
    except importlib.metadata.PackageNotFoundError:
        return None


def score(job_file):
    """Run one dimension as the job file says and check that its result exists."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    if job["root"]:
        sys.path.insert(0, job["root"])
    name, dimension = job["name"], job["dimension"]
    package = importlib.import_module(job["package"])
    suite = package.VBenchI2V if job["package"] == "vbench2_beta_i2v" else package.VBench
    device = job["device"]
    if device != "cpu":
        device = importlib.import_module("torch").device(device)
    bench = suite(device, job["full_info"], job["out"])
    arguments = {"dimension_list": [dimension], "local": True}
    if job["package"] == "vbench2_beta_i2v":
        arguments["resolution"] = job["resolution"]
    else:
        arguments["mode"] = job["mode"]
    if job["mode"] == "custom_input":
        # Without a prompt map VBench reads prompts from file names.
        if "prompt_list" not in inspect.signature(suite.evaluate).parameters:
            sys.exit("This VBench has no prompt_list; version 0.1.3 or newer is needed.")
        arguments["prompt_list"] = job["prompts"]
    bench.evaluate(job["videos"], name, **arguments)
    result = Path(job["out"]) / f"{name}_eval_results.json"
    if not result.is_file() or dimension not in json.loads(result.read_text(encoding="utf-8")):
        sys.exit(f"VBench wrote no result for {dimension}.")


if __name__ == "__main__":
    import importlib.metadata
    import importlib.util

    # Python puts a script's own folder in front: names of ours must not hide those of VBench's packages.
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
    if sys.argv[1] == "probe":
        probe(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "")
    else:
        score(sys.argv[2])
