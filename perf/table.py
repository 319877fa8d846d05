"""What was measured, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from perf.measure import Measured, Window, cpu_us, iops
from perf.startup import LIMIT_SECONDS, Startup


def _percentile(fraction: float) -> Any:
    return lambda window: window.outcome.percentile(fraction) / 1000


def _name(measured: Measured) -> str:
    return f"{measured.row.name} *" if measured.row.required else measured.row.name


def show(console: Console, rows: Sequence[Measured], startups: Sequence[Startup]) -> None:
    """Prints the tables."""
    table = Table(
        title="Block, one queue; medians of the rounds that count; server CPU time a request",
        title_justify="left",
    )
    table.add_column("load", no_wrap=True)
    table.add_column("server", no_wrap=True)
    for name in ("kIOPS", "MB/s", "p50 µs", "p99 µs", "CPU µs", "cores", "rounds"):
        table.add_column(name, justify="right")
    for m in rows:
        if not m.counting:
            table.add_row(_name(m), "[red]the cores never kept their distance[/red]")
            continue
        for kind in ("vdev", *(k.name for k in m.row.peers)):
            rate = m.median(kind, iops)
            table.add_row(
                _name(m) if kind == "vdev" else "",
                f"{kind} ←" if kind == m.peer else kind,
                f"{rate / 1e3:.1f}",
                f"{rate * m.row.load.block_size / 1e6:.0f}",
                f"{m.median(kind, _percentile(0.5)):.1f}",
                f"{m.median(kind, _percentile(0.99)):.1f}",
                f"{m.median(kind, cpu_us):.3f}",
                m.placement,
                f"{len(m.counting)}/{len(m.rounds)}" + ("" if m.calm else " busy"),
            )
        table.add_row(
            "",
            "[bold]vdev / best peer ←[/bold]",
            f"[bold]{m.ratio(iops):.2f}[/bold]",
            *("", "", ""),
            f"[bold]{m.ratio(cpu_us):.2f}[/bold]",
            *("", ""),
            end_section=True,
        )
    console.print(table)
    if not all(m.calm for m in rows):
        console.print(
            "busy: others used the cores too; ratios mean something, absolute figures do not"
        )
    console.print("* required: IOPS at least 1.00, CPU a request at most 1.00 of the peer's")
    table = Table(title="From exec to the answer of GET_FEATURES", title_justify="left")
    for name in ("server", "median ms", "worst ms", "limit ms"):
        table.add_column(name, justify="left" if name == "server" else "right")
    for s in startups:
        limit = f"{LIMIT_SECONDS * 1e3:.0f}" if s.server == "vdev" else ""
        table.add_row(s.server, f"{s.median * 1e3:.0f}", f"{max(s.seconds) * 1e3:.0f}", limit)
    console.print(table)


def _window(window: Window) -> dict[str, Any]:
    outcome = window.outcome
    return {
        "server": window.server,
        "round": window.round,
        "requests": outcome.requests,
        "seconds": outcome.seconds,
        "iops": outcome.iops,
        "errors": outcome.errors,
        "kicks": outcome.kicks,
        "sleeps": outcome.sleeps,
        "p50_ns": outcome.percentile(0.5),
        "p99_ns": outcome.percentile(0.99),
        "server_cpu_seconds": window.server_cpu_seconds,
        "server_cpu_us_per_request": window.cpu_us,
        "others_share_of_core": window.others_share,
        "ping_ns": [window.before.round_trip_ns, window.after.round_trip_ns],
        "placement": window.placement,
    }


def _row(measured: Measured) -> dict[str, Any]:
    return {
        "name": measured.row.name,
        "required": measured.row.required,
        "load": measured.row.load.__dict__,
        "peer": measured.peer if measured.counting else None,
        "placement": measured.placement,
        "rounds_that_count": len(measured.counting),
        "calm": measured.calm,
        "iops_ratio": measured.ratio(iops) if measured.counting else None,
        "cpu_per_request_ratio": measured.ratio(cpu_us) if measured.counting else None,
        "windows": [_window(w) for r in measured.rounds for w in r.values()],
    }


def write_json(
    path: Path, rows: Sequence[Measured], startups: Sequence[Startup], failures: Sequence[str]
) -> None:
    """Writes everything that was measured, each window for itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "rows": [_row(m) for m in rows],
        "startup_seconds": {s.server: s.seconds for s in startups},
        "failures": list(failures),
    }
    path.write_text(json.dumps(data, indent=1) + "\n")
