"""Write a random-weight Wan pipeline directory of any size, with real diffusers classes.

python scripts/make_random_wan.py --variant T2V-A14B --layers 2 --width 128 --out /tmp/wan-small
python scripts/make_random_wan.py --variant T2V-A14B --layers 2 --true-width --out /tmp/wan-wide
"""

from __future__ import annotations

import argparse

from random_model import make_random_pipeline

from ptq.errors import PtqError
from ptq.wan.variants import VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=list(VARIANTS), default="T2V-A14B")
    parser.add_argument("--layers", type=int, default=2, help="transformer blocks of each expert")
    parser.add_argument("--width", type=int, default=128, help="inner dimension, a multiple of 64")
    parser.add_argument("--true-width", action="store_true", help="the variant's real width and feed-forward size")
    parser.add_argument("--ffn", type=int, help="feed-forward dimension")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    width = None if args.true_width else args.width
    try:
        path = make_random_pipeline(
            args.out, args.variant, layers=args.layers, width=width, ffn=args.ffn, seed=args.seed
        )
    except PtqError as error:
        raise SystemExit(f"Error: {error}") from error
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
