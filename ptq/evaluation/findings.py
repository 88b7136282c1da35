"""What a reader of the evaluation must be told besides the numbers: paragraphs for the `warnings` of
evaluation.json.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from ptq.evaluation import statistics
from ptq.evaluation.runs import Run, named_differences
from ptq.evaluation.suites import ANY, Suite, get_suite
from ptq.store.evaluation import ROLES, Dimension, Estimate
from ptq.store.evaluation_units import UnitLine
from ptq.store.run_info import RunInfo

FEW_PROMPTS = 20
"""Below this many prompts, percentile intervals are known to be too narrow."""
BLUR_LOSS = 0.02
"""Sharpness falling by this share while temporal flickering "improves" is reported as blur."""
VICLIP, VICLIP_TOKENS = ("overall_consistency", "temporal_style"), 32
"""Dimensions of VBench that compare the video with its prompt by ViCLIP, and how many tokens of the prompt that reads, the marks of
start and end among them."""
SELF_NAMED = dict(zip(ROLES, ROLES, strict=True))
"""Role -> what texts call it."""
NAMED_SETTINGS = ("dtype", "attention_backend", "compile")
"""Settings that may differ between paired runs, and are then named (where `allowed_differences` has not)."""


def pairing_warnings(excluded: Mapping[str, str], same_checkpoint: bool) -> list[str]:
    """Left-out units, and a run compared with itself."""
    found = []
    if excluded:
        listed = "; ".join(f"{unit} ({reason})" for unit, reason in sorted(excluded.items())[:5])
        found.append(f"{len(excluded)} units are not in the comparison (--allow-missing): {listed}.")
    if same_checkpoint:
        found.append("Both runs come from the same checkpoint: this compares a model with itself.")
    return found


def allowed_differences(reference: RunInfo, candidate: RunInfo, called: str = "candidate") -> list[str]:
    """Settings that change videos by themselves and differ because the user let them: what a report says first."""
    return [
        f"The runs differ in {name}, which --allow-difference let pass: {one or 'none'} for the reference, {other or 'none'} for the {called}. The loss is of this and of the weights together."
        for name, (one, other) in named_differences(reference.settings, candidate.settings).items()
    ]


def condition_warnings(reference: RunInfo, candidate: RunInfo, called: str = "candidate") -> list[str]:
    """Differences of two run.json that pairing allows but a reader should know: number type, device code, versions."""
    versions = sorted({*reference.versions, *candidate.versions})
    named = named_differences(reference.settings, candidate.settings)
    settings = [name for name in NAMED_SETTINGS if name.replace("_", "-") not in named]
    pairs = [(name, reference.settings.get(name), candidate.settings.get(name)) for name in settings]
    pairs += [(name, reference.versions.get(name), candidate.versions.get(name)) for name in versions]
    return [
        f"The runs differ in {name}: {ours} for the reference, {theirs} for the {called}."
        for name, ours, theirs in pairs
        if ours != theirs
    ]


def settings_warnings(suite: Suite, candidate: RunInfo) -> list[str]:
    """Videos of another geometry, or made otherwise, than the suite's: their scores stand for themselves only."""
    found = {name: candidate.settings.get(name) for name in suite.settings}
    other = [
        f"{name} {'not given' if found[name] is None else found[name]} (there {wanted})"
        for name, wanted in suite.settings.items()
        if found[name] != wanted and not (wanted == ANY and found[name])
    ]
    if not other:
        return []
    return [
        f"The videos were not made with the settings of suite {suite.name}: {', '.join(other)}. Scores are not comparable with results of those settings."
    ]


def prompt_warnings(suite: Suite, prompts: Iterable[str]) -> list[str]:
    """Prompts of which a dimension reads only the beginning; a word is one token or more, so none is named wrongly."""
    names, texts = [name for name in VICLIP if name in suite.gate], set(prompts)
    long = sum(len(text.split()) > VICLIP_TOKENS - 2 for text in texts)
    if not names or not long:
        return []
    return [
        f"{long} of {len(texts)} prompts have more than {VICLIP_TOKENS - 2} words, and {' and '.join(names)} reads {VICLIP_TOKENS} tokens of a prompt, start and end among them: what a video shows of the rest is not scored."
    ]


def digest_warnings(reference: Run, candidate: Run) -> list[str]:
    """Files that are left out because the version that made them recorded no digest of them."""
    instead = {"saved_frames": "their videos are measured instead", "final_latents": "latents are not compared"}
    return [
        f"{count} units of the {role} have {key} without a digest in the manifest (made by an earlier version): {instead[key]}."
        for role, run in zip(ROLES, (reference, candidate), strict=True)
        for key, count in run.without_digest().items()
    ]


