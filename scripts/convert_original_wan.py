"""Convert a Wan 2.2 release in its original layout (or two single-file experts) to a diffusers pipeline directory.

python scripts/convert_original_wan.py Wan2.2-T2V-A14B --base Wan-AI/Wan2.2-T2V-A14B-Diffusers --out wan-t2v
python scripts/convert_original_wan.py --transformer high.safetensors --transformer-2 low.safetensors \\
    --base Wan-AI/Wan2.2-T2V-A14B-Diffusers --out wan-t2v

Only the experts are converted, by streaming: no memory and no change of value. VAE, text encoder and tokenizer are copied
from --base, a directory or a hub id (its own experts are not downloaded).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub import snapshot_download

from ptq.errors import PtqError
from ptq.wan.original import convert_original, find_original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", nargs="?", type=Path, help="directory of the original release")
    parser.add_argument("--transformer", type=Path, help="high-noise (or only) expert: folder or .safetensors file")
    parser.add_argument("--transformer-2", type=Path, help="low-noise expert")
    parser.add_argument("--base", required=True, help="diffusers pipeline of the same variant: directory or hub id")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    given = {"transformer": args.transformer, "transformer_2": args.transformer_2}
    experts = {name: path for name, path in given.items() if path is not None}
    if args.release is not None:
        experts = find_original(args.release) | experts
    if not experts:
        parser.error("name a release directory that holds original weights, or --transformer")
    base = Path(args.base)
    if not base.is_dir():
        base = Path(snapshot_download(args.base, ignore_patterns=["transformer*/*.safetensors*"]))
    try:
        print(f"Wrote {convert_original(experts, base, args.out)}")
    except PtqError as error:
        raise SystemExit(f"Error: {error}") from error


if __name__ == "__main__":
    main()
