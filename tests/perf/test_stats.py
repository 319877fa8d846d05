"""Medians, their intervals, and ratios of what was measured in pairs."""

from __future__ import annotations

import random

import pytest

from perf.stats import Estimate, estimate, ratio, worsening


def test_the_median_lies_within_its_interval() -> None:
    found = estimate([3.0, 1.0, 2.0, 5.0, 4.0])
    assert found.value == 3.0
    assert 1.0 <= found.low < 3.0 < found.high <= 5.0
    assert found.count == 5


def test_equal_values_leave_no_doubt() -> None:
    assert estimate([7.0] * 6) == Estimate(7.0, 7.0, 7.0, 6)
    assert estimate([7.0]).spread == 0.0


def test_the_same_values_give_the_same_interval() -> None:
    values = [random.Random(3).gauss(10, 1) for _ in range(9)]
    assert estimate(values) == estimate(list(values))


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = random.Random(5)
    held = 0
    for _ in range(200):
        found = estimate([generator.gauss(10, 1) for _ in range(15)])
        held += found.low <= 10 <= found.high
    assert 180 <= held < 200


def test_no_values_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_a_ratio_is_of_pairs_so_that_drift_cancels() -> None:
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    found = ratio([3 * d for d in drift], drift)
    assert (found.low, found.value, found.high) == (3.0, 3.0, 3.0)


def test_values_without_partners_are_refused() -> None:
    with pytest.raises(ValueError, match="paired"):
        ratio([1.0], [1.0, 2.0])


def test_a_quotient_of_estimates_is_less_certain_than_either() -> None:
    a, b = Estimate(10, 9, 11, 5), Estimate(5, 4.5, 5.5, 7)
    quotient = a.over(b)
    assert quotient.value == 2
    assert quotient.spread > max(a.spread, b.spread)
    assert quotient.count == 5


@pytest.mark.parametrize(
    ("change", "better", "worse_by"),
    [(0.9, "higher", 0.1), (1.2, "higher", -0.2), (1.1, "lower", 0.1), (0.5, "lower", -0.5)],
)
def test_worse_depends_on_what_is_good(change: float, better: str, worse_by: float) -> None:
    assert worsening(change, better) == pytest.approx(worse_by)
