"""``python -m perf.handover``: how long a front-end waits while its server is replaced.

For each depth a server of a file on tmpfs is replaced again and again (`vdev upgrade`).  Each time
the native driver keeps that many random reads in flight, from before the hand-over until after it;
the longest that one of them took is the pause.  The same without a hand-over tells how much of it
is the machine's.  Latencies are counted in buckets an eighth of their power of two wide, and told
by their upper end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.errors import PerfError
from perf.frontend.blk import BlkFrontend, Pattern
from vdev._native import lib
from vdev.runtime import runtime_dir
from vdev.server.control import request

SIZE = 64 << 20
BLOCK = 4096
SHM = "/dev/shm"
START_SECONDS = 20.0
MARGIN_SECONDS = 0.2  # of load before a hand-over and after it


@dataclass(frozen=True)
class Pauses:
    """Milliseconds, one of each window, in order of time."""

    depth: int
    replaced: Sequence[float]
    undisturbed: Sequence[float]

    def line(self) -> str:
        """A row of the table."""
        half, most = (percentile(self.replaced, share) for share in (50, 99))
        return (
            f"{self.depth:5} {len(self.replaced):10} {half:8.2f} {most:8.2f} "
            f"{max(self.replaced):8.2f} {percentile(self.undisturbed, 50):12.2f} "
            f"{percentile(self.undisturbed, 99):8.2f}"
        )


def percentile(values: Sequence[float], share: int) -> float:
    """The smallest value that `share` percent of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)]


def measure(depth: int, times: int) -> Pauses:
    """Replaces a server `times` times. Raises PerfError where requests fail, or the server."""
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        socket, image = Path(folder, "s"), Path(folder, "disk.img")
        image.write_bytes(bytes(SIZE))
        command = ("blk", "serve", "--socket-path", str(socket), "--blk-file", str(image))
        with subprocess.Popen([sys.executable, "-m", "vdev", *command]) as server:
            pid = server.pid
            try:
                _wait_for(socket, server)
                with BlkFrontend(socket, depth=depth, block_size=BLOCK) as frontend:
                    pattern = Pattern(depth=depth, block_size=BLOCK, poll=False)
                    frontend.run(pattern, seconds=MARGIN_SECONDS)
                    replaced, undisturbed = [], []
                    for _ in range(times):
                        began = time.monotonic()
                        pause, pid = _pause_of(frontend, pattern, pid)
                        replaced.append(pause)
                        window = time.monotonic() - began
                        undisturbed.append(_longest(frontend, pattern, window))
            finally:
                request(runtime_dir() / f"{pid}.sock", "stop")
    return Pauses(depth, replaced, undisturbed)


def _pause_of(frontend: BlkFrontend, pattern: Pattern, pid: int) -> tuple[float, int]:
    """The longest wait in milliseconds while that server is replaced, and who serves now."""
    longest: list[float] = []
    ended = threading.Event()

    def load() -> None:
        # In short runs, so that it lasts as long as it must; requests of one do not wait for the
        # next, so a pause lies within one.
        while not ended.is_set():
            longest.append(_longest(frontend, pattern, 2 * MARGIN_SECONDS))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        time.sleep(MARGIN_SECONDS)
        answer = request(runtime_dir() / f"{pid}.sock", "upgrade", patience=60)
        time.sleep(MARGIN_SECONDS)
    finally:
        ended.set()
        thread.join()
    return max(longest), int(answer["pid"])


def _longest(frontend: BlkFrontend, pattern: Pattern, seconds: float) -> float:
    outcome = frontend.run(pattern, seconds=seconds)
    if outcome.errors or not outcome.requests:
        raise PerfError(f"{outcome.errors} of {outcome.requests} requests failed")
    last = max(bucket for bucket, count in enumerate(outcome.latency) if count)
    return float(lib.vhost_histogram_floor(last + 1)) / 1e6


def _wait_for(socket: Path, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not socket.exists():
        if server.poll() is not None or time.monotonic() > deadline:
            raise PerfError("the server did not start")
        time.sleep(0.01)


def main() -> int:
    """Measures and prints a table of milliseconds."""
    parser = argparse.ArgumentParser(prog="python -m perf.handover", description=__doc__)
    parser.add_argument("--times", type=int, default=50, help="hand-overs a depth (default: 50)")
    parser.add_argument("--depth", type=int, action="append", help="again and again (1 and 32)")
    options = parser.parse_args()
    print("                 longest wait, ms           without a hand-over, ms")
    print("depth  hand-overs   median      p99      max       median      p99")
    for depth in options.depth or (1, 32):
        print(measure(depth, options.times).line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