def integrity_warnings(lines: Sequence[UnitLine], roles: Mapping[str, str] = SELF_NAMED) -> list[str]:
    """Black, frozen, duplicate or pasted videos, and a candidate that equals the reference.

    Args:
        roles: role -> what it is called; those that are not here are passed over.
    """
    found = []
    for measure, words in (("black_frames", "black"), ("frozen_frames", "frozen")):
        for role, name in roles.items():
            counts = {line.unit: line.of(role).get(measure) or 0 for line in lines}
            hit = [unit for unit, count in counts.items() if count]
            if hit:
                frames = int(sum(counts.values()))
                found.append(f"The {name} has {frames} {words} frames in {len(hit)} videos, for example {hit[0]}.")
    for role, name in roles.items():
        repeated = duplicates(lines, role)
        if repeated:
            found.append(
                f"The {name} shows the same pixels for different units: {', '.join(repeated[0][:3])}{f' and {len(repeated) - 1} more groups' if len(repeated) > 1 else ''}."
            )
        copied = [line.unit for line in lines if line.of(role).get("first_frame_copied")]
        if copied:
            found.append(
                f"The first frame of {len(copied)} {name} videos is a copy of the input image (for example {copied[0]}): it was pasted, not generated."
            )
    equal = sum(line.hashes is not None and line.hashes.reference == line.hashes.candidate for line in lines)
    if equal:
        found.append(f"{equal} of {len(lines)} {roles['candidate']} videos equal the reference's pixel for pixel.")
    return found


def duplicates(lines: Iterable[UnitLine], role: str) -> list[list[str]]:
    """Groups of two or more units of one run whose frames are identical."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        if line.hashes is not None:
            groups.setdefault(getattr(line.hashes, role), []).append(line.unit)
    return [units for units in groups.values() if len(units) > 1]


def gate_warnings(comparison: statistics.Comparison, limit: float | None, verdict: str | None, gate: str) -> list[str]:
    """Few prompts, undefined dimensions, and a pass that comes from cancellation."""
    found = []
    if comparison.prompts < FEW_PROMPTS:
        found.append(
            f"Only {comparison.prompts} prompts: bootstrap intervals from fewer than {FEW_PROMPTS} are too narrow. Evaluate more prompts before relying on the verdict."
        )
    deciding = comparison.aggregates.get(gate)
    if limit is not None and verdict == statistics.INCONCLUSIVE and deciding is not None:
        found.append(_what_would_decide(deciding, limit, comparison.prompts))
    for name in comparison.undefined:
        found.append(f"{name} scores 0 or less in the reference: it has no relative loss and is not in the aggregates.")
    if limit is None:
        return [*found, "The challenge has no limit for this format: there is no verdict."]
    over = statistics.cancels(comparison, limit)
    if over and gate == "mean_signed" and verdict != statistics.FAIL:
        positive = comparison.aggregates["mean_positive"].value
        found.append(
            f"The mean signed loss is under the limit only because gains cancel losses: the positive parts average {positive:.2%}, over the limit of {limit:.2%} ({', '.join(over)})."
        )
    return found


def _what_would_decide(estimate: Estimate, limit: float, prompts: int) -> str:
    """Intervals shrink with the square root of the number of prompts: how many would move the limit out of this one."""
    distance = abs(limit - estimate.value)
    if estimate.low is None or estimate.high is None or distance == 0:
        return "The data cannot bound the loss: no verdict is possible. Evaluate more prompts."
    side = estimate.high - estimate.value if estimate.value < limit else estimate.value - estimate.low
    needed = math.ceil(prompts * (side / distance) ** 2)
    return f"The 95 % interval of the loss contains the limit, so these {prompts} prompts decide nothing. If the loss stays where it is, about {needed} prompts would."


def beside_warnings(suite: Suite, scored: Collection[str]) -> list[str]:
    """Dimensions that belong beside a suite's verdict, whichever were asked for, and were not scored."""
    absent = [name for name in get_suite(suite.name).beside if name not in scored]
    if not absent:
        return []
    return [
        f"{', '.join(absent)} was not scored: no dimension of suite {suite.name} falls when motion freezes, so the verdict says nothing about that."
    ]


def mark_warnings(suite: Suite, totals: Mapping[str, object] | None) -> list[str]:
    """A suite with a published mark whose scores are not those that the mark is of."""
    mark = get_suite(suite.name).mark
    if mark is None or totals is not None:
        return []
    return [
        f"The mark of suite {suite.name} ({mark.needed:g}, {mark.share:.0%} of {mark.published:g}) is of all its dimensions on all their prompts, with {suite.videos_per_prompt} video each: these scores are not, so they are not held against it."
    ]


def blur_warnings(gated: statistics.Comparison | None, informative: Mapping[str, Dimension]) -> list[str]:
    """temporal_flickering that improves while the picture loses sharpness: VBench rewards blur."""
    if gated is None:
        return []
    flicker, sharp = gated.dimensions.get("temporal_flickering"), informative.get("sharpness")
    if not (flicker and sharp and flicker.relative_loss and sharp.relative_loss):
        return []
    if flicker.relative_loss.value < 0 and sharp.relative_loss.value > BLUR_LOSS:
        return [
            f"temporal_flickering improved while sharpness fell by {sharp.relative_loss.value:.1%}: the gain may be blur."
        ]
    return []
