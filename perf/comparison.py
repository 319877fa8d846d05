"""What got worse: between two results, or between two servers of one.

Between two runs it is the ratio to a server that both measured, each in its own run, that is
compared: absolute figures of two times are figures of two machines. Within a run the two servers'
windows were interleaved, so their ratio says it all. A change counts only beyond the threshold
plus the noise: what the base's two instances differed by, and the ratio's own interval.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perf.model import METRICS
from perf.results import Row, Run
from perf.stats import Estimate, worsening


@dataclass(frozen=True)
class Change:
    """A metric's change by the factor `ratio`; `noise`: the share that means nothing."""

    workload: str
    metric: str
    what: str
    placement: str
    ratio: Estimate
    noise: float

    @property
    def worsening(self) -> float:
        """By which share it got worse; negative: better."""
        return worsening(self.ratio.value, METRICS[self.metric].better)

    def is_worse(self, threshold: float) -> bool:
        """Whether it got worse by more than the threshold and the noise."""
        return self.worsening > threshold + self.noise

    def is_better(self, threshold: float) -> bool:
        """Whether it got better by more than the threshold and the noise."""
        return -self.worsening > threshold + self.noise


def noise_of(row: Row, metric: str, ratio: Estimate) -> float:
    """The share by which a ratio of this row may be off."""
    again = row.noise(metric)
    apart = max(abs(1 - again.low), abs(again.high - 1)) if again else 0.0
    return max(apart, ratio.spread)


def servers_of(run: Run, first: str, second: str) -> list[Change]:
    """`second` against `first`, in every row that measured both."""
    changes = []
    for row in (row for suite in run.suites for row in suite.rows):
        known = {server.name: server for server in row.servers}
        if first not in known or second not in known:
            continue
        for metric in row.compared:
            ratio = row.ratio(known[second], known[first], metric)
            if ratio:
                noise = noise_of(row, metric, ratio)
                what = f"{second} / {first}"
                changes.append(Change(row.workload, metric, what, row.placement, ratio, noise))
    return changes


def runs(old: Run, new: Run) -> list[Change]:
    """The base's ratio to each peer that both runs measured, new against old.

    Only rows are compared whose cores were at the same distance.
    """
    before = {row.workload: row for suite in old.suites for row in suite.rows}
    changes = []
    for row in (row for suite in new.suites for row in suite.rows):
        past = before.get(row.workload)
        if past and past.base and row.base and past.placement == row.placement:
            changes += _row(past, row)
    return changes


def _row(old: Row, new: Row) -> list[Change]:
    changes = []
    peers = {peer.name: peer for peer in old.peers}
    assert old.base
    assert new.base
    for peer in new.peers:
        if peer.name not in peers:
            continue
        for metric in new.compared:
            past = old.ratio(old.base, peers[peer.name], metric)
            now = new.ratio(new.base, peer, metric)
            if past and now:
                noise = max(noise_of(old, metric, past), noise_of(new, metric, now))
                what = f"{new.base.name} / {peer.name}"
                changes.append(
                    Change(new.workload, metric, what, new.placement, now.over(past), noise)
                )
    return changes


def show(console: Console, changes: list[Change], threshold: float) -> None:
    """Prints a line a change."""
    table = Table(title=f"Changes; counted beyond {threshold:.0%} and the noise")
    for name in ("workload", "metric", "ratio of"):
        table.add_column(name)
    for name in ("change", "95 %", "noise", "cores"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for change in changes:
        verdict = "[dim]same[/dim]"
        if change.is_worse(threshold):
            verdict = "[bold red]worse[/bold red]"
        elif change.is_better(threshold):
            verdict = "[green]better[/green]"
        table.add_row(
            escape(change.workload),
            METRICS[change.metric].title,
            escape(change.what),
            f"{change.ratio.value:.3f}",
            f"{change.ratio.low:.3f}-{change.ratio.high:.3f}",
            f"±{change.noise:.1%}",
            change.placement,
            verdict,
        )
    console.print(table)
