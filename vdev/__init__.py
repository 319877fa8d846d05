"""vdev: virtio devices served to virtual machines, and virtual machines.

Python decides, C moves the data: this package handles connections, negotiation, configuration and
life cycles on an asyncio event loop; the rings are served by the C library libvhost (`native/`).

Layers, imports going down only: cli; machines; server, vmm; blk, net and the virtio transports; the
virtio core (spec, device, queue); the base (errors, memory, iothread, registers, …); `_native`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vdev import blk as blk
    from vdev import net as net
    from vdev import vmm as vmm

__all__ = ["__version__", "blk", "net", "vmm"]


def __getattr__(name: str) -> object:
    """Loads the packages and `vdev.__version__` at first use: starting stays quick."""
    import importlib

    if name in ("blk", "net", "vmm"):
        return importlib.import_module(f"vdev.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("vdev")
    raise AttributeError(f"module 'vdev' has no attribute {name!r}")
