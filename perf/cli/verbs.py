"""What the verbs of ``python -m perf`` do; each returns its exit code."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from perf import comparison, gate, history, instructions, machine, results, servers
from perf.cli import FAILED, GOOD, OUTPUT, WORSE
from perf.cli.choice import chosen_servers, know, plan_of, run_options
from perf.errors import PerfError
from perf.measuring import LATEST, measure, saver
from perf.report import charts, page, table
from perf.suites import all_suites

HISTORY = Path(__file__).resolve().parents[1] / "history.jsonl"
_WIDTH = 120


def _console() -> Console:
    """The terminal, or a page of fixed width where there is none."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def _past() -> list[history.Point]:
    return history.read(HISTORY) if HISTORY.exists() else []


def run(options: Namespace) -> int:
    """Measures; writes JSON and the HTML page, prints the table."""
    console = _console()
    plan = plan_of(options.suites, options.only)
    chosen, extra = chosen_servers(options)
    name = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{machine.commit()}"
    save = saver(options.output, name)
    found = measure(plan, run_options(options), chosen, extra, console, save)
    table.show(console, found)
    if options.record:
        history.append(HISTORY, history.points_of(found))
    written = options.output / f"{name}.html"
    page.write_page(found, written, _past())
    console.print(f"Report: {os.path.relpath(written)}", highlight=False)
    return FAILED if found.failures else GOOD


def report(options: Namespace) -> int:
    """The table, the page and the pictures of a result."""
    path: Path = options.results or OUTPUT / LATEST
    found = results.read(path)
    console = _console()
    table.show(console, found)
    written = options.page or path.resolve().with_suffix(".html")
    page.write_page(found, written, _past())
    console.print(f"Report: {os.path.relpath(written)}", highlight=False)
    if options.pictures:
        for picture in charts.write_pictures(found, options.pictures):
            console.print(f"Picture: {os.path.relpath(picture)}", highlight=False)
    return GOOD


def compare(options: Namespace) -> int:
    """Two results, or two servers of one result."""
    old = results.read(options.old)
    if options.servers:
        if options.new:
            raise PerfError("--servers compares two servers of one results file, not of two")
        changes = comparison.servers_of(old, *options.servers)
    elif options.new:
        new = results.read(options.new)
        changes = comparison.runs(old, new)
        for difference in new.host.unlike(old.host):
            _console().print(f"[yellow]another kind of host[/yellow] {escape(difference)}")
    else:
        raise PerfError("compare needs a second results file, or --servers A B")
    if not changes:
        raise PerfError("nothing can be compared: no workload, server and distance in common")
    comparison.show(_console(), changes, options.threshold)
    return WORSE if any(c.is_worse(options.threshold) for c in changes) else GOOD


def check_gate(options: Namespace) -> int:
    """The short set against the baseline."""
    console = _console()
    chosen, extra = chosen_servers(options)
    baseline = gate.Baseline() if options.update else gate.read(gate.BASELINE)
    wanted = replace(run_options(options), seconds=options.seconds or gate.SECONDS, most=gate.MOST)
    with console.status("counting instructions") as status:
        counted = instructions.measure(progress=lambda what: status.update(f"counting: {what}"))
    save = saver(options.output, "gate")
    found = measure(gate.plan(), wanted, chosen, extra, console, save)
    table.show(console, found)
    if found.failures:
        return FAILED
    if options.update:
        if gate.BASELINE.exists():
            baseline = gate.read(gate.BASELINE)
        gate.write(gate.update(baseline, found, counted), gate.BASELINE)
        console.print(f"Written: {os.path.relpath(gate.BASELINE)}", highlight=False)
        for row in (row for suite in found.suites for row in suite.rows if not row.calm):
            console.print(f"[yellow]not stored, busy[/yellow] {escape(row.workload)}")
        return GOOD
    changes, left = gate.changes(baseline, found)
    worse, uncounted = gate.instruction_changes(baseline, counted)
    comparison.show(console, changes, gate.RATIO_THRESHOLD)
    for line in (*left, *uncounted):
        console.print(f"[yellow]not compared[/yellow] {escape(line)}", highlight=False)
    for line in worse:
        console.print(f"[bold red]worse[/bold red] {escape(line)}", highlight=False)
    if not changes and uncounted:
        raise PerfError("the baseline knows nothing of this machine: gate --update adds it")
    return WORSE if worse or any(c.is_worse(gate.RATIO_THRESHOLD) for c in changes) else GOOD


def listing(options: Namespace) -> int:
    """Suites, workloads and servers."""
    know(options)
    versions = {name: servers.find(name).version() for name in servers.names()}
    suites = all_suites()
    if options.json:
        content = {
            "servers": versions,
            "suites": {
                suite.name: {w.name: list(w.servers) for w in suite.workloads}
                for suite in suites.values()
            },
        }
        print(json.dumps(content, indent=1))
        return GOOD
    console = _console()
    for suite in suites.values():
        listed = Table(title=f"{suite.name}: {suite.title}", title_justify="left")
        listed.add_column("workload", no_wrap=True)
        listed.add_column("what")
        listed.add_column("servers")
        for workload in suite.workloads:
            what = workload.series
            if workload.x:
                what += f", {workload.x[0]} {workload.x[1]:g}"
            marks = ("✓ verified " if workload.verified else "") + ("gate" if workload.gate else "")
            listed.add_row(
                workload.name, f"{escape(what)} [dim]{marks}[/dim]", ", ".join(workload.servers)
            )
        console.print(listed)
    known = Table(title="Servers", title_justify="left")
    known.add_column("server", no_wrap=True)
    known.add_column("version")
    for name, version in versions.items():
        known.add_row(name, escape(version) if version else "[dim]not here, or it tells none[/dim]")
    console.print(known)
    return GOOD


VERBS: Mapping[str, Callable[[Namespace], int]] = {
    "run": run,
    "gate": check_gate,
    "compare": compare,
    "report": report,
    "list": listing,
}
