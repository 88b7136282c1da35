"""Mutations of files, and what a command did with one: exit code, words, CPU time, memory, files."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
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


KEYS = ("missing", "extra", "twice")
"""What can be wrong with a key."""
NAMES = (*WHOLE, *(f"value {name}" for name in VALUES), *KEYS)
"""All mutations."""


def mutate(content: Any, number: tuple[str | int, ...], name: str) -> bytes:
    """A JSON file whose value at `number`, a number that is not negative, or its key, or the whole, suffered a mutation."""
    if name in WHOLE:
        return WHOLE[name](json.dumps(content).encode())
    if name == "missing":
        return json.dumps(at(content, number, lambda place, key: place.pop(key))).encode()
    if name == "extra":
        return json.dumps(at(content, number, lambda place, _: place.__setitem__("no_such_key", 1))).encode()
    placed = json.dumps(at(content, number, lambda place, key: place.__setitem__(key, PLACE)))
    text = f'1, "{number[-1]}": 1' if name == "twice" else VALUES[name.removeprefix("value ")]
    return placed.replace(f'"{PLACE}"', text).encode()


@dataclass(frozen=True)
class Outcome:
    """code: exit code. text: what stderr had. seconds: of CPU. megabytes: growth of the peak."""

    code: int
    text: str
    seconds: float
    megabytes: float


def command(*arguments: object) -> Outcome:
    """Run `ptq ARGUMENTS` in this process; one callable instead is run as a command is."""
    from ptq.cli.main import run
    from ptq.errors import PtqError

    before, started = peak(), time.process_time()
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


def peak() -> float:
    """Largest memory of this process so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def listing(folder: Path) -> dict[str, int]:
    """Relative path -> size of every file."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


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
