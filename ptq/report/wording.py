"""The sentences of a report: the verdict in plain words, what it means, what the reader must know besides.

Every sentence follows from the facts; none is written unless it is true of this job.
"""

from __future__ import annotations

from ptq.checkpoint.manifest import Manifest
from ptq.evaluation.statistics import AGGREGATES, FAIL, INCONCLUSIVE, PASS
from ptq.evaluation.suites import DRIFT_NOTE
from ptq.report.cells import signed
from ptq.report.facts import Facts
from ptq.store.evaluation import Evaluation

NO_VERDICT = "NO VERDICT"
MEANING = {
    PASS: "The whole interval lies below the limit.",
    FAIL: "The whole interval lies at or above the limit.",
    INCONCLUSIVE: "The interval contains the limit: these videos do not decide it.",
}
SUITE_SCOPE = {
    "core": "Suite core measures drift and integrity only; it has no verdict. A verdict needs suite tiny or VBench results.",
    "tiny": "The score is of the embedded tiny model in its own small world: a rehearsal of the method with exact prompt adherence. It says how well the toolkit works, not how a 14-billion-parameter model scores.",
}


def verdict_word(evaluation: Evaluation) -> str:
    """PASS, FAIL, INCONCLUSIVE, or that there is none."""
    return evaluation.verdict or NO_VERDICT


def headline(facts: Facts) -> str:
    """The verdict as one sentence with loss, interval, videos and limit."""
    evaluation = facts.evaluation
    videos = f"{evaluation.units} {_kind_of_videos(facts)} videos"
    if evaluation.verdict is None or evaluation.limit is None:
        return f"{facts.format_name} was compared with the original on {videos}, without a verdict (suite {evaluation.suite})."
    ending = f"{evaluation.verdict}, the limit is {100 * evaluation.limit:g} %."
    loss = evaluation.deciding
    if loss is None:
        return f"The loss of {facts.format_name} is undefined, because the original scores 0 on {videos}: {ending}"
    percent = signed(100 * abs(loss.value), 2).lstrip("+")
    if loss.value < 0 and float(percent) > 0:
        what = f"{facts.format_name} scores {percent} % above the original"
    else:
        what = f"{facts.format_name} loses {percent} % of the original's score"
    return f"{what}{_interval_words(evaluation)} on {videos}: {ending}".replace(" %", "\u00a0%")


def _interval_words(evaluation: Evaluation) -> str:
    loss = evaluation.deciding
    if loss is None or loss.low is None or loss.high is None:
        return " (no interval could be computed)"
    # An interval of the loss: a negative loss is a gain.
    low, high = (signed(100 * bound, 2).lstrip("+") for bound in (loss.low, loss.high))
    return f" (loss between {low} and {high} % with {100 * evaluation.bootstrap.confidence:g} % confidence)"


def _kind_of_videos(facts: Facts) -> str:
    if facts.evaluation.reference.directory is None:
        return "imported"
    return "held-out paired" if facts.overlap == 0 else "paired"


def meaning(facts: Facts) -> str:
    """What the verdict says and how the loss is defined, two or three sentences."""
    evaluation = facts.evaluation
    if evaluation.verdict is None or evaluation.gate is None:
        return SUITE_SCOPE.get(evaluation.suite, "")
    first = MEANING[evaluation.verdict]
    loss = evaluation.deciding
    if loss is None or loss.low is None:
        first = "The data cannot bound the loss."
    names = ", ".join(name.replace("_", " ") for name in evaluation.dimensions)
    return f"{first} Loss is the {AGGREGATES[evaluation.gate]} over {len(evaluation.dimensions)} dimensions ({names}; suite {evaluation.suite}): the share of the original's score that is gone, positive when the quantized model is worse. {_pairing(evaluation)}"


def _pairing(evaluation: Evaluation) -> str:
    if evaluation.reference.directory is None:
        return "Scores were imported: videos are paired by file name, and nothing proves that they started from equal noise."
    return "Both models made every video from the same prompt and the same noise."


def held_out(facts: Facts) -> str:
    """Whether calibration saw any evaluated prompt."""
    if facts.overlap is None:
        return "Whether calibration saw evaluated prompts cannot be told from the artifacts that are here."
    if facts.overlap == 0:
        return "No evaluated prompt was a calibration prompt (compared by caption)."
    return f"{facts.overlap} evaluated prompts were calibration prompts too: the evaluation is not held out."


def residual_limit(manifest: Manifest) -> str:
    """What a judge must know of a checkpoint with residual blocks."""
    return f"Residual blocks: some input channels are multiplied in two 4-bit words, the value and what its rounding left, which adds {manifest.coverage.residual_share:.2%} to the products of the quantized layers. Every operand has 4 bits; whether an activation may have two such words the challenge's rules do not say."


def limitations(facts: Facts) -> list[str]:
    """What limits the claim: residual blocks, then the evaluation's own warnings first."""
    evaluation, manifest = facts.evaluation, facts.manifest
    found = [residual_limit(manifest)] if manifest is not None and manifest.coverage.residual_share else []
    found += evaluation.warnings
    if evaluation.yardstick is not None:
        found += [f"Of the yardstick: {text}" for text in evaluation.yardstick.warnings]
    scope = SUITE_SCOPE.get(evaluation.suite)
    if scope:
        found.append(scope)
    found.append(held_out(facts))
    found.append(DRIFT_NOTE)
    if evaluation.verdict is not None:
        found.append(
            f"Intervals ({evaluation.bootstrap.method}; {evaluation.bootstrap.resamples} resamples, seed {evaluation.bootstrap.seed}) cover the choice of prompts and seeds, not a change of resolution, steps or sampler."
        )
    if facts.manifest is not None:
        found.append(
            "Layer, block and denoiser errors are taken on calibration records; they guide the method and are no measure of the video."
        )
        found.append(f"Not done: {facts.manifest.statement}")
    return found + [f"Left out: {text}" for text in facts.omissions]
