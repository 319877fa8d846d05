"""Names of feature bits, drawn from the enums of the native contract header."""

from __future__ import annotations

from functools import cache

from vdev._native import ffi, lib

_DEVICE_FEATURES = {
    lib.VIRTIO_ID_NET: ("enum virtio_net_feature", "VIRTIO_NET_F_"),
    lib.VIRTIO_ID_BLOCK: ("enum virtio_blk_feature", "VIRTIO_BLK_F_"),
    lib.VIRTIO_ID_CONSOLE: ("enum virtio_console_feature", "VIRTIO_CONSOLE_F_"),
    lib.VIRTIO_ID_BALLOON: ("enum virtio_balloon_feature", "VIRTIO_BALLOON_F_"),
    lib.VIRTIO_ID_VSOCK: ("enum virtio_vsock_feature", "VIRTIO_VSOCK_F_"),
}

# What every ring of ours can do, for a device to add to its own features.
RING_FEATURES: int = (
    1 << lib.VIRTIO_F_ANY_LAYOUT
    | 1 << lib.VIRTIO_F_INDIRECT_DESC
    | 1 << lib.VIRTIO_F_EVENT_IDX
    | 1 << lib.VIRTIO_F_VERSION_1
    | 1 << lib.VIRTIO_F_RING_PACKED
    | 1 << lib.VIRTIO_F_IN_ORDER
)


@cache
def feature_names(device_id: int) -> dict[int, str]:
    """Bit → name of the features that a device of this virtio id can have."""
    names = {
        bit: _short(name, ("VIRTIO_F_", "VHOST_USER_F_", "VHOST_F_"))
        for bit, name in ffi.typeof("enum virtio_feature").elements.items()
    }
    if device_id in _DEVICE_FEATURES:
        enum, prefix = _DEVICE_FEATURES[device_id]
        own = {bit: _short(n, (prefix,)) for bit, n in ffi.typeof(enum).elements.items()}
        names.update(own)
    return names


@cache
def protocol_feature_names() -> dict[int, str]:
    """Bit → name of the protocol features of vhost-user."""
    elements = ffi.typeof("enum vhost_user_protocol_feature").elements
    return {bit: _short(name, ("VHOST_USER_PROTOCOL_F_",)) for bit, name in elements.items()}


@cache
def status_names() -> dict[int, str]:
    """Bit value → name of the device status (virtio 1.3, section 2.1)."""
    elements = ffi.typeof("enum virtio_status").elements
    return {value: _short(name, ("VIRTIO_STATUS_",)) for value, name in sorted(elements.items())}


def describe_features(features: int, names: dict[int, str]) -> list[str]:
    """The names of the bits set in `features`; a bit without a name is given by its number."""
    return [names.get(b, f"bit {b}") for b in range(features.bit_length()) if features >> b & 1]


def _short(name: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name
