"""A few random disturbances of real commands, with a seed; `scripts/torture.py` makes as many as are asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tree_comparison import differences, leftovers, read_tree

SCRIPT = Path(__file__).parents[1] / "scripts" / "torture.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
def test_a_few_random_disturbances(tmp_path: Path):
    # With this seed every kind comes once, by turns in both stages.
    command = [sys.executable, str(SCRIPT), "--tries", "4", "--seed", "13", "--keep", str(tmp_path / "bench")]
    result = subprocess.run(
        [*command, "--stages", "calibrate,reference", "--kinds", "kill,term,int,limit"],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0 and "4 of 4 tries held" in result.stdout, result.stdout + result.stderr


def test_the_comparison_sees_what_differs(tmp_path: Path):
    for name, seconds in (("a", 1), ("b", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(f'{{"seconds": {seconds}, "peak_memory_bytes": 7, "seed": 5}}')
        (folder / "weights").write_bytes(b"w")
    expected = [read_tree(tmp_path / name) for name in "ab"]
    found = tmp_path / "a"
    assert differences(read_tree(found), expected) == []
    (found / "run.json").write_text('{"seconds": 3, "peak_memory_bytes": 8, "seed": 5}')
    assert differences(read_tree(found), expected) == []
    (found / "run.json").write_text('{"seconds": 3, "peak_memory_bytes": 7, "seed": 6}')
    (found / "weights").write_bytes(b"v")
    (found / "weights").chmod(0o600)
    (found / ".weights.0a0a0a-5.part").touch()
    wrong = differences(read_tree(found), expected)
    assert len([text for text in wrong if text.startswith(("run.json#.seed", "weights:", "weights mode"))]) == 3
    assert any("should not be there" in text for text in wrong)
    assert leftovers(tmp_path) == [str(found / ".weights.0a0a0a-5.part")]
    (tmp_path / "out.partial").mkdir()
    assert len(leftovers(tmp_path)) == 2 and len(leftovers(tmp_path, resumable=True)) == 1
