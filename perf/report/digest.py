"""A run's figures, each computed once, and the verdicts upon them.

A verdict is passed on the base server beside the best of its peers, the best in that metric. It is
"ahead" or "behind" only where the whole 95 % interval of the ratio is on that side of 1 and the
ratio is further from 1 than a second instance of the base came (the A/A noise); all else is even.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Literal

from perf.model import METRICS
from perf.results import MIXED, Failure, Row, Run, ServerResult, SuiteResult
from perf.stats import Estimate

Verdict = Literal["ahead", "even", "behind"]

# Shown wherever they were measured; other metrics where workloads are compared by them.
MAIN = (
    "iops",
    "packets_per_second",
    "bytes_per_second",
    "bits_per_second",
    "latency_p50_us",
    "latency_p99_us",
    "server_cpu_us",
)


@dataclass(frozen=True)
class Comparison:
    """The base over its best peer in one metric."""

    metric: str
    base: str
    peer: str
    ratio: Estimate
    noise: Estimate | None

    @property
    def verdict(self) -> Verdict:
        """Whether the base is better than its best peer, beyond noise."""
        return verdict(self.ratio, self.noise, METRICS[self.metric].better)

    @property
    def advantage(self) -> Estimate:
        """How many times better the base is: the ratio, or its inverse where less is better."""
        return self.ratio if self._higher else _inverse(self.ratio)

    @property
    def noise_advantage(self) -> Estimate | None:
        """The A/A ratio on the scale of `advantage`."""
        return _inverse(self.noise) if self.noise and not self._higher else self.noise

    @property
    def _higher(self) -> bool:
        return METRICS[self.metric].better == "higher"


class RowDigest:
    """The figures of a row; those that are no finite numbers are left out."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.compared = [metric for metric in row.compared if metric in METRICS]
        self.base = row.base
        self.placement = row.placement
        self.calm = row.calm
        self.counted = len(row.counting)
        self._values: dict[tuple[str, str], Estimate | None] = {}
        self._ratios: dict[tuple[str, str], Estimate | None] = {}

    def value(self, server: ServerResult, metric: str) -> Estimate | None:
        """The median of a server's rounds that count."""
        key = (server.name, metric)
        if key not in self._values:
            self._values[key] = _finite(self.row.estimate(server, metric))
        return self._values[key]

    def ratio(self, peer: ServerResult, metric: str) -> Estimate | None:
        """The base over a peer."""
        key = (peer.name, metric)
        if key not in self._ratios and self.base:
            self._ratios[key] = _positive(self.row.ratio(self.base, peer, metric))
        return self._ratios.get(key)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """One for each metric that workloads are compared by, where base and peer have it."""
        found = []
        for metric in self.compared:
            peer = self.row.best_peer(metric)
            ratio = self.ratio(peer, metric) if peer else None
            if self.base and peer and ratio:
                noise = _positive(self.row.noise(metric))
                found.append(Comparison(metric, self.base.name, peer.name, ratio, noise))
        return found

    def comparison(self, metric: str | None) -> Comparison | None:
        """The one in this metric."""
        return next((c for c in self.comparisons if c.metric == metric), None)

    @property
    def measured(self) -> list[ServerResult]:
        """The servers with windows, base first."""
        return [server for server in self.row.servers if server.windows]

    def failure_of(self, server: str) -> Failure | None:
        """What this server did instead of its work."""
        return next((f for f in self.row.failures if f.server == server), None)

    @property
    def lost(self) -> list[Failure]:
        """What servers did that did not even start, and so are not among the row's."""
        started = {server.name for server in self.row.servers}
        return [failure for failure in self.row.failures if failure.server not in started]

    @property
    def base_failure(self) -> Failure | None:
        """What the server that the others are compared with did instead of its work."""
        return self.failure_of(self.row.servers[0].name) if self.row.servers else None

    @cached_property
    def metrics(self) -> list[str]:
        """What was measured here: the compared metrics first, then the order of METRICS."""
        present = {name for s in self.measured for window in s.windows for name in window.metrics}
        return [m for m in dict.fromkeys([*self.compared, *METRICS]) if m in present]

    @property
    def trouble(self) -> str:
        """Why there are no figures, or an empty string."""
        if not self.row.rounds:
            return "nothing was measured"
        if self.placement == MIXED:
            return f"no round counts: the cores' distance changed in all {self.row.rounds}"
        return ""

    @property
    def rounds(self) -> str:
        """How many rounds count of those run, and whether they were busy."""
        busy = self.counted and not self.calm
        return f"{self.counted}/{self.row.rounds}" + (" busy" if busy else "")


