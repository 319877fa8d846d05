"""Suites are data: what they say holds together."""

from __future__ import annotations

from collections import Counter

import pytest

from perf import servers
from perf.model import METRICS, Suite
from perf.suites import all_suites

SUITES = all_suites().values()


def test_the_suites_of_the_documentation_are_there() -> None:
    assert set(all_suites()) == {"blk", "blk-guest", "net", "net-guest", "rings", "scale", "start"}


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_a_suite_holds_together(suite: Suite) -> None:
    names = Counter(workload.name for workload in suite.workloads)
    assert max(names.values()) == 1
    for workload in suite.workloads:
        assert len(set(workload.servers)) == len(workload.servers) >= 2, workload.name
        for name in workload.servers:
            servers.find(name)
        assert workload.servers[0].split("-")[0] == "vdev"
        assert workload.compared
        assert set(workload.compared) <= set(METRICS)
        assert workload.seconds > 0


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_a_suite_checks_what_comes_back(suite: Suite) -> None:
    assert any(workload.verified for workload in suite.workloads)


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_rows_of_a_series_are_one_plot(suite: Suite) -> None:
    axes: dict[str, set[str | None]] = {}
    places: Counter[tuple[str, float | None]] = Counter()
    for workload in suite.workloads:
        axes.setdefault(workload.series, set()).add(workload.x[0] if workload.x else None)
        places[workload.series, workload.x[1] if workload.x else None] += 1
    assert all(len(names) == 1 for names in axes.values())
    assert max(places.values()) == 1
