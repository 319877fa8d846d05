"""An IOMMU between the driver and its memory: buffers and rings have I/O virtual addresses.

    with IommuDisk(socket_path) as disk:
        disk.write(8, data)                     # the server asks for what it lacks, and is told
        disk.iommu.invalidate(address, size)    # it has to ask again

To drivers `IommuMemory` is memory like any other, with other addresses: its pages lie anywhere in
the regions that the server maps.
"""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from .blk import FEATURES, BlkClient
from .memory import PAGE, GuestMemory, Region
from .net import FEATURES as NET_FEATURES
from .net import NetClient
from .session import F_RING_PACKED, Refused, Session
from .survivor import Survivor
from .wire import HEADER, IOTLB, VERSION, Closed, Request, Wire, iotlb

F_ACCESS_PLATFORM = 1 << 33
LAYOUTS = {
    "split": FEATURES | F_ACCESS_PLATFORM,
    "packed": FEATURES | F_ACCESS_PLATFORM | F_RING_PACKED,
}
READ, WRITE = 1, 2
MISS, UPDATE, INVALIDATE, ACCESS_FAIL = 1, 2, 3, 4
EVERYTHING = 1 << 64

_BASE = 0x50_0000_0000
_BACKEND_IOTLB_MSG = 1


class IommuMemory(GuestMemory):
    """Guest memory whose addresses, but for those of `regions`, are IOVAs.

    pages: the guest address of each page, by its IOVA.
    """

    def __init__(self, *regions: Region, seed: int = 1) -> None:
        super().__init__(*regions)
        where = [r.guest_addr + at for r in regions for at in range(0, r.size, PAGE)]
        random.Random(seed).shuffle(where)
        self.pages = {_BASE + PAGE * n: page for n, page in enumerate(where)}
        # What is allocated there lies nowhere: only the holes of this are used.
        self._space = Region(_BASE, len(where) * PAGE)

    @classmethod
    def default(cls, size: int = 2 << 20) -> Self:
        return cls(Region(0, size), Region(1 << 32, size, offset=2 * PAGE))

    def alloc(self, size: int, align: int = 1, *, region: Region | None = None) -> int:
        """Pages of their own, so that each can be taken back alone."""
        address = self._space.alloc(_whole(size), max(align, PAGE))
        assert address is not None, f"no room for {size} bytes of test memory"
        return address

    def release(self, address: int, size: int) -> None:
        self._space.release(address, _whole(size))

    def free_pages(self) -> list[int]:
        return [
            page
            for low, high in self._space.holes
            for page in range(-(-low // PAGE) * PAGE, high - PAGE + 1, PAGE)
        ]

    def user_addr(self, address: int) -> int:
        """Addresses of rings are told as the driver knows them."""
        return address

    def guest_addr(self, address: int) -> int:
        return self.pages[address & -PAGE] + address % PAGE

    def _pieces(self, address: int, size: int) -> Iterator[tuple[Region, int, int]]:
        while size:
            count = min(size, PAGE - address % PAGE)
            yield from super()._pieces(self.guest_addr(address), count)
            address += count
            size -= count

    def read16(self, address: int) -> int:
        return super().read16(self.guest_addr(address))

    def write16(self, address: int, value: int) -> None:
        super().write16(self.guest_addr(address), value)

    def close(self) -> None:
        super().close()
        self._space.close()


class Iommu(threading.Thread):
    """Answers what the server asks for on the back-end channel.

    denied: pages (IOVAs) that are not translated; what is asked for there is not answered.
    granted: what each translation allows; None = what was asked for.
    misses: what was asked for: IOVA and access.
    """

    def __init__(self, session: Session, memory: IommuMemory) -> None:
        super().__init__(daemon=True)
        self.session = session
        self.memory = memory
        self.denied: set[int] = set()
        self.granted: int | None = READ | WRITE
        self.misses: list[tuple[int, int]] = []
        self._asked = threading.Condition()
        self.channel, theirs = socket.socketpair()
        with theirs:
            session.do(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])

    def run(self) -> None:
        try:
            while (miss := self._next()) is not None:
                iova, access = miss
                with self._asked:
                    self.misses.append(miss)
                    self._asked.notify_all()
                # Refused: the memory that it lies in has been taken from the server.
                with self.session.wire.lock, suppress(Refused):
                    if iova & -PAGE in self.memory.pages.keys() - self.denied:
                        self.update(iova & -PAGE, PAGE, self.granted or access)
        except (OSError, Closed):
            return  # the session has ended

    def deny(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.denied.add(page)
            self.invalidate(page, PAGE)

    def wait_asked(self, count: int, *, timeout: float) -> None:
        """Returns once so many misses have come."""
        with self._asked:
            assert self._asked.wait_for(lambda: len(self.misses) >= count, timeout), self.misses

    def update(self, iova: int, size: int, access: int = READ | WRITE) -> None:
        """Tells of a range, page by page."""
        for page in range(iova & -PAGE, iova + size, PAGE):
            self.say(page, PAGE, self.user_addr(page), access, UPDATE)

    def invalidate(self, iova: int, size: int) -> None:
        """Takes a range back; the server uses nothing of it when this returns."""
        self.say(iova, size % EVERYTHING, 0, 0, INVALIDATE)

    def say(self, iova: int, size: int, user_addr: int, access: int, kind: int) -> None:
        """Raises Refused."""
        self.session.do(Request.IOTLB_MSG, iotlb(iova, size, user_addr, access, kind))

    def user_addr(self, iova: int) -> int:
        return GuestMemory.user_addr(self.memory, self.memory.guest_addr(iova))

    def swap(self, one: int, other: int) -> None:
        """Two pages change places in memory, contents included; the server does not use them."""
        memory = self.memory
        with self.session.wire.lock:
            for page in (one, other):
                self.invalidate(page, PAGE)
            contents = memory.read(one, PAGE), memory.read(other, PAGE)
            memory.pages[one], memory.pages[other] = memory.pages[other], memory.pages[one]
            for page, content in zip((one, other), contents, strict=True):
                memory.write(page, content)

    def close(self) -> None:
        """May be called twice."""
        with suppress(OSError):
            self.channel.shutdown(socket.SHUT_RDWR)
        self.join()
        self.channel.close()

    def _next(self) -> tuple[int, int] | None:
        header = self._read(HEADER.size)
        if header is None:
            return None
        request, flags, size = HEADER.unpack(header)
        if request != _BACKEND_IOTLB_MSG:
            self._read(size)
            return self._next()
        payload = self._read(size)
        assert payload is not None
        assert (flags, size) == (VERSION, 32)
        iova, _, _, access, kind = IOTLB.unpack_from(payload)
        assert kind == MISS
        return iova, access

    def _read(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            part = self.channel.recv(size - len(data))
            if not part:
                return None
            data += part
        return data


def _whole(size: int) -> int:
    return -(-max(size, 1) // PAGE) * PAGE


class _Behind(Session):
    """A client whose memory is behind an IOMMU."""

    iommu: Iommu
    memory: GuestMemory

    def share(self, memory: GuestMemory, *, slots: bool = False) -> None:
        super().share(memory, slots=slots)
        assert isinstance(memory, IommuMemory)
        self.iommu = Iommu(self, memory)
        self.iommu.start()

    def close(self) -> None:
        if hasattr(self, "iommu"):
            self.iommu.close()
        super().close()


class IommuDisk(_Behind, BlkClient):
    """A disk."""

    def __init__(
        self,
        connection: Wire | str | os.PathLike[str],
        *,
        features: int = LAYOUTS["split"],
        memory: IommuMemory | None = None,
        **options: Any,
    ) -> None:
        memory = memory or IommuMemory.default()
        super().__init__(connection, features=features, memory=memory, **options)


class IommuSurvivor(_Behind, Survivor):
    """A disk whose server may be killed: the next one has to ask for everything."""

    def __init__(self, path: Path, *, features: int = LAYOUTS["split"], **options: Any) -> None:
        super().__init__(path, features=features, memory=IommuMemory.default(), **options)

    def reconnect(self, path: Path | None = None) -> None:
        self.iommu.close()
        super().reconnect(path)


class IommuCard(_Behind, NetClient):
    """A network card."""

    def __init__(
        self,
        connection: Wire | str | os.PathLike[str],
        *,
        features: int = NET_FEATURES | F_ACCESS_PLATFORM,
        memory: IommuMemory | None = None,
        **options: Any,
    ) -> None:
        memory = memory or IommuMemory.default()
        super().__init__(connection, features=features, memory=memory, **options)
