"""The devices of a machine in their places: PCI slots, or MMIO slots."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vdev.dirtylog import DirtyLog
from vdev.errors import NotSupported, UserError
from vdev.iothread import settle
from vdev.memory import GuestMemory
from vdev.registers import Bus
from vdev.virtio.device import Device
from vdev.vmm.interrupts import Interrupts
from vdev.vmm.mmio import SLOTS_MAX, MmioFunction
from vdev.vmm.pci.bus import SLOTS, PciBus
from vdev.vmm.pci.function import PciFunction
from vdev.vmm.vm import VM

C = TypeVar("C")


@dataclass(eq=False, repr=False)
class Plugged:
    """A device in its slot: `place` takes it out, then `stack` closes it and `gone` is set.

    renewed: whether it is plugged in again as soon as the guest has let go of it.
    """

    id: str
    kind: str
    device: Device
    function: PciFunction | MmioFunction
    slot: int
    place: contextlib.AsyncExitStack
    stack: contextlib.AsyncExitStack
    config: object = None
    renewed: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class Plugs:
    """All devices of a machine, in the order in which they were plugged in."""

    def __init__(self, bus: Bus, interrupts: Interrupts, memory: GuestMemory, *, pci: bool) -> None:
        self._bus = bus
        self._interrupts = interrupts
        self._memory = memory
        self._vm: VM | None = None
        self._log: DirtyLog | None = None
        self._plugged: dict[str, Plugged] = {}
        self.pci = PciBus(bus) if pci else None

    def __iter__(self) -> Iterator[Plugged]:
        return iter(tuple(self._plugged.values()))

    def find(self, id: str) -> Plugged:
        """Raises UserError where there is none of that id."""
        if id not in self._plugged:
            known = ", ".join(self._plugged) or "none"
            raise UserError(f"device {id!r}: this machine has {known}")
        return self._plugged[id]

    def at(self, slot: int) -> Plugged | None:
        """Who is in a slot."""
        return next((plugged for plugged in self if plugged.slot == slot), None)

    def plug(
        self,
        id: str,
        kind: str,
        device: Device,
        stack: contextlib.AsyncExitStack,
        *,
        config: object = None,
        slot: int | None = None,
    ) -> Plugged:
        """Puts a device, which `stack` closes, into a slot, the next by default. Raises UserError
        where all are taken; `stack` is the caller's then."""
        function: PciFunction | MmioFunction
        place = contextlib.AsyncExitStack()
        if self.pci is not None:
            slot = self.pci.free_slot() if slot is None else slot
            function = PciFunction(device, self._interrupts, self._bus)
            place.push_async_callback(function.close)
            self.pci.add(function, slot)
            place.callback(self.pci.remove, slot)
        else:
            slot = len(self._plugged) if slot is None else slot
            if slot >= SLOTS_MAX:
                raise UserError(f"{slot + 1} devices: with transport mmio at most {SLOTS_MAX}")
            function = MmioFunction(device, self._interrupts, self._bus, slot)
            place.push_async_callback(function.close)
        function.transport.memory = self._memory
        function.transport.log = self._log
        if self._vm is not None:
            function.attach(self._vm)
        plugged = Plugged(id, kind, device, function, slot, place, stack, config)
        self._plugged[id] = plugged
        return plugged

    async def unplug(self, plugged: Plugged) -> None:
        """Takes it out and closes it; once is enough."""
        if self._plugged.pop(plugged.id, None) is None:
            return
        await plugged.stack.enter_async_context(plugged.place)
        try:
            # To the end: half closed, a queue would go on in a device that is no more.
            await settle(asyncio.ensure_future(plugged.stack.aclose()))
        finally:
            plugged.gone.set()

    async def renew(self, plugged: Plugged) -> Plugged:
        """Takes it out and plugs it in again: to the guest, a device that it does not know."""
        del self._plugged[plugged.id]
        await settle(asyncio.ensure_future(plugged.place.aclose()))
        return self.plug(
            plugged.id, plugged.kind, plugged.device, plugged.stack, config=plugged.config
        )

    def attach(self, vm: VM) -> None:
        """The guest's notifications come by `vm` from now on."""
        self._vm = vm
        for plugged in self:
            plugged.function.attach(vm)

    def detach(self) -> None:
        """The present VM is going."""
        self._vm = None
        for plugged in self:
            plugged.function.detach()

    def configs(self, cls: type[C]) -> tuple[C, ...]:
        """What was written of the devices of one kind."""
        return tuple(plugged.config for plugged in self if isinstance(plugged.config, cls))

    def save(self) -> dict[str, Any]:
        """Id → slot and state, while all are suspended."""
        return {
            plugged.id: {
                "slot": plugged.slot,
                "function": plugged.function.save(),
                "device": plugged.device.save(),
            }
            for plugged in self
        }

    def slot_of(self, state: dict[str, Any], id: str) -> int:
        """Where `save` had a device. Raises KeyError, TypeError or ValueError: it is no slot."""
        slot = state[id]["slot"]
        slots = range(1, SLOTS) if self.pci is not None else range(SLOTS_MAX)
        if type(slot) is not int or slot not in slots or self.at(slot) is not None:
            raise ValueError(f"device {id}: slot {slot!r}")
        return slot

    def restore(self, state: dict[str, Any]) -> None:
        """What `save` gave; all are suspended afterwards. Raises ValueError."""
        if state.keys() != self._plugged.keys():
            raise ValueError("state of other devices than there are")
        for plugged in self:
            plugged.device.restore(state[plugged.id]["device"])
            plugged.function.restore(state[plugged.id]["function"])

    async def set_log(self, log: DirtyLog | None) -> None:
        """Has all log what they write, those that come later too, or no more.

        Raises NotSupported where one cannot; then none does.
        """
        if log is not None:
            for plugged in self:
                if not plugged.device.supports_log:
                    raise NotSupported(f"{plugged.id}: it does not log what it writes")
        self._log = log
        await self._each(lambda plugged: plugged.function.transport.set_log(log))

    async def suspend(self) -> None:
        """All queues stop and drain."""
        await self._each(lambda plugged: plugged.function.transport.suspend())

    async def resume(self) -> None:
        await self._each(lambda plugged: plugged.function.transport.resume())

    async def reset(self) -> None:
        """All as at power-on."""
        for plugged in self:
            plugged.renewed = False
        await self._each(lambda plugged: plugged.function.reset())

    async def clear(self) -> None:
        """All are taken out, the last first."""
        for plugged in reversed(tuple(self)):
            await self.unplug(plugged)

    def close(self) -> None:
        """All have been taken out."""
        if self.pci is not None:
            self.pci.close()

    async def _each(self, act: Callable[[Plugged], Awaitable[None]]) -> None:
        await asyncio.gather(*(act(plugged) for plugged in self))
