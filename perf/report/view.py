"""What the page's template shows, in words: cards, tables, facts. No HTML, no charts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median
from typing import TypeAlias

from perf.model import METRICS
from perf.report.digest import (
    Comparison,
    RowDigest,
    RunDigest,
    Series,
    Verdict,
    absences,
    noise_share,
    verdict,
)
from perf.report.units import (
    Scale,
    compact,
    duration,
    interval,
    ratio,
    scale_of,
    share,
    short_name,
    times,
)
from perf.results import Failure, Row, ServerResult
from perf.stats import Estimate

VERDICTS: tuple[Verdict, ...] = ("ahead", "even", "behind")
Counts: TypeAlias = Sequence[tuple[Verdict, int]]


@dataclass(frozen=True)
class Word:
    """A text with a verdict upon it."""

    text: str
    label: str = ""
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Card:
    """A series in its headline: the ratio to the best peer in what it is about.

    `counts`: of its rows, by verdict; a row in which the base failed counts as behind.
    """

    verdict: Verdict | None
    counts: Counts
    big: str
    metric: str
    peers: str
    why: str
    points: Sequence[Word]
    others: Sequence[Word]


@dataclass(frozen=True)
class Tally:
    """In how many workloads the base is ahead, even and behind in a metric."""

    metric: str
    counts: Counts


@dataclass(frozen=True)
class Cell:
    """A figure of a table; `small` stands behind it, `title` shows when it is pointed at."""

    text: str = ""
    small: str = ""
    title: str = ""
    verdict: Verdict | None = None
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A server in a row's table."""

    server: str
    measured: bool
    failed: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Workload:
    """A row of a series' table."""

    row: RowDigest
    lines: Sequence[Line]


@dataclass(frozen=True)
class Table:
    """The figures of a series."""

    headings: Sequence[str]
    workloads: Sequence[Workload]


@dataclass
class ServerFacts:
    """A server in the list of all."""

    name: str
    versions: list[str] = field(default_factory=list)
    workloads: int = 0
    absent: list[str] = field(default_factory=list)


