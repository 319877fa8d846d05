"""The devices of a machine in another program: who serves them, where they are plugged in."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from vdev.errors import UserError
from vdev.iothread import IOThread
from vdev.server.blk import serve as serve_blk
from vdev.server.device_server import DeviceServer
from vdev.virtio.device import Device
from vdev.vmm.config import DiskConfig, MachineConfig, NicConfig, VhostUserConfig, free_id

P = TypeVar("P")
P_co = TypeVar("P_co", covariant=True)


class Parts(Protocol[P_co]):
    """How the program is told of a vhost-user device."""

    def disk(self, device: str, queues: int) -> P_co: ...

    def nic(self, device: str, mac: str, queues: int, mtu: int | None) -> P_co:
        """queues: pairs."""

    def fs(self, device: str, tag: str) -> P_co: ...


@dataclass
class Plugged(Generic[P]):
    """One that is plugged in: what the program was told, where, and who serves it."""

    id: str
    kind: str
    part: P
    port: str
    stack: contextlib.AsyncExitStack
    address: str
    server: DeviceServer | None = None
    folder: _Folder | None = None

    def hide(self) -> None:
        """The program has connected, or knows another way: nobody else shall."""
        if self.folder is not None:
            self.folder.remove()


class _Folder:
    """A private folder for the socket of one device."""

    def __init__(self) -> None:
        self._path = tempfile.mkdtemp(prefix="vdev-")
        self.socket = f"{self._path}/socket"

    def remove(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


class DeviceSet(Generic[P]):
    """Opens and closes devices; those that are open are its items, by id.

    ports: the slots that there are.
    """

    def __init__(self, config: MachineConfig, ports: Sequence[str], parts: Parts[P]) -> None:
        self._config = config
        self._ports = ports
        self._parts = parts
        self._ids = {device.id for device in config.devices()}
        self._plugged: dict[str, Plugged[P]] = {}
        self._threads: Sequence[IOThread] = ()

    def __iter__(self) -> Iterator[Plugged[P]]:
        return iter(tuple(self._plugged.values()))

    def find(self, name: str) -> Plugged[P]:
        """Raises UserError where there is none of that id."""
        if name not in self._plugged:
            known = ", ".join(self._plugged) or "none"
            raise UserError(f"device {name!r} is not plugged in: {known}")
        return self._plugged[name]

    async def open_all(self, threads: Sequence[IOThread]) -> None:
        """Those of the configuration; their queues run on `threads`. Raises UserError."""
        self._threads = threads
        for disk in self._config.disks:
            await self.open_disk(disk)
        for nic in self._config.nics:
            await self.open_nic(nic)
        for other in self._config.vhost_user:
            self.add_external(other.id, other.kind, self._external_part(other), other.socket)

    def _external_part(self, other: VhostUserConfig) -> P:
        match other.kind:
            case "blk":
                return self._parts.disk(other.id, other.queues)
            case "net":
                mac = self._config.mac_of(NicConfig(socket=other.socket, id=other.id))
                return self._parts.nic(other.id, mac, other.queues, None)
        return self._parts.fs(other.id, other.tag)

    def new_id(self, stem: str, wanted: str) -> str:
        if not wanted:
            return free_id(stem, self._ids)
        if wanted in self._ids:
            raise UserError(f"id {wanted!r}: another device has it")
        self._ids.add(wanted)
        return wanted

    def _port(self) -> str:
        used = {device.port for device in self._plugged.values()}
        free = [port for port in self._ports if port not in used]
        if not free:
            raise UserError(f"machine {self._config.name}: all {len(self._ports)} slots are taken")
        return free[0]

    async def open_disk(self, disk: DiskConfig) -> Plugged[P]:
        folder = _Folder()
        server = serve_blk(
            folder.socket,
            disk.path,
            read_only=disk.read_only,
            num_queues=disk.queues,
            serial=disk.serial,
            cache=disk.cache,
            engine=disk.engine,
            iothreads=self._threads,
            name=disk.id,
        )
        return await self._open(
            disk.id, "blk", folder, server, lambda _: self._parts.disk(disk.id, disk.queues)
        )

    async def open_nic(self, nic: NicConfig) -> Plugged[P]:
        mac = self._config.mac_of(nic)
        if nic.socket is not None:
            part = self._parts.nic(nic.id, mac, nic.queues, nic.mtu)
            return self.add_external(nic.id, "net", part, nic.socket)
        from vdev.net.device import NetDevice
        from vdev.server.net import serve as serve_net  # brings all wiring

        folder = _Folder()
        server = serve_net(
            folder.socket,
            tap=nic.tap,
            bridge=nic.bridge,
            queues=nic.queues,
            mac=mac,
            mtu=nic.mtu,
            address=nic.address,
            iothreads=self._threads,
            name=nic.id,
        )

        def part_of(card: Device) -> P:
            assert isinstance(card, NetDevice)
            return self._parts.nic(nic.id, mac, nic.queues, card.mtu)

        return await self._open(nic.id, "net", folder, server, part_of)

    async def _open(
        self,
        name: str,
        kind: str,
        folder: _Folder,
        serving: contextlib.AbstractAsyncContextManager[DeviceServer],
        part_of: Callable[[Device], P],
    ) -> Plugged[P]:
        stack = contextlib.AsyncExitStack()
        stack.callback(folder.remove)
        try:
            port = self._port()
            server = await stack.enter_async_context(serving)
        except BaseException:
            self._ids.discard(name)
            await stack.aclose()
            raise
        part = part_of(server.device)
        device = Plugged(name, kind, part, port, stack, folder.socket, server, folder)
        self._plugged[name] = device
        return device

    def add_external(self, name: str, kind: str, part: P, address: str) -> Plugged[P]:
        stack = contextlib.AsyncExitStack()
        device = Plugged(name, kind, part, self._port(), stack, address)
        self._plugged[name] = device
        return device

    async def close(self, device: Plugged[P]) -> None:
        self._plugged.pop(device.id, None)
        self._ids.discard(device.id)
        await device.stack.aclose()

    async def close_all(self) -> None:
        for device in reversed(tuple(self._plugged.values())):
            await self.close(device)


def describe(device: Plugged[Any]) -> dict[str, Any]:
    if device.server is None:
        return {"id": device.id, "kind": device.kind, "socket": device.address, "state": "external"}
    status = {**device.server.status(), **device.server.device.describe()}
    return {**status, "id": device.id, "kind": device.kind, "socket": ""}
