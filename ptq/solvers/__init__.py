"""Rounding solvers: (weights, input statistics, scheme) -> codes and bases. No model knowledge.

`solve_group` is the composition; the parts are public for those who build another one.
"""

from ptq.solvers.basis import BasisChoice, search_basis
from ptq.solvers.factor import Factor, factorize
from ptq.solvers.gptq import gptq
from ptq.solvers.rtn import round_to_nearest, round_to_scales
from ptq.solvers.scales import search_scales
from ptq.solvers.solve import LayerSolution, solve_group
from ptq.solvers.stats import InputStats, SolverError

__all__ = [
    "BasisChoice",
    "Factor",
    "InputStats",
    "LayerSolution",
    "SolverError",
    "factorize",
    "gptq",
    "round_to_nearest",
    "round_to_scales",
    "search_basis",
    "search_scales",
    "solve_group",
]
