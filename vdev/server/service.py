"""A server as a program: until a signal or a command ends it, watched over a control socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import vdev
from vdev.blk.device import BlkDevice
from vdev.errors import UserError
from vdev.server.control import ControlServer, default_path
from vdev.server.device_server import DeviceServer
from vdev.server.notify import notify
from vdev.units import parse_size

_log = logging.getLogger("vdev.service")


class Service:
    """Runs device servers until SIGTERM, SIGINT, SIGHUP or the command "stop".

    ``control`` is the path of the control socket, True for the default place, False for none.
    """

    def __init__(self, *, control: str | bool = True) -> None:
        self._control = control
        self._servers: dict[str, DeviceServer] = {}
        self._stop = asyncio.Event()
        self._started = time.monotonic()

    async def run(self, devices: AbstractAsyncContextManager[Sequence[DeviceServer]]) -> None:
        """Serve what ``devices`` opens; returns when everything is closed again."""
        loop = asyncio.get_running_loop()
        # Before anything exists that a signal would leave behind.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup(1) wants it
            loop.add_signal_handler(signal.SIGHUP, self._stop.set)
        async with devices as servers, self._controlled():
            self._servers = {server.device.name: server for server in servers}
            notify("READY=1")
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

    async def _wait_for_stop(self) -> None:
        await self._stop.wait()

    @contextlib.asynccontextmanager
    async def _controlled(self) -> AsyncIterator[None]:
        if self._control is False:
            yield
            return
        handlers = {"status": self.status, "stop": self.stop, "resize": self.resize}
        if isinstance(self._control, str):
            server = ControlServer(Path(self._control), handlers)
            await server.start()
        else:
            try:
                server = ControlServer(default_path(), handlers)
                await server.start()
            except UserError as error:
                # Nobody asked for this one: a server serves without.
                _log.warning("no `vdev status` for this server: %s", error)
                yield
                return
        try:
            yield
        finally:
            await server.close()

    async def status(self, request: dict[str, Any]) -> dict[str, Any]:
        """The command "status"."""
        threads = {id(t): t for server in self._servers.values() for t in server.iothreads}
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

    async def stop(self, request: dict[str, Any]) -> None:
        """The command "stop": as SIGTERM does."""
        self._stop.set()

    async def resize(self, request: dict[str, Any]) -> dict[str, int]:
        """The command "resize": {"device": name, "size": bytes or "2G" or none = look again}."""
        name, size = request.get("device"), request.get("size")
        server = self._servers.get(name) if isinstance(name, str) else None
        if server is None or not isinstance(server.device, BlkDevice):
            disks = [n for n, s in self._servers.items() if isinstance(s.device, BlkDevice)]
            raise UserError(
                f"device {name!r} is no block device of this server: {', '.join(disks)}"
            )
        if isinstance(size, str):
            size = parse_size(size)
        if not (size is None or (isinstance(size, int) and not isinstance(size, bool))):
            raise UserError(f"size {size!r}: bytes, or text like 2GiB")
        return {"size": server.device.resize(size)}


async def _wait_for_all(servers: Sequence[DeviceServer]) -> None:
    await asyncio.gather(*(server.wait() for server in servers))
