"""Proper requests by their parts, for tests to take apart."""

from __future__ import annotations

from dataclasses import dataclass

from tests.frontend.blk import SECTOR, T_IN, BlkClient, header
from tests.frontend.memory import GuestMemory
from tests.frontend.ring import DESC, Desc, SplitRing, pack_table

HOLE = 1 << 36
END_OF_RAM = (1 << 32) + (4 << 20)


@dataclass(frozen=True)
class Parts:
    """Guest addresses of a proper read of sector 0: header, data, status."""

    disk: BlkClient
    head: int
    data: int
    status: int

    @property
    def ring(self) -> SplitRing:
        return self.disk.ring

    @property
    def memory(self) -> GuestMemory:
        return self.disk.memory

    def chain(self) -> list[Desc]:
        return [
            Desc(self.head, 16),
            Desc(self.data, SECTOR, write=True),
            Desc(self.status, 1, write=True),
        ]

    def table(self, *entries: tuple[int, int, int, int]) -> int:
        """Write raw descriptors somewhere and return the address of this table."""
        packed = b"".join(DESC.pack(*entry) for entry in entries)
        address = self.memory.alloc(len(packed), 16)
        self.memory.write(address, packed)
        return address

    def good_table(self) -> tuple[int, int]:
        packed = pack_table(self.chain())
        address = self.memory.alloc(len(packed), 16)
        self.memory.write(address, packed)
        return address, len(packed)

    def send(self, *chain: Desc) -> int:
        return self.ring.submit(chain)

    def raw(self, *entries: tuple[int, int, int, int], head: int = 0) -> None:
        """Fill the descriptor table from its start and make `head` available."""
        for index, entry in enumerate(entries):
            self.ring.set_desc(index, *entry)
        self.ring.offer(head)
        self.ring.kick()


def parts(disk: BlkClient) -> Parts:
    found = Parts(
        disk, disk.memory.alloc(16, 16), disk.memory.alloc(SECTOR, 16), disk.memory.alloc(1)
    )
    disk.memory.write(found.head, header(T_IN))
    disk.memory.write(found.status, b"\xee")
    return found


def wide_chain(p: Parts, entries: int) -> list[Desc]:
    """A read whose chain has exactly `entries` descriptors."""
    count = entries - 2
    data = p.memory.alloc(count * SECTOR, 16)
    return [
        Desc(p.head, 16),
        *(Desc(data + n * SECTOR, SECTOR, write=True) for n in range(count)),
        Desc(p.status, 1, write=True),
    ]
