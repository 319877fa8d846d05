"""virtio over MMIO, version 2 (virtio 1.3, section 4.2): one window of registers, one interrupt.

The interrupt is an edge, raised by the device through one eventfd for all queues, so "used buffer"
in InterruptStatus is always set: the driver looks at its queues whenever it is interrupted.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from vdev._native import lib
from vdev.registers import ALL, Access, Bank, Register, Tell, Window
from vdev.virtio.device import Device
from vdev.virtio.transport import FEATURE_WORDS, QUEUE_SIZE_MAX, QueueSetup, Transport

MAGIC = 0x74726976
VENDOR = 0x56444556
NOTIFY, ACKNOWLEDGE = 0x50, 0x64
USED_BUFFER = 1
_GENERATION, _CONFIG = 0xFC, 0x100
_CONFIG_CHANGE = 2
_QUEUE_REGISTERS = (
    Register("queue_num_max", 0x34, 4, initial=QUEUE_SIZE_MAX),
    Register("queue_num", 0x38, 4, initial=QUEUE_SIZE_MAX, writable=ALL),
    Register("queue_ready", 0x44, 4, writable=1, tell=Tell.CHANGE),
    Register("queue_desc", 0x80, 8, writable=ALL),
    Register("queue_driver", 0x90, 8, writable=ALL),
    Register("queue_device", 0xA0, 8, writable=ALL),
)


def registers(device: Device) -> tuple[Register, ...]:
    """Every register of section 4.2.2 that a device of ours has."""
    return (
        Register("magic", 0x00, 4, initial=MAGIC),
        Register("version", 0x04, 4, initial=2),
        Register("device_id", 0x08, 4, initial=device.device_id),
        Register("vendor_id", 0x0C, 4, initial=VENDOR),
        Register("device_features", 0x10, 4),
        Register("device_features_sel", 0x14, 4, writable=ALL),
        Register("driver_features", 0x20, 4, writable=ALL),
        Register("driver_features_sel", 0x24, 4, writable=ALL),
        Register("queue_sel", 0x30, 4, writable=ALL),
        *_QUEUE_REGISTERS,
        Register("interrupt_status", 0x60, 4),
        Register("interrupt_ack", ACKNOWLEDGE, 4, writable=_CONFIG_CHANGE, tell=Tell.ACKNOWLEDGES),
        Register("status", 0x70, 4, tell=Tell.WRITE),
        Register("shm_sel", 0xAC, 4, writable=ALL),
        # No shared memory: its length and base read as all ones (section 4.2.2.1).
        Register("shm", 0xB0, 16, initial=(1 << 128) - 1),
        Register("config_generation", _GENERATION, 4),
        Register("config", _CONFIG, len(device.config()), tell=Tell.WRITE),
    )


class MmioTransport(Transport):
    """A device's registers in `window`, its notification at NOTIFY, its interrupt `irq_fd`."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.irq_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.window = Window(
            _CONFIG + len(device.config()),
            registers(device),
            banks=(
                Bank(0x10, 0x14, "device_features_sel", FEATURE_WORDS),
                Bank(0x20, 0x24, "driver_features_sel", FEATURE_WORDS),
                Bank(0x34, 0x48, "queue_sel", device.num_queues),
                Bank(0x80, 0xA8, "queue_sel", device.num_queues),
            ),
            handler=self._access,
        )
        for row in range(FEATURE_WORDS):
            self.window.write("device_features", device.features >> 32 * row & 0xFFFFFFFF, row)
        self.show_config()

    @property
    def status(self) -> int:
        return self.window.read("status")

    @status.setter
    def status(self, value: int) -> None:
        self.window.write("status", value)
        if value & lib.VIRTIO_STATUS_DRIVER_OK:
            self.window.set_bits("interrupt_status", USED_BUFFER)

    def driver_features(self) -> int:
        words = (self.window.read("driver_features", row) for row in range(FEATURE_WORDS))
        return sum(word << 32 * row for row, word in enumerate(words))

    def queue_setup(self, index: int) -> QueueSetup:
        read = self.window.read
        return QueueSetup(
            size=read("queue_num", index),
            desc=read("queue_desc", index),
            avail=read("queue_driver", index),
            used=read("queue_device", index),
            ready=bool(read("queue_ready", index)),
        )

    def call_fd(self, index: int) -> int:
        return self.irq_fd

    def clear_registers(self) -> None:
        self.window.write("interrupt_status", 0)
        for register in _QUEUE_REGISTERS:
            for row in range(self.device.num_queues):
                self.window.write(register.name, register.initial, row)
        for row in range(FEATURE_WORDS):
            self.window.write("driver_features", 0, row)

    def show_config(self) -> None:
        before = self.window.load(_CONFIG, self.window.size - _CONFIG)
        config = self.device.config()
        if config != before:
            generation = self.window.read("config_generation") + 1 & 0xFFFFFFFF
            # At once: a driver that reads one of them old reads the other old (section 2.5.3).
            self.window.store(_GENERATION, generation.to_bytes(4, "little") + config)

    def config_interrupt(self) -> None:
        self.show_config()
        self.window.set_bits("interrupt_status", _CONFIG_CHANGE)
        # The counter is full only where nobody listens.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self.irq_fd, 1)

    def save(self) -> dict[str, Any]:
        return {**super().save(), "registers": self.window.save()}

    def restore(self, state: dict[str, Any]) -> None:
        self.window.restore(state["registers"])
        super().restore(state)
        self.show_config()

    async def close(self) -> None:
        await super().close()
        self.window.close()
        os.close(self.irq_fd)

    async def _access(self, access: Access) -> int | None:
        if access.register == "status":
            # Others than its lowest byte say nothing.
            if access.offset == self.window.registers["status"].offset:
                await self.write_status(access.value & 0xFF)
        elif access.register == "queue_ready":
            await self.queue_ready(access.row)
        elif access.register == "config":
            self.write_config(
                access.offset - _CONFIG, access.value.to_bytes(8, "little")[: access.size]
            )
            self.show_config()
        return None
