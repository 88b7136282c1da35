"""All ingredients together, for one input and the Linears that read it: choose a basis, choose scales, round.

Mathematics on tensors only: no module names, no files, no replay. What comes out is what the checkpoint stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.config.recipe import SolverSettings
from ptq.scheme import Codes, Format, FormatError, Scheme
from ptq.scheme.transform import OFF
from ptq.solvers.basis import BasisChoice, search_basis
from ptq.solvers.factor import Factor, factorize
from ptq.solvers.gptq import gptq
from ptq.solvers.measure import relative, sqnr_db, token_error, trace_errors
from ptq.solvers.rtn import round_to_nearest, round_to_scales
from ptq.solvers.scales import search_scales
from ptq.solvers.stats import InputStats, SolverError


@dataclass(frozen=True)
class LayerSolution:
    """One quantized Linear.

    Attributes:
        codes: in the basis.
        basis: what the layer stores of it, or None; the same tensor for all Linears of the input.
        stats: plain values for the report.
            weight_sqnr_db: of the codes, in their basis.
            trace_error_rtn, trace_error: relative squared output error in trace form over all calibration tokens, of
            plain rounding in the same basis and of the codes (with a Hessian). Inputs are unquantized.
            rows_kept_rtn: output rows for which plain rounding was the better of the two and was kept (with a Hessian).
            output_error_rtn, output_error: the same over the sample tokens with quantized inputs (with statistics).
            tokens, sample_tokens: in the Hessian (without one: all), and in the sample (with statistics).
            basis (its name), basis_errors (where searched); damping, damping_retries, dead_columns (gptq).
    """

    codes: Codes
    basis: Tensor | None
    stats: dict[str, object]


def solve_group(
    weights: Mapping[str, Tensor], stats: InputStats | None, scheme: Scheme, settings: SolverSettings
) -> dict[str, LayerSolution]:
    """Quantize all Linears that share one input.

    Args:
        weights: name -> float [N, K] in the original basis.
        stats: of the shared input. None only for rounding to nearest, in a basis that needs no records.
        scheme: how the layers are quantized.
        settings: the recipe's solver.

    Raises:
        SolverError: K does not fit the scheme, statistics missing or of another K, non-finite weights or Hessian, no
            factorisation. The text names the Linears.
    """
    try:
        _check_group(weights, stats, scheme, settings)
        return _solve(weights, stats, scheme, settings)
    except SolverError as error:
        raise SolverError(f"{', '.join(weights)}: {error}") from error


def _solve(
    weights: Mapping[str, Tensor], stats: InputStats | None, scheme: Scheme, settings: SolverSettings
) -> dict[str, LayerSolution]:
    fmt = scheme.format
    if stats is None:
        first = next(iter(weights.values()))
        choice = BasisChoice(OFF, scheme.transform.plain(first.shape[1], first.device), {})
    else:
        choice = search_basis(list(weights.values()), stats, scheme, settings)
    # Rows are independent: Linears of one input are one tall matrix.
    stacked = torch.cat([scheme.transform.weight(w, choice.basis) for w in weights.values()])
    rtn = round_to_nearest(stacked, fmt, scale_rule=settings.weight_rule)
    h_kk = None
    if stats is not None and stats.h_kk is not None:
        h_kk = scheme.transform.hessian(stats.h_kk, choice.basis)
    codes, shared, traces = _codes(stacked, rtn, h_kk, fmt, settings)
    shared |= {"basis": choice.name, "basis_errors": choice.errors}
    inputs = None
    if stats is not None:
        shared |= {"tokens": stats.n_tokens, "sample_tokens": len(stats.x_tk)}
        inputs = (scheme.transform_input(stats.x_tk, choice.basis), scheme.quantize_input(stats.x_tk, choice.basis))

    solutions: dict[str, LayerSolution] = {}
    start = 0
    for name, weight in weights.items():
        rows = slice(start, start + len(weight))
        start = rows.stop
        chosen = _rows(codes, rows)
        w, wq = stacked[rows], fmt.dequantize(chosen)
        report = {"weight_sqnr_db": sqnr_db(w, wq)} | shared
        if traces is not None:
            report |= traces.report(rows)
        if inputs is not None:
            report |= _output_errors(w, wq, fmt.dequantize(_rows(rtn, rows)), *inputs)
        solutions[name] = LayerSolution(chosen, choice.basis, report)
    return solutions


def _codes(
    w_nk: Tensor, rtn: Codes, h_kk: Tensor | None, fmt: Format, settings: SolverSettings
) -> tuple[Codes, dict[str, object], _Traces | None]:
    """Codes of a weight in the basis, what to report for all its Linears, and the errors of its rows."""
    if h_kk is None:
        scales = search_scales(w_nk, fmt, scale_rule=settings.weight_rule) if settings.clip_search else None
        return (rtn if scales is None else round_to_scales(w_nk, scales, fmt)), {}, None
    factor, report = None, {}
    if settings.rounding == "gptq":
        factor = factorize(h_kk, damping=settings.damping, act_order=settings.act_order)
        report = {name: getattr(factor, name) for name in ("damping", "damping_retries", "dead_columns")}
    codes, traces = _keep_better(w_nk, rtn, _round(w_nk, rtn, factor, h_kk, fmt, settings), h_kk, fmt)
    return codes, report, traces


def _check_group(
    weights: Mapping[str, Tensor], stats: InputStats | None, scheme: Scheme, settings: SolverSettings
) -> None:
    widths = {w.shape[-1] for w in weights.values()}
    if len(widths) != 1:
        raise SolverError(f"Linears of one input have one K, found {sorted(widths)}.")
    (k,) = widths
    try:
        scheme.check_width(k)
    except FormatError as error:
        raise SolverError(str(error)) from error
    if stats is not None and stats.k != k:
        raise SolverError(f"The statistics are of an input with {stats.k} channels, the weights have K = {k}.")
    if settings.rounding == "gptq" and (stats is None or stats.h_kk is None):
        raise SolverError(
            "GPTQ needs the input's Hessian, and there is none. Collect it, or set solver.rounding to rtn."
        )
    if stats is None and scheme.transform.needs_records:
        raise SolverError(
            f"A {scheme.transform.kind} transform needs calibration statistics, and there are none. Collect them, or choose another scheme.transform."
        )


def _round(
    w_nk: Tensor, rtn: Codes, factor: Factor | None, h_kk: Tensor, fmt: Format, settings: SolverSettings
) -> Codes:
    """The codes that the settings ask for, on searched or given scales."""
    scales = rtn.scales
    if settings.clip_search:
        scales = search_scales(w_nk, fmt, weights_k=h_kk.diagonal(), scale_rule=settings.weight_rule)
    if factor is not None:
        return gptq(w_nk, factor, fmt, scales=scales)
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


def _output_errors(w_nk: Tensor, wq_nk: Tensor, rtn_nk: Tensor, x_tk: Tensor, xq_tk: Tensor) -> dict[str, object]:
    target = x_tk @ w_nk.T
    return {
        "output_error_rtn": relative(*token_error(target, xq_tk @ rtn_nk.T)),
        "output_error": relative(*token_error(target, xq_tk @ wq_nk.T)),
    }


def _rows(codes: Codes, rows: slice) -> Codes:
    return Codes(codes.elements[rows], codes.scales[rows])
