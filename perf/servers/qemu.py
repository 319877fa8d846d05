"""QEMU's own devices, which need no server beside it, but a guest: virtio-blk and virtio-net.

The disk is served by an iothread, the network card by the main loop, on a tap (no vhost-net).
"""

from __future__ import annotations

from dataclasses import dataclass

from perf.model import Server
from perf.tools import first_line

PROGRAM = "qemu-system-x86_64"


class InProcess(Server):
    """A device that QEMU serves itself."""

    def version(self) -> str:
        return first_line([PROGRAM], "--version")


@dataclass
class VirtioBlk(InProcess):
    """`aio`: "io_uring", "threads" or "native"."""

    name: str
    aio: str = "io_uring"


@dataclass
class VirtioNet(InProcess):
    name: str


SERVERS = [
    VirtioBlk("qemu-virtio-blk"),
    VirtioBlk("qemu-virtio-blk-threads", aio="threads"),
    VirtioNet("qemu-virtio-net"),
]
