"""``python -m perf``: run suites, compare and report what came of them, list what there is.

Exit codes: 0 good; 1 a regression; 2 wrong arguments, or the machine cannot measure; 3 a server
died, hung or returned wrong data; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from perf.errors import PerfError

GOOD, WORSE, UNUSABLE, FAILED, INTERRUPTED = 0, 1, 2, 3, 130
OUTPUT = Path(__file__).resolve().parents[2] / "build" / "perf"
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)

    run = verbs.add_parser("run", help="measure; writes JSON and an HTML report")
    run.add_argument("suites", nargs="*", metavar="SUITE", help="which (all)")
    _choice(run)
    run.add_argument("--only", default="", metavar="TEXT", help="workloads whose names hold this")
    run.add_argument("--record", action="store_true", help="add the ratios to perf/history.jsonl")
    run.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help="where to write")

    gate = verbs.add_parser("gate", help="the short set against perf/baseline.json")
    _choice(gate)
    gate.add_argument("--update", action="store_true", help="make the present ratios the baseline")
    gate.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help="where to write")

    compare = verbs.add_parser("compare", help="two results, or two servers of one result")
    compare.add_argument("old", type=Path, help="a results file")
    compare.add_argument("new", type=Path, nargs="?", help="a later one")
    compare.add_argument("--servers", nargs=2, metavar=("A", "B"), help="of one file: B against A")
    compare.add_argument(
        "--threshold",
        type=float,
        default=0.05,
        help="share by which a ratio may get worse, beside the noise (0.05)",
    )

    report = verbs.add_parser("report", help="the table, the HTML page and the PNGs of a result")
    report.add_argument("results", type=Path, nargs="?", help="a results file (the latest)")
    report.add_argument("--page", type=Path, help="where to write the HTML (beside the results)")
    report.add_argument("--pictures", type=Path, metavar="DIR", help="write PNGs there too")

    listing = verbs.add_parser("list", help="suites, workloads, and which servers are here")
    listing.add_argument("--json", action="store_true", help="for programs")
    listing.add_argument("--tool", action="append", default=[], metavar="NAME=PATH")
    listing.add_argument("--plugin", action="append", default=[], type=Path, metavar="FILE")
    return parser


def _choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="NAME[=KNOWN:COMMAND]",
        help="only these; the first is what the others are compared with; with =KNOWN:COMMAND, "
        "a known server run by another command, such as last week's build",
    )
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a Python file with a list SERVERS",
    )
    parser.add_argument(
        "--tool",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a program that lies elsewhere",
    )
    parser.add_argument(
        "--pairs", type=_positive, default=5, help="rounds that must count (at least 5)"
    )
    parser.add_argument("--seconds", type=float, help="length of a window (the workload's own)")
    parser.add_argument(
        "--cpus", type=_two_cpus, default=(0, 1), metavar="A,B", help="client's, server's (0,1)"
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _two_cpus(text: str) -> tuple[int, int]:
    try:
        client, server = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError("two CPU numbers, such as 0,1") from None
    if client == server or not {client, server} <= os.sched_getaffinity(0):
        raise argparse.ArgumentTypeError(f"{text}: two different CPUs of this machine are needed")
    return client, server


def _stop_once(*_: object) -> NoReturn:
    """Ends in order; once that has begun, further signals wait."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code."""
    options = _parser().parse_args(argv)
    for number in _STOPS:
        signal.signal(number, _stop_once)
    # Only now: --help and wrong arguments are answered at once.
    from perf.cli.verbs import VERBS

    try:
        return VERBS[options.verb](options)
    except PerfError as error:
        print(f"perf: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        print("perf: interrupted; what was started is gone", file=sys.stderr)
        return INTERRUPTED
