"""virtio over PCI (virtio 1.3, section 4.1): the structures in a function's BAR, the capabilities
that name them.

What makes it a PCI function (configuration header, MSI-X, where the BAR lies) is the bus's
business: see `vdev.vmm.pci`.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, Protocol

from vdev.registers import ALL, Access, Bank, Register, Tell, Window
from vdev.virtio.device import Device
from vdev.virtio.transport import FEATURE_WORDS, QUEUE_SIZE_MAX, QueueSetup, Transport

VENDOR_ID = 0x1AF4
DEVICE_ID_BASE = 0x1040
NO_VECTOR = 0xFFFF

COMMON, ISR, CONFIG, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
"""Offsets of the structures in the BAR; the table of vectors and its pending bits follow."""
NOTIFY_STRIDE = 4
_NOTIFY_ROOM = 0x1000
_COMMON_SIZE = 0x40
_QUEUE_BANK = 0x18

_CAP_VENDOR = 9
_CFG_COMMON, _CFG_NOTIFY, _CFG_ISR, _CFG_DEVICE, _CFG_PCI = 1, 2, 3, 4, 5

# Class codes as QEMU's guests know them: base class, subclass, interface.
_CLASSES = {1: 0x020000, 2: 0x010000, 3: 0x078000, 4: 0x00FF00, 5: 0x00FF00, 26: 0x018000}

_QUEUE_REGISTERS = (
    Register("queue_size", 0x18, 2, initial=QUEUE_SIZE_MAX, writable=ALL),
    Register("queue_vector", 0x1A, 2, initial=NO_VECTOR, writable=ALL, tell=Tell.WRITE),
    Register("queue_enable", 0x1C, 2, writable=1, tell=Tell.CHANGE),
    Register("queue_notify_off", 0x1E, 2),
    Register("queue_desc", 0x20, 8, writable=ALL),
    Register("queue_driver", 0x28, 8, writable=ALL),
    Register("queue_device", 0x30, 8, writable=ALL),
    Register("queue_notif_config_data", 0x38, 2),
    Register("queue_reset", 0x3A, 2),
)
_COMMON_REGISTERS = (
    Register("device_feature_select", 0x00, 4, writable=ALL),
    Register("device_feature", 0x04, 4),
    Register("driver_feature_select", 0x08, 4, writable=ALL),
    Register("driver_feature", 0x0C, 4, writable=ALL),
    Register("config_vector", 0x10, 2, initial=NO_VECTOR, writable=ALL, tell=Tell.WRITE),
    Register("num_queues", 0x12, 2),
    Register("device_status", 0x14, 1, tell=Tell.WRITE),
    Register("config_generation", 0x15, 1),
    Register("queue_select", 0x16, 2, writable=ALL),
    *_QUEUE_REGISTERS,
)


class Vectors(Protocol):
    """The MSI-X vectors of a function."""

    def fd(self, vector: int) -> int:
        """The eventfd that raises this vector."""


class PciTransport(Transport):
    """A device's structures as windows, to be placed in a BAR."""

    def __init__(self, device: Device, vectors: Vectors) -> None:
        super().__init__(device)
        self._vectors = vectors
        self.num_vectors = self.vectors_of(device)
        self.common = Window(
            _COMMON_SIZE,
            _COMMON_REGISTERS,
            banks=(
                Bank(0x04, 0x08, "device_feature_select", FEATURE_WORDS),
                Bank(0x0C, 0x10, "driver_feature_select", FEATURE_WORDS),
                Bank(_QUEUE_BANK, _COMMON_SIZE, "queue_select", device.num_queues),
            ),
            handler=self._common_access,
        )
        self.common.write("num_queues", device.num_queues)
        for row in range(FEATURE_WORDS):
            self.common.write("device_feature", device.features >> 32 * row & 0xFFFFFFFF, row)
        for index in range(device.num_queues):
            self.common.write("queue_notify_off", index, index)
        # Only INTx needs it; a driver that reads it finds no cause.
        self.isr = Window(4, (Register("isr", 0, 4),))
        size = len(device.config())
        self.config: Window | None = None
        if size:
            self.config = Window(
                size,
                (Register("config", 0, size, tell=Tell.WRITE),),
                handler=self._config_access,
            )
        self.show_config()

    @staticmethod
    def vectors_of(device: Device) -> int:
        """One for each queue, and one for changes of the configuration."""
        return device.num_queues + 1

    @property
    def windows(self) -> dict[int, Window]:
        """Offset in the BAR → window."""
        windows = {COMMON: self.common, ISR: self.isr}
        if self.config is not None:
            windows[CONFIG] = self.config
        return windows

    @property
    def notifications(self) -> dict[int, int]:
        """Offset in the BAR → eventfd that a write there signals."""
        return {NOTIFY + NOTIFY_STRIDE * index: kick for index, kick in enumerate(self.kicks)}

    @property
    def ids(self) -> tuple[int, int, int]:
        """PCI vendor, device, and class code (section 4.1.2)."""
        device_id = self.device.device_id
        return VENDOR_ID, DEVICE_ID_BASE + device_id, _CLASSES.get(device_id, 0x00FF00)

    def capabilities(self) -> list[bytes]:
        """The vendor-specific capabilities, without their "next" byte's value (section 4.1.4)."""
        spans = [(_CFG_COMMON, COMMON, _COMMON_SIZE), (_CFG_ISR, ISR, 4)]
        if self.config is not None:
            spans.append((_CFG_DEVICE, CONFIG, self.config.size))
        notify_size = NOTIFY_STRIDE * max(1, len(self.kicks))
        return [
            *(_capability(*span) for span in spans),
            _capability(_CFG_NOTIFY, NOTIFY, notify_size, struct.pack("<I", NOTIFY_STRIDE)),
            _capability(_CFG_PCI, 0, 0, bytes(4)),
        ]

    # Transport

    @property
    def status(self) -> int:
        return self.common.read("device_status")

    @status.setter
    def status(self, value: int) -> None:
        self.common.write("device_status", value)

    def driver_features(self) -> int:
        words = (self.common.read("driver_feature", row) for row in range(FEATURE_WORDS))
        return sum(word << 32 * row for row, word in enumerate(words))

    def queue_setup(self, index: int) -> QueueSetup:
        read = self.common.read
        return QueueSetup(
            size=read("queue_size", index),
            desc=read("queue_desc", index),
            avail=read("queue_driver", index),
            used=read("queue_device", index),
            ready=bool(read("queue_enable", index)),
        )

    def call_fd(self, index: int) -> int:
        return self._vector_fd(self.common.read("queue_vector", index))

    def _vector_fd(self, vector: int) -> int:
        # Between the guest's write and `_queue_vector` any number stands there.
        return self._vectors.fd(vector) if vector < self.num_vectors else -1

    def clear_registers(self) -> None:
        self.common.write("config_vector", NO_VECTOR)
        for register in _QUEUE_REGISTERS:
            if register.writable:
                for row in range(self.device.num_queues):
                    self.common.write(register.name, register.initial, row)
        for row in range(FEATURE_WORDS):
            self.common.write("driver_feature", 0, row)

    def show_config(self) -> None:
        if self.config is None:
            return
        config = self.device.config()
        if config != self.config.load(0, self.config.size):
            self.config.store(0, config)
            generation = self.common.read("config_generation") + 1 & 0xFF
            self.common.write("config_generation", generation)

    def config_interrupt(self) -> None:
        self.show_config()
        fd = self._vector_fd(self.common.read("config_vector"))
        if fd >= 0:
            # The counter is full only where nobody listens.
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(fd, 1)

    def save(self) -> dict[str, Any]:
        return {**super().save(), "common": self.common.save()}

    def restore(self, state: dict[str, Any]) -> None:
        self.common.restore(state["common"])
        vectors = [self.common.read("config_vector")]
        vectors += [self.common.read("queue_vector", i) for i in range(self.device.num_queues)]
        if any(vector != NO_VECTOR and vector >= self.num_vectors for vector in vectors):
            raise ValueError("interrupt vectors that the device does not have")
        super().restore(state)
        self.show_config()

    async def close(self) -> None:
        await super().close()
        for window in self.windows.values():
            window.close()

    # Told accesses

    async def _common_access(self, access: Access) -> int | None:
        if action := self._ACTIONS.get(access.register):
            await action(self, access)
        return None

    async def _status(self, access: Access) -> None:
        await self.write_status(access.value)

    async def _config_vector(self, _access: Access) -> None:
        if self.common.read("config_vector") >= self.num_vectors:
            self.common.write("config_vector", NO_VECTOR)

    async def _queue_vector(self, access: Access) -> None:
        # Section 4.1.5.1.2: the driver reads back whether it got the vector.
        if self.common.read("queue_vector", access.row) >= self.num_vectors:
            self.common.write("queue_vector", NO_VECTOR, access.row)
        await self.queue_moved(access.row)

    async def _queue_enable(self, access: Access) -> None:
        await self.queue_ready(access.row)

    _ACTIONS: ClassVar[dict[str, Callable[[PciTransport, Access], Awaitable[None]]]] = {
        "device_status": _status,
        "config_vector": _config_vector,
        "queue_vector": _queue_vector,
        "queue_enable": _queue_enable,
    }

    async def _config_access(self, access: Access) -> int | None:
        self.write_config(access.offset, access.value.to_bytes(8, "little")[: access.size])
        self.show_config()
        return None


def bar_layout(num_queues: int) -> tuple[int, int, int]:
    """Offsets of the vector table and of the pending bits, and the size of the BAR."""
    table = NOTIFY + max(_NOTIFY_ROOM, -(-NOTIFY_STRIDE * num_queues // 0x1000) * 0x1000)
    pending = table + -(-16 * (num_queues + 1) // 0x1000) * 0x1000
    return table, pending, 1 << (pending + 0x1000 - 1).bit_length()


def _capability(kind: int, offset: int, size: int, extra: bytes = b"") -> bytes:
    """struct virtio_pci_cap, in BAR 0 (section 4.1.4)."""
    head = struct.pack("<BBBBBBxxII", _CAP_VENDOR, 0, 16 + len(extra), kind, 0, 0, offset, size)
    return head + extra
