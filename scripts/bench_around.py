"""Speed of the parts around the model: `ptq --help`, reading captions, loading a packed expert against reading its bytes.

python scripts/make_random_wan.py --variant TI2V-5B --layers 16 --width 3072 --out /tmp/wan-big     # then calibrate, quantize
python scripts/bench_around.py --checkpoint /tmp/wan-big-hif4 --captions captions.txt

"Cold" asks the kernel to drop the file's pages first (posix_fadvise), which it may not do for all of them. Candidates take
turns; the median of the wall times and of the processor times is printed. On a busy machine compare the latter.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

CHUNK = 8 * 2**20


def drop_pages(files: list[Path]) -> None:
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes(files: list[Path], *, checksum: bool) -> None:
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    for file in files:
        crc = 0
        with open(file, "rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                crc = zlib.crc32(view[:count], crc) if checksum else 0


def load_expert(directory: Path) -> None:
    import torch
    from diffusers import WanTransformer3DModel

    WanTransformer3DModel.from_pretrained(directory, dtype=torch.bfloat16)


def measure(candidates: dict[str, Callable[[], None]], files: list[Path], *, cold: bool, repeats: int) -> None:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            if cold:
                drop_pages(files)
            wall, processor = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    for name, pairs in times.items():
        wall, processor = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"{'cold' if cold else 'warm'}  {name:30s} {wall:7.2f} s wall  {processor:7.2f} s processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="packed pipeline directory; its `transformer` is loaded")
    parser.add_argument("--captions", type=Path, help="prompt file")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    command = [sys.executable, "-c", "from ptq.cli.main import run; run()", "--help"]
    shown = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        shown.append(time.perf_counter() - start)
    print(f"ptq --help: {statistics.median(shown):.2f} s wall (best {min(shown):.2f})")
    if args.captions:
        from ptq.prompts import read_prompts

        read = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            count = len(read_prompts(args.captions).samples)
            read.append(time.perf_counter() - start)
        print(f"{count} captions: {statistics.median(read):.3f} s wall (best {min(read):.3f})")
    if args.checkpoint:
        import ptq  # noqa: F401  (registers the quantizer)

        directory = args.checkpoint / "transformer"
        files = sorted(directory.glob("*.safetensors"))
        load_expert(directory)  # imports and first allocations are not what is measured
        print(f"{directory}: {sum(file.stat().st_size for file in files) / 1e9:.3f} GB")
        candidates: dict[str, Callable[[], None]] = {
            "read": lambda: read_bytes(files, checksum=False),
            "read + CRC-32": lambda: read_bytes(files, checksum=True),
            "from_pretrained": lambda: load_expert(directory),
        }
        for cold in (False, True):
            measure(candidates, files, cold=cold, repeats=args.repeats)


if __name__ == "__main__":
    main()
