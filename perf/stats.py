"""Medians with bootstrap confidence intervals, of values and of paired ratios.

What is compared was measured in the same round, so ratios are formed within rounds and the rounds
are resampled: drift of the machine, which falls on both sides of a pair, then cancels out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A median and the bounds of its 95 % confidence interval; `count` values behind it."""

    value: float
    low: float
    high: float
    count: int

    @property
    def spread(self) -> float:
        """Half the interval's width as a share of the value."""
        return (self.high - self.low) / 2 / abs(self.value) if self.value else 0.0

    def over(self, other: Estimate) -> Estimate:
        """This divided by an independent estimate; relative errors add as squares do."""
        value = self.value / other.value
        below = ((1 - self.low / self.value) ** 2 + (other.high / other.value - 1) ** 2) ** 0.5
        above = ((self.high / self.value - 1) ** 2 + (1 - other.low / other.value) ** 2) ** 0.5
        return Estimate(
            value, value * (1 - below), value * (1 + above), min(self.count, other.count)
        )


def estimate(values: Sequence[float]) -> Estimate:
    """The median of `values` with its percentile-bootstrap interval.

    Equal values give equal results: the resampling is seeded. Raises ValueError without values.
    """
    return _estimate(tuple(values))


@lru_cache(maxsize=4096)  # table, page and gate ask for the same
def _estimate(values: tuple[float, ...]) -> Estimate:
    if not values:
        raise ValueError("no values to take a median of")
    generator = random.Random(len(values))
    medians = sorted(median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = int(RESAMPLES * (1 - CONFIDENCE) / 2)
    return Estimate(median(values), medians[tail], medians[-1 - tail], len(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """The median ratio of values measured in pairs: above[i] with below[i].

    Raises ValueError for sequences that are empty or of different lengths.
    """
    if len(above) != len(below):
        raise ValueError(f"{len(above)} values cannot be paired with {len(below)}")
    return estimate([a / b for a, b in zip(above, below, strict=True) if b])


def worsening(change: float, better: str) -> float:
    """By which share a metric got worse when it changed by the factor `change`; negative: better.

    0.1 = a tenth less of what should be high, or a tenth more of what should be low.
    """
    return 1 - change if better == "higher" else change - 1
