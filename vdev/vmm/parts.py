"""From what is written of a device to the device: opened, and closed with the machine."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vdev._native import ffi, lib
from vdev.blk.device import BlkDevice
from vdev.blk.image import open_image
from vdev.errors import PeerError, UserError
from vdev.iothread import IOThread
from vdev.virtio.device import Device
from vdev.vmm.api import Dial, Opened
from vdev.vmm.config import DiskConfig, NicConfig, ShareConfig, VhostUserConfig, VsockConfig
from vdev.vmm.ram import Ram

if TYPE_CHECKING:
    from vdev.net.tap import Tap
    from vdev.vmm.devices.balloon import BalloonDevice
    from vdev.vmm.devices.console import ConsoleDevice
    from vdev.vmm.devices.vsock import VsockDevice

_AWAY_SECONDS = 60.0
"""How long a guest waits for a disk whose server has ended, until it is lost."""
_FS_QUEUES = 2
"""Of virtiofs: requests of high priority, and the others."""


class Maker(NamedTuple):
    """Makes devices for one machine; what it opens is closed by the `stack` that comes along.

    iothreads: started or not.  confined: whether this process has given up its rights by now.
    dial: as of `VirtualMachine`.
    """

    iothreads: Sequence[IOThread]
    ram: Ram
    confined: Callable[[], bool] = lambda: False
    dial: Dial | None = None

    def disk(
        self, disk: DiskConfig, stack: contextlib.AsyncExitStack, opened: Opened | None = None
    ) -> BlkDevice:
        """Raises UserError where the image cannot be had."""
        fd = _only(opened, "image")["image"] if opened else None
        image = open_image(disk.path, read_only=disk.read_only, cache=disk.cache, fd=fd)
        stack.callback(image.close)
        if all(thread.native for thread in self.iothreads):
            check_engines([disk], self.iothreads)
        device = BlkDevice(
            image,
            iothreads=self.iothreads,
            name=disk.id,
            num_queues=disk.queues,
            serial=disk.serial,
            cache=disk.cache,
            engine=disk.engine,
        )
        stack.callback(device.close)
        return device

    async def nic(
        self, nic: NicConfig, stack: contextlib.AsyncExitStack, opened: Opened | None = None
    ) -> Device:
        """Raises UserError where the tap, the bridge or the back-end cannot be had."""
        card = await self._card(nic, stack, opened)
        if not card.features >> lib.VIRTIO_NET_F_CTRL_VQ & 1:
            return card
        from vdev.vmm.devices.net_control import ControlledNic

        device = ControlledNic(card, self.iothreads)
        stack.callback(device.close)
        return device

    async def _card(
        self, nic: NicConfig, stack: contextlib.AsyncExitStack, opened: Opened | None
    ) -> Device:
        if nic.socket is not None:
            from vdev.net.card import parse_mac

            sock = _socket(_only(opened, "socket")["socket"]) if opened else None
            assert nic.mac is not None
            mac = parse_mac(nic.mac)
            return await self._remote(
                *(nic.id, nic.socket, lib.VIRTIO_ID_NET, 2 * nic.queues),
                *(net_space(mac, nic.queues), stack, sock, mac),
            )
        if opened:
            return self._open_card(nic, stack, opened)
        from vdev.net.wiring import Wiring

        wiring = Wiring(
            tap=nic.tap, bridge=nic.bridge, queues=nic.queues, mtu=nic.mtu, address=nic.address
        )

        async def down() -> None:
            if self.confined():
                wiring.let_go()
            else:
                await wiring.down()

        stack.push_async_callback(down)
        await wiring.up()
        return self._tap_card(nic, wiring.tap, wiring.mtu, stack)

    def _open_card(
        self, nic: NicConfig, stack: contextlib.AsyncExitStack, opened: Opened
    ) -> Device:
        queues = [f"queue{number}" for number in range(nic.queues)]
        _only(opened, *queues, *({"journal"} & opened.keys()))
        if "journal" in opened:
            # Its lock says that what the records would undo is in use.
            stack.callback(os.close, os.dup(opened["journal"]))
        from vdev.net.tap import Tap

        tap = Tap.adopt([opened[name] for name in queues])
        stack.callback(tap.close)
        return self._tap_card(nic, tap, nic.mtu, stack)

    def _tap_card(
        self, nic: NicConfig, tap: Tap, mtu: int | None, stack: contextlib.AsyncExitStack
    ) -> Device:
        from vdev.net.device import NetDevice

        device = NetDevice(tap, iothreads=self.iothreads, name=nic.id, mac=nic.mac, mtu=mtu)
        stack.callback(device.close)
        return device

    async def vhost_user(self, config: VhostUserConfig, stack: contextlib.AsyncExitStack) -> Device:
        """A device that another process serves. Raises UserError where it does not."""
        if config.kind == "fs":
            return await self._remote(
                config.id,
                config.socket,
                lib.VIRTIO_ID_FS,
                _FS_QUEUES,
                fs_space(config.tag),
                stack,
            )
        device_id = {"blk": lib.VIRTIO_ID_BLOCK, "net": lib.VIRTIO_ID_NET}[config.kind]
        queues = config.queues * (2 if config.kind == "net" else 1)
        return await self._remote(config.id, config.socket, device_id, queues, None, stack)

    async def share(self, share: ShareConfig, stack: contextlib.AsyncExitStack) -> Device:
        """A folder, served by a virtiofsd of its own. Raises UserError."""
        from vdev.vmm.virtiofs import Virtiofsd

        server = Virtiofsd(share)
        stack.push_async_callback(server.close)
        async with server.listening() as path:
            return await self._remote(
                share.id, path, lib.VIRTIO_ID_FS, _FS_QUEUES, fs_space(share.tag), stack
            )

    def rng(self, stack: contextlib.AsyncExitStack) -> Device:
        """The entropy device."""
        from vdev.vmm.devices.rng import RngDevice

        device = RngDevice(iothreads=self.iothreads)
        stack.callback(device.close)
        return device

    def balloon(self, stack: contextlib.AsyncExitStack) -> BalloonDevice:
        """A balloon that gives memory back to the host, all of it small at first."""
        from vdev.vmm.devices.balloon import BalloonDevice

        device = BalloonDevice(
            [(r.base, r.size) for r in self.ram.ranges],
            self.ram.discard,
            iothreads=self.iothreads,
            page=self.ram.page,
        )
        stack.callback(device.close)
        return device

    def console(
        self, output: Callable[[bytes], None], stack: contextlib.AsyncExitStack
    ) -> ConsoleDevice:
        """The virtio console."""
        from vdev.vmm.devices.console import ConsoleDevice

        device = ConsoleDevice(iothreads=self.iothreads, output=output)
        stack.callback(device.close)
        return device

    def vsock(
        self, path: str, config: VsockConfig, stack: contextlib.AsyncExitStack
    ) -> VsockDevice:
        """Sockets between host and guest; path: where the host's side connects to, if `config` does
        not say. Raises UserError where it cannot be had."""
        from vdev.vmm.devices.vsock import VsockDevice

        device = VsockDevice(config.cid, config.path or path, iothreads=self.iothreads)
        stack.callback(device.close)
        return device

    async def _remote(
        self,
        id: str,
        path: str,
        device_id: int,
        queues: int,
        space: bytes | None,
        stack: contextlib.AsyncExitStack,
        sock: socket.socket | None = None,
        mac: bytes | None = None,
    ) -> Device:
        from vdev.virtio.vhost_user.remote import VhostUserDevice

        if not self.ram.is_shared:
            raise UserError(
                f"{id}: {path}: no other process can have the RAM of a machine that went on from a "
                "snapshot without such devices: plug in what needs none, as a tap or a bridge"
            )
        try:
            device = await VhostUserDevice.connect(
                path,
                device_id=device_id,
                num_queues=queues,
                config=space,
                mac=mac,
                name=id,
                sock=sock,
                away_seconds=_AWAY_SECONDS,
                dial=self.dial,
            )
        except PeerError as error:
            raise UserError(f"{id}: {error}") from None
        except OSError as error:
            raise UserError(f"{id}: {path}: {error.strerror or error}") from None
        stack.callback(device.close)
        return device


def check_engines(disks: Iterable[DiskConfig], iothreads: Iterable[IOThread]) -> None:
    """Raises UserError where the running iothreads lack what a disk asks for."""
    if all(thread.has_io_uring for thread in iothreads):
        return
    for disk in disks:
        if disk.engine == "io_uring":
            raise UserError(f"disk {disk.id}: engine io_uring: this kernel refuses io_uring")


def _only(opened: Opened, *names: str) -> Opened:
    """Raises UserError unless there are these descriptors and no others."""
    if set(opened) != set(names):
        raise UserError(
            f"descriptors {', '.join(sorted(opened))}: it takes {', '.join(sorted(names))}"
        )
    return opened


def _socket(fd: int) -> socket.socket:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise UserError("descriptor socket: it is none of a connection")
    return socket.socket(fileno=os.dup(fd))


@contextlib.asynccontextmanager
async def undone_on_error(stack: contextlib.AsyncExitStack) -> AsyncIterator[None]:
    """Closes what is on the stack if the block fails."""
    try:
        yield
    except BaseException:
        await stack.aclose()
        raise


def net_space(mac: bytes, pairs: int) -> bytes:
    """struct virtio_net_config (virtio 1.3, section 5.1.4), the link up."""
    space = ffi.new("struct virtio_net_config *")
    space.mac = mac
    space.status = lib.VIRTIO_NET_S_LINK_UP
    space.max_virtqueue_pairs = pairs
    return bytes(ffi.buffer(space))


def fs_space(tag: str) -> bytes:
    """struct virtio_fs_config (virtio 1.3, section 5.11.4): the tag, and one request queue."""
    return tag.encode().ljust(36, b"\0") + (1).to_bytes(4, "little")