@dataclass(frozen=True)
class Series:
    """The rows of one plot; `over`: the name of x where the rows differ in it."""

    name: str
    rows: Sequence[RowDigest]

    @property
    def over(self) -> str | None:
        """What the rows are plotted over, or None where they stand beside each other."""
        points = [row.row.x for row in self.rows]
        names = {x[0] for x in points if x}
        distinct = {x[1] for x in points if x}
        plotted = len(names) == 1 and len(distinct) == len(points) > 1
        return names.pop() if plotted else None

    @property
    def headline(self) -> str | None:
        """What it is about: the first metric by which all its rows are compared."""
        first = self.rows[0].compared
        common = [m for m in first if all(m in row.compared for row in self.rows)]
        return next(iter([*common, *first]), None)

    @property
    def metrics(self) -> list[str]:
        """All that was measured in it, the headline first."""
        found = dict.fromkeys(metric for row in self.rows for metric in row.metrics)
        return sorted(found, key=lambda metric: metric != self.headline)

    @property
    def servers(self) -> list[str]:
        """The names of the servers that were measured in it."""
        return list(dict.fromkeys(s.name for row in self.rows for s in row.measured))

    def values(self, metric: str) -> list[float]:
        """Every server's and row's value."""
        found = (row.value(server, metric) for row in self.rows for server in row.measured)
        return [estimate.value for estimate in found if estimate]


@dataclass(frozen=True)
class SuiteDigest:
    """The rows of a suite, and the same by series."""

    suite: SuiteResult
    rows: Sequence[RowDigest]

    @cached_property
    def series(self) -> list[Series]:
        """The plots, in the order in which they first appear."""
        names = dict.fromkeys(row.row.series for row in self.rows)
        return [Series(name, [r for r in self.rows if r.row.series == name]) for name in names]


@dataclass(frozen=True)
class RunDigest:
    """A whole run."""

    run: Run
    suites: Sequence[SuiteDigest]

    @property
    def rows(self) -> list[RowDigest]:
        """The rows of all suites."""
        return [row for suite in self.suites for row in suite.rows]

    @cached_property
    def servers(self) -> list[str]:
        """All servers that were measured, those first that others are compared with."""
        rows = self.rows
        bases = [row.base.name for row in rows if row.base]
        return list(dict.fromkeys([*bases, *(s.name for row in rows for s in row.measured)]))

    def absences(self) -> dict[tuple[str, str], list[Row]]:
        """By server and reason: the rows in which it is absent."""
        return absences(row.row for row in self.rows)


def digest(run: Run) -> RunDigest:
    """The figures of a run, computed when they are first asked for."""
    return RunDigest(run, [SuiteDigest(s, [RowDigest(r) for r in s.rows]) for s in run.suites])


def absences(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """By server and reason: the rows in which it is absent."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        for absent in row.absent.items():
            found.setdefault(absent, []).append(row)
    return found


def verdict(ratio: Estimate, noise: Estimate | None, better: str) -> Verdict:
    """Whether a ratio to a peer is better than 1 beyond noise. One round decides nothing."""
    if ratio.count < 2 or ratio.low <= 1 <= ratio.high:
        return "even"
    if noise and max(ratio.value, 1 / ratio.value) <= 1 + noise_share(noise):
        return "even"
    return "ahead" if (ratio.value > 1) == (better == "higher") else "behind"


def noise_share(noise: Estimate) -> float:
    """How far from 1 two instances of one server came apart, either way."""
    return max(abs(noise.low - 1), abs(noise.high - 1))


def _finite(estimate: Estimate | None) -> Estimate | None:
    if estimate and all(map(isfinite, (estimate.value, estimate.low, estimate.high))):
        return estimate
    return None


def _positive(ratio: Estimate | None) -> Estimate | None:
    """Ratios to zero and of zero say nothing."""
    return ratio if _finite(ratio) and ratio and ratio.low > 0 else None


def _inverse(ratio: Estimate) -> Estimate:
    return Estimate(1 / ratio.value, 1 / ratio.high, 1 / ratio.low, ratio.count)
