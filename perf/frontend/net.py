"""The front-end of a vhost-user-net back-end, and the C packet driver on its queue pair."""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.frontend.connection import RING_EVENT_IDX, Connection, check
from vdev._native import ffi, lib

RING_SIZE = 1024
RX, TX = 0, 1
BUFFER_SIZE = 2048  # of a receive buffer
LOST_MS = 200
STALL_MS = 5000
_SEGMENTS = (
    1 << lib.VIRTIO_NET_F_CSUM
    | 1 << lib.VIRTIO_NET_F_GUEST_CSUM
    | 1 << lib.VIRTIO_NET_F_HOST_TSO4
    | 1 << lib.VIRTIO_NET_F_GUEST_TSO4
)
_EXPERIMENTAL = 0x88B5  # an EtherType for local experiments (IEEE 802): no stack answers it
_SEGMENT_SIZE = 1448  # of TCP in an MTU of 1500, with time stamps


@dataclass(frozen=True)
class Frames:
    """What a port sends: the header bytes of every frame, and its virtio-net header."""

    header: bytes
    vnet: Sequence[int]


def plain(source: str, target: str) -> Frames:
    """Ethernet frames between two MAC addresses."""
    header = _mac(target) + _mac(source) + struct.pack("!H", _EXPERIMENTAL)
    return Frames(header, (0, 0, 0, 0, 0, 0, 0))


def segments(source: str, target: str, size: int) -> Frames:
    """TCP segments of `size` bytes, all headers counted, for the receiver to cut.

    Checksums of TCP are left to the receiver too (virtio 1.3, section 5.1.6.2).
    """
    length = size - 14
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, length, 0, 0x4000, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2"
    )
    ip = ip[:10] + struct.pack("!H", _checksum(ip)) + ip[12:]
    pseudo = ip[12:20] + struct.pack("!BBH", 0, 6, length - 20)
    started = ~_checksum(pseudo) & 0xFFFF
    tcp = struct.pack("!HHIIBBHHH", 5001, 5001, 1, 1, 5 << 4, 0x10, 65535, started, 0)
    header = _mac(target) + _mac(source) + b"\x08\0" + ip + tcp
    flags, gso_type = lib.VIRTIO_NET_HDR_F_NEEDS_CSUM, lib.VIRTIO_NET_HDR_GSO_TCPV4
    tcp_start, tcp_checksum = 34, 16
    vnet = (flags, gso_type, len(header), _SEGMENT_SIZE, tcp_start, tcp_checksum, 0)
    return Frames(header, vnet)


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass(frozen=True)
class PacketOutcome:
    """What came of a run (struct vhost_packet_result); times in seconds."""

    sent: int
    received: int
    lost: int
    corrupt: int
    bytes: int
    seconds: float
    driver_cpu_seconds: float
    latency: tuple[int, ...]


class NetFrontend(Connection):
    """A connection with one queue pair, and the C driver's port on it.

    `segmented`: take the offloads that let frames be larger than the MTU. `features`: of the rings,
    which to take where they are offered; not VIRTIO_F_INDIRECT_DESC. Raises PeerError where the
    peer refuses, OSError where it lacks an offload that is needed, or is lost.
    """

    def __init__(
        self, path: Path, frames: Frames, *, segmented: bool, features: int = RING_EVENT_IDX
    ) -> None:
        super().__init__(path)
        self.port = ffi.NULL
        try:
            merged = 1 << lib.VIRTIO_NET_F_MRG_RXBUF
            self.negotiate(features | merged | (_SEGMENTS if segmented else 0), 0)
            if segmented and _SEGMENTS & ~self.frontend.features:
                raise OSError(errno.EOPNOTSUPP, "the back-end lacks segmentation offloads")
            room = RING_SIZE * (2 * BUFFER_SIZE + 512) + (32 << 20 if segmented else 0)
            self.share(room + (1 << 20))
            rings = [self.start_ring(index, RING_SIZE) for index in (RX, TX)]
            self._open_port(rings, self.place(room), room, frames)
            self.frontend.barrier()
        except BaseException:
            self.close()
            raise

    def _open_port(self, rings: Sequence[object], buffers: int, room: int, frames: Frames) -> None:
        flags = (
            (lib.VHOST_PACKET_EVENT_IDX if self.has(lib.VIRTIO_F_EVENT_IDX) else 0)
            | (lib.VHOST_PACKET_MERGEABLE if self.has(lib.VIRTIO_NET_F_MRG_RXBUF) else 0)
            | (lib.VHOST_PACKET_PACKED if self.has(lib.VIRTIO_F_RING_PACKED) else 0)
            | (lib.VHOST_PACKET_IN_ORDER if self.has(lib.VIRTIO_F_IN_ORDER) else 0)
        )
        rx, tx = ({name: getattr(ring, name) for name in _RING_FIELDS} for ring in rings)
        header = ffi.new("uint8_t[]", frames.header)
        self._memory = ffi.from_buffer(self.map)
        config = ffi.new(
            "struct vhost_packet_port_config *",
            {
                "memory": self._memory,
                "memory_size": self.memory_size,
                "rx": rx,
                "tx": tx,
                "buffers": buffers,
                "buffers_size": room,
                "rx_buffer_size": BUFFER_SIZE,
                "flags": flags,
                "vnet": frames.vnet,
                "header": header,
                "header_len": len(frames.header),
            },
        )
        port = ffi.new("struct vhost_packet_port **")
        check(lib.vhost_packet_port_new(config, port), "the packet driver's port", STALL_MS)
        self.port = port[0]

    def close(self) -> None:
        if self.port != ffi.NULL:
            lib.vhost_packet_port_free(self.port)
            self.port = ffi.NULL
            ffi.release(self._memory)
        super().close()


_RING_FIELDS = ("size", "desc", "avail", "used", "kick_fd", "call_fd")


def run(
    source: NetFrontend,
    target: NetFrontend,
    *,
    size: int,
    depth: int,
    seconds: float = 0,
    packets: int = 0,
    round_trip: bool = False,
    verify: bool = False,
    poll: bool = True,
    lost_ms: int = LOST_MS,
    cpu: int = -1,
) -> PacketOutcome:
    """Sends frames of `size` bytes from one port to the other, in this thread.

    `depth`: frames in flight at most. `round_trip`: they come back, and that is the latency.
    `lost_ms`: when a frame that has not come counts as lost.
    Raises TimeoutError when the back-end stops answering, OSError when it breaks a ring.
    """
    flags = (
        (lib.VHOST_PACKET_POLL if poll else 0)
        | (lib.VHOST_PACKET_VERIFY if verify else 0)
        | (lib.VHOST_PACKET_ROUND_TRIP if round_trip else 0)
    )
    config = ffi.new(
        "struct vhost_packet_config *",
        {
            "port_a": source.port,
            "port_b": target.port,
            "packets": packets,
            "duration_ns": int(seconds * 1e9),
            "packet_size": size,
            "depth": depth,
            "lost_ms": lost_ms,
            "stall_ms": STALL_MS,
            "flags": flags,
            "cpu": cpu,
        },
    )
    result = ffi.new("struct vhost_packet_result *")
    check(lib.vhost_packet_run(config, result), f"{size} bytes, {depth} in flight", STALL_MS)
    return PacketOutcome(
        sent=result.sent,
        received=result.received,
        lost=result.lost,
        corrupt=result.corrupt,
        bytes=result.bytes,
        seconds=result.elapsed_ns / 1e9,
        driver_cpu_seconds=result.cpu_ns / 1e9,
        latency=tuple(result.latency),
    )
