"""Choosing the basis of one input by output error, among the candidates that the transform offers.

Every candidate is tried on the sample tokens with inputs quantized and weights rounded to nearest, which ranks bases as
GPTQ would at a fraction of its cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.config.recipe import SolverSettings
from ptq.scheme import Scheme
from ptq.solvers.conversion import DEFINITION, Conversion
from ptq.solvers.factor import check_hessian
from ptq.solvers.measure import relative, row_energies, row_step, sample_tokens
from ptq.solvers.rtn import check_weight, round_to_nearest
from ptq.solvers.stats import InputStats, SolverError


@dataclass(frozen=True)
class SampleOutputs:
    """What the Linears of an input give, on the tokens and rows of `ptq.solvers.measure`.

    Attributes:
        target: with weights and inputs as they are, float32 [T, N].
        energy: squared sum of each row, float32 [N].
        rtn_error: the same of the error in the chosen basis with inputs quantized and weights rounded to nearest.
    """

    target: Tensor
    energy: Tensor
    rtn_error: Tensor


@dataclass(frozen=True)
class BasisChoice:
    """The choice and what it was chosen from.

    Attributes:
        name: of the candidate ("off", an exponent of smoothing, "learned").
        basis: what the layer stores, or None.
        errors: candidate -> relative output error, averaged over the Linears; empty where there was nothing to choose.
        outputs: where there was.
    """

    name: str
    basis: Tensor | None
    errors: dict[str, float]
    outputs: SampleOutputs | None = None


def search_basis(
    weights: Sequence[Tensor],
    stats: InputStats,
    scheme: Scheme,
    settings: SolverSettings,
    conversion: Conversion = DEFINITION,
) -> BasisChoice:
    """Try every candidate of the scheme's transform and keep the one with the smallest output error.

    Args:
        weights: the Linears [N_i, K] that read this input.
        stats: of the input.
        conversion: how inputs and weights are quantized.

    Raises:
        SolverError: a transform that needs a Hessian without one, non-finite weights or Hessian.
    """
    transform = scheme.transform
    for w_nk in weights:
        check_weight(w_nk)
    if transform.needs_hessian:
        if stats.h_kk is None:
            raise SolverError(f"A {transform.kind} transform needs the input's Hessian, and there is none. Collect it.")
        check_hessian(stats.h_kk)
    candidates = transform.candidates(weights, stats.h_kk, stats.rms_k, settings.smoothing)
    if len(candidates) == 1:
        return BasisChoice(*next(iter(candidates.items())), {})
    rows = [w[:: row_step(len(w))].float() for w in weights]
    sizes, stacked = [len(part) for part in rows], torch.cat(rows)  # rows are independent
    x_tk = sample_tokens(stats.x_tk)
    target = x_tk @ stacked.T
    energies = [row_energies(target)]
    for basis in candidates.values():
        w_nk, rule = transform.weight(stacked, basis), settings.weight_rule
        codes = round_to_nearest(w_nk, scheme.format, scale_rule=rule, conversion=conversion)
        output = conversion.input(x_tk, basis, scheme) @ scheme.format.dequantize(codes).T
        energies.append(row_energies(output.sub_(target)))
    table = torch.stack(energies).double()
    signals, *by_candidate = torch.stack([part.sum(1) for part in table.split(sizes, dim=1)], 1).tolist()
    # A Linear without any output (an all-zero weight) has no say.
    errors = {
        name: sum(relative(*pair) or 0.0 for pair in zip(row, signals, strict=True)) / len(rows)
        for name, row in zip(candidates, by_candidate, strict=True)
    }
    best = min(errors, key=errors.__getitem__)
    signal, *errors_n = energies
    outputs = SampleOutputs(target, signal, errors_n[list(errors).index(best)])
    return BasisChoice(best, candidates[best], errors, outputs)
