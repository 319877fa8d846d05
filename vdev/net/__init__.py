"""Network devices: `serve` one on a vhost-user socket, or many from one `Switch`; or build a
`NetDevice` of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vdev.net.device import NetDevice as NetDevice
    from vdev.net.tap import Tap as Tap
    from vdev.net.wiring import Wiring as Wiring
    from vdev.server.net import serve as serve
    from vdev.server.switch import Switch as Switch

__all__ = ["NetDevice", "Switch", "Tap", "Wiring", "serve"]

_HOMES = {
    "NetDevice": "vdev.net.device",
    "Switch": "vdev.server.switch",
    "Tap": "vdev.net.tap",
    "Wiring": "vdev.net.wiring",
    "serve": "vdev.server.net",
}


def __getattr__(name: str) -> object:
    """Loads each name from its module at first use; the servers above us import this package."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vdev.net' has no attribute {name!r}")
