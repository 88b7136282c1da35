"""Child processes of tests are in the state of the test that starts them, not in that of the first one."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from children import PRELOADED, start_child

import ptq

NAMES = ("PTQ_TEST_EARLIER", "PTQ_TEST_LATER")


def tell(out: Path) -> None:
    out.write_text(json.dumps([*map(os.environ.get, NAMES), ptq.__file__]))


def test_a_child_has_the_environment_and_the_package_of_its_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in NAMES:
        with monkeypatch.context() as patch:
            patch.setenv(name, "set")
            child = start_child(tell, tmp_path / name)
            child.join()
        assert child.exitcode == 0
        found.append(json.loads((tmp_path / name).read_text()))
    assert found == [["set", None, ptq.__file__], [None, "set", ptq.__file__]]


def test_what_is_preloaded_exists() -> None:
    """The server passes over what it cannot import, and every child would import it again."""
    assert all(find_spec(name) for name in PRELOADED)
