"""Who serves the device under test, and what of the CPU time is theirs.

Beside QEMU it is a process: what QEMU uses is all the VMM's. Within QEMU it is a set of threads.
The disk's iothread starts others (the "threads" engine, io_uring's workers), so the VMM's are the
virtual CPUs and the main loop, and all the rest serves. A network card is served by the main loop.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from perf.guest.vmm import Vmm
from perf.process import Started
from tests.lab.process import tail
from tests.lab.qemu import Guest

_LOG_LINES = 20


@dataclass(frozen=True)
class Used:
    """CPU seconds of the server and of the VMM."""

    server: float
    vmm: float

    def __sub__(self, earlier: Used) -> Used:
        return Used(self.server - earlier.server, self.vmm - earlier.vmm)


class Backend(Protocol):
    """The server of a guest's device."""

    @property
    def pid(self) -> int:
        """The process that serves."""
        ...

    def used(self) -> Used:
        """CPU time so far. Raises OSError when QEMU or the server has ended."""
        ...

    def ended(self) -> str | None:
        """How it ended, or None while it runs."""
        ...

    async def wait(self) -> str:
        """Waits for its end, and says how it ended."""
        ...

    def log_tail(self) -> Sequence[str]:
        """The last lines that it wrote."""
        ...


class Beside:
    """A process of its own."""

    def __init__(self, started: Started, vmm: Vmm) -> None:
        self._started = started
        self._vmm = vmm
        self.pid = started.pid
        self.ended = started.end
        self.log_tail = started.log_tail

    def used(self) -> Used:
        return Used(self._started.cpu_seconds(), self._vmm.cpu_seconds())

    async def wait(self) -> str:
        if end := self.ended():
            return end
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        fd = os.pidfd_open(self.pid)
        loop.add_reader(fd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        return str(self.ended())


class _Within:
    def __init__(self, guest: Guest, vmm: Vmm) -> None:
        self._guest = guest
        self._vmm = vmm
        self.pid = vmm.pid

    def ended(self) -> str | None:
        code = self._guest.process.returncode
        if code is None:
            return None
        if code >= 0:
            return f"ended with exit code {code}"
        return f"was ended by {signal.Signals(-code).name}"

    async def wait(self) -> str:
        await self._guest.process.wait()
        return str(self.ended())

    def log_tail(self) -> Sequence[str]:
        return tail(self._guest.process.log, _LOG_LINES).splitlines()


class IothreadWithin(_Within):
    """A disk's iothread in QEMU, and the threads that it starts."""

    def used(self) -> Used:
        vmm = self._vmm.thread_cpu_seconds({self._vmm.pid, *self._vmm.vcpus})
        return Used(self._vmm.cpu_seconds() - vmm, vmm)


class MainLoopWithin(_Within):
    """QEMU's main loop."""

    def used(self) -> Used:
        server = self._vmm.thread_cpu_seconds({self._vmm.pid})
        return Used(server, self._vmm.cpu_seconds() - server)
