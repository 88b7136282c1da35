"""Cost: memory of a large file, time of a thousand captions, and what is imported."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptq.prompts import read_prompts
from ptq.prompts.container import PROGRESS_STEP

MEASURE = """
import sys
from ptq.prompts import PromptScan, read_prompts, survey
mode, path = sys.argv[1:]
result = survey(PromptScan(path)) if mode == "survey" else read_prompts(path)
count = result.samples if mode == "survey" else len(result.samples)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
heavy = [name for name in ("torch", "av", "numpy", "PIL", "diffusers") if name in sys.modules]
print(count, result.sha256, int(peak) // 1024, ",".join(heavy))
"""


def measure(mode: str, path: Path) -> tuple[int, str, int, str]:
    """(samples, sha256, peak resident MB, heavy modules imported) of a fresh process."""
    run = subprocess.run([sys.executable, "-c", MEASURE, mode, str(path)], capture_output=True, text=True, check=True)
    count, digest, peak, *heavy = run.stdout.split()
    return int(count), digest, int(peak), "".join(heavy)


@pytest.fixture(scope="module")
def native_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 MB in 4,000 records: short metadata and long annotations, as in the native files."""
    path = tmp_path_factory.mktemp("native") / "total_part1.json"
    annotation = json.dumps({"masks": ["f" * 1000] * 50, "boxes": [1.5, 2.25] * 500})
    with open(path, "w") as handle:
        for index in range(4000):
            metadata = {"path": f"{index}.mp4", "face_cut": [0, 9], "crop": [0, 8, 0, 8], "cap": [f"caption {index}"]}
            opening = "{" if index == 0 else ","
            handle.write(f'{opening}"key{index}": {{"metadata": {json.dumps(metadata)}, "annotation": {annotation}}}\n')
        handle.write("}")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("mode", ["read", "survey"])
def test_memory_does_not_grow_with_the_file(native_file: Path, mode: str) -> None:
    assert native_file.stat().st_size > 200e6
    count, digest, peak_mb, heavy = measure(mode, native_file)
    assert count == 4000
    with open(native_file, "rb") as handle:
        assert digest == hashlib.file_digest(handle, "sha256").hexdigest()
    assert peak_mb < 80  # reading the bytes alone would take 240
    assert heavy == ""


def test_a_limit_stops_parsing_but_not_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"prompt": "one"}, {"prompt": "two"}, ' + b" " * (3 << 20) + b"this is not JSON")
    result = read_prompts(path, limit=2)
    assert [one.prompt for one in result.samples] == ["one", "two"]
    assert result.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_large_files_show_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"prompt": "one"}' + b" " * (2 * PROGRESS_STEP + 5) + b"]")
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr("ptq.prompts.container.PROGRESS_BYTES", PROGRESS_STEP)
    monkeypatch.setattr("ptq.ui.Progress.advance", lambda bar, count=1, note="": steps.append((count, bar.total)))
    read_prompts(path)
    assert sum(count for count, _ in steps) == 3
    assert {total for _, total in steps} == {3}


def test_a_thousand_captions_take_under_a_fifth_of_a_second(tmp_path: Path) -> None:
    path = tmp_path / "mm.json"
    caption = "A person walks along a street in the evening light. " * 13
    path.write_text(json.dumps([{"path": f"/x/OpenS2V-5M/{i}.mp4", "cap": f"{caption}{i}"} for i in range(1000)]))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        assert len(read_prompts(path, media_root=[tmp_path]).samples) == 1000
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.2
