"""All ingredients together, for one input and the Linears that read it: choose a basis, choose scales, round.

Mathematics on tensors only: no module names, no files, no replay. What comes out is what the checkpoint stores.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptq.config.recipe import SolverSettings
from ptq.scheme import Codes, Format, FormatError, Scheme
from ptq.scheme.transform import OFF
from ptq.solvers.basis import BasisChoice, SampleOutputs, search_basis
from ptq.solvers.conversion import DEFINITION, Conversion
from ptq.solvers.factor import factorize
from ptq.solvers.gptq import Rounding, gptq, rounded_from
from ptq.solvers.measure import relative, row_energies, sample_rows, sample_tokens, sqnr_db, trace_errors
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
            rows_kept_rtn: output rows for which plain rounding was the better of the two and was kept (with a Hessian).
            trace_error_rtn, trace_error: relative squared output error in trace form over all calibration tokens, of
            plain rounding in the same basis and of the codes (with a Hessian). Inputs are unquantized. These and the next are
            of the rows of `ptq.solvers.measure.sample_rows`.
            output_error_rtn, output_error: the same over sample tokens with quantized inputs (with statistics).
            tokens, sample_tokens: in the Hessian (without one: all), and those of the last two (with statistics).
            basis (its name), basis_errors (where searched); damping, damping_retries, dead_columns (gptq).
            All without residual blocks, which are chosen afterwards, and before the codes of a block are tuned.
        gains: of residual blocks of its input, the same for all Linears of it; None where the recipe has none.
        residual: the blocks that were chosen (`ptq.solvers.residual.choose`); None where the recipe has none, or not yet.
        target: what the codes were rounded from, float32 [N, K]; None where the recipe does not tune.
    """

    codes: Codes
    basis: Tensor | None
    stats: dict[str, object]
    gains: BlockGains | None = None
    residual: tuple[int, ...] | None = None
    target: Tensor | None = None


def solve_group(
    weights: Mapping[str, Tensor],
    stats: InputStats | None,
    scheme: Scheme,
    settings: SolverSettings,
    conversion: Conversion = DEFINITION,
) -> dict[str, LayerSolution]:
    """Quantize all Linears that share one input.

    Args:
        weights: name -> float [N, K] in the original basis.
        stats: of the shared input. None only for rounding to nearest, in a basis that needs no records.
        scheme: how the layers are quantized.
        settings: the recipe's solver.
        conversion: how inputs and weights are quantized.

    Raises:
        SolverError: K does not fit the scheme, statistics missing or of another K, non-finite weights or Hessian, no
            factorisation. The text names the Linears.
    """
    try:
        _check_group(weights, stats, scheme, settings)
        return _solve(weights, stats, scheme, settings, conversion)
    except SolverError as error:
        raise SolverError(f"{', '.join(weights)}: {error}") from error


def _solve(
    weights: Mapping[str, Tensor],
    stats: InputStats | None,
    scheme: Scheme,
    settings: SolverSettings,
    conversion: Conversion,
) -> dict[str, LayerSolution]:
    fmt = scheme.format
    if stats is None:
        first = next(iter(weights.values()))
        choice = BasisChoice(OFF, scheme.transform.plain(first.shape[1], first.device), {})
    else:
        choice = search_basis(list(weights.values()), stats, scheme, settings, conversion)
    # Rows are independent: Linears of one input are one tall matrix.
    stacked = torch.cat([scheme.transform.weight(w, choice.basis) for w in weights.values()])
    rtn = round_to_nearest(stacked, fmt, scale_rule=settings.weight_rule, conversion=conversion)
    h_kk = None
    if stats is not None and stats.h_kk is not None:
        h_kk = scheme.transform.hessian(stats.h_kk, choice.basis)
    sizes = [len(weight) for weight in weights.values()]
    rows = sample_rows(sizes, stacked.device)
    rounded, shared = _rounded(stacked, rtn, h_kk, fmt, settings)
    shared |= {"basis": choice.name, "basis_errors": choice.errors}
    figures = [_totals(rounded.figures, sizes)]
    sampled, gains = {name: figure[rows.index] for name, figure in rounded.traces.items()}, None
    if h_kk is not None:
        sampled["trace"] = trace_errors(stacked[rows.index], h_kk)
    if stats is not None:
        x_tk = sample_tokens(stats.x_tk)
        shared |= {"tokens": stats.n_tokens, "sample_tokens": len(x_tk)}
        inputs = conversion.input(x_tk, choice.basis, scheme)
        outputs = choice.outputs
        if outputs is None:
            target = scheme.transform_input(x_tk, choice.basis) @ stacked[rows.index].T
            plain = (inputs @ _values(rtn, rows.index, fmt).T).sub_(target)
            outputs = SampleOutputs(target, row_energies(target), row_energies(plain))
        values = _values(rounded.codes, rows.index, fmt)
        chosen = (inputs @ values.T).sub_(outputs.target)
        sampled |= {
            "output_error_rtn": outputs.rtn_error,
            "output_error": row_energies(chosen),
            "output": outputs.energy,
        }
        if settings.residual:
            whole = len(stats.x_tk) / len(x_tk)  # noise is measured on all sample tokens
            signals = [whole * float(part.sum()) for part in outputs.energy.split(rows.sizes)]
            changed, noisy = (
                change(stats.x_tk, choice.basis) for change in (scheme.transform_input, scheme.quantize_input)
            )
            gains = block_gains(changed, noisy, values.split(rows.sizes), signals, len(stacked), scheme)
    if sampled:
        figures.append(_totals(sampled, rows.sizes))
    parts = zip(rounded.codes.elements.split(sizes), rounded.codes.scales.split(sizes), strict=True)
    solutions = {
        name: LayerSolution(Codes(*part), choice.basis, _report(functools.reduce(operator.or_, own)) | shared, gains)
        for name, part, own in zip(weights, parts, zip(*figures, strict=True), strict=True)
    }
    if rounded.target is None:
        return solutions
    targets = zip(solutions.items(), rounded.target.split(sizes), strict=True)
    return {name: replace(one, target=target) for (name, one), target in targets}


