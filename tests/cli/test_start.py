"""Commands start at once: what is refused is refused, and what is done is said, before anything heavy is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_interruption import COMMANDS

from ptq.calibration.prepare import make_plan
from ptq.prompts import read_prompts
from ptq.store.files import sha256_file
from ptq.tiny import assets_dir
from ptq.wan.loading import find_model

FOREIGN = """
import sys, sysconfig
site = tuple(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))
found = {name.partition(".")[0] for name, module in sys.modules.items() if name not in before and str(getattr(module, "__file__", "")).startswith(site)}
"""
COMMAND_LINE = {
    "rich",
    "typer",
    "markdown_it",
    "mdurl",
    "pygments",
    "shellingham",
    "click",
    "typing_extensions",
    "annotated_doc",
}
"""What the command line shows itself with."""
LIGHT = COMMAND_LINE | {
    "pydantic",
    "pydantic_core",
    "annotated_types",
    "typing_inspection",
    "yaml",
    "_yaml",
    "psutil",
    "numpy",
    "ijson",
}
"""What the checks of all commands may load besides: schemas, recipes, free memory, statistics; each takes a tenth of a second."""
HEAVY = ("torch", "diffusers", "transformers", "numba", "matplotlib", "av", "huggingface_hub", "safetensors", "PIL")
RUN_EACH = """
import contextlib, io, json
sys.modules.update(dict.fromkeys({blocked!r}))  # importing them is an error
from ptq import ui
from ptq.cli.main import run
results = []
for arguments in json.loads({commands!r}):
    sys.argv, said = ["ptq", *arguments], io.StringIO()
    ui.stderr.file = said
    with contextlib.redirect_stderr(said):
        try:
            run()
        except SystemExit as end:
            results.append((end.code, said.getvalue()))
