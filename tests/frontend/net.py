"""A virtio-net driver on the test front-end (virtio 1.3, section 5.1), over split rings.

    with NetClient(socket_path) as nic:
        nic.post(16)
        nic.send(frame)
        answer = nic.recv().frame

Ring 2n receives, ring 2n + 1 transmits.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from .blk import cut
from .memory import GuestMemory
from .packed import PackedRing
from .ring import Ring, SplitRing, Used
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

F_CSUM = 1 << 0
F_GUEST_CSUM = 1 << 1
F_MTU = 1 << 3
F_MAC = 1 << 5
F_GUEST_TSO4 = 1 << 7
F_GUEST_TSO6 = 1 << 8
F_GUEST_ECN = 1 << 9
F_HOST_TSO4 = 1 << 11
F_HOST_TSO6 = 1 << 12
F_HOST_ECN = 1 << 13
F_MRG_RXBUF = 1 << 15
F_STATUS = 1 << 16
F_MQ = 1 << 22

FEATURES = (
    F_CSUM
    | F_GUEST_CSUM
    | F_MTU
    | F_MAC
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_ECN
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_HOST_ECN
    | F_MRG_RXBUF
    | F_STATUS
    | F_MQ
    | F_ANY_LAYOUT
    | F_INDIRECT
    | F_EVENT_IDX
    | F_PROTOCOL_FEATURES
    | F_VERSION_1
)

HDR_F_NEEDS_CSUM = 1
HDR_F_DATA_VALID = 2
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_UDP = 3
GSO_TCPV6 = 4
GSO_ECN = 0x80
HEADER = struct.Struct("<BBHHHHH")
CONFIG = struct.Struct("<6sHHH")


@dataclass(frozen=True)
class Header:
    """virtio_net_hdr with num_buffers: 12 bytes."""

    flags: int = 0
    gso_type: int = GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def pack(self) -> bytes:
        return HEADER.pack(
            self.flags,
            self.gso_type,
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
            self.num_buffers,
        )

    @classmethod
    def parse(cls, data: bytes) -> Header:
        return cls(*HEADER.unpack(data))


@dataclass(frozen=True)
class Packet:
    header: Header
    frame: bytes


@dataclass(frozen=True)
class NetConfig:
    mac: bytes
    status: int
    max_pairs: int
    mtu: int


class NetClient(Session):
    """A connected NIC: negotiated, memory shared, `pairs` ring pairs running and enabled."""

    def __init__(
        self,
        connection: Wire | str | os.PathLike[str],
        *,
        pairs: int = 1,
        size: int = 64,
        features: int = FEATURES,
        protocol: int = PROTOCOL_WANTED,
        memory: GuestMemory | None = None,
        enable: bool = True,
    ) -> None:
        super().__init__(connection)
        self.memory = memory or GuestMemory.default()
        self.rings: list[Ring] = []
        self._rx: list[dict[int, tuple[int, int]]] = [{} for _ in range(pairs)]
        self._tx: list[dict[int, tuple[int, int]]] = [{} for _ in range(pairs)]
        try:
            self.negotiate(features, protocol=protocol)
            self.share(self.memory)
            event_idx = bool(self.features & F_EVENT_IDX)
            kind = PackedRing if self.features & F_RING_PACKED else SplitRing
            for index in range(2 * pairs):
                ring = kind(self.memory, size, event_idx=event_idx)
                self.rings.append(ring)
                self.start_ring(index, ring, enable=enable)
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

    def config(self) -> NetConfig:
        return NetConfig(*CONFIG.unpack(self.get_config(0, CONFIG.size)))

    def rx(self, pair: int = 0) -> Ring:
        return self.rings[2 * pair]

    def tx(self, pair: int = 0) -> Ring:
        return self.rings[2 * pair + 1]

    # ---- transmit ----

    def submit(
        self,
        data: bytes,
        *,
        sizes: Sequence[int] | None = None,
        pair: int = 0,
        indirect: bool = False,
    ) -> int:
        """Make raw bytes (header and frame) available for transmission; returns the head."""
        address = self.memory.alloc(len(data), 2)
        self.memory.write(address, data)
        head = self.tx(pair).submit(cut(address, len(data), sizes, write=False), indirect=indirect)
        self._tx[pair][head] = (address, len(data))
        return head

    def reap(self, *, pair: int = 0, timeout: float = TIMEOUT) -> Used:
        """Wait for the next transmitted head to come back."""
        used = self.tx(pair).wait(timeout=timeout)
        self.memory.release(*self._tx[pair].pop(used.id))
        return used

    def send(
        self,
        frame: bytes,
        header: Header | None = None,
        *,
        sizes: Sequence[int] | None = None,
        pair: int = 0,
        indirect: bool = False,
    ) -> None:
        """Transmit one frame and wait until the device has taken it."""
        data = (header or Header()).pack() + frame
        head = self.submit(data, sizes=sizes, pair=pair, indirect=indirect)
        used = self.reap(pair=pair)
        assert used == Used(head, 0), f"transmit used element {used}, head {head}"

    # ---- receive ----

    def post(
        self,
        count: int = 1,
        size: int = 2048,
        *,
        sizes: Sequence[int] | None = None,
        pair: int = 0,
        indirect: bool = False,
    ) -> None:
        """Make `count` receive buffers of `size` bytes available, each cut as `sizes` says."""
        ring = self.rx(pair)
        heads = []
        for _ in range(count):
            address = self.memory.alloc(size, 2)
            self.memory.write(address, bytes([0xEE]) * size)
            head = ring.add(cut(address, size, sizes, write=True), indirect=indirect)
            self._rx[pair][head] = (address, size)
            heads.append(head)
        ring.offer(*heads)
        ring.kick()

    def recv_raw(self, *, pair: int = 0, timeout: float = TIMEOUT) -> bytes:
        """What the device wrote into the next receive buffer."""
        used = self.rx(pair).wait(timeout=timeout)
        address, size = self._rx[pair].pop(used.id)
        assert used.len <= size, f"used.len {used.len} of a buffer of {size}"
        data = self.memory.read(address, used.len)
        self.memory.release(address, size)
        return data

    def recv(self, *, pair: int = 0, timeout: float = TIMEOUT) -> Packet:
        """The next packet, put together from its merged buffers."""
        data = self.recv_raw(pair=pair, timeout=timeout)
        header = Header.parse(data[: HEADER.size])
        if self.features & F_MRG_RXBUF:
            for _ in range(header.num_buffers - 1):
                data += self.recv_raw(pair=pair, timeout=timeout)
        return Packet(header, data[HEADER.size :])
