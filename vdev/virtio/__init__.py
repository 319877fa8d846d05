"""The virtio core: spec constants, what a device is, what a served queue is; and transports."""

from __future__ import annotations

from vdev.virtio.device import Device, NativeDevice

__all__ = ["Device", "NativeDevice"]
