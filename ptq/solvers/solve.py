"""All ingredients together, for one input and the Linears that read it: choose a basis, choose scales, round.

Mathematics on tensors only: no module names, no files, no replay. What comes out is what the checkpoint stores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptq.config.recipe import SolverSettings
from ptq.scheme import Codes, Format, FormatError, Scheme
from ptq.scheme.transform import OFF
from ptq.solvers.basis import BasisChoice, SampleOutputs, search_basis
from ptq.solvers.factor import Factor, factorize
from ptq.solvers.gptq import gptq
from ptq.solvers.measure import relative, row_energies, sqnr_db, trace_errors
from ptq.solvers.residual import BlockGains, block_gains
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
            All without residual blocks, which are chosen afterwards.
        gains: of residual blocks of its input, the same for all Linears of it; None where the recipe has none.
        residual: the blocks that were chosen (`ptq.solvers.residual.choose`); None where the recipe has none, or not yet.
    """

    codes: Codes
    basis: Tensor | None
    stats: dict[str, object]
    gains: BlockGains | None = None
    residual: tuple[int, ...] | None = None


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
    rounded, shared = _rounded(stacked, rtn, h_kk, fmt, settings)
    shared |= {"basis": choice.name, "basis_errors": choice.errors}
    figures, gains = rounded.figures, None
    sizes = [len(weight) for weight in weights.values()]
    if stats is not None:
        shared |= {"tokens": stats.n_tokens, "sample_tokens": len(stats.x_tk)}
        inputs = scheme.quantize_input(stats.x_tk, choice.basis)
        outputs = choice.outputs
        if outputs is None:
            target = scheme.transform_input(stats.x_tk, choice.basis) @ stacked.T
            plain = (inputs @ rounded.plain.T).sub_(target)
            outputs = SampleOutputs(target, row_energies(target), row_energies(plain))
        chosen = (inputs @ rounded.values.T).sub_(outputs.target)
        figures |= {
            "output_error_rtn": outputs.rtn_error,
            "output_error": row_energies(chosen),
            "output": outputs.energy,
        }
        if settings.residual:
            x_tk = scheme.transform_input(stats.x_tk, choice.basis)
            signals = [float(rows.sum()) for rows in outputs.energy.split(sizes)]
            gains = block_gains(x_tk, inputs, rounded.values.split(sizes), signals, scheme)
    parts = zip(rounded.codes.elements.split(sizes), rounded.codes.scales.split(sizes), strict=True)
    return {
        name: LayerSolution(Codes(*part), choice.basis, _report(totals) | shared, gains)
        for name, part, totals in zip(weights, parts, _totals(figures, sizes), strict=True)
    }


@dataclass(frozen=True)
class _Rounded:
    """A weight as it will be stored, and what that costs: codes, their values and those of plain rounding, both float32 [N, K],
    name -> a figure of each row [N]."""

    codes: Codes
    values: Tensor
    plain: Tensor
    figures: dict[str, Tensor]


def _rounded(
    w_nk: Tensor, rtn: Codes, h_kk: Tensor | None, fmt: Format, settings: SolverSettings
) -> tuple[_Rounded, dict[str, object]]:
    """A weight in the basis, rounded, and what to report for all its Linears."""
    if h_kk is None:
        scales = search_scales(w_nk, fmt, scale_rule=settings.weight_rule) if settings.clip_search else None
        codes = rtn if scales is None else round_to_scales(w_nk, scales, fmt)
        values = fmt.dequantize(codes)
        figures = {"weight_error": (values - w_nk).square_().sum(-1), "weight": w_nk.square().sum(-1)}
        return _Rounded(codes, values, values if codes is rtn else fmt.dequantize(rtn), figures), {}
    factor, report = None, {}
    if settings.rounding == "gptq":
        factor = factorize(h_kk, damping=settings.damping, act_order=settings.act_order)
        report = {name: getattr(factor, name) for name in ("damping", "damping_retries", "dead_columns")}
    codes = _round(w_nk, rtn, factor, h_kk, fmt, settings)
    del factor
    return _keep_better(w_nk, rtn, codes, h_kk, fmt), report


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
    if stats is None and settings.residual:
        raise SolverError(
            "Residual blocks are chosen by the noise of the input, and there are no calibration statistics. Collect them, or set solver.residual to 0."
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


def _keep_better(w_nk: Tensor, rtn: Codes, codes: Codes, h_kk: Tensor, fmt: Format) -> _Rounded:
    """Row by row the better of plain rounding and the solver's codes: rows are independent, and so are their scales."""
    plain, solved = fmt.dequantize(rtn), fmt.dequantize(codes)
    traces_rtn, errors_rtn = _row_errors(plain, w_nk, h_kk)
    traces, errors = _row_errors(solved, w_nk, h_kk)
    kept = traces_rtn < traces
    column = kept.unsqueeze(-1)
    best = Codes(torch.where(column, rtn.elements, codes.elements), torch.where(column, rtn.scales, codes.scales))
    figures = {
        "weight_error": torch.where(kept, errors_rtn, errors),
        "weight": w_nk.square().sum(-1),
        "trace_error_rtn": traces_rtn,
        "trace_error": torch.minimum(traces_rtn, traces),
        "trace": trace_errors(w_nk, h_kk),
        "kept_rtn": kept,
    }
    return _Rounded(best, torch.where(column, plain, solved), plain, figures)


def _row_errors(values: Tensor, w_nk: Tensor, h_kk: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the squared output error over the calibration tokens, and the squared error of the weight."""
    error = values - w_nk
    return trace_errors(error, h_kk), error.square_().sum(-1)


def _totals(figures: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, float]]:
    """Figures of rows [N] -> their sums over each Linear's rows; all leave the device at once."""
    table = torch.stack([rows.double() for rows in figures.values()])
    sums = torch.stack([part.sum(1) for part in table.split(list(sizes), dim=1)]).tolist()
    return [dict(zip(figures, row, strict=True)) for row in sums]


def _report(totals: Mapping[str, float]) -> dict[str, object]:
    """What `LayerSolution.stats` says of one Linear's figures."""
    report: dict[str, object] = {"weight_sqnr_db": sqnr_db(totals["weight_error"], totals["weight"])}
    for name in ("trace", "output"):
        if name in totals:
            report[f"{name}_error_rtn"] = relative(totals[f"{name}_error_rtn"], totals[name])
            report[f"{name}_error"] = relative(totals[f"{name}_error"], totals[name])
    return report | ({"rows_kept_rtn": int(totals["kept_rtn"])} if "kept_rtn" in totals else {})
