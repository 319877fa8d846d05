"""Frames of tests, and where they come from."""

from __future__ import annotations

import os
import struct

from tests.frontend.net import GSO_TCPV4, HDR_F_NEEDS_CSUM, Header

from .namespace import TEST_TYPE, Namespace

GUEST = bytes.fromhex("020000000001")
HOST = bytes.fromhex("020000000002")
LONG = 65000
GSO_SIZE = 1448


def frame(payload: int = 100, *, source: bytes = GUEST, to: bytes = HOST) -> bytes:
    """An Ethernet frame of 14 + `payload` bytes, all different."""
    return to + source + TEST_TYPE.to_bytes(2, "big") + os.urandom(payload)


def tcp_frame(payload: int) -> bytes:
    """A TCP segment over IPv4, `payload` bytes long, whose checksum is still to be made."""
    total = 40 + payload
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, total, 1, 0, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2")
    words = sum(struct.unpack(">10H", ip))
    words = (words & 0xFFFF) + (words >> 16)
    ip = ip[:10] + (~words & 0xFFFF).to_bytes(2, "big") + ip[12:]
    tcp = struct.pack(">HHIIBBHHH", 1000, 2000, 1, 1, 0x50, 0x10, 512, 0, 0)
    return b"".join((HOST, GUEST, b"\x08\x00", ip, tcp, os.urandom(payload)))


GSO = Header(HDR_F_NEEDS_CSUM, GSO_TCPV4, 54, GSO_SIZE, 34, 16)


def long_segment(ns: Namespace) -> bytes:
    """A segment of 64 KiB towards the guest."""
    sent = tcp_frame(LONG)
    with ns.port("tap0", vnet_header=True) as wire:
        wire.send(GSO.pack()[:10] + sent)
    return sent
