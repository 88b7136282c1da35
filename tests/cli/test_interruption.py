"""Signals at any moment: one line, exit code 128 + number, nothing left, children gone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptq.cli.interruption import MESSAGE, SIGNALS
from ptq.store.files import PARTIAL_SUFFIX

COMMANDS = {
    "demo": ("--out", "demo"),
    "calibrate": ("tiny", "--prompts", "prompts.txt", "--out", "calibration"),
    "quantize": ("tiny", "--calibration", "calibration", "--format", "hif4", "--out", "packed"),
    "generate": ("tiny", "--prompts", "prompts.txt", "--out", "run"),
    "evaluate": ("--reference", "run", "--candidate", "run", "--out", "evaluation"),
    "report": ("evaluation",),
    "package": ("packed", "--evaluation", "evaluation"),
    "verify": ("submission.tar.gz",),
    "inspect": ("packed",),
    "compare": ("packed", "packed"),
    "export": ("packed", "--to", "bf16", "--out", "exported"),
    "prompts": ("prompts.txt",),
    "status": ("run",),
    "doctor": (),
    "bench": ("quantize",),
}


@pytest.fixture(autouse=True, scope="module")
def signals_arrive() -> Iterator[None]:
    """Where the tests run under `nohup` or behind `&`, signals are ignored, and would be in every child."""
    ignored = {number: signal.getsignal(number) for number in SIGNALS}
    ignored = {number: handler for number, handler in ignored.items() if handler == signal.SIG_IGN}
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in ignored.items():
        signal.signal(number, handler)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ptq.cli.main", *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_until_listening(process: subprocess.Popen[str]) -> None:
    """Until SIGHUP has a handler, the first thing that the command line does."""
    deadline = time.monotonic() + 60
    status = Path(f"/proc/{process.pid}/status")
    while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) & 1:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)


def test_every_command_is_listed():
    from ptq.cli.app import ASIDE, JOB

    assert {*COMMANDS} == {command.__name__ for command in (*JOB, *ASIDE)} | {"bench"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_every_command_while_it_still_imports(tmp_path: Path):
    draw = random.Random(5)
    (tmp_path / "prompts.txt").write_text("a red disc\n")
    for name, arguments in COMMANDS.items():
        process, number = start(tmp_path, name, *arguments), draw.choice(SIGNALS)
        wait_until_listening(process)
        time.sleep(draw.uniform(0, 0.05))
        process.send_signal(number)
        assert (process.communicate(timeout=60)[0], process.returncode) == (f"{MESSAGE}\n", 128 + number), name
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


IMPORTING = """
import os, signal, sys
from ptq.cli import interruption
interruption.listen()
try:  # as libraries do around an optional import
    os.kill(os.getpid(), signal.SIGINT)
    import ptq.version
except:
    pass
print("went on")
"""
WRITING = """
import os, signal, sys, threading, time
from pathlib import Path
from ptq.cli import interruption
from ptq.store.ending import run_child
from ptq.store.files import atomic_path, temporary_directory
from ptq.store.locks import exclusive
interruption.listen()
with exclusive(Path(".out.lock"), "it"), temporary_directory(Path("."), "scratch"), atomic_path("whole") as temporary:
    temporary.write_text("half")
    assert len(os.listdir(".")) == 3
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    run_child(["sh", "-c", "sleep 600 & echo $! $$ > ../pids; wait"])
"""
BUSY = """
import ctypes, os, signal, threading, time
from ptq.cli import interruption
interruption.listen()
for delay in (0.3, 0.6):
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
deadline = time.monotonic() + 60
while time.monotonic() < deadline:
    ctypes.CDLL(None).sleep(60)  # C code that no handler interrupts; without the signal it would go on
    signal.pthread_sigmask(signal.SIG_BLOCK, interruption.SIGNALS)
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=50)


def test_an_import_that_swallows_exceptions_does_not_swallow_the_signal(tmp_path: Path):
    result = python(IMPORTING, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", f"{MESSAGE}\n")


def test_nothing_stays_behind_and_children_end_too(tmp_path: Path):
    folder = tmp_path / "work"
    folder.mkdir()
    result = python(WRITING, folder)
    assert (result.returncode, result.stderr) == (143, f"{MESSAGE}\n")
    assert list(folder.iterdir()) == []
    deadline = time.monotonic() + 10
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        while is_running(pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


MAKING_A_LOCK = """
import os, signal
from pathlib import Path
from ptq.cli import interruption
from ptq.store import locks
interruption.listen()
locks._flock = lambda handle, how: os.kill(os.getpid(), signal.SIGTERM)
with locks.exclusive(Path(".out.lock"), "it"):
    pass
"""


def test_a_lock_that_was_made_and_not_yet_held_goes_too(tmp_path: Path):
    assert python(MAKING_A_LOCK, tmp_path).returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_the_second_signal_ends_a_process_that_is_busy_in_c(tmp_path: Path):
    began = time.monotonic()
    result = python(BUSY, tmp_path)
    assert result.returncode == 130 and MESSAGE in result.stderr and time.monotonic() - began < 20


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path):
    code = "import os, signal\nfrom ptq.cli import interruption\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\ninterruption.listen()\nos.kill(os.getpid(), signal.SIGHUP)\nprint('went on')"
    result = python(code, tmp_path)
    assert (result.returncode, result.stdout) == (0, "went on\n")


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path):
    code = "import os, signal, sys\nfrom pathlib import Path\nfrom ptq.store.files import atomic_path, temporary_directory\nwith temporary_directory(Path('.'), 'scratch') as folder, atomic_path('target') as temporary:\n    (folder / 'inside').touch(); temporary.touch()\n    print(os.getpid(), flush=True)\n    sys.stdin.read()"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    dead, living = (writer.stdout.readline().strip() for writer in writers if writer.stdout)
    writers[0].kill()
    writers[0].wait()
    other = tmp_path / f".other.0a0a0a-{dead}{PARTIAL_SUFFIX}"  # of another machine: nothing is known about it
    other.touch()
    assert sum(dead in path.name for path in tmp_path.iterdir()) == 3
    command = [sys.executable, "-c", "from ptq.store.files import write_bytes; write_bytes('new', b'')"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert {path.name for path in tmp_path.iterdir() if dead in path.name} == {other.name}
    assert sum(living in path.name for path in tmp_path.iterdir()) == 2
    writers[1].communicate("")
    assert {path.name for path in tmp_path.iterdir()} == {other.name, "new", "target"}


def test_a_child_of_this_process_undoes_nothing_of_its_parent(tmp_path: Path):
    from ptq.store.ending import undo_all
    from ptq.store.files import atomic_path

    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_bytes(b"whole")
        pid = os.fork()
        if pid == 0:
            undo_all()
            os._exit(0)
        os.waitpid(pid, 0)
        assert temporary.exists()
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_what_cannot_be_undone_now_is_undone_when_the_command_ends(tmp_path: Path):
    """No file can be opened while the error holds them all, so a folder cannot be listed and removed."""
    code = """
import resource, sys
from pathlib import Path
sys.argv = ["ptq", "prompts", "none"]
from ptq.cli import app, boundary, main
from ptq.store.files import temporary_directory
def greedy():
    with temporary_directory(Path("."), "scratch") as folder:
        (folder / "file").touch()
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        held = []
        while True:
            held.append(open("/dev/null"))
app.app = greedy
main.run()
"""
    result = python(code, tmp_path)
    assert result.returncode == 1 and "Too many open files" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
