"""The demo's results: one table for people, one JSON file for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from perf.fio_output import FioResult

from .iperf import IperfResult, PingResult

_HEADINGS = ("IOPS", "MB/s", "Gbit/s", "mean µs", "p99 µs", "verified", "errors")


@dataclass
class Report:
    """What was run, on what, and what came out."""

    machine: dict[str, str] = field(default_factory=dict)
    block: dict[str, FioResult] = field(default_factory=dict)
    network: dict[str, IperfResult] = field(default_factory=dict)
    ping: PingResult | None = None

    @property
    def failures(self) -> list[str]:
        """Every error that a step reported."""
        failed = [f"{name}: {r.errors} errors" for name, r in self.block.items() if r.errors]
        verify = self.block.get("fio verify")
        if verify and verify.read_bytes != verify.written_bytes:
            failed.append(
                f"fio verify: wrote {verify.written_bytes} bytes, verified {verify.read_bytes}"
            )
        failed += [
            f"{name}: nothing was received"
            for name, result in self.network.items()
            if not result.received_bytes
        ]
        if self.ping and self.ping.received != self.ping.sent:
            failed.append(f"ping: {self.ping.sent - self.ping.received} lost")
        return failed

    def write(self, path: Path) -> None:
        """Write the JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {**asdict(self), "failures": self.failures}
        path.write_text(json.dumps(content, indent=2) + "\n")

    def show(self, console: Console) -> None:
        """Print the table."""
        table = Table(
            title="A stock Debian guest on devices of one vdev process",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        table.add_column("step", no_wrap=True)
        for heading in _HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        for name, fio in self.block.items():
            table.add_row(name, *_fio_cells(fio))
        table.add_section()
        if self.ping:
            lost = self.ping.sent - self.ping.received
            table.add_row("ping", "", "", "", _us(self.ping.mean_us), "", "", str(lost))
        for name, iperf in self.network.items():
            megabytes = f"{iperf.bits_per_second / 8e6:,.0f}"
            gigabits = f"{iperf.bits_per_second / 1e9:.2f}"
            errors = str(int(not iperf.received_bytes))
            table.add_row(name, "", megabytes, gigabits, "", "", "", errors)
        console.print(table)
        console.print(_facts(self.machine), style="dim")


def _fio_cells(result: FioResult) -> tuple[str, ...]:
    checked = f"{result.read_bytes / (1 << 20):,.0f} MiB" if _both(result) else ""
    return (
        f"{result.iops:,.0f}",
        f"{result.bytes_per_second / 1e6:,.1f}",
        "",
        _us(result.latency_mean_us),
        _us(result.latency_p99_us),
        checked,
        str(result.errors),
    )


def _both(result: FioResult) -> bool:
    """Only a verify job both writes and reads."""
    return bool(result.read_bytes and result.written_bytes)


def _us(microseconds: float) -> str:
    return f"{microseconds:,.0f}"


def _facts(machine: Mapping[str, Any]) -> str:
    return " · ".join(f"{name}: {value}" for name, value in machine.items())
