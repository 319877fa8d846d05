"""QEMU's monitor protocol, as far as the lab needs it."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any


class QmpError(Exception):
    """QEMU refused a command."""


class Qmp:
    """A connection to the monitor; one command at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, monitor: socket.socket) -> Qmp:
        """Use this socket, whose other end QEMU holds as its monitor."""
        return cls(*await asyncio.open_unix_connection(sock=monitor, limit=1 << 20))

    async def negotiate(self) -> None:
        """Take the greeting and enter command mode."""
        await self._reader.readline()
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return what it returns; events in between are passed over."""
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
        raise QmpError(f"{command}: the monitor was closed")

    def close(self) -> None:
        """Give up the connection."""
        self._writer.close()
