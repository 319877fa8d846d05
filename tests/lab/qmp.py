"""QEMU's monitor protocol, as far as the lab needs it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any


class QmpError(Exception):
    """QEMU refused a command."""


class Qmp:
    """A connection to the monitor; one command at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()
        self._events: list[dict[str, Any]] = []

    @classmethod
    async def open(cls, monitor: socket.socket) -> Qmp:
        """Use this socket, whose other end QEMU holds as its monitor."""
        return cls(*await asyncio.open_unix_connection(sock=monitor, limit=1 << 20))

    async def negotiate(self) -> None:
        """Take the greeting and enter command mode."""
        await self._reader.readline()
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return what it returns; events in between wait for `event`."""
        async with self._turn:
            message = {"execute": command, "arguments": arguments}
            self._writer.write(json.dumps(message).encode() + b"\n")
            await self._writer.drain()
            while line := await self._reader.readline():
                answer = json.loads(line)
                if "error" in answer:
                    raise QmpError(f"{command}: {answer['error']['desc']}")
                if "return" in answer:
                    return answer["return"]
                self._events.append(answer)
        raise QmpError(f"{command}: the monitor was closed")

    async def event(self, name: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The data of the next event of that name that is wanted; those before it are forgotten."""
        async with self._turn:
            while True:
                while self._events:
                    event = self._events.pop(0)
                    if event["event"] == name and wanted(event["data"]):
                        return dict(event["data"])
                if not (line := await self._reader.readline()):
                    raise QmpError(f"event {name}: the monitor was closed")
                self._events.append(json.loads(line))

    def close(self) -> None:
        """Give up the connection."""
        self._writer.close()