exec({foreign!r})
json.dump([results, sorted(found)], open("result.json", "w"))
"""


def python(folder: Path, code: str) -> str:
    child = subprocess.run(
        [sys.executable, "-c", f"import sys\nbefore = set(sys.modules)\n{code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout


def run_each(folder: Path, commands: list[list[str]], *, block: bool = False) -> tuple[list[tuple[int, str]], set[str]]:
    """Run commands in one fresh interpreter: (exit code, stderr) of each, and the foreign packages that are loaded then."""
    python(
        folder,
        RUN_EACH.format(blocked=HEAVY if block else (), commands=json.dumps(commands), foreign=FOREIGN),
    )
    results, loaded = json.loads((folder / "result.json").read_text())
    return [(code, " ".join(said.split())) for code, said in results], set(loaded)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts, calibration directories, a full directory, recipes and a packed model's JSON files."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "prompts.txt").write_text("a red ball\n")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "archive.tar.gz").write_text("something")
    (folder / "odd.yaml").write_text("solver: {rounding: up}\n")
    info = make_plan(find_model("tiny"), read_prompts(folder / "prompts.txt")).info()
    for name in ("records", "begun"):
        (folder / name).mkdir()
        (folder / name / "records.jsonl").write_text("")
    (folder / "begun" / "records").mkdir()
    (folder / "begun" / "records" / "00000.safetensors").write_text("")
    info.write(folder / "begun" / "calibration.json")
    files = {"records.jsonl": sha256_file(folder / "records" / "records.jsonl")}
    whole = info.model_copy(update={"complete": True, "digest": "0" * 64, "files": files})
    whole.write(folder / "records" / "calibration.json")
    packed = folder / "packed"
    shutil.copytree(assets_dir("tiny"), packed, ignore=shutil.ignore_patterns("*.safetensors"))
    learned = {"type": "learned", "block_size": 64, "smooth": False}
    for expert in ("transformer", "transformer_2"):
        config = json.loads((packed / expert / "config.json").read_text())
        (packed / expert / "config.json").write_text(
            json.dumps(
                config | {"quantization_config": {"quant_method": "ptq", "format": "mxfp4", "transform": learned}}
            )
        )
    return folder


QUANTIZE = "quantize tiny --calibration records --format hif4 --out new"
CALIBRATE = "calibrate tiny --prompts prompts.txt --out new"
GENERATE = "generate tiny --prompts prompts.txt --out new"
REFUSED = [
    ("calibrate tiny --prompts none.txt --out new", "none.txt does not exist"),
    (f"{CALIBRATE} --offload disk", "--offload must be one of"),
    (f"{CALIBRATE} --device tpu", "--device takes cpu, cuda or cuda:<n>"),
    (f"{CALIBRATE} --shard 3/2", "3/2"),
    (f"{CALIBRATE} --prompt-format opensora", "opensora"),
    (f"{CALIBRATE} --height 50", "height must be a multiple of 16 for this model, found 50; try 48"),
    (f"{GENERATE} --num-frames 8", "The number of frames must be 4 n + 1 for this model"),
    ("calibrate tiny --prompts prompts.txt --out full", "full holds other files"),
    ("calibrate tiny --prompts prompts.txt --out begun --seed 4 --dry-run", "seed"),
    ("calibrate full --prompts prompts.txt --out new", "full"),
    ("quantize tiny --calibration records --format int3 --out new", "Unknown format 'int3'; choose one of mxfp4, hif4"),
    ("quantize tiny --calibration records --format hif4 --out full", "full exists already"),
    ("quantize tiny --calibration records --format hif4 --out full --dry-run", "full exists already"),
    ("quantize tiny --calibration full --format hif4 --out new", "not a calibration directory"),
    ("quantize tiny --calibration begun --format hif4 --out new", "has not finished"),
    ("quantize tinny --calibration records --format hif4 --out new", "There is no model 'tinny'"),
    (f"{QUANTIZE} --recipe odd.yaml", "solver.rounding"),
    (f"{QUANTIZE} --recipe mine", "There is no recipe 'mine'"),
    (f"{QUANTIZE} --recipe mxfp4", "made for mxfp4"),
    (f"{QUANTIZE} --set solver.dampning=1", "solver.dampning"),
    (f"{QUANTIZE} --set scheme.transform=rotated", "Unknown transform 'rotated'; choose one of none, hadamard"),
    (f"{QUANTIZE} --set scheme.block=32", "hold whole groups of 64; found blocks of 32"),
    (f"{QUANTIZE} --set scheme.input_rule=even", "hif4 has no scale rule 'even'; choose one of reference, mse"),
    (f"{QUANTIZE} --recipe rtn --set solver.smoothing=[0.5]", "does not try exponents of smoothing"),
    (f"{QUANTIZE} --high-precision transformer:99", "has blocks 0 to 5"),
    (f"{QUANTIZE} --budget-scope each", "--budget-scope takes total or per-expert"),
    (f"{QUANTIZE} --max-memory nan", "--max-memory"),
    ("generate tiny --out new", "Give either --prompt TEXT or --prompts FILE"),
    ("generate tiny --prompts prompts.txt --out odd.yaml", "odd.yaml is a file and not a generation directory"),
    (f"{GENERATE} --dtype float8", "--dtype must be float32 or bfloat16"),
    (f"{GENERATE} --device cpu --offload model", "without a GPU use none"),
    (
        f"{GENERATE} --device cpu --offload group",
        "--offload group moves weights between a GPU and the CPU; without a GPU",
    ),
    (f"{GENERATE} --steps 4 --cache first-block", "with 4 steps there are none"),
    (f"{GENERATE} --preset lightning --cache first-block:0.1", "with 4 steps there are none"),
    (f"{GENERATE} --cache teacache", "--cache takes first-block or first-block:THRESHOLD"),
    (f"{GENERATE} --cache first-block:2", "above 0 and up to 1"),
    (
        f"{GENERATE} --cache first-block --steps 12 --context-parallel 2",
        "--cache cannot be used with --context-parallel",
    ),
    (f"{GENERATE} --attention-backend fa3", "needs the package fa3-fwd: pip install 'wan-ptq[attention]'"),
    (f"{GENERATE} --attention-backend fa3-fp8 --dtype float32", "in float32 (--dtype)"),
    (f"{GENERATE} --guidance-scale inf", "--guidance-scale"),
    (f"{GENERATE} --seed-scheme fixed", "--seed-scheme takes unit, vbench, same, found 'fixed'"),
    (f"{GENERATE} --preset mlperf", "There is no preset 'mlperf'; choose one of icme2026, lightning, mlperf-t2v"),
    (f"{GENERATE} --fixed-latent none.safetensors", "none.safetensors does not exist"),
    (f"{GENERATE} --fixed-latent archive.tar.gz", "--fixed-latent cannot be read"),
    (f"{GENERATE} --image-to-video", "text-to-video"),
    ("evaluate --candidate full --out new", "Give both --reference and --candidate"),
    ("evaluate --reference full --candidate full --out new --format int3", "Unknown format 'int3'"),
    ("evaluate --reference full --candidate full --out new --suite best", "There is no suite 'best'"),
    ("evaluate --reference full --candidate full --out new --gate worst", "gate"),
    ("evaluate --reference full --candidate full --out new", "full"),
    (
        "evaluate --reference full --candidate full --out new --allow-difference seed",
        "takes cache, attention-backend, found 'seed'",
    ),
    ("report full", "full"),
    ("package full --evaluation full", "full"),
    ("verify none.tar.gz", "none.tar.gz does not exist"),
    ("export packed --to gguf --out new", "--to takes one of compressed-tensors, msmodelslim, bf16"),
    ("export packed --to bf16 --out full", "full exists already"),
    ("export packed --to msmodelslim --out new", "this one is mxfp4. Use --to bf16."),
    ("export packed --to compressed-tensors --out new", "transform learned, blocks of 64), which it cannot do"),
    ("export full --to bf16 --out new", "full"),
    ("inspect full", "full"),
    ("compare full full", "full"),
    ("prompts none.txt", "none.txt does not exist"),
    ("status full", "full"),
    ("doctor full", "full"),
    ("doctor Wan-AI/Wan2.2-T2V-A14B-Diffusers", "on this machine"),
    ("demo --format int3", "Unknown format 'int3'"),
    ("demo --model large", "The demo runs on tiny-outliers, tiny or tiny-i2v"),
    ("bench linear --shape 5x5", "multiple of 64"),
    ("bench quantize --shape 5", "multiple of 64"),
]
"""Command -> what it is refused with."""
FIRST_LINES = [
    (CALIBRATE, "Recording tiny on 1 prompts of prompts.txt."),
    (f"{CALIBRATE} --dry-run", "Planning to record tiny"),
    (QUANTIZE, "Quantizing tiny to hif4 with the records of records."),
    (f"{QUANTIZE} --dry-run --json", "Planning to quantize tiny to hif4"),
    (GENERATE, "Generating videos of 1 prompts with tiny."),
    (f"{GENERATE} --dry-run --json", "Planning videos of 1 prompts with tiny."),
    ("verify archive.tar.gz", "Checking archive.tar.gz, generating one unit again."),
    ("export packed --to bf16 --out new", "Exporting packed for bf16."),
    ("doctor", "Looking at this machine."),
    ("demo --format hif4", "Running the whole job on tiny-outliers for hif4, in demo-out."),
    ("bench linear", "Timing linear layers."),
    ("bench quantize", "Timing quantize + pack"),
]
"""Command that loads something heavy -> what it says before."""


def test_the_package_and_the_command_line_import_only_light_packages(tmp_path: Path) -> None:
    loaded = python(tmp_path, f"import ptq, ptq.cli, ptq.known, ptq.rules, ptq.limits{FOREIGN}print(*found)")
    assert set(loaded.split()) == set()
    loaded = python(tmp_path, f"import ptq.cli.app{FOREIGN}print(*found)")
    assert set(loaded.split()) <= COMMAND_LINE


def test_requests_are_refused_before_anything_heavy_is_imported(place: Path) -> None:
    assert {command.split()[0] for command, _ in REFUSED} == {*COMMANDS}
    results, loaded = run_each(place, [command.split() for command, _ in REFUSED])
    cases = zip(REFUSED, results, strict=True)
    wrong = [
        (command, code, said) for (command, words), (code, said) in cases if code not in (1, 2) or words not in said
    ]
    assert not wrong
    assert loaded <= LIGHT
    assert not (place / "new").exists()


def test_what_is_done_is_said_before_anything_heavy_is_imported(place: Path) -> None:
    """Where heavy packages cannot be imported at all, the first line stands all the same, and nothing else."""
    results, loaded = run_each(place, [command.split() for command, _ in FIRST_LINES], block=True)
    cases = zip(FIRST_LINES, results, strict=True)
    wrong = [
        (command, code, said)
        for (command, line), (code, said) in cases
        if not said.startswith(line) or " Error: A library cannot be loaded" not in said
    ]
    assert not wrong
    assert loaded <= LIGHT
    assert not (place / "new").exists()