def unanimous(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The verdict that all of them are, if they are one."""
    found = set(verdicts)
    return found.pop() if len(found) == 1 else None


def count(verdicts: Iterable[Verdict]) -> Counts:
    """How often each verdict was passed."""
    counter = Counter(verdicts)
    return [(verdict, counter[verdict]) for verdict in VERDICTS]


def span(comparisons: Sequence[Comparison]) -> str:
    """The ratio, or the least and the greatest of several."""
    values = sorted(comparison.ratio.value for comparison in comparisons)
    if ratio(values[0]) == ratio(values[-1]):
        return times(values[0])
    return f"{ratio(values[0])}–{times(values[-1])}"  # noqa: RUF001


def card(series: Series) -> Card:
    """The card of a series."""
    metrics = list(dict.fromkeys(c.metric for row in series.rows for c in row.comparisons))
    head = series.headline if series.headline in metrics else next(iter(metrics), None)
    by_metric = {m: [c for row in series.rows if (c := row.comparison(m))] for m in metrics}
    found = by_metric.pop(head, []) if head else []
    points = [point for row in series.rows if (point := _point(row, series, head))]
    verdicts = [point.verdict for point in points if point.verdict]
    failed = dict.fromkeys(f"{f.server} {f.kind}" for r in series.rows for f in r.row.failures)
    why = ", ".join(failed)
    if not found:
        why = why or next((r.trouble for r in series.rows if r.trouble), "no peer to compare with")
    return Card(
        verdict=unanimous(verdicts),
        counts=count(verdicts),
        big=span(found) if found else "",
        metric=short_name(head) if head else "",
        peers=", ".join(dict.fromkeys(c.peer for c in found)),
        why=why,
        points=points if len(points) > 1 else (),
        others=[
            Word(span(others), short_name(metric), unanimous(c.verdict for c in others))
            for metric, others in by_metric.items()
        ],
    )


def _point(row: RowDigest, series: Series, metric: str | None) -> Word | None:
    name = compact(row.row.x[1]) if series.over and row.row.x else row.row.workload
    comparison = row.comparison(metric)
    if comparison:
        return Word(times(comparison.ratio.value), name, comparison.verdict)
    return Word(row.base_failure.kind, name, "behind") if row.base_failure else None


def tallies(figures: RunDigest) -> list[Tally]:
    """One for each metric that workloads are compared by."""
    found: dict[str, list[Verdict]] = {}
    for row in figures.rows:
        for comparison in row.comparisons:
            found.setdefault(comparison.metric, []).append(comparison.verdict)
    return [Tally(short_name(metric), count(verdicts)) for metric, verdicts in found.items()]


def table(series: Series) -> Table:
    """The figures of a series; behind what rows are compared by, the base's ratio to each peer."""
    scales = {metric: scale_of(metric, series.values(metric)) for metric in series.metrics}
    compared = {c.metric for row in series.rows for c in row.comparisons}
    base = next((row.base.name for row in series.rows if row.base), "")
    headings = []
    for metric, scale in scales.items():
        headings += [scale.heading, f"{base} / it"] if metric in compared else [scale.heading]
    return Table(
        headings,
        [
            Workload(
                row,
                [
                    *(_line(row, server, scales, compared) for server in row.row.servers),
                    *(Line(f.server, False, f.kind, [Cell()] * len(headings)) for f in row.lost),
                ],
            )
            for row in series.rows
        ],
    )


def _line(
    row: RowDigest, server: ServerResult, scales: Mapping[str, Scale], compared: Container[str]
) -> Line:
    failure = row.failure_of(server.name)
    cells = []
    for metric, scale in scales.items():
        cells.append(_value_cell(row.value(server, metric), scale, spread=metric in compared))
        if metric in compared:
            cells.append(_ratio_cell(row, server, metric))
    return Line(server.name, bool(server.windows), failure.kind if failure else "", cells)


def _value_cell(value: Estimate | None, scale: Scale, *, spread: bool) -> Cell:
    if value is None:
        return Cell()
    bounds = f"95 %: {scale.format(value.low)} to {scale.format(value.high)} {scale.unit}"
    shown = spread and value.value and value.count > 1
    return Cell(
        scale.format(value.value),
        f"±{share(value.spread)}" if shown else "",
        f"{bounds}, {value.count} rounds",
    )


def _ratio_cell(row: RowDigest, server: ServerResult, metric: str) -> Cell:
    comparison = row.comparison(metric)
    if comparison is None or row.base is None:
        return Cell()
    noise = comparison.noise
    if server is row.base:
        return Cell("", f"A/A ±{share(noise_share(noise))}" if noise else "no A/A")
    found = row.ratio(server, metric)
    if found is None:
        return Cell()
    return Cell(
        times(found.value),
        interval(found),
        f"{found.count} rounds",
        verdict(found, noise, METRICS[metric].better),
        best=server.name == comparison.peer,
    )


def remarks(series: Series) -> list[str]:
    """Who is absent and why, and rows without figures."""
    found = [f"{row.row.workload}: {row.trouble}" for row in series.rows if row.trouble]
    for (server, reason), rows in absences(row.row for row in series.rows).items():
        some = "" if len(rows) == len(series.rows) else names(row.workload for row in rows)
        found.append(f"{server} is absent: {reason}" + (f" ({some})" if some else ""))
    return found


def failures(series: Series) -> list[tuple[Row, Failure]]:
    """What servers did instead of their work."""
    return [(row.row, failure) for row in series.rows for failure in row.row.failures]


def names(found: Iterable[str]) -> str:
    """A list in words."""
    return ", ".join(found)


def facts(figures: RunDigest) -> list[tuple[str, str]]:
    """When, what and where, and how far it can be trusted."""
    run, rows = figures.run, figures.rows
    found = [
        ("commit", run.commit[:12]),
        ("started", moment(run.started)),
        ("took", duration(run.seconds)),
        *run.machine.items(),
    ]
    placements = Counter(row.placement for row in rows)
    if rows:
        where = ", ".join(f"{place} in {count}" for place, count in placements.most_common())
        found.append(("cores, by workloads", where))
    pings: dict[str, list[float]] = {}
    for row in rows:
        for server in row.measured:
            for window in server.windows:
                pings.setdefault(window.placement, []).extend(window.ping_ns)
    found += [
        (f"round trip {place}", f"{min(values):.0f} to {max(values):.0f} ns")
        for place, values in pings.items()
        if place in ("near", "far")
    ]
    if any(row.row.rounds for row in rows):
        counted, ran = sum(row.counted for row in rows), sum(row.row.rounds for row in rows)
        found.append(("rounds that count", f"{counted} of {ran}"))
    noises = [noise_share(c.noise) for row in rows for c in row.comparisons if c.noise]
    if noises:
        found.append(("A/A noise", f"±{share(median(noises))}, at worst ±{share(max(noises))}"))
    return found


def moment(iso: str) -> str:
    """A time, for people; whatever is no time stays as it is."""
    try:
        return datetime.fromisoformat(iso).strftime("%d %B %Y, %H:%M %Z").strip()
    except ValueError:
        return iso


def servers(figures: RunDigest) -> list[ServerFacts]:
    """All servers, those measured first."""
    found = {name: ServerFacts(name) for name in figures.servers}
    for row in figures.rows:
        for server in row.row.servers:
            entry = found.setdefault(server.name, ServerFacts(server.name))
            entry.workloads += bool(server.windows)
            if server.version and server.version not in entry.versions:
                entry.versions.append(server.version)
    for server_name, reason in absences(row.row for row in figures.rows):
        found.setdefault(server_name, ServerFacts(server_name)).absent.append(reason)
    return list(found.values())
