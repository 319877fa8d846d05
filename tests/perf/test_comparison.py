"""A change counts beyond the threshold and the noise, and only like is compared with like."""

from __future__ import annotations

import pytest

from perf import comparison
from tests.perf.rows import FAR, row, run

STEADY = [100.0] * 5


def test_servers_of_one_run() -> None:
    found = run(row({"old": STEADY, "new": [80.0] * 5}))
    (change,) = comparison.servers_of(found, "old", "new")
    assert change.worsening == pytest.approx(0.2)
    assert change.is_worse(0.05)
    assert not change.is_worse(0.25)
    (back,) = comparison.servers_of(found, "new", "old")
    assert back.is_better(0.05)
    assert not back.is_worse(0.05)


def test_where_low_is_good_more_is_worse() -> None:
    found = run(row({"old": STEADY, "new": [120.0] * 5}, metric="server_cpu_us"))
    (change,) = comparison.servers_of(found, "old", "new")
    assert change.is_worse(0.05)


def test_what_noise_explains_is_no_regression() -> None:
    apart = [100.0, 130.0, 75.0, 120.0, 80.0]
    found = run(row({"old": STEADY, "new": [88.0] * 5}, again=apart))
    (change,) = comparison.servers_of(found, "old", "new")
    assert change.noise > 0.15
    assert not change.is_worse(0.05)
    (quiet,) = comparison.servers_of(
        run(row({"old": STEADY, "new": [88.0] * 5}, again=STEADY)), "old", "new"
    )
    assert quiet.is_worse(0.05)


def test_servers_that_a_row_lacks_are_passed_over() -> None:
    assert comparison.servers_of(run(row({"old": STEADY})), "old", "new") == []


def test_between_runs_the_ratios_to_the_same_peer_are_compared() -> None:
    # The machine is twice as fast the second time; the base alone is a fifth slower.
    old = run(row({"base": STEADY, "peer": [50.0] * 5}))
    new = run(row({"base": [160.0] * 5, "peer": [100.0] * 5}))
    (change,) = comparison.runs(old, new)
    assert change.ratio.value == pytest.approx(0.8)
    assert change.is_worse(0.1)
    (same,) = comparison.runs(old, old)
    assert not same.is_worse(0.0)


def test_runs_at_another_distance_or_with_other_peers_are_not_compared() -> None:
    near = run(row({"base": STEADY, "peer": STEADY}))
    assert comparison.runs(near, run(row({"base": STEADY, "peer": STEADY}, placement=FAR))) == []
    assert comparison.runs(near, run(row({"base": STEADY, "other": STEADY}))) == []
    assert comparison.runs(near, run(row({"base": STEADY, "peer": STEADY}, workload="x"))) == []
