"""The jobs of a comparison, and how both generations of checkouts spell their recipes."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FORMATS = ("hif4", "mxfp4")

RENAMED = {
    "solver.rounding": "rounding",
    "solver.smoothing": "smoothing",
    "solver.clip_search": "clip_search",
    "solver.weight_rule": "weight_scale_rule",
    "solver.damping": "gptq.damping",
    "solver.act_order": "gptq.act_order",
    "scheme.block": "rotation",
    "scheme.input_rule": "activations.scale_rule",
}
"""Today's recipe keys -> the flat ones of before, where both take the same values."""
TRANSFORMS: dict[str, dict[str, object]] = {
    "none": {"learned_transform": False, "rotation": 0},
    "hadamard": {"learned_transform": False},
    "smoothed": {"learned_transform": False},
    "learned": {"learned_transform": True},
}
"""`scheme.transform` in the flat keys."""

VARIATIONS: dict[str, dict[str, object]] = {
    "hadamard": {"scheme.transform": "hadamard"},
    "hadamard-16": {"scheme.transform": "hadamard", "scheme.block": 16},
    "hadamard-32": {"scheme.transform": "hadamard", "scheme.block": 32},
    "learned-smoothed": {"solver.smoothing": [0.3, 0.6]},
    "smoothed": {"scheme.transform": "smoothed", "solver.smoothing": [0.25, 0.5, 0.75]},
    "smoothed-unrotated": {"scheme.transform": "smoothed", "scheme.block": 0, "solver.smoothing": [0.5]},
    "none": {"scheme.transform": "none"},
    "no-clip-search": {"solver.clip_search": False},
    "weight-rule": {"scheme.transform": "hadamard", "solver.clip_search": False, "solver.weight_rule": "mse"},
    "no-act-order": {"scheme.transform": "hadamard", "solver.act_order": False},
    "damping": {"scheme.transform": "hadamard", "solver.damping": 0.2},
    "rtn-clip-search": {"scheme.transform": "hadamard", "solver.rounding": "rtn"},
    "rtn-learned": {"solver.rounding": "rtn", "solver.clip_search": False},
    "rtn-smoothed": {
        "scheme.transform": "smoothed",
        "solver.smoothing": [0.5],
        "solver.rounding": "rtn",
        "solver.clip_search": False,
    },
    "input-rule": {"scheme.transform": "hadamard", "scheme.input_rule": None},
    "few-tokens": {"records.tokens_per_record": 24, "records.hessian_tokens": 40},
}
"""Changes of a format's default recipe that are tried on the cut model, in today's keys."""
MODULE_VARIATIONS = {name: VARIATIONS[name] for name in ("hadamard-32", "smoothed", "none", "rtn-learned")} | {
    "default": {},
    "hadamard-128": {"scheme.transform": "hadamard", "scheme.block": 128},
    "learned-64": {"scheme.block": 64},
}


@dataclass(frozen=True)
class Job:
    """One run of the package. Its results lie in the folder of its name.

    Attributes:
        command: "ptq" and its arguments, "random-model" and the arguments of scripts/make_random_wan.py, or "module" and a format.
        recipe: changes of the recipe, in today's keys; None where the command takes no recipe.
        needs: jobs whose results it reads.
    """

    name: str
    command: tuple[str, ...]
    recipe: Mapping[str, object] | None
    needs: tuple[str, ...]

    def arguments(self, flat: bool) -> list[str]:
        """The command as a checkout of that spelling takes it."""
        recipe = {} if self.recipe is None else spell(self.recipe, flat)
        settings = (f"{key}={json.dumps(value)}" for key, value in recipe.items())
        return [*self.command, *(part for setting in settings for part in ("--set", setting)), "--out", self.name]


def spell(recipe: Mapping[str, object], flat: bool) -> dict[str, object]:
    """Recipe keys of today -> those of the checkout; `flat`: the flat ones.

    0.1 weighted records by d_sigma^2 where a recipe said nothing; today all weigh the same.
    """
    if not flat:
        return dict(recipe)
    spelled: dict[str, object] = {"records.weighting": "uniform"}
    for key, value in recipe.items():
        spelled |= TRANSFORMS[str(value)] if key == "scheme.transform" else {RENAMED.get(key, key): value}
    return spelled


class _Jobs:
    """Collects jobs. An argument that is the name of an earlier job is its result, which the new one needs."""

    def __init__(self) -> None:
        self.all: dict[str, Job] = {}

    def add(self, name: str, command: str, recipe: Mapping[str, object] | None = None) -> str:
        words = tuple(command.split())
        self.all[name] = Job(name, words, recipe, tuple(word for word in words if word in self.all))
        return name

    def calibrate(self, name: str, model: str, prompts: str) -> str:
        few = "--steps 6 --records-per-prompt 4"
        return self.add(f"calibrate/{name}", f"ptq calibrate {model} --prompts ../inputs/{prompts} {few}")

    def quantize(self, name: str, model: str, records: str, options: str, recipe: Mapping[str, object] = {}) -> str:
        return self.add(f"quantize/{name}", f"ptq quantize {model} --calibration {records} --format {options}", recipe)

    def generate(self, name: str, model: str, prompts: str, options: str = "--num-prompts 1") -> str:
        few = f"--steps 4 --save-frames {options}"
        return self.add(f"generate/{name}", f"ptq generate {model} --prompts ../inputs/{prompts} {few}")