@dataclass(frozen=True)
class _Rounded:
    """A weight as it will be stored, and what that costs: name -> a figure of each row [N]; `traces` are looked at on sample rows.
    For tuning, what the codes were rounded from."""

    codes: Codes
    figures: dict[str, Tensor]
    traces: dict[str, Tensor]
    target: Tensor | None = None


def _rounded(
    w_nk: Tensor, rtn: Codes, h_kk: Tensor | None, fmt: Format, settings: SolverSettings
) -> tuple[_Rounded, dict[str, object]]:
    """A weight in the basis, rounded, and what to report for all its Linears."""
    scales = rtn.scales
    if settings.clip_search:
        weights = None if h_kk is None else h_kk.diagonal()
        scales = search_scales(w_nk, fmt, weights_k=weights, scale_rule=settings.weight_rule)
    if h_kk is not None and settings.rounding == "gptq":
        factor = factorize(h_kk, damping=settings.damping, act_order=settings.act_order)
        report = {name: getattr(factor, name) for name in ("damping", "damping_retries", "dead_columns")}
        solved = gptq(w_nk, factor, fmt, scales=scales)
        target = rounded_from(w_nk, solved.codes, factor, fmt) if settings.tune else None
        del factor
        rounded = _keep_better(w_nk, rtn, solved, h_kk, fmt)
        if target is not None:
            target = torch.where(rounded.figures["kept_rtn"].unsqueeze(-1), w_nk, target)
        return replace(rounded, target=target), report
    codes = round_to_scales(w_nk, scales, fmt) if settings.clip_search else rtn
    target = w_nk if settings.tune else None
    if h_kk is None:
        error = (fmt.dequantize(codes) - w_nk).square_().sum(-1)
        return _Rounded(codes, {"weight_error": error, "weight": w_nk.square().sum(-1)}, {}, target), {}
    rounded = _keep_better(w_nk, rtn, _measured(codes, w_nk, h_kk, fmt), h_kk, fmt)
    return replace(rounded, target=target), {}


def _values(codes: Codes, rows: Tensor, fmt: Format) -> Tensor:
    """Values of some rows of a weight."""
    return fmt.dequantize(Codes(codes.elements[rows], codes.scales[rows]))


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


def _keep_better(w_nk: Tensor, rtn: Codes, solved: Rounding, h_kk: Tensor, fmt: Format) -> _Rounded:
    """Row by row the better of plain rounding and the solver's codes: rows are independent, and so are their scales."""
    plain = _measured(rtn, w_nk, h_kk, fmt)
    kept = plain.trace_n < solved.trace_n
    column, codes = kept.unsqueeze(-1), solved.codes
    best = Codes(torch.where(column, rtn.elements, codes.elements), torch.where(column, rtn.scales, codes.scales))
    figures = {
        "weight_error": torch.where(kept, plain.error_n, solved.error_n),
        "weight": w_nk.square().sum(-1),
        "kept_rtn": kept,
    }
    traces = {"trace_error_rtn": plain.trace_n, "trace_error": torch.minimum(plain.trace_n, solved.trace_n)}
    return _Rounded(best, figures, traces)


def _measured(codes: Codes, w_nk: Tensor, h_kk: Tensor, fmt: Format) -> Rounding:
    """Codes of a weight in the basis of the Hessian, and what they cost."""
    error = fmt.dequantize(codes).sub_(w_nk)
    return Rounding(codes, trace_errors(error, h_kk), error.square_().sum(-1).double())


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
