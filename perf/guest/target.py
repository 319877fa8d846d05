"""One guest with one device under test, paused but while it is measured.

QEMU pauses it (``stop``, ``cont``): its clocks stand still too, so that it never notices. A guest
whose server does not answer any more may hang for ever, and QEMU with it; every step has a limit,
and what does not keep it is ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from perf.guest.backend import Backend
from perf.guest.steps import Steps
from perf.model import Sample
from tests.lab.qemu import Guest, GuestError
from tests.lab.qmp import QmpError

MONITOR_SECONDS = 10.0
ANSWER_SECONDS = 5.0
START_SECONDS = 20.0
"""Beyond a window's own length: programs start slowly in an emulated guest."""


class Work(Protocol):
    """What a guest does in a window."""

    async def run(self, seconds: float) -> Sample:
        """Runs one window. `seconds` of the sample are those that rates refer to.

        Of `own_cpu_seconds` only what is neither the server's nor QEMU's.

        Raises OSError, ValueError or GuestError.
        """
        ...


class GuestTarget:
    """A perf.model.Target."""

    def __init__(self, steps: Steps, guest: Guest, backend: Backend, work: Work) -> None:
        self.backend = backend
        self._steps = steps
        self._guest = guest
        self._work = work
        self._broken: str | None = None

    def go_on(self) -> None:
        self._steps.run(self._monitor("cont"))

    def rest(self) -> None:
        self._steps.run(self._monitor("stop"))

    async def _monitor(self, command: str) -> None:
        if self._broken:
            return
        try:
            async with asyncio.timeout(MONITOR_SECONDS):
                await self._guest.monitor.execute(command)
        except (QmpError, OSError) as error:
            hung = isinstance(error, TimeoutError)
            self._broken = f"QEMU did not take {command!r}" + ("" if hung else f": {error}")
            await self._guest.kill()

    def measure(self, seconds: float) -> Sample:
        if self._broken:
            raise TimeoutError(self._broken)
        start, before = time.monotonic(), self.backend.used()
        sample = self._steps.run(self._window(seconds))
        used = self.backend.used() - before
        return replace(
            sample,
            seconds=time.monotonic() - start,
            own_cpu_seconds=sample.own_cpu_seconds + used.server + used.vmm,
        )

    async def _window(self, seconds: float) -> Sample:
        work = asyncio.create_task(self._work.run(seconds))
        end = asyncio.create_task(self.backend.wait())
        try:
            async with asyncio.timeout(2 * seconds + START_SECONDS):
                await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
            if end.done():
                raise OSError(f"the server {end.result()}")
            return work.result()
        except TimeoutError:
            answers = "answers" if await self._guest_answers() else "does not answer either"
            raise TimeoutError(
                f"a window of {seconds:g} s did not end in time; the guest's shell {answers}"
            ) from None
        except (ValueError, GuestError) as error:
            raise OSError(str(error)) from error
        finally:
            work.cancel()
            end.cancel()
            await asyncio.gather(work, end, return_exceptions=True)

    async def _guest_answers(self) -> bool:
        """Whether it is the device that hangs, or all of the guest."""
        try:
            await self._guest.run("true", limit=ANSWER_SECONDS)
        except GuestError:
            return False
        return True

    def alive(self) -> str | None:
        return self.backend.ended()

    def log_tail(self) -> Sequence[str]:
        return self.backend.log_tail()
