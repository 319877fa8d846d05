"""One call of ``run`` or ``gate`` from its options to a Run, with progress and time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from perf import host, machine, results
from perf.model import Suite, Workload
from perf.results import Row, Run, SuiteResult
from perf.run import Options, run_suite

LATEST = "latest.json"

Plan = Sequence[tuple[Suite, Sequence[Workload]]]


def measure(
    plan: Plan,
    options: Options,
    chosen: Sequence[str],
    extra: Sequence[str],
    console: Console,
    save: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Runs the plan; `save` is called with what there is after every row.

    An interruption is noted in the run, saved, and raised again.
    """
    started = time.monotonic()
    kind = host.measure()
    run = Run(
        schema_version=results.SCHEMA,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=0.0,
        command=sys.argv[1:],
        commit=machine.commit(),
        machine=machine.facts(options.cpus, kind),
        host=kind,
    )
    total = sum(len(workloads) for _, workloads in plan)
    with _progress(console, total) as (advance, say):
        done = 0
        for suite, workloads in plan:
            found = SuiteResult(suite.name, suite.title)
            run.suites.append(found)

            def keep(row: Row, found: SuiteResult = found) -> None:
                found.rows.append(row)
                run.seconds = time.monotonic() - started
                save(run)
                say(row)

            def tell(what: str, share: float, first: int = done, of: int = len(workloads)) -> None:
                advance(what, first + share * of)

            try:
                run_suite(suite, workloads, options, chosen, extra, tell, keep)
            except KeyboardInterrupt:
                run.interrupted = True
                run.seconds = time.monotonic() - started
                save(run)
                raise
            done += len(workloads)
    return run


def saver(directory: Path, run_name: str) -> Callable[[Run], None]:
    """Writes a run into the directory, by its name and as the latest."""

    def save(run: Run) -> None:
        path = directory / f"{run_name}.json"
        results.write(run, path)
        latest = directory / LATEST
        latest.unlink(missing_ok=True)
        latest.symlink_to(path.name)

    return save


@contextlib.contextmanager
def _progress(
    console: Console, total: int
) -> Iterator[tuple[Callable[[str, float], None], Callable[[Row], None]]]:
    """A bar with the time left; where nobody watches, a line a finished row."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("starting", total=total)

        def advance(what: str, done: float) -> None:
            bar.update(task, description=escape(what), completed=done)

        def say(row: Row) -> None:
            trouble = "".join(f" [red]{escape(f.server)} {f.kind}[/red]" for f in row.failures)
            left = bar.tasks[task].completed
            console.print(
                f"[green]✓[/green] {escape(row.workload)}{trouble} "
                f"[dim]({left:.0f} of {total})[/dim]",
                highlight=False,
            )

        yield advance, say
