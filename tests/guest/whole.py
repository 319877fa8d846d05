"""A guest with all that vdev serves: its root disk, another disk, a card."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from tests.lab.lab import Lab
from tests.lab.network import Network
from tests.lab.qemu import Guest
from tests.lab.server import BlkDevice, Server


@dataclass(frozen=True)
class Machine:
    """The booted guest: vda is its root, vdb `data`, and eth0 on `network`."""

    server: Server
    guest: Guest
    data: BlkDevice
    network: Network
    lab: Lab


@contextlib.asynccontextmanager
async def booted(
    lab: Lab, name: str, size: int, *, device_options: str = "", iommu: bool = False
) -> AsyncIterator[Machine]:
    """With `size` bytes of data and the options of `Lab.boot`; `name`: in what it makes."""
    root = lab.blk(f"{name}-root", await lab.root_image())
    data = lab.blk(f"{name}-data", lab.blank(f"{name}-data", size), queues=2)
    network = await lab.network()
    nic = lab.net(name, network)
    async with (
        lab.serving(root, data, nic) as server,
        lab.boot([root, data], [nic], device_options=device_options, iommu=iommu) as guest,
    ):
        yield Machine(server, guest, data, network, lab)
