"""Rounding solvers: (weights, input statistics, format) -> codes, bases and biases. No model knowledge.

`solve_group` is the composition; the parts are public for those who build another one.
"""

from ptq.solvers.basis import Basis
from ptq.solvers.basis_search import BasisChoice, search_basis
from ptq.solvers.bias import bias_correction
from ptq.solvers.factor import Factor, factorize
from ptq.solvers.gptq import GptqResult, gptq
from ptq.solvers.learned import learn_transform
from ptq.solvers.rtn import round_to_nearest, round_to_scales
from ptq.solvers.scales import search_scales
from ptq.solvers.smoothing import smoothing_factors
from ptq.solvers.solve import LayerSolution, SolveSettings, solve_group
from ptq.solvers.stats import InputStats, SolverError

__all__ = [
    "Basis",
    "BasisChoice",
    "Factor",
    "GptqResult",
    "InputStats",
    "LayerSolution",
    "SolveSettings",
    "SolverError",
    "bias_correction",
    "factorize",
    "gptq",
    "learn_transform",
    "round_to_nearest",
    "round_to_scales",
    "search_basis",
    "search_scales",
    "smoothing_factors",
    "solve_group",
]
