"""The whole lab: one description of a device serves it and plugs it into a guest.

::

    async with Lab() as lab:
        root = lab.blk("root", await lab.root_image())
        data = lab.blk("data", lab.blank("data", 1 << 30), queues=2)
        net = lab.net("net0", await lab.network())
        async with lab.serving(root, data, net) as server:
            async with lab.boot(disks=[root, data], nics=[net]) as guest:
                result = await guest.run("lsblk")
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from . import host, image, initrd, kernel, network, rootfs
from .devices import Disk, Nic, behind_iommu
from .network import Network
from .qemu import Guest, Machine, booted
from .server import BlkDevice, NetDevice, Server, serving


class Lab:
    """A directory of sockets, images and logs, and the guests and servers that use it."""

    directory: Path

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._servers: list[Server] = []
        self._networks: dict[str, Network] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="vdev-lab-")
        host.extend_path()

    async def __aenter__(self) -> Lab:
        self.directory = Path(self._temporary.name)
        self._kernel = await kernel.fetch()
        self._initrd = await initrd.build(self._kernel)
        self._rootfs = await rootfs.build()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._temporary.cleanup()

    @property
    def kernel_release(self) -> str:
        """What ``uname -r`` says in a guest."""
        return self._kernel.release

    async def root_image(self) -> Path:
        """A root file system of one's own."""
        return await image.copy(self._rootfs, self.directory / f"root{next(self._numbers)}.img")

    def blank(self, name: str, size: int) -> Path:
        """A blank disk image."""
        return image.blank(self.directory / f"{name}.img", size)

    async def network(self) -> Network:
        """A network that nothing else uses."""
        return await network.unused()

    def blk(self, name: str, path: Path, **settings: Any) -> BlkDevice:
        """A disk to serve and plug in; the settings are those of a ``[[blk]]`` table."""
        return BlkDevice(self.directory / f"{name}.sock", path, **settings)

    def net(self, name: str, on: Network, **settings: Any) -> NetDevice:
        """A network card to serve and plug in; the settings are those of a ``[[net]]`` table."""
        self._networks[on.bridge] = on
        settings.setdefault("mac", network.mac(next(self._numbers)))
        return NetDevice(
            self.directory / f"{name}.sock", bridge=on.bridge, address=on.host_cidr, **settings
        )

    @contextlib.asynccontextmanager
    async def serving(self, *devices: BlkDevice | NetDevice) -> AsyncIterator[Server]:
        """One vdev process that serves these devices."""
        blk = [device for device in devices if isinstance(device, BlkDevice)]
        net = [device for device in devices if isinstance(device, NetDevice)]
        name = f"server{next(self._numbers)}"
        async with serving(blk, net, name, self.directory) as server:
            self._servers.append(server)
            try:
                yield server
            finally:
                self._servers.remove(server)

    @contextlib.asynccontextmanager
    async def boot(
        self,
        disks: Sequence[BlkDevice],
        nics: Sequence[NetDevice] = (),
        *,
        reconnect: bool = False,
        device_options: str = "",
        iommu: bool = False,
        **settings: Any,
    ) -> AsyncIterator[Guest]:
        """A guest on served devices; the first disk is its root.

        Its interfaces are up and addressed, unless it comes from elsewhere (``incoming``).
        ``reconnect``: its disks may lose their server.  ``device_options`` are QEMU's for each
        device; ``iommu`` puts an IOMMU before them; the settings are those of ``Machine``.
        """
        options = [device_options] * (len(disks) + len(nics))
        if iommu:
            options, settings["arguments"] = behind_iommu(len(options), device_options)
            settings.setdefault("cmdline", "intel_iommu=on")
        each = iter(options)
        if all(disk.read_only for disk in disks[:1]):
            settings.setdefault("cmdline", "ro")
        machine = Machine(
            kernel=self._kernel.image,
            initrd=self._initrd,
            disks=[
                Disk(disk.socket, disk.queues, next(each), reconnect=reconnect) for disk in disks
            ],
            nics=[Nic(nic.socket, nic.mac or "", nic.queues, nic.mtu, next(each)) for nic in nics],
            **settings,
        )
        async with booted(machine, f"guest{next(self._numbers)}", self.directory) as guest:
            watches = [asyncio.create_task(_die_with(server, guest)) for server in self._servers]
            try:
                for index, nic in enumerate(nics if machine.incoming is None else ()):
                    await self._address(guest, f"eth{index}", nic, index)
                yield guest
            finally:
                for watch in watches:
                    watch.cancel()
                await asyncio.gather(*watches, return_exceptions=True)

    async def _address(self, guest: Guest, interface: str, nic: NetDevice, index: int) -> None:
        address = self._networks[nic.bridge or ""].guest_cidr(index)
        await guest.run(f"ip address add {address} dev {interface} && ip link set {interface} up")


async def _die_with(server: Server, guest: Guest) -> None:
    """A guest whose server has died waits for its disk for ever; better to end it, and the test."""
    await server.process.wait()
    if server.died:
        await guest.kill()
