"""Disturb every command at random moments, run it again, and demand the result of an undisturbed run.

    python scripts/torture.py --tries 200 --seed 1 [--stages generate,package] [--kinds kill,full]

A try: one stage on the embedded model, one disturbance (a signal, a full disk, a place that cannot be written, a second
process, a limit on memory or open files), then the same command undisturbed. It fails where a traceback was printed, where
an interrupted command left temporary files, where the second run did not succeed, or where the files differ from those of
an undisturbed run (what two undisturbed runs disagree on is not compared: times). docs/reliability.md has the counts.

Commands run in children forked from this process, which has imported everything; some are started from nothing (`cold`).
Linux; the full disk needs root, and falls back to a limit of the size of files. Exit code 1 on any failure.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import pkgutil
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads of the parent would not survive the fork

from tree_comparison import Tree, differences, leftovers, read_tree

SIZE = ("--height", "32", "--width", "32", "--num-frames", "5", "--steps", "3")
MAKE = ("--prompts", "in/prompts.txt", *SIZE, "--save-frames")
STAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "prompts": (("prompts", "in/prompts.txt", "--json"), ()),
    "calibrate": (
        (
            "calibrate",
            "tiny",
            "--prompts",
            "in/calibration.txt",
            "--out",
            "out/cal",
            *SIZE,
            "--records-per-prompt",
            "2",
        ),
        (),
    ),
    "quantize": (
        ("quantize", "tiny", "--calibration", "in/cal", "--format", "hif4", "--recipe", "rtn", "--out", "out/q"),
        ("cal",),
    ),
    "reference": (("generate", "tiny", *MAKE, "--out", "out/ref"), ()),
    "generate": (("generate", "in/q", *MAKE, "--out", "out/cand"), ("q",)),
    "evaluate": (
        ("evaluate", "--reference", "in/ref", "--candidate", "in/cand", "--out", "out/eval", "--suite", "tiny"),
        ("ref", "cand"),
    ),
    "report": (
        ("report", "in/eval", "--html", "out/r.html", "--pdf", "out/r.pdf", "--checkpoint", "in/q"),
        ("eval", "ref", "cand", "q"),
    ),
    "package": (
        ("package", "in/q", "--evaluation", "in/eval", "--out", "out/s.tar.gz", "--allow-failing-gate"),
        ("eval", "ref", "cand", "q"),
    ),
    "verify": (("verify", "in/s.tar.gz", "--no-regenerate", "--json"), ("s.tar.gz",)),
    "export": (("export", "in/q", "--to", "bf16", "--out", "out/x"), ("q",)),
}
"""Stage -> its command, and which results of the others it reads."""
PRODUCERS = {
    Path(command[command.index("--out") + 1]).name: stage
    for stage, (command, _) in STAGES.items()
    if "--out" in command
}
"""Result -> the stage that makes it."""
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "hup": signal.SIGHUP}
KINDS = (*SIGNALS, "full", "limit", "readonly", "two", "files", "memory", "cold")
ENDINGS = {0, 1, 2, *(128 + number for number in SIGNALS.values()), -signal.SIGKILL}
"""Exit codes that a disturbed command may have."""
TIMEOUT_S = 120.0
_CAPABILITY_VERSION = 0x20080522
PROMPTS = 3


@dataclass
class Child:
    """One command in a process of its own, its output in a file."""

    pid: int
    log: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self) -> int:
        """The exit code, negative for a signal; -SIGALRM when it had to be killed because it hung."""
        while time.monotonic() - self.started < TIMEOUT_S:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return -signal.SIGALRM

    @property
    def text(self) -> str:
        """Everything it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Bench:
    """The folder in which every try happens: always the same paths, because results may hold them."""

    def __init__(self, root: Path) -> None:
        self.root, self.work, self.store, self.tmp = root, root / "work", root / "made", root / "tmp"
        for path in (self.work, self.store, self.tmp):
            path.mkdir(parents=True, exist_ok=True)
        root.chmod(0o755)
        self._children = 0
        self.expected: dict[str, list[Tree]] = {}
        self.seconds: dict[str, float] = {}
        self.codes: dict[str, int] = {}

    def prepare(self, stage: str) -> None:
        """Fresh inputs and an empty `out`."""
        shutil.rmtree(self.work)
        (self.work / "in").mkdir(parents=True)
        (self.work / "out").mkdir()
        for prompts in self.root.glob("*.txt"):
            shutil.copy(prompts, self.work / "in")
        for name in STAGES[stage][1]:
            source, target = self.store / name, self.work / "in" / name
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy2(source, target)

    def start(self, stage: str, setup: Callable[[], None] = lambda: None, *, cold: bool = False) -> Child:
        """The stage's command in a forked child, or (`cold`) in a new interpreter."""
        self._children += 1
        log = self.root / f"log-{self._children}.txt"
        log.touch()  # also where the child is killed before it has opened it
        command, environment = STAGES[stage][0], {**os.environ, "TMPDIR": str(self.tmp)}
        if cold:
            with open(log, "wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "ptq.cli.main", *command],
                    cwd=self.work, stdout=output, stderr=output, env=environment, start_new_session=True,
                )  # fmt: skip
            process.returncode = 0  # waited for by `Child`
            return Child(process.pid, log)
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = _in_child(self.work, self.tmp, log, command, setup)
            finally:
                os._exit(code)
        return Child(pid, log)

    def learn(self, stages: Sequence[str]) -> None:
        """Two undisturbed runs of every stage: what is expected, and how long it takes."""
        for stage in stages:
            trees = []
            for _ in range(2):
                self.prepare(stage)
                child = self.start(stage)
                code = child.wait()
                if code not in (0, 1) or "Error" in child.text:  # 1: `verify` of what did not pass its gate
                    raise SystemExit(f"{stage} fails undisturbed (exit code {code}):\n{child.text}")
                self.codes[stage] = code
                self.seconds[stage] = time.monotonic() - child.started
                trees.append(self.result(child))
            self.expected[stage] = trees
            for path in (self.work / "out").iterdir():
                target = self.store / path.name
                if not target.exists():
                    shutil.move(path, target)
            print(f"{stage}: {self.seconds[stage]:.1f} s undisturbed", flush=True)

    def result(self, child: Child) -> Tree:
        """What a command made: files, or what it printed."""
        return read_tree(self.work / "out") or {"printed": child.text}

    def disturb(self, stage: str, kind: str, draw: random.Random) -> tuple[str, list[Child], list[int]]:
        """Run a stage with one disturbance; says which, and how the children ended."""
        out, span = self.work / "out", self.seconds[stage]
        if kind in SIGNALS or kind == "cold":
            delay = draw.uniform(0.15, 2.5) if kind == "cold" else draw.uniform(0, 1.1 * span)
            number = SIGNALS[kind if kind in SIGNALS else draw.choice(sorted(SIGNALS))]
            child = self.start(stage, cold=kind == "cold")
            time.sleep(delay)
            os.kill(child.pid, number)
            return f"{number.name} after {delay:.3f} s", [child], [child.wait()]
        if kind == "two":
            first, delay = self.start(stage), draw.uniform(0, span)
            time.sleep(delay)
            children = [first, self.start(stage)]
            return f"a second process after {delay:.3f} s", children, [child.wait() for child in children]
        if kind == "readonly":
            out.chmod(0o555)
            child = self.start(stage, _obey_modes)
            code = child.wait()
            out.chmod(0o755)
            return "out cannot be written", [child], [code]
        if kind == "full" and _mount(out, size := int(10 ** draw.uniform(3.7, 6.5))):
            child = self.start(stage)
            code = child.wait()
            _mount(out, 1 << 30, "remount,")
            return f"a disk of {size} bytes", [child], [code]
        limits = {"memory": resource.RLIMIT_AS, "files": resource.RLIMIT_NOFILE}
        limit = limits.get(kind, resource.RLIMIT_FSIZE)
        amount = {
            "memory": _address_space() + int(10 ** draw.uniform(6.5, 9)),
            "files": draw.randint(5, 14),
        }.get(kind, int(10 ** draw.uniform(2, 6)))
        child = self.start(stage, lambda: resource.setrlimit(limit, (amount, amount)))
        return f"limit {kind} {amount}", [child], [child.wait()]

    def attempt(self, stage: str, kind: str, draw: random.Random) -> tuple[str, list[str]]:
        """One try: what was done, and what went wrong."""
        self.prepare(stage)
        out, wrong = self.work / "out", []
        try:
            what, children, codes = self.disturb(stage, kind, draw)
            if not set(codes) <= ENDINGS:
                wrong.append(f"exit codes {codes}")
            if -signal.SIGKILL not in codes and kind != "files":  # to list a folder and empty it takes an open file
                wrong += [f"left behind: {name}" for name in leftovers(self.work, self.tmp, resumable=True)]
            again = self.start(stage)
            code = again.wait()
            if code != self.codes[stage] and not (code == 2 and "exists already" in again.text):
                wrong.append(f"the second run ended with {code}: {again.text[-600:]}")
            for child in (*children, again):
                if "Traceback" in child.text or "Exception ignored" in child.text:
                    wrong.append(f"traceback: {child.text[-1500:]}")
                elif child in children and not child.text.strip() and -signal.SIGKILL not in codes:
                    wrong.append("ended without a word")
            wrong += differences(self.result(again), self.expected[stage])
            wrong += [f"left behind at last: {name}" for name in leftovers(self.work, self.tmp)]
        finally:
            if os.path.ismount(out):
                subprocess.run(["umount", "-l", str(out)], check=True)
            shutil.rmtree(self.tmp)
            self.tmp.mkdir()
            self.tmp.chmod(0o1777)
        return f"{what} -> {codes}", wrong


