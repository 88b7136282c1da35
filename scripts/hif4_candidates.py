"""Other choices of HiF4's scales, under the default recipe, on held-out records; for docs/log.md.

    python scripts/hif4_candidates.py --work build/ablation --out docs/data

 - Power-of-two group scales (E6M2 mantissa 0) on weights, on inputs, on both: the values are then exact in FP8.
 - A search of the inputs' group scales: E6M2 bytes around the reference's, the micro-exponents by the reference's
   thresholds or free, the smallest squared error of the group wins. What is stored stays plain HiF4.

The rule that won, bytes 0..+2 with free micro-exponents, is `mse` in `ptq.scheme.hif4` and the default of inputs; here
everything counts against the reference's scales. Everything else is the default recipe, solved with the candidate in place: its search of
weight scales (of powers of two where weights are confined to them) with GPTQ on top, its choice of a basis with inputs
quantized the candidate's way. (The figures in docs/log.md were measured with bias correction, which both sides had.)
Records and measure are those of scripts/ablation.py; both scripts can share a work directory. CPU only. Writes <out>/hif4-candidates-<model>.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from ablation import as_table, record_both, sweep_parser
from held_out import sweep
from torch import Tensor

from ptq import known
from ptq.cli.common import quiet_libraries
from ptq.config import load_recipe
from ptq.quantization.settings import QuantizeSettings
from ptq.scheme import FORMATS, hif4_search, native
from ptq.scheme.format import NAN_SCALE, Codes
from ptq.scheme.hif4 import HiF4
from ptq.scheme.hif4_words import BINADE, SCALE_BIAS, join_words, scale_values
from ptq.scheme.tensors import grouped
from ptq.store.files import write_json
from ptq.wan.loading import resolve_model

DEFAULT = "default recipe, reference's scales"


@dataclass(frozen=True)
class Rule:
    """How group scales are chosen.

    Attributes:
        offsets: E6M2 bytes tried, relative to the base byte; on equal error the first one wins.
        free: micro-exponents are the best ones for each byte, else they follow the reference's thresholds.
        power_of_two: the base byte is the exponent of the group's maximum with mantissa 0, else the reference's byte.
    """

    offsets: tuple[int, ...]
    free: bool = True
    power_of_two: bool = False

    @property
    def evaluations(self) -> int:
        """Steps that each element is rounded with: S(byte + 4) = 2 S(byte), so steps coincide between bytes."""
        shifts = range(3) if self.free else range(1)
        return len({offset + 4 * shift for offset in self.offsets for shift in shifts})


POWER_OF_TWO = Rule((0, 4, -4), power_of_two=True)
MAXIMUM_EXPONENT = Rule((0,), free=False, power_of_two=True)
INPUT_SEARCHES = {
    "bytes 0..+1, thresholds": Rule((0, 1), free=False),
    "bytes 0..+2, thresholds": Rule((0, 1, 2), free=False),
    "bytes -1..+2, thresholds": Rule((0, -1, 1, 2), free=False),
    "byte 0, free": Rule((0,)),
    "bytes -1..0, free": Rule((0, -1)),
    "bytes 0..+1, free": Rule((0, 1)),
    "bytes 0..+2, free": Rule((0, 1, 2)),
    "bytes -1..+1, free": Rule((0, -1, 1)),
    "bytes -4..+2, free": Rule(hif4_search.SEARCHED_OFFSETS),
}


class Candidate(HiF4):
    """HiF4 with other scales of weights and inputs; None keeps the package's own.

    The solvers and layers convert weights with `quantize` and inputs with `fake_quantize`, where no compiled kernel does both.
    """

    def __init__(self, name: str, weights: Rule | None = None, inputs: Rule | None = None) -> None:
        self.name, self.weights, self.inputs = name, weights, inputs  # type: ignore[misc]

    def kernels(self, rule: str, ties: str) -> native.Kernels | None:  # type: ignore[override]
        """None, for they have the package's scales, where this one has others."""
        return super().kernels(rule, ties) if self.weights is self.inputs is None else None

    def search_scales(self, w_rk: Tensor, weights_k: Tensor | None, scale_rule: str | None = None) -> Tensor:
        if self.weights is None:
            return super().search_scales(w_rk, weights_k, scale_rule)
        return scale_words(w_rk, self.weights, weights_k)

    def quantize(self, x: Tensor, *, scale_rule: str | None = None, ties: str | None = None) -> Codes:
        if self.weights is None:
            return super().quantize(x, scale_rule=scale_rule, ties=ties)
        words = scale_words(x.float(), self.weights)
        return Codes(self.encode(x.float(), self.steps(words)), words)

    def fake_quantize(self, x: Tensor, *, scale_rule: str | None = None, ties: str | None = None) -> Tensor:
        if self.inputs is None:
            return super().fake_quantize(x, scale_rule=scale_rule, ties=ties)
        return on_grid(x.float(), scale_words(x.float(), self.inputs)).to(x.dtype)


