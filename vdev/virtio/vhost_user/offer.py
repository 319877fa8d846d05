"""What a front-end is offered besides the device's own features."""

from __future__ import annotations

from vdev._native import lib
from vdev.virtio.device import Device
from vdev.virtio.vhost_user.session import F_ACCESS_PLATFORM
from vdev.virtio.vhost_user.table import PROTOCOL_FEATURES

_F_BASE_INFLIGHT: int = lib.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT
_F_INFLIGHT = 1 << lib.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
_F_LOG = 1 << lib.VHOST_USER_PROTOCOL_F_LOG_SHMFD
_F_MQ = 1 << lib.VHOST_USER_PROTOCOL_F_MQ
_F_MTU = 1 << lib.VHOST_USER_PROTOCOL_F_MTU
_F_RARP = 1 << lib.VHOST_USER_PROTOCOL_F_RARP
_F_MEM_SLOTS = 1 << lib.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS


def virtio_features(device: Device) -> int:
    """Virtio features, the device's included."""
    return device.features | (F_ACCESS_PLATFORM if device.supports_iommu else 0)


def protocol_features(device: Device) -> int:
    """The protocol features that are offered."""
    features: int = PROTOCOL_FEATURES
    if not device.supports_multiqueue:
        features &= ~_F_MQ
    if not device.supports_log:
        features &= ~_F_LOG
    if device.supports_inflight:
        features |= _F_INFLIGHT | 1 << _F_BASE_INFLIGHT
    if device.supports_mtu:
        features |= _F_MTU
    if device.supports_rarp:
        features |= _F_RARP
    # QEMU up to 7.2 drives each queue pair as if it were a device.  It sends SET_MEM_TABLE for the
    # first only, but ADD_MEM_REG and REM_MEM_REG for all, on the one connection.
    if device.queue_groups > 1:
        features &= ~_F_MEM_SLOTS
    return features
