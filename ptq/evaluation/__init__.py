"""Measuring what quantization costs: paired measures, VBench results, paired statistics and the gate.

`evaluate_runs` compares two generation directories and writes an evaluation directory; `evaluate_imported` judges two
VBench result files alone; `plan` says beforehand what the first would do.
"""

from __future__ import annotations

from ptq.evaluation.evaluate import evaluate_imported, evaluate_runs
from ptq.evaluation.pairs import plan
from ptq.evaluation.vbench.run import VBenchSettings

__all__ = ["VBenchSettings", "evaluate_imported", "evaluate_runs", "plan"]
