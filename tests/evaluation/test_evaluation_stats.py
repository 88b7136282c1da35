"""Statistics of the gate against scipy, against exact cases, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq.evaluation import statistics as gate
from ptq.evaluation.findings import gate_warnings
from ptq.store.evaluation import Estimate


def compare(reference, candidate, clusters=None, **options):
    names = list(reference)
    clusters = clusters or {name: [f"p{i}" for i in range(len(reference[name]))] for name in names}
    arrays = [{name: np.asarray(side[name], float) for name in names} for side in (reference, candidate)]
    return gate.compare(*arrays, clusters, **options)


def skewed(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reference = rng.beta(5, 2, size)
    return reference, np.clip(reference - rng.gamma(0.5, 0.05, size) + rng.normal(0, 0.02, size), 0, 1)


@pytest.mark.parametrize("size", [12, 64, 300])
def test_interval_equals_scipy_paired_percentile_bootstrap(size):
    reference, candidate = skewed(size, size)
    found = compare({"d": reference}, {"d": candidate}, resamples=20_000).dimensions["d"].relative_loss
    expected = scipy.stats.bootstrap(
        (reference, candidate), lambda b, q, axis: (b.mean(axis) - q.mean(axis)) / b.mean(axis), paired=True,
        vectorized=True, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1),
    )  # fmt: skip
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert found.value == pytest.approx((reference.mean() - candidate.mean()) / reference.mean(), abs=1e-12)
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.03 * width)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.03 * width)


def test_aggregate_interval_equals_scipy_over_joint_resamples():
    first, second = skewed(1, 50), skewed(2, 50)
    found = compare({"a": first[0], "b": second[0]}, {"a": first[1], "b": second[1]}, resamples=20_000)

    def mean_positive(a, qa, b, qb, axis):
        losses = [(r.mean(axis) - c.mean(axis)) / r.mean(axis) for r, c in ((a, qa), (b, qb))]
        return sum(np.maximum(loss, 0) for loss in losses) / 2

    expected = scipy.stats.bootstrap(
        (first[0], first[1], second[0], second[1]), mean_positive, paired=True, vectorized=True, n_resamples=20_000,
        method="percentile", rng=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert found.aggregates["mean_positive"].low == pytest.approx(expected.low, abs=0.03 * width)
    assert found.aggregates["mean_positive"].high == pytest.approx(expected.high, abs=0.03 * width)


def test_identical_runs_lose_nothing_and_pass():
    scores = {"a": np.linspace(0.2, 1, 30), "b": np.linspace(0.5, 0.9, 30)}
    found = compare(scores, scores)
    for estimate in found.aggregates.values():
        assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)
        assert gate.verdict(estimate, 0.005) == gate.PASS


def test_aggregates_of_a_known_case():
    found = compare({"a": [0.5] * 4, "b": [0.8] * 4, "c": [0.4] * 4}, {"a": [0.4] * 4, "b": [0.88] * 4, "c": [0.4] * 4})
    assert found.dimensions["a"].relative_loss.value == pytest.approx(0.2)
    assert found.dimensions["a"].points.value == pytest.approx(10.0)
    assert found.dimensions["b"].relative_loss.value == pytest.approx(-0.1)
    values = {name: estimate.value for name, estimate in found.aggregates.items()}
    assert values == pytest.approx(
        {"mean_signed": 0.1 / 3, "mean_absolute": 0.1, "mean_positive": 0.2 / 3, "mean_score": 0.02 / 1.7}
    )


def test_constant_relative_loss_has_an_interval_of_no_width():
    reference = np.random.default_rng(0).uniform(0.2, 1, 40)
    loss = compare({"d": reference}, {"d": 0.97 * reference}).dimensions["d"].relative_loss
    assert loss.low == pytest.approx(0.03) and loss.high == pytest.approx(0.03)
    assert gate.verdict(loss, 0.01) == gate.FAIL


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 0.0049, "PASS"), (0.004, 0.006, "INCONCLUSIVE"), (0.0, 0.005, "INCONCLUSIVE"), (0.005, 0.01, "FAIL")],
)
def test_verdict_at_the_limit(low, high, expected):
    assert gate.verdict(Estimate(value=(low + high) / 2, low=low, high=high), 0.005) == expected


def test_verdict_needs_an_interval():
    assert gate.verdict(None, 0.01) == gate.INCONCLUSIVE
    assert gate.verdict(Estimate(value=0.0, low=None, high=None), 0.01) == gate.INCONCLUSIVE


def test_one_prompt_has_no_interval_even_with_many_samples():
    found = compare({"d": [0.5, 0.6]}, {"d": [0.5, 0.6]}, {"d": ["p", "p"]})
    assert found.prompts == 1
    assert gate.verdict(found.aggregates["mean_signed"], 0.01) == gate.INCONCLUSIVE


def test_samples_of_one_prompt_are_resampled_together():
    """Copying every unit five times adds no information: clusters keep the interval, independent units shrink it."""
    reference, candidate = skewed(5, 30)
    once = compare({"d": reference}, {"d": candidate}).aggregates["mean_signed"]
    five_b, five_q = np.repeat(reference, 5), np.repeat(candidate, 5)
    clusters = {"d": [f"p{i // 5}" for i in range(150)]}
    grouped = compare({"d": five_b}, {"d": five_q}, clusters).aggregates["mean_signed"]
    independent = compare({"d": five_b}, {"d": five_q}).aggregates["mean_signed"]
    assert grouped.high - grouped.low == pytest.approx(once.high - once.low, rel=0.05)
    assert independent.high - independent.low < 0.6 * (once.high - once.low)


def test_pairing_is_kept():
    """Scores vary widely but each pair differs by a hundredth: an unpaired bootstrap would be a hundred times wider."""
    reference = np.random.default_rng(0).uniform(0.1, 1, 60)
    noise = np.random.default_rng(1).normal(0, 1e-3, 60)
    loss = compare({"d": reference}, {"d": reference * 0.99 + noise}).dimensions["d"].relative_loss
    assert loss.high - loss.low < 0.002


def test_dimensions_may_cover_different_prompts():
    found = compare(
        {"a": [0.5, 0.7], "b": [0.9, 0.8, 0.7]}, {"a": [0.5, 0.6], "b": [0.9, 0.8, 0.7]},
        {"a": ["p0", "p1"], "b": ["p1", "p2", "p3"]},
    )  # fmt: skip
    assert found.prompts == 4 and found.dimensions["b"].units == 3
    # Some resamples draw no prompt of dimension a: its interval cannot be given, nor that of the averages.
    assert found.dimensions["a"].relative_loss.low is None
    assert gate.verdict(found.aggregates["mean_signed"], 0.5) == gate.INCONCLUSIVE


def test_dimension_without_positive_reference_is_left_out_and_named():
    found = compare({"zero": [0.0] * 30, "d": [0.5] * 30}, {"zero": [0.1] * 30, "d": [0.5] * 30})
    assert found.undefined == ["zero"] and found.dimensions["zero"].relative_loss is None
    assert found.aggregates["mean_signed"].value == 0.0


def test_cancellation_is_reported_only_when_gains_hide_a_loss():
    hidden = compare({"a": [0.5] * 30, "b": [0.5] * 30}, {"a": [0.45] * 30, "b": [0.549] * 30})
    assert gate.verdict(hidden.aggregates["mean_signed"], 0.005) == gate.PASS
    assert gate.cancels(hidden, 0.005) == ["a"]
    clean = compare({"a": [0.5] * 30, "b": [0.5] * 30}, {"a": [0.499] * 30, "b": [0.501] * 30})
    assert gate.cancels(clean, 0.005) == []


def test_interval_covers_the_true_loss():
    """95 % intervals of 300 simulated evaluations with 60 prompts cover the known loss 92 to 98 times in a hundred."""
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(300):
        reference = rng.beta(6, 2, 60)
        candidate = reference * (1 - 0.01) + rng.normal(0, 0.03, 60)
        loss = compare({"d": reference}, {"d": candidate}, resamples=1000, seed=trial).dimensions["d"].relative_loss
        covered += loss.low <= 0.01 <= loss.high
    assert 0.92 * 300 <= covered <= 0.98 * 300


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), min_size=2, max_size=20), st.integers(0, 5))
def test_same_seed_same_numbers_and_order_does_not_matter(pairs, seed):
    reference, candidate = map(np.array, zip(*pairs, strict=True))
    names = [f"p{i:02d}" for i in range(len(pairs))]
    order = np.random.default_rng(seed).permutation(len(pairs))
    first = compare({"d": reference}, {"d": candidate}, {"d": names}, resamples=1000, seed=seed)
    second = compare(
        {"d": reference[order]}, {"d": candidate[order]}, {"d": [names[i] for i in order]}, resamples=1000, seed=seed
    )
    assert first == second or first.dimensions["d"].relative_loss.low == pytest.approx(
        second.dimensions["d"].relative_loss.low, abs=1e-12
    )
    estimate = first.dimensions["d"].relative_loss
    assert estimate.low <= estimate.high


@pytest.mark.parametrize(
    ("reference", "candidate"), [([], []), ([0.5, 0.5], [0.5]), ([0.5, np.nan], [0.5, 0.5]), ([0.5], [np.inf])]
)
def test_unusable_scores_are_refused(reference, candidate):
    with pytest.raises(ValueError, match="dimension d"):
        compare({"d": reference}, {"d": candidate})


def test_an_inconclusive_verdict_says_how_many_prompts_would_decide():
    rng = np.random.default_rng(0)
    reference = rng.uniform(0.5, 0.9, 40)
    undecided = compare({"d": reference}, {"d": reference * 0.99 + rng.normal(0, 0.03, 40)})
    estimate = undecided.aggregates["mean_signed"]
    assert gate.verdict(estimate, 0.005) == gate.INCONCLUSIVE
    said = next(text for text in gate_warnings(undecided, 0.005, gate.INCONCLUSIVE, "mean_signed") if "about" in text)
    needed = int(said.split("about ")[1].split()[0])
    more = rng.uniform(0.5, 0.9, needed * 2)
    again = compare({"d": more}, {"d": more * (1 - estimate.value) + rng.normal(0, 0.03, needed * 2)})
    assert needed > 40 and gate.verdict(again.aggregates["mean_signed"], 0.005) != gate.INCONCLUSIVE
