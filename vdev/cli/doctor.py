"""``vdev doctor``: what this host can do for serving, what it lacks, and how to get it."""

from __future__ import annotations

import json
from argparse import Namespace

from rich.table import Table
from rich.text import Text

from vdev.cli import EXIT_FAILED, EXIT_OK
from vdev.cli.console import console_for
from vdev.cli.doctor_checks import CHECKS, Finding

_LOOKS = {"ok": "green", "missing": "bold red", "optional": "yellow"}


def doctor(arguments: Namespace) -> int:
    """Run every check; exit code 0 if block and net devices can be served here."""
    findings = [check() for check in CHECKS]
    serves = {
        kind: all(finding.ok for finding in findings if kind in finding.needed_for)
        for kind in ("blk", "net")
    }
    if arguments.json:
        report = {
            "ok": all(serves.values()),
            "serves": serves,
            "checks": [finding.as_dict() for finding in findings],
        }
        print(json.dumps(report, indent=2))
    else:
        _print(findings, serves)
    return EXIT_OK if all(serves.values()) else EXIT_FAILED


def _print(findings: list[Finding], serves: dict[str, bool]) -> None:
    console = console_for()
    table = Table(title="vdev doctor", title_justify="left")
    for heading in ("what", "", "found", "how to get it"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        table.add_row(
            finding.name,
            Text(finding.status, _LOOKS[finding.status]),
            Text(finding.found),
            Text("" if finding.ok else finding.fix),
        )
    console.print(table)
    for kind, words in (("blk", "block devices"), ("net", "network devices")):
        console.print(f"{words} can{'' if serves[kind] else 'not'} be served here")
