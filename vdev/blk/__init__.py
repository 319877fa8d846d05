"""Block devices: `serve` one on a vhost-user socket, or build a `BlkDevice` to serve by oneself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vdev.blk.device import BlkDevice as BlkDevice
    from vdev.blk.image import Image as Image
    from vdev.blk.image import open_image as open_image
    from vdev.server.blk import serve as serve

__all__ = ["BlkDevice", "Image", "open_image", "serve"]

_HOMES = {
    "BlkDevice": "vdev.blk.device",
    "Image": "vdev.blk.image",
    "open_image": "vdev.blk.image",
    "serve": "vdev.server.blk",
}


def __getattr__(name: str) -> object:
    """Loads each name from its module at first use; the servers above us import this package."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vdev.blk' has no attribute {name!r}")