def _in_child(work: Path, tmp: Path, log: Path, command: Sequence[str], setup: Callable[[], None]) -> int:
    """Everything a started `ptq` would do, in a fork."""
    from ptq.cli.main import run

    os.setsid()
    os.chdir(work)
    os.environ["TMPDIR"], tempfile.tempdir = str(tmp), None
    output = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["ptq", *command]
    setup()
    try:
        run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _obey_modes() -> None:
    """As root: give up the right to ignore permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER)."""
    libc, words = ctypes.CDLL(None, use_errno=True), ctypes.c_uint32 * 6
    header, sets = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), words()
    libc.capget(header, sets)
    for index in range(3):  # effective, permitted, inheritable; the second half are capabilities above 31
        sets[index] &= ~(1 << 1 | 1 << 2 | 1 << 3)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _mount(folder: Path, size: int, how: str = "") -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"{how}size={size},mode=755", "tmpfs", str(folder)]
    return os.getuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _with_sources(stages: Sequence[str]) -> list[str]:
    """The stages and those whose results they read, in the order in which they can run."""
    needed, unseen = set[str](), list(stages)
    while unseen:
        stage = unseen.pop()
        needed.add(stage)
        unseen += [PRODUCERS[name] for name in STAGES[stage][1]]
    return [stage for stage in STAGES if stage in needed]


