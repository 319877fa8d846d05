"""The balloon (virtio 1.3, section 5.5): memory that the guest lends to its host.

Pages that the guest puts into the balloon, or reports as free, are discarded: the host has them
until the guest touches them again, which needs nobody's leave.  What the guest names is a wish:
only whole pages inside its RAM are ever touched, and at most they lose their contents.

Queues.  0 inflates, 1 deflates, and the rest depend on what was negotiated.  Drivers differ on
whether a queue that is absent leaves a gap, so each place behind the last one that is certain is
taken to be free page reporting, the only one left.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from vdev._native import ffi, lib
from vdev.errors import PeerError, UserError
from vdev.iothread import IOThread
from vdev.virtio.batch import BatchDevice, Chain
from vdev.virtio.spec import RING_FEATURES

INFLATE, DEFLATE, STATISTICS = 0, 1, 2
QUEUES = 5
PAGE: int = 1 << lib.VIRTIO_BALLOON_PFN_SHIFT
PFNS_MOST = 1024
"""Of one request; Linux sends 256.  What is beyond it stays where it is."""
RANGES_MOST = 512
"""Of one report; Linux sends 32."""

_STATISTIC = struct.Struct("<HQ")
_STATISTICS_MOST = 64
_TAGS: dict[int, str] = {
    tag: name.removeprefix("VIRTIO_BALLOON_S_").lower()
    for name, tag in ffi.typeof("enum virtio_balloon_stat_tag").relements.items()
}
_REPORTING = 1 << lib.VIRTIO_BALLOON_F_PAGE_REPORTING
_STATS_VQ = 1 << lib.VIRTIO_BALLOON_F_STATS_VQ


class BalloonDevice(BatchDevice):
    """A virtio-balloon device.

    ram: guest address and size, in bytes, of each range that may be discarded.
    discard: gives [address, address + size) of guest memory back to the host, whole pages always;
        OSError is logged.  `vhost_memory_discard` does that for a mapped table.
    page: the size of the pages behind RAM, in bytes; a part of one is never discarded.
    deflate_on_oom: the guest may take pages back when it runs out of memory.
    """

    device_id = lib.VIRTIO_ID_BALLOON

    def __init__(
        self,
        ram: Sequence[tuple[int, int]],
        discard: Callable[[int, int], object],
        *,
        iothreads: Sequence[IOThread],
        name: str = "balloon",
        page: int = PAGE,
        deflate_on_oom: bool = True,
        statistics: bool = True,
        reporting: bool = True,
    ) -> None:
        self.name = name
        self.features = RING_FEATURES
        if deflate_on_oom:
            self.features |= 1 << lib.VIRTIO_BALLOON_F_DEFLATE_ON_OOM
        if statistics:
            self.features |= _STATS_VQ
        if reporting:
            self.features |= _REPORTING
        self.discarded = 0
        self._ram = tuple(ram)
        self._discard = discard
        self._page = page
        self._accepted = 0
        self._num_pages = 0
        self._actual = 0
        self._asking = asyncio.Lock()
        self._statistics_there = asyncio.Event()
        super().__init__(QUEUES, iothreads)

    # ---- the host's side ----

    @property
    def target(self) -> int:
        """How large the balloon should be, in bytes."""
        return self._num_pages * PAGE

    @property
    def actual(self) -> int:
        """How large the guest says that it is, in bytes; never more than its RAM."""
        return min(self._actual * PAGE, self._ram_size)

    def set_target(self, size: int) -> None:
        """Asks the guest for a balloon of `size` bytes, rounded down to pages. Raises UserError."""
        if not 0 <= size <= self._ram_size:
            raise UserError(
                f"balloon of {size} bytes: this guest has {self._ram_size} bytes of memory"
            )
        if size // PAGE != self._num_pages:
            self._num_pages = size // PAGE
            self.notify_config()

    async def memory_stats(self) -> dict[str, int]:
        """What the guest says of its memory now (5.5.6.4), by lower-case names: "memfree", …

        In bytes, or numbers of events.  A guest need not answer: bound the wait.  Raises UserError
        where it gives no statistics, or lets go of the device meanwhile.
        """
        async with self._asking:
            # The buffer that waits holds an earlier answer; handing it back is the question.
            (await self._statistics()).complete(0)
            chain = await self._statistics()
            data = chain.read(_STATISTIC.size * _STATISTICS_MOST)
            chain.give_back()
        whole = len(data) - len(data) % _STATISTIC.size
        found = _STATISTIC.iter_unpack(data[:whole])
        return {_TAGS[tag]: value for tag, value in found if tag in _TAGS}

    # ---- the device ----

    def config(self) -> bytes:
        """struct virtio_balloon_config."""
        space = ffi.new("struct virtio_balloon_config *")
        space.num_pages, space.actual = self._num_pages, self._actual
        return bytes(ffi.buffer(space))

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver says how many pages are in the balloon (5.5.6)."""
        if (offset, len(data)) != (ffi.offsetof("struct virtio_balloon_config", "actual"), 4):
            raise PeerError(f"{self.name}: only the field `actual` may be written, and whole")
        self._actual = int.from_bytes(data, "little")

    def negotiate(self, features: int) -> None:
        super().negotiate(features)
        self._accepted = features
        self.on_demand = frozenset({STATISTICS} if features & _STATS_VQ else ())

    def reset(self) -> None:
        self._accepted = self._actual = 0
        self._statistics_there.set()

    async def handle(self, queue: int, chains: list[Chain]) -> None:
        for chain in chains:
            if queue == INFLATE:
                self._give_up(_runs(_page_numbers(chain)))
            elif queue != DEFLATE and self._accepted & _REPORTING:
                ranges = chain.writable_ranges[:RANGES_MOST]
                self._give_up((start, start + size) for start, size in ranges)
            chain.complete(0)
            await asyncio.sleep(0)  # discarding takes its time, and others want theirs

    def available(self, queue: int) -> None:
        self._statistics_there.set()

    def save(self) -> dict[str, Any]:
        return {"target": self._num_pages, "actual": self._actual}

    def restore(self, state: dict[str, Any]) -> None:
        if state.keys() != self.save().keys() or not all(
            isinstance(pages, int) and 0 <= pages < 1 << 32 for pages in state.values()
        ):
            raise ValueError(f"{self.name}: not the state of a balloon")
        self._num_pages, self._actual = state["target"], state["actual"]

    def describe(self) -> dict[str, Any]:
        """Sizes in bytes; `discarded` counts what went back to the host, again and again."""
        return {
            "kind": "balloon",
            "target": self.target,
            "actual": self.actual,
            "discarded": self.discarded,
        }

    def close(self) -> None:
        super().close()
        self.reset()

    # ---- within ----

    @property
    def _ram_size(self) -> int:
        return sum(size for _, size in self._ram)

    async def _statistics(self) -> Chain:
        while self._accepted & _STATS_VQ:
            self._statistics_there.clear()
            for chain in self.take(STATISTICS, 1):
                return chain
            await self._statistics_there.wait()
        raise UserError(f"{self.name}: the guest gives no statistics")

    def _give_up(self, ranges: Iterable[tuple[int, int]]) -> None:
        for start, end in ranges:
            for address, size in self._whole_pages(start, end):
                try:
                    self._discard(address, size)
                except OSError as error:
                    self._log.warning("%s: %#x, %d bytes: %s", self.name, address, size, error)
                else:
                    self.discarded += size

    def _whole_pages(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        for base, size in self._ram:
            first = -(-max(start, base) // self._page) * self._page
            last = min(end, base + size) // self._page * self._page
            if first < last:
                yield first, last - first


def _page_numbers(chain: Chain) -> list[int]:
    data = chain.read(4 * PFNS_MOST)
    return list(struct.unpack_from(f"<{len(data) // 4}I", data))


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Start and end, in bytes, of what the pages cover: neighbours are one range."""
    start = end = -1
    for page in sorted(pages):
        if page > end:
            if end > start:
                yield start * PAGE, end * PAGE
            start = page
        end = page + 1
    if end > start:
        yield start * PAGE, end * PAGE
