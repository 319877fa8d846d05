"""The header of a vsock packet (virtio 1.3, section 5.10.6), little endian and packed."""

from __future__ import annotations

import struct
from typing import NamedTuple

from vdev._native import lib

_LAYOUT = struct.Struct("<QQIIIHHIII")
HEADER_SIZE: int = lib.VIRTIO_VSOCK_HEADER_SIZE


class Header(NamedTuple):
    """A packet without its payload, of `len` bytes.

    buf_alloc: bytes that the sender buffers for the stream.  fwd_cnt: bytes of it that have left
    that buffer, modulo 2^32.
    """

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int = 0
    buf_alloc: int = 0
    fwd_cnt: int = 0

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Of exactly `HEADER_SIZE` bytes."""
        return cls._make(_LAYOUT.unpack(data))

    def pack(self) -> bytes:
        return _LAYOUT.pack(*self)

    def reset(self) -> Header:
        """The RST that answers this packet."""
        return Header(
            self.dst_cid,
            self.src_cid,
            self.dst_port,
            self.src_port,
            0,
            self.type,
            lib.VIRTIO_VSOCK_OP_RST,
        )
