"""The control socket of a running machine: the verbs of `VirtualMachine`, a command each.

{"command": "pause"}                               {"ok": true, "result": null}
{"command": "add-disk", "disk": {"path": "/d"}}    {"ok": true, "result": {"id": "disk1"}}
{"command": "console"}                             {"ok": true, ...}, then bytes both ways
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import vdev
from vdev.errors import UserError
from vdev.server.control import ControlServer, Handler, Request, Stream, default_path, find_machine
from vdev.tables import decode
from vdev.units import parse_size
from vdev.vmm.api import VirtualMachine
from vdev.vmm.config import DiskConfig, NicConfig

_log = logging.getLogger("vdev.machine")
_READ = 4096


def log_path(name: str) -> Path:
    """Where a detached machine writes its messages. Raises UserError where there is no place."""
    return default_path(name).with_name(f"{name}.log")


def check_name_free(name: str) -> None:
    """Raises UserError where a machine of this name runs already."""
    if (other := find_machine(name)) is not None:
        raise UserError(f"machine {name}: one of that name runs already ({other})")


class MachineControl:
    """Answers for `machine`."""

    def __init__(self, machine: VirtualMachine) -> None:
        self.machine = machine
        self._started = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answers for the length of the block.

        Raises UserError where there can be no socket.
        """
        server = ControlServer(default_path(self.machine.config.name), self.handlers())
        await server.start()
        try:
            yield
        finally:
            await server.close()

    def handlers(self) -> dict[str, Handler]:
        """Command → coroutine function."""
        machine = self.machine
        return {
            "status": self.status,
            "info": self._plain(lambda: _now(machine.info)),
            "counters": self._plain(lambda: _now(machine.counters)),
            "pause": self._plain(machine.pause),
            "resume": self._plain(machine.resume),
            "power-button": self._plain(machine.power_button),
            "reset": self._plain(machine.reset),
            "stop": self.stop,
            "console": self.console,
            "window": self.window,
            "add-disk": self.add_disk,
            "add-nic": self.add_nic,
            "remove": self.remove,
            "link": self.link,
            "balloon": self.balloon,
            "snapshot": self.snapshot,
        }

    def _plain(
        self, verb: Callable[[], Awaitable[Any]]
    ) -> Callable[[dict[str, Any]], Awaitable[Any]]:
        async def handler(request: dict[str, Any]) -> Any:
            return await verb()

        return handler

    async def status(self, request: dict[str, Any]) -> dict[str, Any]:
        """What `vdev status` shows of any process of vdev."""
        info, counters = self.machine.info(), self.machine.counters()
        devices = info.pop("devices")
        return {
            "pid": os.getpid(),
            "version": vdev.__version__,
            "uptime_s": round(time.monotonic() - self._started, 3),
            "machine": info,
            "iothreads": counters["iothreads"],
            "devices": [
                {**device, "name": device["id"], "stats": counters["devices"].get(device["id"])}
                for device in devices
            ],
        }

    async def stop(self, request: dict[str, Any]) -> Stream:
        """Begins to end the machine; the connection lasts until it has."""

        async def until_ended(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self.machine.wait()

        task = asyncio.ensure_future(self.machine.stop())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return Stream(until_ended)

    async def console(self, request: dict[str, Any]) -> Stream:
        """{"history": false}: without what was written before."""
        history = request.get("history", True) is not False

        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            output = asyncio.ensure_future(self._copy_output(writer, history))
            typing = asyncio.ensure_future(self._copy_input(reader))
            try:
                await asyncio.wait([output, typing], return_when=asyncio.FIRST_COMPLETED)
            finally:
                output.cancel()
                typing.cancel()
                await asyncio.gather(output, typing, return_exceptions=True)

        return Stream(converse)

    async def _copy_output(self, writer: asyncio.StreamWriter, history: bool) -> None:
        async for data in self.machine.console.attach(history=history):
            writer.write(data)
            await writer.drain()

    async def _copy_input(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(_READ):
            await self.machine.console.write(data)

    async def window(self, request: dict[str, Any]) -> None:
        """{"columns": 80, "rows": 24}: the terminal's size."""
        self.machine.console.resize(_number(request, "columns"), _number(request, "rows"))

    async def add_disk(self, request: Request) -> dict[str, str]:
        """{"disk": a [[disk]] table}, and descriptors: see `VirtualMachine.add_disk`."""
        disk = decode(DiskConfig, request.get("disk"), "disk: ")
        return {"id": await self.machine.add_disk(disk, request.fds)}

    async def add_nic(self, request: Request) -> dict[str, str]:
        """{"nic": a [[nic]] table}, and descriptors: see `VirtualMachine.add_nic`."""
        nic = decode(NicConfig, request.get("nic"), "network card: ")
        return {"id": await self.machine.add_nic(nic, request.fds)}

    async def remove(self, request: dict[str, Any]) -> None:
        """{"device": its id}"""
        await self.machine.remove(_text(request, "device"))

    async def link(self, request: dict[str, Any]) -> None:
        """{"device": a card's id, "up": whether its cable is plugged in}"""
        up = request.get("up")
        if not isinstance(up, bool):
            raise UserError(f"up {up!r}: true or false")
        await self.machine.set_link(_text(request, "device"), up)

    async def balloon(self, request: dict[str, Any]) -> dict[str, int]:
        """{"size": bytes or "256M"}: what is wanted back from the guest."""
        size = request.get("size")
        wanted = parse_size(size) if isinstance(size, str) else _number(request, "size")
        await self.machine.set_balloon(wanted)
        return {"size": wanted}

    async def snapshot(self, request: Request) -> None:
        """{"directory": a new folder, "base": the last one if it was tracked, "track": bool};
        with descriptors of the files, they are those in the folder."""
        base = _text(request, "base") if request.get("base") is not None else None
        await self.machine.snapshot(
            _text(request, "directory"),
            files=request.fds or None,
            base=base,
            track=request.get("track") is True,
        )


async def _now(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    return ask()


def _number(request: dict[str, Any], key: str) -> int:
    value = request.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{key} {value!r}: a whole number, 0 or more")
    return value


def _text(request: dict[str, Any], key: str) -> str:
    value = request.get(key)
    if not isinstance(value, str) or not value:
        raise UserError(f"{key} {value!r}: must be text")
    return value
