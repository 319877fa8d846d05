"""Virtqueue drivers in shared memory (virtio 1.3, section 2.7), with their three eventfds.

`add`/`offer`/`kick`/`wait` drive a ring as a driver should.  Everything beneath (`set_desc`,
`avail_idx`, `set_avail`, …) writes what it is told, so that tests can lie to the server.

Here are the split ring and what rings have in common; the packed one is in `packed`.
"""

from __future__ import annotations

import os
import select
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from .memory import GuestMemory, Region, fence
from .wire import TIMEOUT, Hung

NEXT = 1
WRITE = 2
INDIRECT = 4
NO_INTERRUPT = 1
NO_NOTIFY = 1
DESC = struct.Struct("=QIHH")
USED_ELEM = struct.Struct("=II")


@dataclass(frozen=True)
class Desc:
    """One descriptor of a chain: `len` bytes at guest address `addr`."""

    addr: int
    len: int
    write: bool = False
    flags: int = 0
    """Flags besides WRITE, and NEXT where the chain goes on."""

    def pack(self, next_index: int | None) -> bytes:
        flags = self.flags | (WRITE if self.write else 0) | (0 if next_index is None else NEXT)
        return DESC.pack(self.addr, self.len, flags, next_index or 0)


@dataclass(frozen=True)
class Used:
    """One used element: the head of the chain and the bytes the device claims to have written."""

    id: int
    len: int


def pack_table(chain: Sequence[Desc]) -> bytes:
    """The chain as an indirect table: entry n points to entry n + 1."""
    last = len(chain) - 1
    return b"".join(d.pack(None if i == last else i + 1) for i, d in enumerate(chain))