def _import_everything() -> None:
    import ptq

    for module in pkgutil.walk_packages(ptq.__path__, "ptq."):
        if not module.name.endswith("vbench.driver"):
            importlib.import_module(module.name)
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel  # noqa: F401
    from transformers import AutoTokenizer, UMT5EncoderModel  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(name for name in STAGES if name != "reference"))
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--keep", type=Path, help="Folder to work in; it and the logs are kept.")
    options = parser.parse_args()
    stages, kinds = options.stages.split(","), options.kinds.split(",")
    unknown = {*stages} - {*STAGES} | {*kinds} - {*KINDS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    began = time.monotonic()
    for ignored in (signal.SIGINT, signal.SIGHUP):  # under `nohup` and `&`, and then in every child too
        signal.signal(ignored, signal.SIG_DFL)
    _import_everything()
    root = options.keep or Path(tempfile.mkdtemp(prefix="ptq-torture-"))
    root.mkdir(parents=True, exist_ok=True)
    from ptq.tiny.grammar import calibration_prompts, held_out_prompts

    for name, texts in (("prompts", held_out_prompts(PROMPTS)), ("calibration", calibration_prompts(PROMPTS))):
        (root / f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    bench = Bench(root)
    bench.tmp.chmod(0o1777)
    bench.learn(_with_sources(stages))
    tries, failures = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for number in range(options.tries):
        draw = random.Random(f"{options.seed}/{number}")
        stage, kind = stages[number % len(stages)], draw.choice(kinds)
        what, wrong = bench.attempt(stage, kind, draw)
        tries[stage, kind] += 1
        failures[stage, kind] += bool(wrong)
        print(f"{number} {stage} {kind}: {what}", *(f"\n    WRONG {text}" for text in wrong), flush=True)
    print(f"\n{'stage':<12}" + "".join(f"{kind:>10}" for kind in kinds))
    for stage in stages:
        cells = (f"{tries[stage, kind] - failures[stage, kind]}/{tries[stage, kind]}" for kind in kinds)
        print(f"{stage:<12}" + "".join(f"{cell:>10}" for cell in cells))
    failed = failures.total()
    print(
        f"\n{options.tries - failed} of {options.tries} tries held, seed {options.seed}, {time.monotonic() - began:.0f} s"
    )
    if options.keep is None and not failed:
        shutil.rmtree(root)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
