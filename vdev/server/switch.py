"""A virtual switch: ports on vhost-user sockets, and taps as uplinks.

A port is made by name, and then has a socket of its own; or it comes with a front-end that connects
to the switch's own socket, and goes with it.  A connection there is a cable with a card at its end:
whoever may connect may plug in.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from vdev._native import lib
from vdev.errors import UserError
from vdev.iothread import IOThread, settle
from vdev.net.card import parse_mac, stable_mac
from vdev.net.fabric import CardPort, Fabric, PortSettings, TapPort
from vdev.ratelog import RateLimitedLog
from vdev.server.device_server import DeviceServer
from vdev.server.listener import Endpoint
from vdev.server.switch_config import GuestConfig, PortConfig, check_name

LOG = logging.getLogger("vdev.switch")
_GUEST = "guest"


@dataclass
class _Plugged:
    """A port that is plugged in. server: of a card's; stack: undoes it."""

    port: CardPort | TapPort
    stack: contextlib.AsyncExitStack
    server: DeviceServer | None = None


class Switch:
    """A switch between its `async with` and the end of that block.

    socket_path: where front-ends come each with a port of their own, as `guests` says; None = ports
    are made by `add_port` alone.  stations, age: see `Fabric`.  poll_us: see `IOThread`.
    Entering raises UserError where the socket cannot be had.
    """

    def __init__(
        self,
        *,
        name: str = "switch",
        socket_path: str | None = None,
        guests: GuestConfig | None = None,
        stations: int = 8192,
        age: int = 300,
        poll_us: int = 32,
    ) -> None:
        check_name("switch", name)
        self.name = name
        self.socket_path = socket_path
        self.guests = guests or GuestConfig()
        self._table = (stations, age)
        self._iothread = IOThread(poll_us=poll_us)
        self._fabric: Fabric | None = None
        self._ports: dict[str, _Plugged] = {}
        self._changing = asyncio.Lock()
        self._warnings = RateLimitedLog(LOG)
        self._endpoint: Endpoint | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._visits: set[asyncio.Task[None]] = set()

    @property
    def fabric(self) -> Fabric:
        """The native switch."""
        if self._fabric is None:
            raise RuntimeError("this switch is not open")
        return self._fabric

    @property
    def iothread(self) -> IOThread:
        """On which all its queues run."""
        return self._iothread

    async def __aenter__(self) -> Self:
        self._iothread.start()
        try:
            stations, age = self._table
            self._fabric = Fabric(self._iothread, stations=stations, age=age)
            if self.socket_path is not None:
                self._endpoint = Endpoint.listen(self.socket_path)
                self._endpoint.open(self._warnings)
                self._accepting = asyncio.ensure_future(self._accept(self._endpoint))
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await settle(asyncio.ensure_future(self._close()))

    async def _close(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
        if self._endpoint is not None:
            self._endpoint.close()
        for visit in self._visits:
            visit.cancel()
        if self._visits:
            await asyncio.wait(self._visits)
        for name in list(self._ports):
            await self._take_out(name)
        if self._fabric is not None:
            self._fabric.close()
            self._fabric = None
        await self._iothread.close()

    async def add_port(self, name: str, **config: Any) -> None:
        """Plugs a port in; config: see `PortConfig`. Raises UserError where it cannot be had."""
        await self.add(PortConfig(name=name, **config))

    async def add(self, config: PortConfig) -> None:
        """The same with its configuration."""
        async with self._changing:
            self._check_free(config.name)
            stack = contextlib.AsyncExitStack()
            try:
                plugged = await self._open(config, stack)
            except OSError as error:
                await stack.aclose()
                raise UserError(f"port {config.name}: {_reason(error)}") from None
            except BaseException:
                await stack.aclose()
                raise
            self._ports[config.name] = plugged

    def settings(self, name: str) -> PortSettings:
        """Those of a port. Raises UserError."""
        return self._find(name).port.settings

    async def change_port(self, name: str, settings: PortSettings) -> None:
        """Gives a port other settings while frames cross it; what was learned there is forgotten.

        Raises UserError.
        """
        async with self._changing:
            await self._find(name).port.change(settings)

    async def remove_port(self, name: str) -> None:
        """Takes a port out: its front-end is disconnected, its tap closed. Raises UserError."""
        async with self._changing:
            self._find(name)
            await self._take_out(name)

    async def table(self) -> list[dict[str, Any]]:
        """The stations that are known: mac, vlan, port (its name), age in seconds, bound."""
        names = {plugged.port.number: name for name, plugged in self._ports.items()}
        return [
            {**asdict(station), "port": names[station.port]}
            for station in await self.fabric.stations()
            if station.port in names
        ]

    def counters(self) -> dict[str, dict[str, int]]:
        """What each port counted, by its name."""
        return {name: plugged.port.counters() for name, plugged in self._ports.items()}

    def ports(self) -> list[dict[str, Any]]:
        """All ports: name, state, socket or tap, settings, counters; those of queues as in `vdev
        status`."""
        return [self._describe(name, plugged) for name, plugged in self._ports.items()]

    def set_link(self, name: str, up: bool) -> None:
        """Plugs or pulls the cable of a card's port; its driver is told. Raises UserError."""
        port = self._find(name).port
        if not isinstance(port, CardPort):
            raise UserError(f"port {name}: a tap's cable is the host's to pull: ip link set")
        port.set_link(up)

    def _describe(self, name: str, plugged: _Plugged) -> dict[str, Any]:
        port, server = plugged.port, plugged.server
        if server is None or isinstance(port, TapPort):
            return {"name": name, "socket": "", "state": "up", **port.describe(), "stats": None}
        return {"name": name, **server.status(), **port.describe(), "stats": port.stats()}

    def _check_free(self, name: str) -> None:
        if name in self._ports:
            raise UserError(f"port {name}: the switch has one of that name")
        if len(self._ports) >= lib.VHOST_SWITCH_PORTS:
            raise UserError(f"port {name}: the switch has all {lib.VHOST_SWITCH_PORTS} ports")

    def _find(self, name: str) -> _Plugged:
        if (plugged := self._ports.get(name)) is None:
            raise UserError(f"port {name!r} does not exist: {', '.join(self._ports) or 'none'}")
        return plugged

    async def _open(self, config: PortConfig, stack: contextlib.AsyncExitStack) -> _Plugged:
        if config.socket is None:
            return _Plugged(await self._open_tap(config, stack), stack)
        endpoint = Endpoint.listen(config.socket)
        port = await self._open_card(config.name, config.settings, config.queues, config.mtu, stack)
        server = DeviceServer(port, endpoint, log=LOG)
        stack.push_async_callback(server.close)
        await server.start()
        return _Plugged(port, stack, server)

    async def _open_card(
        self,
        name: str,
        settings: PortSettings,
        pairs: int,
        mtu: int | None,
        stack: contextlib.AsyncExitStack,
    ) -> CardPort:
        given = settings.mac
        mac = parse_mac(given) if given is not None else stable_mac(f"{self.name} {name}")
        port = CardPort(self.fabric, settings, name=name, mac=mac, pairs=pairs, mtu=mtu)
        stack.callback(port.close)
        stack.push_async_callback(port.unplug)
        await port.plug()
        return port

    async def _open_tap(self, config: PortConfig, stack: contextlib.AsyncExitStack) -> TapPort:
        from vdev.net.wiring import Wiring  # brings pyroute2

        wiring = Wiring(
            tap=config.tap, bridge=config.bridge, mtu=config.mtu, address=config.address
        )
        stack.push_async_callback(wiring.down)
        await wiring.up()
        port = TapPort(self.fabric, config.settings, wiring.tap, name=config.name)
        stack.callback(port.close)
        stack.push_async_callback(port.unplug)
        await port.plug()
        return port

    async def _take_out(self, name: str) -> None:
        plugged = self._ports.pop(name)
        await settle(asyncio.ensure_future(plugged.stack.aclose()))

    # Front-ends at the switch's own socket

    async def _accept(self, endpoint: Endpoint) -> None:
        while (sock := await endpoint.next()) is not None:
            visit = asyncio.ensure_future(self._visit(sock.detach()))
            self._visits.add(visit)
            visit.add_done_callback(self._visits.discard)

    async def _visit(self, fd: int) -> None:
        """A front-end from its coming to its leaving."""
        endpoint = Endpoint.connected_fd(fd)
        try:
            async with self._guest_port(endpoint) as server:
                await server.wait()
        except (OSError, UserError) as error:
            self._warnings.warning("%s: a front-end is turned away: %s", self.name, error)
        finally:
            endpoint.close()

    @contextlib.asynccontextmanager
    async def _guest_port(self, endpoint: Endpoint) -> AsyncIterator[DeviceServer]:
        guests = self.guests
        stack = contextlib.AsyncExitStack()
        async with self._changing:
            name = self._free_name()
            self._check_free(name)
            try:
                port = await self._open_card(
                    name, guests.settings, guests.queues, guests.mtu, stack
                )
                server = DeviceServer(port, endpoint, log=LOG)
                stack.push_async_callback(server.close)
                await server.start()
            except BaseException:
                await stack.aclose()
                raise
            self._ports[name] = _Plugged(port, stack, server)
        try:
            yield server
        finally:
            if (plugged := self._ports.get(name)) is not None and plugged.server is server:
                await self._take_out(name)

    def _free_name(self) -> str:
        number = 0
        while f"{_GUEST}{number}" in self._ports:
            number += 1
        return f"{_GUEST}{number}"


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"the switch has all {lib.VHOST_SWITCH_PORTS} ports"
    return error.strerror or str(error)
