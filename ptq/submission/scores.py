"""The evaluation of a submission, computed again from its units by the rules, and every recorded number compared.

Dimensions are those of the suite, units those of both runs; format and limit are those of the weights; the verdict has to
follow from the rules' own bootstrap too, so that no seed can be searched for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ptq.errors import DamagedFileError
from ptq.evaluation.conclude import Judgement, conclude, header
from ptq.evaluation.findings import condition_warnings, digest_warnings, prompt_warnings, settings_warnings
from ptq.evaluation.pairs import inputs_digest
from ptq.evaluation.scores import Scores, scores_from_units
from ptq.evaluation.suites import Suite, get_suite, score_range
from ptq.evaluation.vbench.totals import UNCOUNTED
from ptq.rules import GATE, RESAMPLES, SUITE
from ptq.store.evaluation import PASS, ROLES, Evaluation
from ptq.store.evaluation_units import UnitLine
from ptq.submission.check import NotCheckedError
from ptq.submission.contents import Contents
from ptq.submission.package import broken_rule

TOLERANCE = 1e-9
"""Relative: the same sums by another version of a library."""
_NOT_DERIVED = ("ptq_version", "vbench", "warnings", "units_sha256", "overlap")
"""Fields of evaluation.json that its units do not give, at least not wholly (the digest is compared by its reader)."""


def check_rules(contents: Contents) -> str:
    """Suite, format, gate, limit, intervals and completeness are those of the rules.

    Raises:
        DamagedFileError: names what is not.
    """
    judged = contents.evaluation
    problem = broken_rule(judged, str(contents.identity.format))
    if problem is not None:
        raise DamagedFileError(f"the evaluation is not by the rules: {problem}")
    scope = "" if judged.suite == SUITE else f", a rehearsal: the challenge counts suite {SUITE}"
    limit = "no limit" if judged.limit is None else f"limit {judged.limit:.1%}"
    return f"suite {judged.suite}{scope}; {judged.format}, {limit}, {judged.bootstrap.resamples} resamples"


def check_units(contents: Contents) -> str:
    """Every unit of both runs is there once, with every dimension of the suite, each value in the range of its measure.

    Raises:
        DamagedFileError: names the unit, the dimension and the value.
    """
    suite, lines = get_suite(contents.evaluation.suite), contents.units
    made = {name for run in contents.lines.values() for name in run}
    counts = Counter(line.unit for line in lines)
    twice = [name for name, count in counts.items() if count > 1]
    odd = sorted(made ^ set(counts))
    if twice or odd:
        what = (
            f"{twice[0]} occurs twice"
            if twice
            else f"{odd[0]} is {'not scored' if odd[0] in made else 'of no run'} ({len(odd)} such units)"
        )
        raise DamagedFileError(f"units.jsonl has {len(lines)} lines for {len(made)} units of the runs: {what}")
    for line in lines:
        for table in (line.reference, line.candidate, line.paired, *line.replaced.values()):
            for name, value in table.items():
                low, high = score_range(name, suite)
                if value is not None and not low <= value <= high:
                    raise DamagedFileError(
                        f"unit {line.unit} has {name} = {value}, which lies between {low:g} and {high:g}"
                    )
    _check_complete(suite, lines)
    for line in lines:
        ours, theirs = (contents.runs[role].units.get(line.unit) for role in ROLES)
        stride = contents.evaluation.stride or 1
        if not ours or not theirs or line.inputs != inputs_digest(ours, theirs, suite, stride):
            raise DamagedFileError(
                f"unit {line.unit} was measured on other files than the runs have now, or in another way"
            )
    return f"{len(lines)} units, {len(suite.gate)} dimensions each"


def _check_complete(suite: Suite, lines: list[UnitLine]) -> None:
    whole = suite.mode != "vbench_standard"  # whose dimensions have prompts of their own
    for name in suite.scored:
        scored = {role: {line.unit for line in lines if line.of(role).get(name) is not None} for role in ROLES}
        if name in suite.beside and not any(scored.values()):
            continue
        wanted = {line.unit for line in lines} if whole else set.union(*scored.values())
        planned = (suite.prompts or {}).get(name, 0) * suite.videos_per_prompt
        if not whole and name not in UNCOUNTED and len(wanted) != planned:
            raise DamagedFileError(f"{name} has scores of {len(wanted)} videos, suite {suite.name} has {planned}")
        for role in ROLES:
            lacking = sorted(wanted - scored[role])
            if lacking or not wanted:
                raise DamagedFileError(
                    f"{name} of the {role} has no score for {len(lacking)} of {len(lines)} units ({', '.join(lacking[:3])})"
                )


def check_numbers(contents: Contents) -> str:
    """Compute evaluation.json again and compare every number of it.

    Raises:
        DamagedFileError: names the field, what is recorded and what its units give.
        NotCheckedError: the evaluation is not by the rules, which bound the work.
    """
    judged = contents.evaluation
    if broken_rule(judged, str(contents.identity.format)) is not None:
        raise NotCheckedError("its numbers are not computed again, for the evaluation is not by the rules")
    again = _compute(contents, judged.bootstrap.resamples, judged.bootstrap.seed)
    recorded, derived = (value.model_dump(mode="json", exclude=set(_NOT_DERIVED)) for value in (judged, again))
    for where, found, wanted in differences(recorded, derived):
        raise DamagedFileError(f"evaluation.json says {where} = {_short(found)}, its units give {_short(wanted)}")
    for key in ("totals", "mark"):
        totals, wanted = ((value.vbench or {}).get(key) for value in (judged, again))
        for where, found, value in differences(totals, wanted):
            raise DamagedFileError(
                f"evaluation.json says vbench.{key}{where} = {_short(found)}, its units give {_short(value)}"
            )
    if judged.vbench is not None and not get_suite(judged.suite).is_vbench:
        raise DamagedFileError(f"evaluation.json has results of VBench, which suite {judged.suite} does not use")
    hidden = [text for text in again.warnings if text not in judged.warnings]
    if hidden:
        raise DamagedFileError(f"evaluation.json lacks a warning that its units give: {hidden[0]}")
    own = {*again.warnings, *digest_warnings(*(contents.runs[role] for role in ROLES))}
    invented = [text for text in judged.warnings if text not in own and not get_suite(judged.suite).is_vbench]
    if invented:
        raise DamagedFileError(f"evaluation.json has a warning that its units do not give: {_short(invented[0])}")
    return f"{sum(1 for _ in _leaves(derived))} values"


def check_verdict(contents: Contents) -> str:
    """Judge by the rules' own bootstrap.

    Raises:
        DamagedFileError: another verdict than evaluation.json says.
    """
    judged = contents.evaluation
    again = _compute(contents, RESAMPLES, 0)
    if again.verdict != judged.verdict:
        raise DamagedFileError(
            f"evaluation.json says {judged.verdict}, its units give {again.verdict} by the rules ({RESAMPLES} resamples, seed 0)"
        )
    undefined = sorted(name for name, value in again.dimensions.items() if value.relative_loss is None)
    if undefined:
        raise DamagedFileError(
            f"{', '.join(undefined)} of the reference scores 0: without these dimensions nothing is proved"
        )
    if again.verdict == PASS:
        return PASS
    return f"{again.verdict or 'no verdict'}: a rehearsal, the gate did not pass and nothing here claims that it did"


def _compute(contents: Contents, resamples: int, seed: int) -> Evaluation:
    judged, lines, runs = contents.evaluation, contents.units, contents.runs
    suite = get_suite(judged.suite)
    judgement = Judgement(contents.identity.format, GATE, resamples, seed)
    content = {
        **header(suite, judgement),
        **{
            role: runs[role].describe().model_copy(update={"directory": getattr(judged, role).directory})
            for role in ROLES
        },
        "units": len(lines),
        "excluded": {},
        "stride": judged.stride,
        "sources": dict(Counter(line.source for line in lines)),
    }
    extra = condition_warnings(runs["reference"].info, runs["candidate"].info)
    extra += settings_warnings(suite, runs["candidate"].info)
    extra += prompt_warnings(suite, (unit.score_prompt for unit in runs["reference"].units.values()))
    return conclude(content, suite, judgement, _scores(suite, lines), lines, extra)


def _scores(suite: Suite, lines: list[UnitLine]) -> Scores:
    """As `scores_from_units`; dimensions with prompts of their own have the units that have them."""
    if suite.mode != "vbench_standard":
        beside = [name for name in suite.beside if any(name in line.of(role) for line in lines for role in ROLES)]
        return scores_from_units(lines, [*suite.gate, *beside])
    tables = {
        role: {
            name: {line.unit: value for line in lines if (value := line.of(role).get(name)) is not None}
            for name in suite.gate
        }
        for role in ROLES
    }
    return Scores(tables["reference"], tables["candidate"], {line.unit: line.unit.rsplit("/", 1)[0] for line in lines})


def differences(found: Any, wanted: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(place, found, wanted) of everything that differs in two JSON values; floats up to `TOLERANCE`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in {**found, **wanted}:
            yield from differences(found.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            yield from differences(*pair, f"{where}.{index}")
    elif isinstance(found, float) and isinstance(wanted, float):
        if not math.isclose(found, wanted, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            yield where, found, wanted
    elif found != wanted or isinstance(found, bool) != isinstance(wanted, bool):
        yield where, found, wanted


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
