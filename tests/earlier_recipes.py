"""Recipes as checkpoints and unfinished runs held them before recipes had groups."""

from typing import Any

EARLIER_RTN: dict[str, Any] = {
    "description": "Plain rounding to nearest, the baseline that every other recipe is compared with.",
    "format": None,
    "rounding": "rtn",
    "rotation": 0,
    "smoothing": [],
    "learned_transform": False,
    "clip_search": False,
    "bias_correction": False,
    "weight_scale_rule": None,
    "gptq": {"damping": 0.03, "act_order": True, "precision": "float32"},
    "activations": {"scale_rule": None, "ties": None},
    "records": {
        "weighting": "d_sigma2",
        "inputs": "original",
        "tokens_per_record": 128,
        "hessian_tokens": None,
        "for_report": 2,
    },
}
"""The recipe `rtn`, whole, as manifests held it."""
