"""JSON that others wrote: bounded before it becomes objects, and without what JSON lets writers get away with.

Depth and number of values are counted on the bytes, in linear time: a parser's memory grows with both. Refused are also
keys that occur twice, NaN and infinities, integers of more digits than any count has, bytes that are not UTF-8, and halves
of surrogate pairs, which no file can be written with.
"""

from __future__ import annotations

import json
import math
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

from ptq.errors import DamagedFileError, PtqError, shown
from ptq.limits import JSON_BYTES, JSON_DEPTH, JSON_DIGITS, JSON_VALUES

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKETS = bytes(set(range(256)) - set(_STEPS))
_CHUNK = 1 << 16


class JsonScan:
    """Depth and size of JSON as its bytes go by, in pieces of any size; it does not check that they are JSON.

    Args:
        values: how many values may pass. record: how many bytes may pass, and then `values` counts, between two moments at
            depth `top` or above, which is one record of a list or of an object of records; None: it is all one record.
    """

    def __init__(self, *, values: int = JSON_VALUES, record: int | None = None, top: int = 1) -> None:
        self._values, self._record, self._top = values, record, top
        self.depth, self._passed, self._since = 0, 0, 0
        self._in_string, self._escape = False, b""

    def feed(self, chunk: bytes) -> None:
        """Count one more piece; `depth` is then that at its end.

        Raises:
            ValueError: a limit is passed; says which.
        """
        text = (self._escape + chunk).replace(b"\\\\", b"")
        self._escape = b"\\" if text.endswith(b"\\") else b""
        parts = text.replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        depths = list(accumulate(map(_STEPS.__getitem__, outside.translate(None, _NO_BRACKETS)), initial=self.depth))
        self.depth = depths[-1]
        if max(depths) > JSON_DEPTH:
            raise ValueError(f"lists and objects are nested more than {JSON_DEPTH} deep")
        if self._record is not None and outside and min(depths) <= self._top:  # a piece of one long text ends no record
            self._passed = self._since = 0
        self._passed += outside.count(b",") + len(depths)
        self._since += len(chunk)
        if self._passed > self._values:
            raise ValueError(f"it holds more than {self._values} values")
        if self._record is not None and self._since > self._record:
            raise ValueError(f"one record is longer than {self._record >> 20} MiB")


def depth_after(start: bytes) -> int | None:
    """How many lists and objects are open where `start` of a JSON text ends; None where that is too deep to read."""
    scan = JsonScan()
    try:
        scan.feed(start)
    except ValueError:
        return None
    return scan.depth


def parse_json(data: bytes, *, nan: bool = False) -> Any:
    """The value of a whole JSON text, a byte order mark before it or not.

    Args:
        nan: let NaN and infinities through, for a reader that names the place where it refuses them.

    Raises:
        ValueError: not JSON, or more or other than is read here; the text says what and where.
    """
    scan = JsonScan()
    for start in range(0, len(data), _CHUNK):
        scan.feed(data[start : start + _CHUNK])
    value = json.loads(
        data.removeprefix(BYTE_ORDER_MARK).decode("utf-8"),
        object_pairs_hook=_object,
        parse_constant=None if nan else _no_constant,
        parse_int=_integer,
        parse_float=_float,
    )
    if _HALF.search(data):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError("a text holds half of a surrogate pair, which is no character") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in value if names.count(name) > 1)
        raise ValueError(f"the key {shown(repeated)} occurs twice in one object")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a finite number")


def _integer(digits: str) -> int:
    if len(digits) > JSON_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, {digits[:12]}...")
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def read_bounded(path: Path, limit: int = JSON_BYTES) -> bytes:
    """The bytes of a file that should be small.

    Raises:
        PtqError: it does not exist. DamagedFileError: no plain file (a directory, a pipe, a device), or longer than `limit`.
    """
    if not path.exists():
        raise PtqError(f"{path} does not exist.")
    if not path.is_file():
        raise DamagedFileError(f"{path} is not a file: expected one, not a directory, a pipe or a device.")
    with open(path, "rb") as handle:
        data = handle.read(limit + 1)
    if len(data) > limit:
        raise DamagedFileError(
            f"{path} is longer than {limit / 2**20:g} MiB, more than any file of its kind has. Is it the right file?"
        )
    return data
