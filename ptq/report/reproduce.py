"""The commands that make this job again, from recorded settings: nothing is filled in by hand.

A command is left out where a value that it needs was not recorded, and `missing` says so.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ptq.checkpoint.manifest import Manifest
from ptq.evaluation.runs import named_differences
from ptq.evaluation.suites import get_suite
from ptq.report.facts import Facts
from ptq.store.files import read_json
from ptq.store.lora import LoraInfo
from ptq.store.run_info import RunPlan
from ptq.wan.lora import OPTIONS
from ptq.wan.presets import PRESET_FILE, load_preset

RECIPE_FILE = "recipe.yaml"
REFERENCE_OUT, CANDIDATE_OUT = "runs/original", "runs/quantized"
_GENERATE_OPTIONS = (
    *("steps", "height", "width", "num_frames", "fps", "flow_shift", "guidance_scale", "guidance_scale_2"),
    *("max_sequence_length", "seed", "dtype", "negative_prompt", "attention_backend", "cache", "seed_scheme"),
)
"""Settings of a generation run that are options of `ptq generate` of the same name."""


@dataclass(frozen=True)
class Steps:
    """Commands in order, the recipe file they read (None without a checkpoint), and what could not be told."""

    commands: list[str]
    recipe: str | None
    missing: list[str]


def reproduction(facts: Facts) -> Steps:
    """Every command from the original model to this report."""
    commands, missing = [f"pip install .  # in the source directory of wan-ptq {facts.evaluation.ptq_version}"], []
    model = facts.evaluation.reference.model
    if model is None:
        missing.append("The original model's name was not recorded.")
    recipe = None
    checkpoint = facts.evaluation.candidate.model or "quantized"
    if facts.manifest is None:
        missing.append("Without the checkpoint's manifest, its calibration and recipe cannot be listed.")
    elif model is not None:
        if facts.manifest.earlier_keys:
            keys = ", ".join(f"{key} = {value}" for key, value in facts.manifest.earlier_keys.items())
            missing.append(
                f"The checkpoint was made by an earlier version with recipe keys that are gone ({keys}): the recipe below leaves them out, so quantizing again gives other codes."
            )
        chosen = facts.manifest.recipe.model_dump(mode="json", exclude={"description"}, exclude_none=True)
        recipe = yaml.safe_dump(chosen, sort_keys=True, allow_unicode=True)
        _quantize(facts, facts.manifest, model, checkpoint, commands, missing)
    settings = facts.evaluation.candidate.settings
    prompts = _prompts(facts)
    if settings is None or prompts is None or model is None:
        missing.append(
            "Settings or prompt file of the generation runs are not here, so their commands cannot be listed."
        )
    else:
        commands += [
            _generate(name, prompts, out, own or settings, facts, loras)
            for name, out, own, loras in (
                (model, REFERENCE_OUT, facts.evaluation.reference.settings, facts.evaluation.reference.lora),
                (checkpoint, CANDIDATE_OUT, settings, {}),
            )
        ]
    if facts.evaluation.yardstick is not None:
        missing.append("The yardstick's run was made elsewhere: the evaluation below leaves it out.")
    commands.append(_evaluate(facts))
    commands.append("ptq report evaluation")
    return Steps(commands, recipe, missing)


def join(*parts: str | int | float) -> str:
    """One command line, quoted for a POSIX shell."""
    return shlex.join(str(part) for part in parts)


def _quantize(
    facts: Facts, manifest: Manifest, model: str, checkpoint: str, commands: list[str], missing: list[str]
) -> None:
    calibration = facts.calibration
    if calibration is None or manifest.calibration is None:
        missing.append("The calibration directory is not here, so `ptq calibrate` cannot be listed with its settings.")
    else:
        shown = ("steps", "height", "width", "num_frames", "flow_shift", "guidance_scale", "guidance_scale_2")
        options = {
            "prompts": calibration.prompts["name"],
            "out": "calibration",
            "num_prompts": len(calibration.samples),
            "records_per_prompt": calibration.records_per_prompt,
            "seed": calibration.seed,
            **{name: calibration.preset[name] for name in shown},
            "negative_prompt": _unless(_default_negative_prompt(facts), calibration.preset["negative_prompt"]),
            **_loras(manifest.loras),
        }
        commands.append(join("ptq", "calibrate", model, *_listed(options)))
    options = {
        "calibration": "calibration",
        "out": checkpoint,
        "format": manifest.format,
        "recipe": RECIPE_FILE,
        "budget_scope": manifest.budget_scope,
        "high_precision": ",".join(manifest.high_precision) or "none",
    }
    commands.append(join("ptq", "quantize", model, *_listed(options)))


def _loras(loras: Mapping[str, LoraInfo]) -> dict[str, str]:
    """Options that merge them; files by name, as prompts are."""
    return {OPTIONS[expert].lstrip("-"): f"{one.name}:{one.strength:g}" for expert, one in loras.items()}


def _listed(options: Mapping[str, Any]) -> list[Any]:
    """Names and values as on a command line, without those that are None."""
    given = {f"--{name.replace('_', '-')}": value for name, value in options.items() if value is not None}
    return [part for pair in given.items() for part in pair]


def _unless(default: Any, value: Any) -> Any:
    """The value, or None (not listed) where it is the default."""
    return None if value == default else value


def _prompts(facts: Facts) -> str | None:
    """Name of the prompt file; its digest is in the table of hashes."""
    run = facts.runs.get("candidate") or facts.runs.get("reference")
    source = (run.info.plan.prompts or {}) if run else {}
    return Path(source["file"]).name if source.get("file") else None


def _generate(
    model: str, prompts: str, out: str, settings: Mapping[str, Any], facts: Facts, loras: Mapping[str, LoraInfo]
) -> str:
    run = facts.runs.get("candidate") or facts.runs.get("reference")
    plan = run.info.plan if run else RunPlan()
    options = {name: settings.get(name) for name in _GENERATE_OPTIONS}
    options |= {
        "negative_prompt": _unless(_default_negative_prompt(facts), settings.get("negative_prompt")),
        "samples_per_prompt": _unless(1, plan.samples_per_prompt),
        "num_prompts": (plan.prompts or {}).get("samples"),
        "fixed_latent": Path(plan.fixed_latent).name if plan.fixed_latent else None,
        **_loras(loras),
    }
    switches = [
        flag for flag in ("--save-frames", "--image-to-video", "--compile") if settings.get(flag[2:].replace("-", "_"))
    ]
    return join("ptq", "generate", model, "--prompts", prompts, "--out", out, *_listed(options), *switches)


def _default_negative_prompt(facts: Facts) -> str | None:
    """What `ptq generate` takes without the option, for the original as for the checkpoint, which carries the settings of
    its records; None where the two differ."""
    if facts.manifest is None or facts.checkpoint is None:
        return None
    own = facts.checkpoint / PRESET_FILE
    if own.is_file():
        carried = str(read_json(own).get("negative_prompt"))
        defaults = (facts.manifest.calibration or {}).get("defaults", {})
        return carried if defaults.get("negative_prompt", carried) == carried else None
    return load_preset(facts.manifest.variant).negative_prompt


def _evaluate(facts: Facts) -> str:
    evaluation = facts.evaluation
    scored, narrowed = list(evaluation.dimensions), False
    if evaluation.vbench is not None:
        suite = get_suite(evaluation.suite)
        scored += [name for name in suite.beside if name in evaluation.informative]
        narrowed = set(scored) != set(suite.scored)
    options = {
        "suite": evaluation.suite,
        "out": "evaluation",
        "format": evaluation.format,
        "gate": _unless("mean_signed", evaluation.gate),
        "stride": _unless(1, evaluation.stride),
        "dimensions": ",".join(scored) if narrowed else None,
        "bootstrap": evaluation.bootstrap.resamples,
        "seed": evaluation.bootstrap.seed,
    }
    if evaluation.reference.file and evaluation.candidate.file:
        files = evaluation.reference.file, evaluation.candidate.file
        return join("ptq", "evaluate", "--import-vbench", *files, *_listed(options))
    runs = "--reference", REFERENCE_OUT, "--candidate", CANDIDATE_OUT
    switches = ["--allow-missing"] if evaluation.excluded else []
    switches += ["--allow-overlap"] if evaluation.overlap else []
    ours, theirs = evaluation.reference.settings or {}, evaluation.candidate.settings or {}
    switches += [part for name in named_differences(ours, theirs) for part in ("--allow-difference", name)]
    command = join("ptq", "evaluate", *runs, *_listed(options), *switches)
    imported = [file["path"] for file in (evaluation.vbench or {}).get("files", ())]
    if imported:
        return f"{command} {join('--import-vbench', *imported)}"
    # The interpreter is a path of the machine that runs it: the reader's own, set in the environment.
    return f'{command} --vbench-python "$VBENCH_PYTHON"' if evaluation.vbench is not None else command
