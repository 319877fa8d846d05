"""Devices over virtio-mmio: each has its page of registers and its pin of the I/O APIC."""

from __future__ import annotations

import os
from typing import Any

from vdev.registers import MMIO, Bus
from vdev.virtio.device import Device
from vdev.virtio.mmio import ACKNOWLEDGE, NOTIFY, USED_BUFFER, MmioTransport
from vdev.vmm.acpi.platform import MmioDevice
from vdev.vmm.interrupts import Interrupts
from vdev.vmm.layout import IOAPIC_PINS, MMIO_BASE, MMIO_FIRST_GSI, VIRTIO_MMIO_SIZE
from vdev.vmm.vm import VM

SLOTS_MAX = IOAPIC_PINS - MMIO_FIRST_GSI


class MmioFunction:
    """A virtio device in an MMIO slot, a number below SLOTS_MAX."""

    def __init__(self, device: Device, interrupts: Interrupts, bus: Bus, slot: int) -> None:
        self._bus = bus
        self._interrupts = interrupts
        self._base = MMIO_BASE + slot * VIRTIO_MMIO_SIZE
        self.device = device
        self.transport = MmioTransport(device)
        self._acknowledged = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._line = interrupts.pin(MMIO_FIRST_GSI + slot, self.transport.irq_fd)
        bus.place(self.transport.window, MMIO, self._base)

    @property
    def described(self) -> MmioDevice:
        """For the ACPI tables."""
        return MmioDevice(self._base, VIRTIO_MMIO_SIZE, self._line.gsi)

    def attach(self, vm: VM) -> None:
        """Notifications are heard on `vm`: a write of a queue's index.

        So is what acknowledges used buffers alone, which changes nothing: KVM keeps it to itself,
        since each interrupt has one.
        """
        for index, kick in enumerate(self.transport.kicks):
            vm.ioeventfd(kick, MMIO, self._base + NOTIFY, True, match=index)
        acknowledge = self._base + ACKNOWLEDGE
        vm.ioeventfd(self._acknowledged, MMIO, acknowledge, True, match=USED_BUFFER)

    def detach(self) -> None:
        """The present VM is going, and takes its notifications along."""

    async def reset(self) -> None:
        """As at power-on."""
        await self.transport.reset()

    def save(self) -> dict[str, Any]:
        """While the transport is suspended."""
        return {"transport": self.transport.save()}

    def restore(self, state: dict[str, Any]) -> None:
        """Raises ValueError where it is not the state of such a device."""
        try:
            self.transport.restore(state["transport"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.device.name}: state of something else") from error

    async def close(self) -> None:
        self._bus.remove(self.transport.window)
        self._interrupts.release(self._line)
        await self.transport.close()
        os.close(self._acknowledged)
