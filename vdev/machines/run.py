"""A machine from its start to its end, as a program."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from vdev.machines.choice import new_machine
from vdev.machines.confine import confine, kept
from vdev.machines.control import MachineControl, check_name_free
from vdev.server.notify import notify
from vdev.server.signals import on_signals
from vdev.vmm.api import Outcome, VirtualMachine
from vdev.vmm.config import MachineConfig

if TYPE_CHECKING:
    from vdev.vmm.snapshot import Snapshot

Front = Callable[[VirtualMachine], AbstractAsyncContextManager[None]]


@contextlib.asynccontextmanager
async def without_front(machine: VirtualMachine) -> AsyncIterator[None]:
    """Nobody sits before the console."""
    yield


async def run_machine(
    config: MachineConfig, front: Front = without_front, snapshot: Snapshot | None = None
) -> Outcome:
    """Runs a machine until it ends, or SIGTERM, SIGINT or SIGHUP ends it; on KVM this process is
    confined before the guest runs, and good for nothing else afterwards.

    `front` is entered once it runs: the terminal of whoever started it. snapshot: where it goes on
    from. Raises UserError where it
    cannot be started, with nothing left behind.
    """
    check_name_free(config.name)
    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        # Before anything exists that a signal would leave behind.
        stack.enter_context(on_signals(stop.set))
        built = new_machine(config, snapshot)
        stack.enter_context(kept(built))
        machine = await stack.enter_async_context(built)
        await stack.enter_async_context(MachineControl(machine).serving())
        await confine(machine)
        await machine.start()
        notify("READY=1")
        async with front(machine):
            outcome = await _ended(machine, stop)
        notify("STOPPING=1")
        return outcome


async def _ended(machine: VirtualMachine, stop: asyncio.Event) -> Outcome:
    ended = asyncio.ensure_future(machine.wait())
    asked = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([ended, asked], return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            await machine.stop()
        return await ended
    finally:
        ended.cancel()
        asked.cancel()
        await asyncio.gather(ended, asked, return_exceptions=True)
