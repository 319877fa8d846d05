"""The device status (virtio 1.3, section 2.1)."""

from __future__ import annotations

from vdev._native import ffi, lib
from vdev.errors import PeerError

_DRIVER_OK: int = lib.VIRTIO_STATUS_DRIVER_OK
_FEATURES_OK: int = lib.VIRTIO_STATUS_FEATURES_OK
_BITS: int = sum(ffi.typeof("enum virtio_status").elements)


def check_status(before: int, after: int) -> None:
    """Bits are set one after another and cleared only by a reset. Raises PeerError.

    QEMU sets FEATURES_OK before ACKNOWLEDGE and DRIVER, so their order is not checked.
    """
    if after == 0:
        return
    if extra := after & ~_BITS:
        raise PeerError(f"status bits {extra:#x} are unknown")
    if cleared := before & ~after:
        raise PeerError(f"status bits {cleared:#x} can only be cleared by a reset")
    if after & _DRIVER_OK and not after & _FEATURES_OK:
        raise PeerError("DRIVER_OK without FEATURES_OK")
