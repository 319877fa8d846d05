"""vdev: virtio block and net devices served to virtual machines.

Python decides, C moves the data: this package handles connections, negotiation, configuration and
life cycles on an asyncio event loop; the rings are served by the C library libvhost (`native/`).

Layers, imports going down only: cli; server; blk, net and the virtio transports; the virtio core
(spec, device, queue); the base (errors, memory, iothread, metrics, config); `_native`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vdev import blk as blk
    from vdev import net as net

__all__ = ["__version__", "blk", "net"]


def __getattr__(name: str) -> object:
    """Loads `vdev.blk`, `vdev.net` and `vdev.__version__` at first use: starting stays quick."""
    import importlib

    if name in ("blk", "net"):
        return importlib.import_module(f"vdev.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("vdev")
    raise AttributeError(f"module 'vdev' has no attribute {name!r}")
