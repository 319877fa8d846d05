"""The kind of host: what a ratio of two servers depends on beside the two.

Two servers make different numbers of system calls for one request, so that where one costs 1.2 µs
instead of 0.1 the same two programs stand in another ratio. Measured ratios compare from host to
host only if the hosts are alike in what is here; instruction counts always do
(perf/instructions.py).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

SLACK = 2.0
"""A cost within this factor is the same: one host's own moods lie 1.8 apart."""
_ROUNDS, _CALLS = 15, 2000
_PAGE = 4096


@dataclass(frozen=True)
class Host:
    """A kind of host. Costs in ns: of a system call that does nothing, of reading 4 KiB of a file
    in memory."""

    cpu: str
    kernel: str
    system_call_ns: float
    read_ns: float

    def apart(self, other: Host) -> float:
        """The larger factor between the two hosts' costs, 1 at least."""
        return max(
            max(mine / theirs, theirs / mine)
            for mine, theirs in (
                (self.system_call_ns, other.system_call_ns),
                (self.read_ns, other.read_ns),
            )
        )

    def unlike(self, other: Host) -> list[str]:
        """In what this host is of another kind than the other, in words: none, they compare."""
        told = [
            ("CPU", self.cpu, other.cpu, self.cpu == other.cpu),
            ("kernel", self.kernel, other.kernel, _series(self.kernel) == _series(other.kernel)),
            _costs("a system call", self.system_call_ns, other.system_call_ns),
            _costs("a read of 4 KiB", self.read_ns, other.read_ns),
        ]
        return [f"{what} {mine}, not {theirs}" for what, mine, theirs, same in told if not same]


def _costs(what: str, mine: float, theirs: float) -> tuple[str, str, str, bool]:
    return what, f"{mine:.0f} ns", f"{theirs:.0f} ns", 1 / SLACK <= mine / theirs <= SLACK


def _series(release: str) -> list[str]:
    """A kernel's first two numbers: what comes after them mends, and changes no costs."""
    return release.split(".")[:2]


def cpu() -> str:
    """The CPU's name, or the architecture's where it has none (proc(5), /proc/cpuinfo)."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    return platform.machine()


def measure() -> Host:
    """This host. Takes a tenth of a second; costs are the least of some rounds."""
    file = os.memfd_create("perf-host", os.MFD_CLOEXEC)
    try:
        os.pwrite(file, bytes(_PAGE), 0)
        page = bytearray(_PAGE)
        own = _cost(lambda: None)
        call = _cost(os.getppid) - own
        read = _cost(lambda: os.preadv(file, [page], 0)) - own
    finally:
        os.close(file)
    return Host(cpu(), platform.release(), call, read)


def _cost(call: Callable[[], object]) -> float:
    """The least time of a call in ns, the interpreter's share included. A round is shorter than the
    slices that a busy core is shared by."""
    least = float("inf")
    for _ in range(_ROUNDS):
        began = time.perf_counter_ns()
        for _ in range(_CALLS):
            call()
        least = min(least, (time.perf_counter_ns() - began) / _CALLS)
    return least