def on_grid(x: Tensor, words: Tensor) -> Tensor:
    """float32 [..., K] and scale words [..., G] -> the nearest values of these scales, float32 [..., K]."""
    fmt = HiF4()
    steps = fmt.steps(words)
    return fmt.decode(fmt.encode(x, steps), steps)


def exponent_bytes(x: Tensor) -> Tensor:
    """float32 [..., K] -> E6M2 bytes [..., G] of S = 2^(floor(log2 maximum) - 2): the maximum is 4 S or more, below 8 S.

    The largest value of a group is 7 S, so a maximum above it is clipped.
    """
    exponent = torch.frexp(grouped(x, HiF4.group_size).abs().amax(-1)).exponent - 1
    return ((exponent - 2 + SCALE_BIAS) * 4).clamp(0, NAN_SCALE - 3)


def threshold_words(x: Tensor, byte: Tensor) -> Tensor:
    """float32 [..., K] and E6M2 bytes [..., G] -> scale words with micro-exponents by the reference's thresholds."""
    magnitude = grouped(x, HiF4.group_size).abs() / scale_values(byte).unsqueeze(-1)
    fours = magnitude.unflatten(-1, (16, 4)).amax(-1)
    e8 = fours.unflatten(-1, (8, 2)).amax(-1) >= 4.0
    e16 = fours / (1.0 + e8.repeat_interleave(2, dim=-1)) >= 2.0
    return join_words(byte, e8, e16)


def scale_words(x: Tensor, rule: Rule, weights_k: Tensor | None = None) -> Tensor:
    """Scale words int32 [..., G] that the rule chooses for float32 [..., K].

    Args:
        weights_k: importance of an error in each column, for free micro-exponents only.
    """
    byte = exponent_bytes(x) if rule.power_of_two else HiF4().quantize(x).scales & 0xFF
    if rule.free:
        rows, spacing = x.reshape(-1, x.shape[-1]), BINADE if rule.power_of_two else 1
        words = hif4_search.searched_natively(rows, byte.view(len(rows), -1), weights_k, rule.offsets, spacing)
        return words.view(byte.shape)
    best, best_error = byte, torch.full(byte.shape, torch.inf)
    for offset in rule.offsets:
        words = threshold_words(x, (byte + offset).clamp(0, NAN_SCALE - 1))
        error = grouped((on_grid(x, words) - x).square(), HiF4.group_size).sum(-1)
        best, best_error = torch.where(error < best_error, words, best), torch.minimum(error, best_error)
    return best


def candidates() -> dict[str, Candidate]:
    """Name -> candidate; the one against which the others count first."""
    rules: dict[str, tuple[Rule | None, Rule | None]] = {
        DEFAULT: (None, None),
        "power of two, weights": (POWER_OF_TWO, None),
        "power of two, inputs": (None, POWER_OF_TWO),
        "power of two, both": (POWER_OF_TWO, POWER_OF_TWO),
        "power of two, both, inputs by exponent of maximum": (POWER_OF_TWO, MAXIMUM_EXPONENT),
    } | {f"input search, {name}": (None, rule) for name, rule in INPUT_SEARCHES.items()}
    return {name: Candidate(name, *both) for name, both in rules.items()}


@contextmanager
def known_as(found: dict[str, Candidate]) -> Iterator[None]:
    """Make candidates formats of their names, blanks included, which `register_format` refuses."""
    facts = dict.fromkeys(found, known.FORMATS["hif4"])
    with mock.patch.dict(FORMATS, found), mock.patch.dict(known.FORMATS, facts):
        yield


def main() -> None:
    args = sweep_parser(__doc__).parse_args()
    quiet_libraries()
    layout = resolve_model(args.model)
    own, other = record_both(args, layout)
    found = candidates()
    recipe = load_recipe("hif4", "hif4", ("scheme.input_rule=reference",))
    mxfp4 = load_recipe("mxfp4", "mxfp4")
    with known_as(found):
        settings = {name: QuantizeSettings(name, recipe, name, {}) for name in found}
        settings["MXFP4, default recipe"] = QuantizeSettings("mxfp4", mxfp4, "mxfp4", {})
        table = as_table(sweep(layout, own, other, settings))
    for row in table:
        candidate = found.get(row["variant"])
        row["input_evaluations"] = candidate.inputs.evaluations if candidate and candidate.inputs else None
        print(f"{row['variant']:52s} {row['error']:.3e} {row['ratio']:.3f} {row['gain_db']:+.2f} dB")
    write_json(args.out / f"hif4-candidates-{args.model}.json", table)


if __name__ == "__main__":
    main()
