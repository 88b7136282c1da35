"""The listed commands: every one is accepted by the command line that it is for, with the recorded values."""

from __future__ import annotations

import dataclasses
import shlex
import shutil

import pytest
import typer
import yaml

from ptq.cli.main import app
from ptq.cli.report import report
from ptq.config import Recipe
from ptq.report import Sources
from ptq.report.facts import gather
from ptq.report.reproduce import reproduction


@pytest.fixture(scope="module")
def commands() -> dict:
    whole = typer.Typer()
    whole.command()(report)
    group = typer.main.get_command(app)
    known = dict(group.commands)  # type: ignore[attr-defined]
    known.setdefault("report", typer.main.get_command(whole))
    return known


def parse(commands: dict, line: str) -> dict:
    program, name, *arguments = shlex.split(line, comments=True)
    assert program == "ptq"
    return commands[name].make_context(name, arguments).params


def test_the_commands_are_valid_and_carry_the_recorded_values(job, commands):
    facts = gather(Sources(job.evaluation))
    steps = reproduction(facts)
    assert not steps.missing
    parsed = {line.split()[1]: [] for line in steps.commands[1:]}
    for line in steps.commands[1:]:
        parsed[line.split()[1]].append(parse(commands, line))
    assert list(parsed) == ["calibrate", "quantize", "generate", "evaluate", "report"]
    preset = facts.calibration.preset
    calibrate = parsed["calibrate"][0]
    assert (calibrate["steps"], calibrate["height"], calibrate["num_prompts"]) == (preset["steps"], preset["height"], 2)
    quantize = parsed["quantize"][0]
    assert (quantize["format_name"], quantize["high_precision"]) == ("hif4", "none")
    reference, candidate = parsed["generate"]
    assert (reference["model"], candidate["model"]) == ("tiny", "hif4")
    for run in (reference, candidate):
        assert (run["steps"], run["fps"], run["flow_shift"], run["num_prompts"]) == (4, 8, 3.0, 24)
        assert run["negative_prompt"] == "模糊，低质量"
    evaluate = parsed["evaluate"][0]
    assert (evaluate["suite"], evaluate["bootstrap"], evaluate["format"]) == ("tiny", 1000, "hif4")


def test_the_recipe_file_is_the_resolved_recipe(job):
    facts = gather(Sources(job.evaluation))
    recipe = Recipe.model_validate(yaml.safe_load(reproduction(facts).recipe))
    assert recipe.model_copy(update={"description": ""}) == facts.manifest.recipe.model_copy(update={"description": ""})


def test_what_was_not_recorded_is_said(copy_job):
    shutil.rmtree(copy_job.root / "calibration")
    steps = reproduction(gather(Sources(copy_job.evaluation)))
    assert any("ptq calibrate" in text for text in steps.missing)
    assert not any(line.startswith("ptq calibrate") for line in steps.commands)


def test_recipe_keys_that_are_gone_are_said_to_be_left_out(job):
    facts = gather(Sources(job.evaluation))
    manifest = facts.manifest.model_copy(update={"earlier_keys": {"bias_correction": True}})
    steps = reproduction(dataclasses.replace(facts, manifest=manifest))
    assert any("recipe keys that are gone (bias_correction = True)" in text for text in steps.missing)