def all_jobs() -> list[Job]:
    """Every job, those that are needed before those that need them."""
    jobs = _Jobs()
    _whole_model(jobs)
    for fmt in FORMATS:
        for name, variation in MODULE_VARIATIONS.items():
            jobs.add(f"module/{fmt}-{name}", f"module {fmt}", variation)
    _cut_model(jobs)
    _other_variants(jobs)
    return list(jobs.all.values())


def _whole_model(jobs: _Jobs) -> None:
    records = jobs.calibrate("tiny", "tiny", "calibration.txt")
    original = jobs.generate("original", "tiny", "held-out.txt", "--samples-per-prompt 2")
    for fmt in FORMATS:
        packed = jobs.quantize(f"tiny-{fmt}", "tiny", records, fmt)
        made = jobs.generate(fmt, packed, "held-out.txt", "--samples-per-prompt 2")
        for suite in ("tiny", "core"):
            runs = f"--reference {original} --candidate {made}"
            jobs.add(f"evaluate/{fmt}-{suite}", f"ptq evaluate {runs} --suite {suite} --bootstrap 1000")
        jobs.add(f"export/{fmt}-bf16", f"ptq export {packed} --to bf16")
        plain = jobs.quantize(f"tiny-{fmt}-rtn", "tiny", records, f"{fmt} --recipe rtn")
        jobs.generate(f"{fmt}-rtn", plain, "held-out.txt")


def _cut_model(jobs: _Jobs) -> None:
    model = "../inputs/cut"
    records = jobs.calibrate("cut", model, "calibration.txt")
    hadamard = VARIATIONS["hadamard"]
    for fmt, layout in zip(FORMATS, ("msmodelslim", "compressed-tensors"), strict=True):
        for name, variation in VARIATIONS.items():
            packed = jobs.quantize(f"cut-{fmt}-{name}", model, records, fmt, variation)
            if name in ("hadamard", "smoothed", "smoothed-unrotated", "none"):
                jobs.generate(f"cut-{fmt}-{name}", packed, "held-out.txt")
            if name == "none":  # the only one that other tools can run
                jobs.add(f"export/{fmt}-{layout}", f"ptq export {packed} --to {layout}")
        jobs.quantize(f"cut-{fmt}-protected", model, records, f"{fmt} --high-precision transformer:0", hadamard)
        both = "--high-precision transformer:0,transformer_2:1 --budget-scope per-expert"
        jobs.quantize(f"cut-{fmt}-protected-both", model, records, f"{fmt} {both}", hadamard)
        rotated = {"scheme.transform": "hadamard", "scheme.block": 16}
        jobs.quantize(f"cut-{fmt}-rtn-rotated", model, records, f"{fmt} --recipe rtn", rotated)
    jobs.quantize("cut-mxfp4-learned-32", model, records, "mxfp4", {"scheme.block": 32})  # HiF4's group does not fit
    jobs.quantize("cut-hif4-auto", model, records, "hif4 --high-precision auto", hadamard)
    jobs.quantize("cut-hif4-seed", model, records, "hif4 --seed 3", VARIATIONS["few-tokens"])
    jobs.quantize("cut-mxfp4-streams-on-disk", model, records, "mxfp4 --max-memory 0.00001", hadamard)


def _other_variants(jobs: _Jobs) -> None:
    """A first frame given (two experts, cut), and one expert with a timestep for each token (random weights)."""
    records = jobs.calibrate("cut-i2v", "../inputs/cut-i2v", "calibration.jsonl")
    packed = jobs.quantize("cut-i2v-hif4", "../inputs/cut-i2v", records, "hif4 --high-precision auto")
    jobs.generate("cut-i2v-original", "../inputs/cut-i2v", "held-out.jsonl")
    jobs.generate("cut-i2v-hif4", packed, "held-out.jsonl")
    model = jobs.add("model/ti2v", "random-model --variant TI2V-5B --layers 2 --width 128")
    records = jobs.calibrate("ti2v", model, "calibration.txt")
    packed = jobs.quantize("ti2v-mxfp4", model, records, "mxfp4 --high-precision transformer:1")
    jobs.generate("ti2v-mxfp4", packed, "held-out.txt")
    jobs.generate("ti2v-image", packed, "held-out.jsonl", "--num-prompts 1 --image-to-video")


def chosen_jobs(patterns: Sequence[str]) -> list[Job]:
    """The jobs whose names match a pattern, and what they need; all without patterns."""
    jobs = all_jobs()
    wanted = {job.name for job in jobs if any(fnmatch.fnmatch(job.name, pattern) for pattern in patterns or ["*"])}
    for job in reversed(jobs):
        wanted |= set(job.needs) if job.name in wanted else set()
    return [job for job in jobs if job.name in wanted]
