"""Rounding solvers: (weights, input statistics, format) -> codes, smoothing factors and biases. No model knowledge.

`solve_group` is the composition; the parts are public for those who build another one.
"""

from ptq.solvers.bias import bias_correction
from ptq.solvers.factor import Factor, factorize
from ptq.solvers.gptq import GptqResult, gptq
from ptq.solvers.rtn import round_to_nearest, round_to_scales
from ptq.solvers.scales import search_scales
from ptq.solvers.smooth_search import SmoothingResult, search_smoothing, smoothing_factors
from ptq.solvers.solve import LayerSolution, SolveSettings, solve_group
from ptq.solvers.stats import InputStats, SolverError

__all__ = [
    "Factor",
    "GptqResult",
    "InputStats",
    "LayerSolution",
    "SmoothingResult",
    "SolveSettings",
    "SolverError",
    "bias_correction",
    "factorize",
    "gptq",
    "round_to_nearest",
    "round_to_scales",
    "search_scales",
    "search_smoothing",
    "smoothing_factors",
    "solve_group",
]
