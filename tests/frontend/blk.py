"""A virtio-blk driver on the test front-end (virtio 1.3, section 5.2).

    with BlkClient(socket_path) as disk:
        disk.write(8, data)
        assert disk.read(8, len(data)) == data

`submit` sends any framing: readable and writable bytes cut at any place into descriptors.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from .memory import GuestMemory, Region
from .packed import PackedRing
from .ring import Desc, Ring, SplitRing, Used, split
from .session import (
    F_ANY_LAYOUT,
    F_EVENT_IDX,
    F_INDIRECT,
    F_PROTOCOL_FEATURES,
    F_RING_PACKED,
    F_VERSION_1,
    PROTOCOL_WANTED,
    Session,
)
from .wire import TIMEOUT, Wire

F_SIZE_MAX = 1 << 1
F_SEG_MAX = 1 << 2
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6
F_FLUSH = 1 << 9
F_TOPOLOGY = 1 << 10
F_CONFIG_WCE = 1 << 11
F_MQ = 1 << 12
F_DISCARD = 1 << 13
F_WRITE_ZEROES = 1 << 14

FEATURES = (
    F_SEG_MAX
    | F_RO
    | F_BLK_SIZE
    | F_FLUSH
    | F_TOPOLOGY
    | F_CONFIG_WCE
    | F_MQ
    | F_DISCARD
    | F_WRITE_ZEROES
    | F_ANY_LAYOUT
    | F_INDIRECT
    | F_EVENT_IDX
    | F_PROTOCOL_FEATURES
    | F_VERSION_1
)
LAYOUTS = {"split": FEATURES, "packed": FEATURES | F_RING_PACKED}
"""Features that make the rings split or packed."""

T_IN = 0
T_OUT = 1
T_SCSI_CMD = 2
T_FLUSH = 4
T_GET_ID = 8
T_GET_LIFETIME = 10
T_DISCARD = 11
T_WRITE_ZEROES = 13
T_SECURE_ERASE = 14

S_OK = 0
S_IOERR = 1
S_UNSUPP = 2
S_UNSET = 0xEE
"""What the driver puts into the status byte: the device must overwrite it."""

SECTOR = 512
UNMAP = 1
CONFIG_SIZE = 60
"""Up to and including write_zeroes_may_unmap and its padding."""

_CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")


@dataclass(frozen=True)
class Config:
    """virtio_blk_config, as far as this driver reads it."""

    capacity: int
    size_max: int
    seg_max: int
    cylinders: int
    heads: int
    sectors: int
    blk_size: int
    physical_block_exp: int
    alignment_offset: int
    min_io_size: int
    opt_io_size: int
    writeback: int
    num_queues: int
    max_discard_sectors: int
    max_discard_seg: int
    discard_sector_alignment: int
    max_write_zeroes_sectors: int
    max_write_zeroes_seg: int
    write_zeroes_may_unmap: int

    @classmethod
    def parse(cls, data: bytes) -> Config:
        return cls(*_CONFIG.unpack(data))


WRITEBACK_OFFSET = 32


def header(kind: int, sector: int = 0, *, reserved: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, reserved, sector)


def segment(sector: int, count: int, flags: int = 0) -> bytes:
    """One range of DISCARD or WRITE_ZEROES."""
    return struct.pack("<QII", sector, count, flags)


@dataclass(frozen=True)
class Pending:
    """A submitted request and where its buffers lie; `serial` tells it from later ones that get
    the same head."""

    serial: int
    queue: int
    head: int
    readable: tuple[int, int]
    writable: tuple[int, int]


@dataclass(frozen=True)
class Completion:
    """status: the last writable byte; data: the writable bytes before it; used: used.len."""

    status: int
    data: bytes
    used: int


def cut(address: int, size: int, sizes: Sequence[int] | None, *, write: bool) -> list[Desc]:
    """Descriptors over [address, address + size): one, or as `sizes` says."""
    if sizes is None:
        return [Desc(address, size, write)] if size else []
    assert sum(sizes) == size, f"{sum(sizes)} bytes cut, {size} wanted"
    chain = []
    for part in sizes:
        chain.append(Desc(address, part, write))
        address += part
    return chain


class BlkClient(Session):
    """A connected disk: negotiated, memory shared, `queues` rings running."""

    def __init__(
        self,
        connection: Wire | str | os.PathLike[str],
        *,
        queues: int = 1,
        size: int = 64,
        features: int = FEATURES,
        protocol: int = PROTOCOL_WANTED,
        memory: GuestMemory | None = None,
        slots: bool = False,
        start: bool = True,
        base: int = 0,
    ) -> None:
        super().__init__(connection)
        self.memory = memory or GuestMemory.default()
        self.rings: list[Ring] = []
        self._serial = 0
        self._open: dict[tuple[int, int], int] = {}
        self._done: dict[int, Used] = {}
        try:
            self.negotiate(features, protocol=protocol)
            self.share(self.memory, slots=slots)
            self.rings += [self.new_ring(size) for _ in range(queues)]
            if start:
                for index, ring in enumerate(self.rings):
                    ring.reset(base)
                    self.start_ring(index, ring, base=base)
                self.driver_ok()
                self.barrier()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def close(self) -> None:
        super().close()
        for ring in self.rings:
            ring.close()
        self.rings.clear()
        self.memory.close()

    def new_ring(self, size: int = 64, *, region: Region | None = None) -> Ring:
        """A ring in our memory, as the negotiated features want it, unknown to the server."""
        event_idx = bool(self.features & F_EVENT_IDX)
        kind = PackedRing if self.features & F_RING_PACKED else SplitRing
        return kind(self.memory, size, event_idx=event_idx, region=region)

    @property
    def ring(self) -> SplitRing:
        """The first ring, where rings are split."""
        return split(self.rings[0])

    @property
    def packed_ring(self) -> PackedRing:
        """The first ring, where rings are packed."""
        ring = self.rings[0]
        assert isinstance(ring, PackedRing)
        return ring

    def config(self) -> Config:
        return Config.parse(self.get_config(0, CONFIG_SIZE))

    # ---- requests ----

    def submit(
        self,
        readable: bytes,
        writable: int,
        *,
        out: Sequence[int] | None = None,
        into: Sequence[int] | None = None,
        queue: int = 0,
        indirect: bool = False,
        kick: bool = True,
        region: Region | None = None,
    ) -> Pending:
        """Send `readable` (header and data) and room for `writable` bytes (data and status).

        `out` and `into` cut them into descriptors; None = one descriptor each.
        """
        ring = self.rings[queue]
        source = self.memory.alloc(len(readable), 16, region=region)
        target = self.memory.alloc(writable, 16, region=region)
        self.memory.write(source, readable)
        self.memory.write(target, bytes([S_UNSET]) * writable)
        chain = cut(source, len(readable), out, write=False)
        chain += cut(target, writable, into, write=True)
        head = ring.add(chain, indirect=indirect)
        ring.offer(head)
        self._serial += 1
        self._open[queue, head] = self._serial
        if kick:
            ring.kick()
        return Pending(self._serial, queue, head, (source, len(readable)), (target, writable))

    def used_of(self, pending: Pending, *, timeout: float = TIMEOUT) -> Used:
        """Wait until the device has returned this head; others' completions are kept."""
        while pending.serial not in self._done:
            used = self.rings[pending.queue].wait(timeout=timeout)
            serial = self._open.pop((pending.queue, used.id), None)
            assert serial is not None, f"head {used.id} returned, but it was not in flight"
            self._done[serial] = used
        return self._done.pop(pending.serial)

    def is_in_flight(self, pending: Pending) -> bool:
        """Whether it was not back yet when something was waited for last."""
        return pending.serial not in self._done

    def finish(self, pending: Pending, *, timeout: float = TIMEOUT) -> Completion:
        used = self.used_of(pending, timeout=timeout)
        written = self.memory.read(*pending.writable)
        self.release(pending)
        status = written[-1] if written else S_UNSET
        return Completion(status, written[:-1], used.len)

    def release(self, pending: Pending) -> None:
        """Give the buffers of a request back to the allocator."""
        self.memory.release(*pending.readable)
        self.memory.release(*pending.writable)

    def request(
        self,
        kind: int,
        sector: int = 0,
        data: bytes = b"",
        *,
        room: int = 0,
        out: Sequence[int] | None = None,
        into: Sequence[int] | None = None,
        queue: int = 0,
        indirect: bool = False,
    ) -> Completion:
        """One request from header to status, waited for."""
        return self.finish(
            self.submit(
                header(kind, sector) + data,
                room + 1,
                out=out,
                into=into,
                queue=queue,
                indirect=indirect,
            )
        )

    def _ok(self, completion: Completion, used: int, what: str) -> Completion:
        assert completion.status == S_OK, f"{what}: status {completion.status}"
        assert completion.used == used, f"{what}: used.len {completion.used}, expected {used}"
        return completion

    def read(self, sector: int, size: int, *, queue: int = 0) -> bytes:
        done = self.request(T_IN, sector, room=size, queue=queue)
        return self._ok(done, size + 1, f"read {size} at sector {sector}").data

    def write(self, sector: int, data: bytes, *, queue: int = 0) -> None:
        done = self.request(T_OUT, sector, data, queue=queue)
        self._ok(done, 1, f"write {len(data)} at sector {sector}")

    def flush(self, *, queue: int = 0) -> None:
        self._ok(self.request(T_FLUSH, queue=queue), 1, "flush")

    def get_id(self) -> bytes:
        return self._ok(self.request(T_GET_ID, room=20), 21, "get_id").data

    def discard(self, sector: int, count: int) -> None:
        self._ok(self.request(T_DISCARD, data=segment(sector, count)), 1, "discard")

    def write_zeroes(self, sector: int, count: int, *, unmap: bool = False) -> None:
        data = segment(sector, count, UNMAP if unmap else 0)
        self._ok(self.request(T_WRITE_ZEROES, data=data), 1, "write_zeroes")


def check_healthy(path: str | os.PathLike[str], *, queues: int = 1, sector: int = 0) -> None:
    """A new client writes and reads back on every queue, then leaves as it should."""
    with BlkClient(path, queues=queues) as disk:
        for queue in range(queues):
            data = os.urandom(4096)
            disk.write(sector + 8 * queue, data, queue=queue)
            assert disk.read(sector + 8 * queue, 4096, queue=queue) == data
        for queue in range(queues):
            disk.get_vring_base(queue)
