"""All ingredients together, for one input and the Linears that read it: choose a basis, choose scales, round, correct.

Mathematics on tensors only: no module names, no files, no replay. What comes out is what the checkpoint stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ptq.scheme import Codes, Format
from ptq.solvers.basis import Basis, QuantizedInputs
from ptq.solvers.basis_search import OFF, BasisChoice, search_basis
from ptq.solvers.bias import bias_correction
from ptq.solvers.factor import Factor, factorize
from ptq.solvers.gptq import gptq
from ptq.solvers.measure import relative, sqnr_db, token_error, trace_errors
from ptq.solvers.rtn import round_to_nearest, round_to_scales
from ptq.solvers.scales import search_scales
from ptq.solvers.stats import InputStats, SolverError


@dataclass(frozen=True)
class SolveSettings:
    """Which ingredients are used, and how.

    Attributes:
        rounding: "rtn" or "gptq".
        rotation: block Hadamard size, 0 for none.
        smoothing: exponents to try besides off; empty for no smoothing.
        learned_transform: try learned blocks of size `rotation` as well.
        clip_search: search the group scales instead of taking the format's rule.
        bias_correction: move the mean output error into the bias.
        damping, act_order, float64: of the factorisation (see `factorize`).
        weight_scale_rule: the format's rule for weights where scales are not searched.
        activation_scale_rule, activation_ties: how inputs are quantized at run time.
    """

    rounding: Literal["rtn", "gptq"] = "gptq"
    rotation: int = 0
    smoothing: tuple[float, ...] = ()
    learned_transform: bool = False
    clip_search: bool = False
    bias_correction: bool = False
    damping: float = 0.01
    act_order: bool = True
    float64: bool = False
    weight_scale_rule: str | None = None
    activation_scale_rule: str | None = None
    activation_ties: str | None = None


@dataclass(frozen=True)
class LayerSolution:
    """One quantized Linear.

    Attributes:
        codes: in the basis.
        basis: the same for all Linears of the input.
        bias: float32 [N] (the given one plus the correction) or None.
        stats: plain values for the report.
            weight_sqnr_db: of the codes, in their basis.
            trace_error_rtn, trace_error: relative squared output error in trace form over all calibration tokens, of
            plain rounding in the same basis and of the codes (with a Hessian). Inputs are unquantized.
            rows_kept_rtn: output rows for which plain rounding was the better of the two and was kept (with a Hessian).
            output_error_rtn, output_error: the same over the sample tokens with quantized inputs, the latter with the
            corrected bias (with statistics).
            tokens, sample_tokens: in the Hessian (without one: in the mean), and in the sample (with statistics).
            basis (its name), basis_errors (where searched); damping, damping_retries, dead_columns (gptq).
    """

    codes: Codes
    basis: Basis
    bias: Tensor | None
    stats: dict[str, object]


def solve_group(
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor | None],
    stats: InputStats | None,
    fmt: Format,
    settings: SolveSettings,
) -> dict[str, LayerSolution]:
    """Quantize all Linears that share one input.

    Args:
        weights: name -> float [N, K] in the original basis.
        biases: name -> float [N] or None.
        stats: of the shared input. None only for rounding to nearest in the given basis without bias correction.

    Raises:
        SolverError: K does not fit the format or the rotation, statistics missing or of another K, non-finite weights
            or Hessian, no factorisation. The text names the Linears.
    """
    try:
        _check_group(weights, stats, fmt, settings)
        return _solve(weights, biases, stats, fmt, settings)
    except SolverError as error:
        raise SolverError(f"{', '.join(weights)}: {error}") from error


def _solve(
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor | None],
    stats: InputStats | None,
    fmt: Format,
    settings: SolveSettings,
) -> dict[str, LayerSolution]:
    choice = _basis(list(weights.values()), stats, fmt, settings)
    basis = choice.basis
    inputs = None
    counts: dict[str, object] = {}
    if stats is not None:
        rule, ties = settings.activation_scale_rule, settings.activation_ties
        inputs = QuantizedInputs.of(stats, basis, fmt, scale_rule=rule, ties=ties)
        counts = {"tokens": stats.n_tokens, "sample_tokens": len(stats.w_t)}
    # Rows are independent: Linears of one input are one tall matrix.
    stacked = torch.cat([basis.weight(w) for w in weights.values()])
    rtn = round_to_nearest(stacked, fmt, scale_rule=settings.weight_scale_rule)
    codes, shared, traces = _codes(stacked, rtn, stats, basis, fmt, settings)
    shared |= counts | {"basis": choice.name, "basis_errors": choice.errors}

    solutions: dict[str, LayerSolution] = {}
    start = 0
    for name, weight in weights.items():
        rows = slice(start, start + len(weight))
        start = rows.stop
        chosen, bias = _rows(codes, rows), biases[name]
        w, wq = stacked[rows], fmt.dequantize(chosen)
        report = {"weight_sqnr_db": sqnr_db(w, wq)} | shared
        if traces is not None:
            report |= traces.report(rows)
        if inputs is not None:
            delta = None
            if settings.bias_correction:
                delta = bias_correction(w, wq, inputs.mean_k, inputs.mean_quantized_k)
                bias = delta if bias is None else bias.float() + delta
            report |= _output_errors(w, wq, fmt.dequantize(_rows(rtn, rows)), delta, inputs)
        solutions[name] = LayerSolution(chosen, basis, None if bias is None else bias.float(), report)
    return solutions


def _codes(
    w_nk: Tensor,
    rtn: Codes,
    stats: InputStats | None,
    basis: Basis,
    fmt: Format,
    settings: SolveSettings,
) -> tuple[Codes, dict[str, object], _Traces | None]:
    """Codes of a weight in the basis, what to report for all its Linears, and the errors of its rows."""
    if stats is None or stats.h_kk is None:
        scales = search_scales(w_nk, fmt) if settings.clip_search else rtn.scales
        return (round_to_scales(w_nk, scales, fmt) if settings.clip_search else rtn), {}, None
    h_kk = basis.hessian(stats.h_kk)
    factor, report = None, {}
    if settings.rounding == "gptq":
        dtype = torch.float64 if settings.float64 else torch.float32
        factor = factorize(h_kk, damping=settings.damping, act_order=settings.act_order, dtype=dtype)
        report = {name: getattr(factor, name) for name in ("damping", "damping_retries", "dead_columns")}
    codes, traces = _keep_better(w_nk, rtn, _round(w_nk, rtn, factor, h_kk, fmt, settings), h_kk, fmt)
    return codes, report, traces


def _check_group(weights: Mapping[str, Tensor], stats: InputStats | None, fmt: Format, settings: SolveSettings) -> None:
    widths = {w.shape[-1] for w in weights.values()}
    if len(widths) != 1:
        raise SolverError(f"Linears of one input have one K, found {sorted(widths)}.")
    (k,) = widths
    multiple = max(fmt.group_size, settings.rotation)
    if k % multiple:
        raise SolverError(
            f"K = {k} is not a multiple of {multiple} ({fmt.name} group {fmt.group_size}, rotation {settings.rotation}). Leave the layer out of the targets, or choose another rotation."
        )
    if stats is not None and len(stats.mean_k) != k:
        raise SolverError(
            f"The statistics are of an input with {len(stats.mean_k)} channels, the weights have K = {k}."
        )
    if settings.rounding == "gptq" and (stats is None or stats.h_kk is None):
        raise SolverError("GPTQ needs the input's Hessian, and there is none. Collect it, or set rounding to rtn.")
    if stats is None and (settings.smoothing or settings.learned_transform or settings.bias_correction):
        raise SolverError(
            "Smoothing, a learned transform and bias correction need calibration statistics, and there are none."
        )


def _basis(weights: list[Tensor], stats: InputStats | None, fmt: Format, settings: SolveSettings) -> BasisChoice:
    if stats is None:
        return BasisChoice(OFF, Basis(settings.rotation), {})
    return search_basis(
        weights,
        stats,
        fmt,
        rotation=settings.rotation,
        alphas=settings.smoothing,
        learned=settings.learned_transform,
        weight_scale_rule=settings.weight_scale_rule,
        activation_scale_rule=settings.activation_scale_rule,
        activation_ties=settings.activation_ties,
    )


def _round(
    w_nk: Tensor, rtn: Codes, factor: Factor | None, h_kk: Tensor, fmt: Format, settings: SolveSettings
) -> Codes:
    """The codes that the settings ask for, on searched or given scales."""
    scales = search_scales(w_nk, fmt, weights_k=h_kk.diagonal()) if settings.clip_search else rtn.scales
    if factor is not None:
        return gptq(w_nk, factor, fmt, scales=scales).codes
    return round_to_scales(w_nk, scales, fmt) if settings.clip_search else rtn


@dataclass(frozen=True)
class _Traces:
    """Squared output errors of every row over the calibration tokens, float64 [N]."""

    rtn: Tensor
    chosen: Tensor
    signal: Tensor
    kept_rtn: Tensor

    def report(self, rows: slice) -> dict[str, object]:
        signal = float(self.signal[rows].sum())
        return {
            "trace_error_rtn": relative(float(self.rtn[rows].sum()), signal),
            "trace_error": relative(float(self.chosen[rows].sum()), signal),
            "rows_kept_rtn": int(self.kept_rtn[rows].sum()),
        }


def _keep_better(w_nk: Tensor, rtn: Codes, codes: Codes, h_kk: Tensor, fmt: Format) -> tuple[Codes, _Traces]:
    """Row by row the better of plain rounding and the solver's codes: rows are independent, and so are their scales."""
    errors_rtn = trace_errors(fmt.dequantize(rtn) - w_nk, h_kk)
    errors = errors_rtn if codes is rtn else trace_errors(fmt.dequantize(codes) - w_nk, h_kk)
    kept = errors_rtn < errors
    column = kept.unsqueeze(-1)
    best = Codes(torch.where(column, rtn.elements, codes.elements), torch.where(column, rtn.scales, codes.scales))
    return best, _Traces(errors_rtn, torch.minimum(errors_rtn, errors), trace_errors(w_nk, h_kk), kept)


def _output_errors(
    w_nk: Tensor, wq_nk: Tensor, rtn_nk: Tensor, delta_n: Tensor | None, inputs: QuantizedInputs
) -> dict[str, object]:
    target = inputs.x_tk @ w_nk.T
    output = inputs.xq_tk @ wq_nk.T
    if delta_n is not None:
        output += delta_n
    return {
        "output_error_rtn": relative(*token_error(target, inputs.xq_tk @ rtn_nk.T, inputs.w_t)),
        "output_error": relative(*token_error(target, output, inputs.w_t)),
    }


def _rows(codes: Codes, rows: slice) -> Codes:
    return Codes(codes.elements[rows], codes.scales[rows])
