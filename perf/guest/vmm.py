"""QEMU's threads: which is which, on which core they run, and what CPU time they used."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.lab.qemu import Guest


@dataclass(frozen=True)
class Vmm:
    """A running QEMU. The main loop's thread has the process's id."""

    pid: int
    vcpus: Collection[int]

    @classmethod
    async def of(cls, guest: Guest) -> Self:
        """Asks QEMU which thread is which."""
        vcpus = await guest.monitor.execute("query-cpus-fast")
        return cls(guest.process.pid, {vcpu["thread-id"] for vcpu in vcpus})

    def pin(self, *, vcpus: int, others: int) -> None:
        """Puts the virtual CPUs on one core, and all other threads and those that they start later
        on another.

        io_uring's workers stay where the kernel puts them.
        """
        for thread in map(int, os.listdir(f"/proc/{self.pid}/task")):
            with contextlib.suppress(OSError):  # Threads come and go.
                os.sched_setaffinity(thread, {vcpus if thread in self.vcpus else others})

    def cpu_seconds(self) -> float:
        """CPU time of all threads so far, also of those that ended. Raises OSError at its end."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def thread_cpu_seconds(self, threads: Iterable[int]) -> float:
        """CPU time of these threads so far, up to a tick behind for one that is running.

        The clocks of another process's threads cannot be read, but for this (sched-stats.rst).
        """
        stats = (Path(f"/proc/{self.pid}/task/{thread}/schedstat") for thread in threads)
        return sum(int(stat.read_text().split()[0]) for stat in stats) / 1e9
