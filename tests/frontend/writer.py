"""Writes all over a disk, in flight while something else goes on, and what must be there then."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .blk import S_OK, SECTOR, T_FLUSH, T_OUT, BlkClient, Pending, header
from .memory import Region

DEPTH = 16
AREA = 2048  # sectors
BYTES = 8 * SECTOR


class Writer:
    """Writes all over the disk, one at a time to a place, and knows what must be there.

    regions: where the data of writes lies, at random; empty = anywhere.
    """

    def __init__(self, disk: BlkClient, seed: int) -> None:
        self.random = random.Random(seed)
        self.disk = disk
        self.content = bytearray(AREA * SECTOR)
        self.writes: dict[int, tuple[Pending, bytes]] = {}
        self.flushes: list[Pending] = []
        self.regions: Sequence[Region] = ()
        self.done = self.overtaken = 0

    def fill(self) -> None:
        """DEPTH writes in flight, on both queues, and here and there a flush."""
        while len(self.writes) < DEPTH:
            place = self.random.randrange(AREA // 8)
            if place in self.writes:
                continue
            data = self.random.randbytes(BYTES)
            queue = self.random.randrange(2)
            region = self.random.choice(self.regions) if self.regions else None
            write = self.disk.submit(header(T_OUT, 8 * place) + data, 1, queue=queue, region=region)
            self.writes[place] = (write, data)
        if len(self.flushes) < 4:
            queue = self.random.randrange(2)
            self.flushes.append(self.disk.submit(header(T_FLUSH), 1, queue=queue))

    def read(self) -> None:
        """A read that may overtake a flush: then the used index does not tell what is in flight."""
        place = self.random.choice([p for p in range(AREA // 8) if p not in self.writes])
        flush = self.flushes[-1]
        data = self.disk.read(8 * place, BYTES, queue=flush.queue)
        assert data == self.content[place * BYTES : (place + 1) * BYTES]
        self.overtaken += self.disk.is_in_flight(flush)

    def take(self, count: int) -> None:
        """Waits for so many writes, any of them."""
        for place in self.random.sample(list(self.writes), count):
            self._finish(place)
        if self.flushes and self.random.randrange(4) == 0:
            assert self.disk.finish(self.flushes.pop(0)).status == S_OK

    def leave(self, region: Region) -> None:
        """Waits for what lies in `region`, and for nothing else; no more goes there."""
        self.regions = [other for other in self.regions if other is not region]
        for place, (write, _) in list(self.writes.items()):
            if region.guest_addr <= write.readable[0] < region.end:
                self._finish(place)

    def finish(self) -> None:
        self.take(len(self.writes))
        while self.flushes:
            assert self.disk.finish(self.flushes.pop()).status == S_OK

    def check(self) -> None:
        """All of the disk is what was written."""
        for at in range(0, AREA, 64):
            there = self.disk.read(at, 64 * SECTOR, queue=at // 64 % 2)
            assert there == self.content[at * SECTOR : (at + 64) * SECTOR]

    def _finish(self, place: int) -> None:
        write, data = self.writes.pop(place)
        assert self.disk.finish(write).status == S_OK
        self.content[place * BYTES : (place + 1) * BYTES] = data
        self.done += 1
