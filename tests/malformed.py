"""Mutations of files, tables of files to mutate, and what a command did with one: exit code, words, CPU time, memory, files."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

MOST_SECONDS, MOST_MEGABYTES, MOST_CHARS = 2.0, 300, 2500
DEEP = 5000
PLACE = "MUTATED-HERE"
"""Stands for the value of the chosen field until the text of the value takes its place."""

VALUES: dict[str, str] = {
    "null": "null",
    "text": '"many"',
    "true": "true",
    "list": "[1]",
    "object": '{"a": 1}',
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "1e999": "1e999",
    "huge": "9" * 100_000,
    "digits": "9" * 41,
    "negative": "-1",
    "deep": "[" * DEEP + "]" * DEEP,
    "deep-objects": '{"a":' * DEEP + "1" + "}" * DEEP,
    "aliases": "[" + "[]," * 2_100_000 + "1]",
    "long": '"' + "x" * 3_000_000 + '"',
    "controls": '"\\u001b[31m\\u0000\\u0007"',
    "half": '"\\ud800"',
}
"""Name -> JSON text that takes the place of a number that is not negative; each must be refused."""

WHOLE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "space": lambda _: b" \n",
    "truncated": lambda data: data[: len(data) // 2].rstrip(),
    "garbage": lambda _: bytes(range(256)) * 16,
    "zeros": lambda _: bytes(4096),
    "utf-16": lambda data: data.decode().encode("utf-16"),
    "latin-1": lambda data: data.replace(b'"', b'"\xe9', 1),
    "tail": lambda data: data + b"\n]}",
    "number": lambda _: b"3",
    "string": lambda _: b'"text"',
    "nothing": lambda _: b"null",
    "list": lambda _: b"[3]",
    "brackets": lambda _: b"[" * (4 << 20),
    "braces": lambda _: b'{"a":' * (1 << 20),
}
"""Name -> what becomes of the bytes of the file."""


def at(content: Any, path: tuple[str | int, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy of JSON-like `content` after `change(container, key)` at `path`."""
    copy = json.loads(json.dumps(content))
    container = copy
    for part in path[:-1]:
        container = container[part]
    change(container, path[-1])
    return copy


KEYS = ("missing", "extra", "long-key", "twice")
"""What can be wrong with a key."""
NAMES = (*WHOLE, *(f"value {name}" for name in VALUES), *KEYS)
"""All mutations."""
SHORT = (
    *(
        "truncated",
        "list",
        "nothing",
        "value null",
        "value text",
        "value object",
        "value NaN",
        "value huge",
        "value deep",
    ),
    *("value negative", "value long", *KEYS),
)
"""Those that tell one schema from another; the others tell one reader of bytes from another."""
LONG_KEY = "k" * 1_000_000


def mutate(content: Any, number: tuple[str | int, ...], name: str) -> bytes:
    """A JSON file whose value at `number`, a number that is not negative, or its key, or the whole, suffered a mutation."""
    if name in WHOLE:
        return WHOLE[name](json.dumps(content).encode())
    if name == "missing":
        return json.dumps(at(content, number, lambda place, key: place.pop(key))).encode()
    if name in ("extra", "long-key"):
        key = LONG_KEY if name == "long-key" else "no_such_key"
        return json.dumps(at(content, number, lambda place, _: place.__setitem__(key, 1))).encode()
    placed = json.dumps(at(content, number, lambda place, key: place.__setitem__(key, PLACE)))
    text = f'1, "{number[-1]}": 1' if name == "twice" else VALUES[name.removeprefix("value ")]
    return placed.replace(f'"{PLACE}"', text).encode()


