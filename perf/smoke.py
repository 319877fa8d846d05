"""``python -m perf.smoke``: vdev and qemu-storage-daemon side by side, in about two minutes.

The driver has one core and the server the other; rings are in shared memory and there is no
guest. Exit code 1: vdev is behind where it must not be; 2: the machine cannot measure.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from perf import startup
from perf.frontend import Load
from perf.measure import DRIVER_CPU, SERVER_CPU, Row, measure
from perf.servers import VDEV, Image, Kind, ToolMissing
from perf.table import show, write_json

QSD = "qemu-storage-daemon"
NULL_PEERS = (Kind("qsd, iothread", QSD, iothread=True), Kind("qsd, main loop", QSD))
FILE_PEERS = (
    Kind("qsd, io_uring", QSD, aio="io_uring", iothread=True),
    Kind("qsd, threads", QSD, aio="threads", iothread=True),
)
READ = Load()
WRITE = Load(write_percent=100)
READ_ALONE = Load(depth=1)
ROWS = (
    Row("null, 4k read, depth 32", "null", READ, NULL_PEERS, required=True),
    Row("tmpfs, 4k read, depth 32", "tmpfs", READ, FILE_PEERS, required=True),
    Row("tmpfs, 4k write, depth 32", "tmpfs", WRITE, FILE_PEERS, required=False),
    Row("null, 4k read, depth 1", "null", READ_ALONE, NULL_PEERS, required=False),
    Row("tmpfs, 4k read, depth 1", "tmpfs", READ_ALONE, FILE_PEERS, required=False),
)
NULL_SIZE = 1 << 30
FILE_SIZE = 256 << 20
CHUNK = bytes(range(256)) * 4096
OUTPUT = Path(__file__).resolve().parents[1] / "build" / "perf" / "smoke.json"


@contextlib.contextmanager
def null() -> Iterator[Image]:
    """A disk without data."""
    yield Image(NULL_SIZE)


@contextlib.contextmanager
def tmpfs() -> Iterator[Image]:
    """A file on tmpfs, written through so that no block is a hole."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="perf-") as file:
        for _ in range(FILE_SIZE // len(CHUNK)):
            file.write(CHUNK)
        file.flush()
        yield Image(FILE_SIZE, Path(file.name))


IMAGES = {"null": null, "tmpfs": tmpfs}


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perf.smoke", description=__doc__)
    parser.add_argument("--pairs", type=int, default=7, help="rounds that must count (7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a window (1)")
    parser.add_argument("--starts", type=int, default=10, help="starts to time (10)")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", type=Path, default=OUTPUT, help="where to write the JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(sys.argv[1:] if argv is None else argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if not {DRIVER_CPU, SERVER_CPU} <= os.sched_getaffinity(0):
        print(f"perf: CPUs {DRIVER_CPU} and {SERVER_CPU} are needed", file=sys.stderr)
        return 2
    rows = []
    try:
        with console.status("starting") as status:
            for row in ROWS:
                if options.only in row.name:
                    load = Load(**{**row.load.__dict__, "seconds": options.seconds})
                    row = Row(**{**row.__dict__, "load": load})
                    image = IMAGES[row.image]
                    rows.append(measure(row, VDEV, image, options.pairs, status.update))
            status.update("starting servers")
            kinds = (VDEV, NULL_PEERS[0])
            startups = [startup.measure(k, options.starts) for k in kinds if options.starts]
    except (ToolMissing, OSError) as error:
        print(f"perf: {error}", file=sys.stderr)
        return 2
    failures = [f for m in rows for f in m.failures]
    for s in startups:
        if s.server == VDEV.name and s.median >= startup.LIMIT_SECONDS:
            failures.append(f"vdev starts in {s.median * 1e3:.0f} ms")
    show(console, rows, startups)
    write_json(options.json, rows, startups, failures)
    console.print(f"Details: {os.path.relpath(options.json)}")
    for failure in failures:
        console.print(f"[bold red]behind[/bold red] {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
