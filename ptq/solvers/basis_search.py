"""Choosing the basis of one input by output error: no change, smoothing by an exponent, or the learned transform.

Every candidate is tried on the sample tokens with inputs quantized and weights rounded to nearest, which ranks bases as
GPTQ would at a fraction of its cost. No smoothing at all is always a candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ptq.scheme import Format, hadamard_blocks
from ptq.solvers.basis import Basis
from ptq.solvers.learned import learn_transform
from ptq.solvers.measure import relative, token_error
from ptq.solvers.rtn import round_to_nearest
from ptq.solvers.smoothing import column_size, smoothing_factors
from ptq.solvers.stats import InputStats, SolverError

OFF, LEARNED = "off", "learned"
SEARCH_ROWS = 1024
"""Output rows of each Linear that the search looks at, evenly spaced: the error is a mean over rows."""


@dataclass(frozen=True)
class BasisChoice:
    """The choice and what it was chosen from.

    Attributes:
        name: "off", the exponent ("0.5"), or "learned".
        basis: the chosen one.
        errors: candidate -> relative output error, averaged over the Linears; empty where there was nothing to choose.
    """

    name: str
    basis: Basis
    errors: dict[str, float]


def search_basis(
    weights: Sequence[Tensor],
    stats: InputStats,
    fmt: Format,
    *,
    rotation: int,
    alphas: Sequence[float] = (),
    learned: bool = False,
    weight_scale_rule: str | None = None,
    activation_scale_rule: str | None = None,
    activation_ties: str | None = None,
) -> BasisChoice:
    """Try every candidate and keep the one with the smallest output error.

    Args:
        weights: the Linears [N_i, K] that read this input.
        stats: of the input; with its Hessian for a learned transform.
        rotation: block size, 0 for none.
        alphas: exponents of smoothing to try.
        learned: try a learned transform too. Every basis is then stored as blocks.

    Raises:
        SolverError: a learned transform without a Hessian.
    """
    candidates = _candidates(weights, stats, rotation, alphas, learned)
    if len(candidates) == 1:
        return BasisChoice(OFF, candidates[OFF], {})
    rows = [w[:: max(1, len(w) // SEARCH_ROWS)].float() for w in weights]
    targets = [stats.x_tk.float() @ w.T for w in rows]
    errors = {}
    for name, basis in candidates.items():
        xq = fmt.fake_quantize(basis.input(stats.x_tk), scale_rule=activation_scale_rule, ties=activation_ties)
        total = 0.0
        for w, target in zip(rows, targets, strict=True):
            codes = round_to_nearest(basis.weight(w), fmt, scale_rule=weight_scale_rule)
            # A Linear without any output (an all-zero weight) has no say.
            total += relative(*token_error(target, xq @ fmt.dequantize(codes).T, stats.w_t)) or 0.0
        errors[name] = total / len(rows)
    best = min(errors, key=errors.__getitem__)
    return BasisChoice(best, candidates[best], errors)


def _candidates(
    weights: Sequence[Tensor], stats: InputStats, rotation: int, alphas: Sequence[float], learned: bool
) -> dict[str, Basis]:
    candidates = {OFF: Basis(rotation)}
    if alphas:
        w_size_k, x_size_k = column_size(weights), stats.rms_k
        for alpha in alphas:
            candidates[f"{alpha:g}"] = Basis(rotation, smoothing_factors(x_size_k, w_size_k, alpha))
    if not learned:
        return candidates
    if stats.h_kk is None:
        raise SolverError("A learned transform needs the input's Hessian, and there is none. Collect it.")
    device, k = stats.h_kk.device, len(stats.mean_k)
    blocks = {name: hadamard_blocks(k, rotation, basis.smooth_k).to(device) for name, basis in candidates.items()}
    blocks[LEARNED] = learn_transform(stats.h_kk, weights, rotation)
    return {name: Basis(rotation, learned_gbb=stored) for name, stored in blocks.items()}