def wait_fd(fd: int, what: str, *, timeout: float = TIMEOUT) -> None:
    """Sleep until the eventfd is readable and take its count.  Raises Hung."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if not poller.poll(timeout * 1000):
        raise Hung(what)
    os.eventfd_read(fd)


def is_signalled(fd: int) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))


class Ring(ABC):
    """A ring of `size` entries in three areas of `memory`: (bytes, alignment) of each."""

    areas: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

    def __init__(
        self,
        memory: GuestMemory,
        size: int = 64,
        *,
        event_idx: bool = False,
        region: Region | None = None,
    ) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.areas = self._areas(size)
        self.desc, self.avail, self.used = (
            memory.alloc(length, align, region=region) for length, align in self.areas
        )
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self.kick_fd = os.eventfd(0, flags)
        self.call_fd = os.eventfd(0, flags)
        self.err_fd = os.eventfd(0, flags)
        self.reset()

    @staticmethod
    @abstractmethod
    def _areas(size: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]: ...

    @abstractmethod
    def reset(self, base: int = 0) -> None:
        """An empty ring that stands at `base`, as a driver makes it at start."""

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    @abstractmethod
    def add(self, chain: Sequence[Desc], *, indirect: bool = False) -> int:
        """Lay out a chain and return what names it; not yet available."""

    @abstractmethod
    def offer(self, *heads: int) -> None:
        """Make chains available that were added."""

    @abstractmethod
    def pop(self) -> Used | None:
        """The next used element, if there is one; its descriptors are free again."""

    @abstractmethod
    def want_call(self) -> None:
        """Ask for a call when the next element is used."""

    def kick(self, count: int = 1) -> None:
        os.eventfd_write(self.kick_fd, count)

    def submit(self, chain: Sequence[Desc], *, indirect: bool = False) -> int:
        head = self.add(chain, indirect=indirect)
        self.offer(head)
        self.kick()
        return head

    def submit_table(self, table: bytes, *, length: int | None = None) -> int:
        """Submit raw bytes as an indirect table of claimed `length`."""
        address = self.memory.alloc(len(table), 16)
        self.memory.write(address, table)
        size = len(table) if length is None else length
        return self.submit([Desc(address, size, flags=INDIRECT)])

    def wait(self, *, timeout: float = TIMEOUT) -> Used:
        """The next used element, sleeping on the call eventfd.  Raises Hung."""
        deadline = time.monotonic() + timeout
        while True:
            if self.event_idx:
                self.want_call()
                fence()
            element = self.pop()
            if element is not None:
                return element
            left = deadline - time.monotonic()
            if left <= 0:
                raise Hung(f"no completion in {timeout} s")
            wait_fd(self.call_fd, f"no call in {timeout} s", timeout=left)

    def wait_broken(self, *, timeout: float = TIMEOUT) -> None:
        """Sleep until the server signals the err eventfd.  Raises Hung."""
        wait_fd(
            self.err_fd, "the err fd was not signalled: the ring is not broken", timeout=timeout
        )


def split(ring: Ring) -> SplitRing:
    """The ring, which is split: for tests that look into it."""
    assert isinstance(ring, SplitRing)
    return ring


class SplitRing(Ring):
    """Descriptor table, avail and used ring of `size` entries, placed in `memory`."""

    @staticmethod
    def _areas(size: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return (16 * size, 16), (6 + 2 * size, 2), (6 + 8 * size, 4)

    def reset(self, base: int = 0) -> None:
        """An empty ring whose indexes both stand at `base`, as a driver makes it at start."""
        self.memory.write(self.desc, bytes(16 * self.size))
        self.memory.write(self.avail, bytes(6 + 2 * self.size))
        self.memory.write(self.used, bytes(6 + 8 * self.size))
        self.avail_idx = base
        self.used_idx = base
        self.last_used = base & 0xFFFF
        if self.event_idx:
            self.used_event = base
        self._free = list(range(self.size))
        self._chains: dict[int, list[int]] = {}
        self._tables: dict[int, tuple[int, int]] = {}

    # ---- raw fields ----

    @property
    def avail_flags(self) -> int:
        return self.memory.read16(self.avail)

    @avail_flags.setter
    def avail_flags(self, value: int) -> None:
        self.memory.write16(self.avail, value)

    @property
    def avail_idx(self) -> int:
        return self.memory.read16(self.avail + 2)

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        self.memory.write16(self.avail + 2, value)

    @property
    def used_flags(self) -> int:
        return self.memory.read16(self.used)

    @used_flags.setter
    def used_flags(self, value: int) -> None:
        self.memory.write16(self.used, value)

    @property
    def used_idx(self) -> int:
        return self.memory.read16(self.used + 2)

    @used_idx.setter
    def used_idx(self, value: int) -> None:
        self.memory.write16(self.used + 2, value)

    @property
    def used_event(self) -> int:
        return self.memory.read16(self.avail + 4 + 2 * self.size)

    @used_event.setter
    def used_event(self, value: int) -> None:
        self.memory.write16(self.avail + 4 + 2 * self.size, value)

    @property
    def avail_event(self) -> int:
        return self.memory.read16(self.used + 4 + 8 * self.size)

    def set_avail(self, position: int, head: int) -> None:
        self.memory.write16(self.avail + 4 + 2 * (position % self.size), head)

    def set_desc(
        self, index: int, addr: int, length: int, flags: int = 0, next_index: int = 0
    ) -> None:
        self.memory.write(self.desc + 16 * index, DESC.pack(addr, length, flags, next_index))

    # ---- the driver ----

    def add(self, chain: Sequence[Desc], *, indirect: bool = False) -> int:
        """Write a chain into free descriptors and return its head; not yet available."""
        if indirect:
            table = pack_table(chain)
            address = self.memory.alloc(len(table), 16)
            self.memory.write(address, table)
            head = self.add([Desc(address, len(table), flags=INDIRECT)])
            self._tables[head] = (address, len(table))
            return head
        indexes = [self._free.pop(0) for _ in chain]
        for i, (index, desc) in enumerate(zip(indexes, chain, strict=True)):
            following = indexes[i + 1] if i + 1 < len(indexes) else None
            self.memory.write(self.desc + 16 * index, desc.pack(following))
        self._chains[indexes[0]] = indexes
        return indexes[0]

    def offer(self, *heads: int) -> None:
        """Make heads available: the ring entries first, the index after them."""
        index = self.avail_idx
        for i, head in enumerate(heads):
            self.set_avail(index + i, head)
        fence()
        self.avail_idx = index + len(heads)
        fence()

    def wants_kick(self, old: int, new: int) -> bool:
        """Whether the device asked for a kick when avail.idx went from `old` to `new`
        (virtio 1.3, sections 2.7.10 and 2.7.10.1)."""
        if self.event_idx:
            return (new - self.avail_event - 1) & 0xFFFF < (new - old) & 0xFFFF
        return not self.used_flags & NO_NOTIFY

    def pop(self) -> Used | None:
        """The next used element, if there is one; its descriptors are free again."""
        if self.used_idx == self.last_used:
            return None
        fence()
        at = self.used + 4 + 8 * (self.last_used % self.size)
        element = Used(*USED_ELEM.unpack(self.memory.read(at, USED_ELEM.size)))
        self.last_used = (self.last_used + 1) & 0xFFFF
        self._free.extend(self._chains.pop(element.id, ()))
        if table := self._tables.pop(element.id, None):
            self.memory.release(*table)
        return element

    def want_call(self) -> None:
        self.used_event = self.last_used
