"""A run on the terminal: one table a suite, and under it what is no figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perf.report.digest import (
    MAIN,
    Comparison,
    RowDigest,
    RunDigest,
    SuiteDigest,
    absences,
    digest,
    noise_share,
)
from perf.report.units import Scale, duration, interval, ratio, scale_of, share
from perf.results import Run, ServerResult

VERDICT_STYLES = {"ahead": "bold green", "even": "bold", "behind": "bold red"}
BEST = "▸"
LOG_LINES = 6


def show(console: Console, run: Run) -> None:
    """Prints a run."""
    run_digest = digest(run)
    console.print(_head(run_digest))
    for suite in run_digest.suites:
        console.print(_table(suite))
        for line in _remarks(suite):
            console.print(line)
    for line in _foot(run_digest):
        console.print(line)


def _head(run_digest: RunDigest) -> Text:
    run = run_digest.run
    facts = [f"commit {run.commit[:12]}", run.started, duration(run.seconds)]
    text = _text(" · ".join([*facts, *(f"{k} {v}" for k, v in run.machine.items())]), "dim")
    if run.interrupted:
        text.append("\ninterrupted: what follows was measured until then", "bold yellow")
    return text


def _table(suite: SuiteDigest) -> Table:
    scales = _scales(suite)
    table = Table(
        title=_text(suite.suite.title, "bold"),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", min_width=24, overflow="fold")
    for scale in scales.values():
        table.add_column(scale.heading, justify="right", no_wrap=True)
    table.add_column("cores", no_wrap=True)
    table.add_column("rounds", no_wrap=True)
    for row in suite.rows:
        _add_row(table, row, scales)
    return table


def _scales(suite: SuiteDigest) -> Mapping[str, Scale]:
    """The columns: what rows are compared by and the main metrics, where they were measured."""
    wanted = [metric for row in suite.rows for metric in row.compared]
    values: dict[str, list[float]] = {}
    for row in suite.rows:
        for metric in row.metrics:
            if metric in MAIN or metric in wanted:
                found = (row.value(server, metric) for server in row.measured)
                values.setdefault(metric, []).extend(e.value for e in found if e)
    order = dict.fromkeys([*MAIN, *wanted])
    return {metric: scale_of(metric, values[metric]) for metric in order if metric in values}


def _add_row(table: Table, row: RowDigest, scales: Mapping[str, Scale]) -> None:
    gap = [Text()] * len(scales)
    ends = [Text(row.placement), Text(row.rounds, "" if row.calm else "yellow")]
    table.add_row(_text(row.row.workload, "bold"), *gap, *ends)
    best = {c.metric: c.peer for c in row.comparisons}
    for server in row.row.servers:
        table.add_row(*_server_line(row, server, scales, best))
    for failure in row.lost:
        table.add_row(_text(f"  {failure.server}", "red"), Text(failure.kind, "red"))
    if row.comparisons:
        for line in _ratio_lines(row.comparisons, scales):
            table.add_row(*line)
    table.add_section()


def _server_line(
    row: RowDigest, server: ServerResult, scales: Mapping[str, Scale], best: Mapping[str, str]
) -> list[Text]:
    failure = row.failure_of(server.name)
    values = {metric: row.value(server, metric) for metric in scales}
    style = "red" if failure else ""
    if not any(values.values()):
        return [
            _text(f"  {server.name}", style or "dim"),
            Text(failure.kind if failure else "–", style),  # noqa: RUF001
        ]
    cells = [_text(f"  {server.name}", style)]
    for metric, scale in scales.items():
        value = values[metric]
        mark = BEST if best.get(metric) == server.name else ""
        cells.append(Text(mark + scale.format(value.value) if value else "", style))
    return cells


def _ratio_lines(
    comparisons: Sequence[Comparison], scales: Mapping[str, Scale]
) -> list[list[Text]]:
    lines = [
        [_text(f"  {comparisons[0].base} / best peer", "italic")],
        [Text("    95 % interval", "dim")],
        [Text("    A/A noise", "dim")],
    ]
    found = {c.metric: c for c in comparisons}
    for metric in scales:
        comparison = found.get(metric)
        if comparison is None:
            for line in lines:
                line.append(Text())
            continue
        noise = comparison.noise
        lines[0].append(Text(ratio(comparison.ratio.value), VERDICT_STYLES[comparison.verdict]))
        lines[1].append(Text(interval(comparison.ratio), "dim"))
        lines[2].append(Text(f"±{share(noise_share(noise))}" if noise else "none", "dim"))
    return lines


def _remarks(suite: SuiteDigest) -> Iterable[Text]:
    """Absences, each reason once, and failures with their logs."""
    for (server, reason), rows in absences(row.row for row in suite.rows).items():
        where = "" if len(rows) == len(suite.rows) else f" ({_names(r.workload for r in rows)})"
        yield _text(f"absent: {server}: {reason}{where}", "dim")
    for row in suite.rows:
        if row.trouble:
            yield _text(f"{row.row.workload}: {row.trouble}", "yellow")
        for failure in row.row.failures:
            yield _text(
                f"{failure.kind}: {failure.server}, {row.row.workload}: {failure.message}", "red"
            )
            for line in failure.log[-LOG_LINES:]:
                yield _text(f"  | {line}", "dim red")


def _names(names: Iterable[str], most: int = 2) -> str:
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _foot(run_digest: RunDigest) -> Iterable[Text]:
    if any(row.comparisons for row in run_digest.rows):
        yield Text(f"{BEST} best peer; green: better, red: worse, beyond interval and noise", "dim")
    if not all(row.calm for row in run_digest.rows if row.counted):
        yield Text(
            "busy: others used the cores too; ratios mean something, absolute figures do not", "dim"
        )
    if not run_digest.rows:
        yield Text("nothing was measured", "yellow")


def _text(words: str, style: str = "") -> Text:
    """Text that cannot steer the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else "�" for c in words), style)
