"""The payloads of vhost-user messages: one `Format` per layout, both ways.

Layouts come from the structures of the native contract header.  Decoding checks the size and what
the layout itself says (counts, lengths); everything else is the session's to check.

Source: vhost-user specification, "Message Specification", "Payload".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vdev._native import ffi, lib
from vdev.errors import PeerError


class VringState(NamedTuple):
    ring: int
    num: int


class VringAddr(NamedTuple):
    """Ring addresses: front-end virtual ones; `log` is a guest address."""

    ring: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


class MemoryRegion(NamedTuple):
    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int


class ConfigAccess(NamedTuple):
    """A part of the configuration space; `data` has `size` bytes."""

    offset: int
    size: int
    flags: int
    data: bytes


class Log(NamedTuple):
    mmap_size: int
    mmap_offset: int


class Inflight(NamedTuple):
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


class IotlbMessage(NamedTuple):
    """access and type: of enum vhost_access and enum vhost_user_iotlb_type."""

    iova: int
    size: int
    user_addr: int
    access: int
    type: int


class TransferState(NamedTuple):
    direction: int
    phase: int


@dataclass(frozen=True, slots=True)
class Format:
    """A layout: its sizes in bytes, and how to turn it into a value and back.

    decode raises PeerError where the payload is not of this layout.
    """

    name: str
    min_size: int
    max_size: int
    parse: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]

    def decode(self, payload: bytes) -> Any:
        if not self.min_size <= len(payload) <= self.max_size:
            sizes = (
                f"{self.min_size}"
                if self.min_size == self.max_size
                else f"{self.min_size} to {self.max_size}"
            )
            raise PeerError(f"payload of {len(payload)} bytes, expected {sizes} ({self.name})")
        return self.parse(payload)


def _struct(name: str, ctype: str, cls: Callable[..., Any]) -> Format:
    """A format that is one C structure, its fields in the order of the named tuple."""
    packed = _packed(ctype)
    return Format(
        name,
        packed.size,
        packed.size,
        lambda payload: cls(*packed.unpack(payload)),
        lambda value: packed.pack(*value),
    )


def _padded(name: str, ctype: str, cls: Callable[..., Any]) -> Format:
    """One that the specification counts without the padding at its end.

    Programs in C send the padding along, and QEMU takes nothing else for an answer.
    """
    fields, size = _packed(ctype), ffi.sizeof(ctype)
    return Format(
        name,
        fields.size,
        size,
        lambda payload: cls(*fields.unpack_from(payload)),
        lambda value: fields.pack(*value).ljust(size, b"\0"),
    )


def _packed(ctype: str) -> struct.Struct:
    """The `struct` of the integer fields of a C structure, padding included at the end."""
    codes = {1: "B", 2: "H", 4: "I", 8: "Q"}
    fields = ffi.typeof(ctype).fields
    layout = "".join(codes[ffi.sizeof(field.type)] for _, field in fields)
    packed = struct.Struct(f"={layout}")
    last = fields[-1][1]
    assert packed.size == last.offset + ffi.sizeof(last.type), f"{ctype} has holes"
    return packed


_U64 = struct.Struct("=Q")
_REGION = _packed("struct vhost_user_mem_region")
_TABLE = _packed("struct vhost_user_memory_header")
_CONFIG = _packed("struct vhost_user_config_header")
_MAX_REGIONS: int = lib.VHOST_USER_MEM_REGIONS
_MAX_CONFIG: int = lib.VHOST_USER_CONFIG_MAX


def _decode_table(payload: bytes) -> tuple[MemoryRegion, ...]:
    count, _ = _TABLE.unpack_from(payload)
    if not 1 <= count <= _MAX_REGIONS:
        raise PeerError(f"{count} memory regions, expected 1 to {_MAX_REGIONS}")
    if len(payload) != _TABLE.size + count * _REGION.size:
        raise PeerError(f"payload of {len(payload)} bytes for {count} memory regions")
    return tuple(MemoryRegion(*r) for r in _REGION.iter_unpack(payload[_TABLE.size :]))


def _encode_table(regions: tuple[MemoryRegion, ...]) -> bytes:
    return _TABLE.pack(len(regions), 0) + b"".join(_REGION.pack(*region) for region in regions)


def _decode_config(payload: bytes) -> ConfigAccess:
    offset, size, flags = _CONFIG.unpack_from(payload)
    data = payload[_CONFIG.size :]
    if len(data) != size:
        raise PeerError(f"{len(data)} bytes of configuration space where the header says {size}")
    return ConfigAccess(offset, size, flags, data)


def _encode_config(access: ConfigAccess) -> bytes:
    return _CONFIG.pack(access.offset, access.size, access.flags) + access.data


EMPTY = Format("empty", 0, 0, lambda _: None, lambda _: b"")
U64 = Format("u64", 8, 8, lambda payload: _U64.unpack(payload)[0], _U64.pack)
VRING_STATE = _struct("vring state", "struct vhost_user_vring_state", VringState)
VRING_ADDR = _struct("vring addresses", "struct vhost_user_vring_addr", VringAddr)
LOG = _struct("log", "struct vhost_user_log", Log)
TRANSFER_STATE = _struct("transfer state", "struct vhost_user_transfer_state", TransferState)
MEMORY_TABLE = Format(
    "memory table",
    _TABLE.size + _REGION.size,
    _TABLE.size + _MAX_REGIONS * _REGION.size,
    _decode_table,
    _encode_table,
)
SINGLE_REGION = Format(
    "single memory region",
    _U64.size + _REGION.size,
    _U64.size + _REGION.size,
    lambda payload: MemoryRegion(*_REGION.unpack_from(payload, _U64.size)),
    lambda region: _U64.pack(0) + _REGION.pack(*region),
)
CONFIG = Format(
    "configuration space",
    _CONFIG.size,
    _CONFIG.size + _MAX_CONFIG,
    _decode_config,
    _encode_config,
)
INFLIGHT = _padded("in-flight description", "struct vhost_user_inflight", Inflight)
IOTLB = _padded("IOTLB message", "struct vhost_user_iotlb", IotlbMessage)
