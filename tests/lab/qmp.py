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
    async def connect(cls, monitor_socket: socket.socket) -> Qmp:
        """Leave the capabilities negotiation behind on a socket whose other end QEMU holds."""
        reader, writer = await asyncio.open_unix_connection(sock=monitor_socket, limit=1 << 20)
        monitor = cls(reader, writer)
        await reader.readline()
        await monitor.execute("qmp_capabilities")
        return monitor

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
