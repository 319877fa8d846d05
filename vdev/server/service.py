"""A server as a program: until a signal or a command ends it, watched over a control socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import vdev
from vdev.blk.device import BlkDevice
from vdev.errors import UserError
from vdev.net.card import Card
from vdev.server.child import end_process
from vdev.server.control import (
    ControlServer,
    ControlSocket,
    Handler,
    Request,
    Stream,
    answer_requests,
    default_path,
)
from vdev.server.device_server import DeviceServer
from vdev.server.handover import PATIENCE, hand_over, leave
from vdev.server.lines import LineSocket
from vdev.server.notify import notify
from vdev.server.orders import Orders
from vdev.server.passage import Passage
from vdev.server.signals import on_signals
from vdev.units import parse_size

_log = logging.getLogger("vdev.service")
_ANSWER_SECONDS = 1.0
Control = str | bool | ControlSocket
D = TypeVar("D", BlkDevice, Card)


def _say_ready() -> None:
    notify("READY=1")


class Service:
    """Runs device servers until SIGTERM, SIGINT, SIGHUP or the command "stop", or another process
    has taken them over.

    ``control``: see `controlled`; or the connection to a `Supervisor`, whose end is that of the
    service too.  ``orders``: to serve the same devices, for a process that takes them over;
    ``program``: the vdev that it runs.  ``ready``: called when everything serves.
    """

    def __init__(
        self,
        *,
        control: Control | socket.socket = True,
        orders: Orders | None = None,
        program: Sequence[str] = (),
        ready: Callable[[], object] = _say_ready,
    ) -> None:
        self._control = control
        self._controller: ControlServer | None = None
        self._orders = orders
        self._program = program
        self._ready = ready
        self._moving = asyncio.Lock()
        self._servers: dict[str, DeviceServer] = {}
        self._stop = asyncio.Event()
        self._started = time.monotonic()

    async def run(self, devices: AbstractAsyncContextManager[Sequence[DeviceServer]]) -> None:
        """Serve what ``devices`` opens; returns when everything is closed again."""
        # Before anything exists that a signal would leave behind.
        with on_signals(self._stop.set):
            async with devices as servers, self._controlled():
                self._servers = {server.device.name: server for server in servers}
                self._ready()
                await self._ended(servers)
                notify("STOPPING=1")

    async def _ended(self, servers: Sequence[DeviceServer]) -> None:
        """Returns when the end was asked for, or no server can get a front-end any more."""
        asked = asyncio.create_task(self._wait_for_stop())
        served = asyncio.create_task(_wait_for_all(servers))
        try:
            await asyncio.wait([asked, served], return_when=asyncio.FIRST_COMPLETED)
            if served.done():
                served.result()
        finally:
            asked.cancel()
            served.cancel()
            await asyncio.gather(asked, served, return_exceptions=True)
            # Taken down is only what has not been taken over.
            async with self._moving:
                pass

    async def _wait_for_stop(self) -> None:
        await self._stop.wait()

    @contextlib.asynccontextmanager
    async def _controlled(self) -> AsyncIterator[None]:
        handlers: dict[str, Handler] = {
            "status": self.status,
            "stop": self.stop,
            "resize": self.resize,
            "upgrade": self.upgrade,
            "link": self.link,
        }
        if not isinstance(self._control, socket.socket):
            async with controlled(self._control, handlers) as self._controller:
                yield
            return
        peer = LineSocket(self._control)
        answering = asyncio.ensure_future(answer_requests(peer, handlers))
        answering.add_done_callback(lambda _: self._stop.set())
        try:
            yield
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            await peer.close()

    async def status(self, request: Request) -> dict[str, Any]:
        """The command "status"."""
        threads = {id(t): t for server in self._servers.values() for t in server.device.iothreads}
        return {
            "pid": os.getpid(),
            "version": vdev.__version__,
            "uptime_s": round(time.monotonic() - self._started, 3),
            "iothreads": [
                {"tid": t.tid, "io_uring": t.has_io_uring, **t.stats()} for t in threads.values()
            ],
            "devices": [
                {
                    "name": server.device.name,
                    **server.status(),
                    **server.device.describe(),
                    "stats": server.device.stats(),
                }
                for server in self._servers.values()
            ],
        }

    async def stop(self, request: Request) -> None:
        """The command "stop": as SIGTERM does."""
        self._stop.set()

    async def upgrade(self, request: Request) -> Stream:
        """The command "upgrade": {"program": path or none = the same, "timeout": seconds}.

        A supervisor starts the other process itself, and brings the "passage" to it along, and
        a descriptor of it, the "successor".
        """
        program, patience = program_of(request, self._program), patience_of(request)
        if self._moving.locked():
            raise UserError("another process is taking over already")
        await self._moving.acquire()
        try:
            if {"passage", "successor"} <= request.fds.keys():
                sock = socket.socket(fileno=os.dup(request.fds["passage"]))
                end = partial(end_process, request.fds["successor"])
                with contextlib.closing(Passage(sock)) as passage:
                    result = {"pause_ms": await self._hand_over(passage, end, patience)}
            else:
                result = await self._start_successor(program, patience)
        except BaseException:
            self._moving.release()
            raise
        if self._controller is not None:
            await self._controller.let_go()
        # As soon as that is answered, or cannot be.
        asyncio.get_running_loop().call_later(_ANSWER_SECONDS, leave, 0)
        return Stream(_leave, result)

    async def _start_successor(self, program: Sequence[str], patience: float) -> dict[str, float]:
        if self._orders is None:
            raise UserError("this server cannot be replaced while it runs")
        ours, theirs = Passage.pair()
        with contextlib.closing(Passage(ours)) as passage:
            with theirs:
                orders = replace(self._orders, passage=theirs.fileno())
                process = orders.give(program)

            async def end() -> None:
                process.kill()
                await process.wait()

            try:
                pause = await self._hand_over(passage, end, patience)
            except BaseException:
                await end()
                raise
        notify(f"MAINPID={process.pid}")
        if self._stop.is_set():
            process.terminate()
        return {"pid": process.pid, "pause_ms": pause}

    async def _hand_over(
        self, passage: Passage, end: Callable[[], Awaitable[object]], patience: float
    ) -> float:
        controller = self._controller
        return await hand_over(
            passage,
            list(self._servers.values()),
            lambda fds: controller.save(fds) if controller is not None else None,
            end,
            patience,
        )

    async def resize(self, request: Request) -> dict[str, int]:
        """The command "resize": {"device": name, "size": bytes or "2G" or none = look again}."""
        disk, size = self._device(request, BlkDevice, "block device"), request.get("size")
        if isinstance(size, str):
            size = parse_size(size)
        if not (size is None or (isinstance(size, int) and not isinstance(size, bool))):
            raise UserError(f"size {size!r}: bytes, or text like 2GiB")
        return {"size": disk.resize(size)}

    async def link(self, request: Request) -> dict[str, bool]:
        """The command "link": {"device": name, "up": whether its cable is plugged in}."""
        card, up = self._device(request, Card, "card"), request.get("up")
        if not isinstance(up, bool):
            raise UserError(f"up {up!r}: true or false")
        try:
            card.set_link(up)
        except OSError as error:
            raise UserError(f"device {card.name!r}: its network: {error.strerror}") from None
        return {"up": up}

    def _device(self, request: Request, kind: type[D], what: str) -> D:
        """That which a request is to change, and which no other process is taking over."""
        if self._moving.locked():
            raise UserError("another process is taking over: ask again")
        name = request.get("device")
        devices = {n: s.device for n, s in self._servers.items() if isinstance(s.device, kind)}
        if not isinstance(name, str) or name not in devices:
            raise UserError(f"device {name!r} is no {what} of this server: {', '.join(devices)}")
        return devices[name]


def program_of(request: Request, ours: Sequence[str]) -> Sequence[str]:
    """The vdev that is asked for, `ours` without one. Raises UserError."""
    program = request.get("program")
    if program is None:
        return ours
    if not isinstance(program, str) or not os.path.isabs(program):
        raise UserError(f"program {program!r}: the absolute path of a vdev program")
    return (program,)


def patience_of(request: Request) -> float:
    """How many seconds a successor may take to start. Raises UserError."""
    patience = request.get("timeout", PATIENCE)
    if isinstance(patience, bool) or not isinstance(patience, int | float) or not patience > 0:
        raise UserError(f"timeout {patience!r}: a number of seconds above 0")
    return patience


async def _leave(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
    leave(0)


@contextlib.asynccontextmanager
async def controlled(
    control: Control, handlers: Mapping[str, Handler], name: str | None = None
) -> AsyncIterator[ControlServer | None]:
    """Answers commands meanwhile.

    ``control`` is the path of the control socket, True for the default place (see `default_path`,
    ``name``), False for none, or a socket from another process.
    """
    if control is False:
        yield None
        return
    if isinstance(control, ControlSocket):
        server = control.server(handlers)
        await server.start()
    elif isinstance(control, str):
        server = ControlServer(Path(control), handlers)
        await server.start()
    else:
        try:
            server = ControlServer(default_path(name), handlers)
            await server.start()
        except UserError as error:
            # Nobody asked for this one: a server serves without.
            _log.warning("no `vdev status` for this server: %s", error)
            yield None
            return
    try:
        yield server
    finally:
        await server.close()


async def _wait_for_all(servers: Sequence[DeviceServer]) -> None:
    await asyncio.gather(*(server.wait() for server in servers))