@dataclass(frozen=True)
class Artifact:
    """file: relative to the folder. content: its JSON. number: path to a number in it. arguments: the command on the folder.

    wrap: from the bytes of the JSON to those of the file. passes: mutations that are no fault here. beside: relative path ->
    content of good files that the command needs, or a function from the mutated bytes to that content. every: all mutations,
    not only `SHORT`. named: what the refusal names; by default the file.
    """

    file: str
    content: Any
    number: tuple[str | int, ...]
    arguments: Callable[[Path], tuple[object, ...]]
    wrap: Callable[[bytes], bytes] = lambda data: data
    passes: frozenset[str] = frozenset()
    beside: Mapping[str, Any] = field(default_factory=dict)
    every: bool = False
    named: str = ""

    def mutations(self) -> list[str]:
        """Names of the mutations that must be refused."""
        keys = KEYS if isinstance(self.number[-1], str) else ()
        passes = self.passes | ({"long-key"} if "extra" in self.passes else set())
        names = NAMES if self.every else SHORT
        return [name for name in names if name not in passes and (name not in KEYS or name in keys)]

    def refused(self, folder: Path, mutation: str) -> None:
        """Write the mutated file into `folder`, run the command, and see it refused by the file's name."""
        data = self.wrap(mutate(self.content, self.number, mutation))
        for name, content in self.beside.items():
            given = content(data) if callable(content) else content
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(given if isinstance(given, str) else json.dumps(given) + "\n")
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        assert (self.named or path.name) in check_refused(folder, *self.arguments(folder))


def cases(artifacts: Mapping[str, Artifact]) -> list[tuple[str, str]]:
    """(artifact, mutation) of a table."""
    return [(name, mutation) for name, artifact in artifacts.items() for mutation in artifact.mutations()]


def line(data: bytes) -> bytes:
    """A JSON line and a whole one behind it, so that it is no torn last line."""
    return data.replace(b"\n", b" ") + b"\n" + b'{"whole": 1}\n'


def by(read: Callable[[Path], Any]) -> Callable[[Path], tuple[object, ...]]:
    """The artifact's own reader, where a command reaches it only after long work."""
    return lambda folder: (lambda: read(folder),)


IN_LINES = frozenset({"empty", "space"})
"""Lines that are not there are no fault."""
FREE = frozenset({"extra", "value negative"})
"""In formats of others, keys of no meaning are passed over, and these numbers may be negative."""


@dataclass(frozen=True)
class Outcome:
    """code: exit code. text: what stderr had. seconds: of CPU. megabytes: peak of this run above what was in use before it."""

    code: int
    text: str
    seconds: float
    megabytes: float


def command(*arguments: object) -> Outcome:
    """Run `ptq ARGUMENTS` in this process; one callable instead is run as a command is."""
    warm()
    return run_command(*arguments)


@cache
def warm() -> None:
    """What is imported on first use is no cost of a file."""
    import ptq.quantization.run
    import ptq.wan.check  # noqa: F401
    from ptq.cli.common import quiet_libraries

    quiet_libraries()
    outcome = run_command("quantize", "tiny", "--calibration", "no-such-folder", "--format", "hif4", "--out", "no-such")
    assert outcome.code == 1, outcome


def run_command(*arguments: object) -> Outcome:
    """As `command`, with the cost of imports."""
    from ptq.cli.main import run
    from ptq.errors import PtqError

    before, started = reset_peak(), time.process_time()
    errors, argv, code = io.StringIO(), sys.argv, 0
    sys.argv = ["ptq", *map(str, arguments)]
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            if callable(arguments[0]):
                arguments[0]()
            else:
                run()
    except PtqError as error:
        code = error.exit_code
        errors.write(f"Error: {error}")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.argv = argv
    return Outcome(code, errors.getvalue(), time.process_time() - started, peak() - before)


def reset_peak() -> float:
    """Let the peak begin anew, so that an earlier and larger one hides nothing; memory in use now, in megabytes."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would be taken again without a trace
    Path("/proc/self/clear_refs").write_text("5")
    return peak("VmRSS")


def peak(name: str = "VmHWM") -> float:
    """Largest memory of this process since `reset_peak`, in megabytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) / 1024


def listing(folder: Path) -> dict[str, int]:
    """Relative path -> size of every file, locks apart."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "state")
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def check_refused(folder: Path, *arguments: object) -> str:
    """The command refuses with one short paragraph, soon, in little memory, and leaves every file as it was; its words."""
    before = listing(folder)
    outcome = command(*arguments)
    assert outcome.code in (1, 2), outcome
    said = [line for line in outcome.text.splitlines() if line.strip()]
    message = "\n".join(said[-1:])
    assert message.startswith("Error: ") and sum(line.startswith("Error:") for line in said) == 1, outcome.text[-3000:]
    assert len(message) < MOST_CHARS and "Traceback" not in outcome.text
    assert outcome.seconds < MOST_SECONDS, outcome.seconds
    assert outcome.megabytes < MOST_MEGABYTES, outcome.megabytes
    assert listing(folder) == before
    return message
