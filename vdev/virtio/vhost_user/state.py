"""What goes from one back-end to the next besides memory and rings: a device's own state.

A header that says whose state it is, and what `Device.save` gave, as JSON.  It comes over the
network and through a front-end, so nothing of it is believed before all of it was checked.
"""

from __future__ import annotations

import json
import struct
import zlib

from vdev.errors import PeerError
from vdev.virtio.device import Device

MAX_STATE = 1 << 16
"""Bytes, with the header."""
VERSION = 1

_MAGIC = b"vdev-dev"
_HEADER = struct.Struct("<8sIIII")
"""Magic, version, virtio device id, size and CRC-32 of what follows."""


def encode_state(device: Device) -> bytes:
    """The state of a device whose rings are stopped."""
    body = json.dumps(device.save()).encode()
    header = _HEADER.pack(_MAGIC, VERSION, device.device_id, len(body), zlib.crc32(body))
    return header + body


def decode_state(device: Device, data: bytes) -> None:
    """Has the device take over what `encode_state` gave.

    Raises PeerError where that is of another device or version, or was damaged on the way.
    """
    if len(data) < _HEADER.size:
        raise PeerError(f"device state of {len(data)} bytes: its header has {_HEADER.size}")
    magic, version, device_id, size, crc = _HEADER.unpack_from(data)
    body = data[_HEADER.size :]
    if magic != _MAGIC:
        raise PeerError(f"device state of another program: it begins with {magic!r}")
    if version != VERSION:
        raise PeerError(f"device state of version {version}, expected {VERSION}")
    if device_id != device.device_id:
        raise PeerError(f"state of virtio device {device_id}, expected {device.device_id}")
    if len(body) != size:
        raise PeerError(f"device state of {len(body)} bytes where its header says {size}")
    if zlib.crc32(body) != crc:
        raise PeerError("device state that was changed on the way: its checksum is wrong")
    try:
        state = json.loads(body)
        if not isinstance(state, dict):
            raise ValueError("no object")
        device.restore(state)
    except (ValueError, RecursionError) as error:
        raise PeerError(f"device state: {error}") from None
