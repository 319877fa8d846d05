"""cloud-hypervisor's API: HTTP on a Unix socket, and the events that it writes to a descriptor.

Source: cloud-hypervisor v53, docs/api.md, vmm/src/api/openapi/cloud-hypervisor.yaml, and
event_monitor (JSON objects over several lines, an empty line behind each).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tempfile
from collections.abc import AsyncIterator
from typing import Any

from vdev.errors import UserError

_ROOT = "/api/v1"
_BODY_MAX = 16 << 20
"""Bytes of an answer."""


def api_sockets() -> tuple[socket.socket, socket.socket]:
    """One that is connected to the other, which listens: for us, and for the program.

    Nobody else can connect any more.
    """
    client, listener = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    try:
        with tempfile.TemporaryDirectory(prefix="vdev-") as folder:
            listener.bind(f"{folder}/api")
            listener.listen(1)
            client.connect(f"{folder}/api")
    except BaseException:
        client.close()
        listener.close()
        raise
    return client, listener


class Api:
    """A connection to the API; one request after another goes over it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()
        self._lost = False
        self._requests: set[asyncio.Task[Any]] = set()

    @classmethod
    async def on(cls, sock: socket.socket) -> Api:
        """On a connected socket, which becomes the connection's."""
        return cls(*await asyncio.open_unix_connection(sock=sock))

    async def put(self, command: str, body: Any = None) -> Any:
        """Has it done. Raises UserError where the program refuses, or has ended."""
        return await self._request("PUT", command, body)

    async def get(self, command: str) -> Any:
        """Asks for it. Raises UserError likewise."""
        return await self._request("GET", command, None)

    async def close(self) -> None:
        """Lets go of the program."""
        for task in self._requests:
            task.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _request(self, method: str, command: str, body: Any) -> Any:
        # A caller who gives up must not leave an answer behind that the next one would take.
        task = asyncio.ensure_future(self._in_turn(method, command, body))
        self._requests.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._requests.discard(task)
        if not task.cancelled():
            task.exception()  # is the caller's, who may have given up

    async def _in_turn(self, method: str, command: str, body: Any) -> Any:
        async with self._turn:
            if self._lost:
                raise UserError(f"cloud-hypervisor has ended: {command}")
            try:
                status, content = await self._exchange(method, command, body)
            except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
                self._lost = True
                raise UserError(f"cloud-hypervisor has ended: {command}: {error}") from None
        if not 200 <= status < 300:
            raise UserError(f"cloud-hypervisor: {command}: {_complaint(status, content)}")
        return _parsed(content)

    async def _exchange(self, method: str, command: str, body: Any) -> tuple[int, bytes]:
        data = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {_ROOT}/{command} HTTP/1.1", "Host: localhost", "Accept: */*"]
        if data:
            head += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        self._writer.write("\r\n".join([*head, "", ""]).encode() + data)
        await self._writer.drain()
        return await self._response()

    async def _response(self) -> tuple[int, bytes]:
        """Raises EOFError, ValueError."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, _, rest = head[0].partition(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"no answer of HTTP: {head[0][:40]!r}")
        size = 0
        for line in head[1:]:
            name, _, value = line.partition(":")
            if name.strip().lower() == "content-length":
                size = int(value)
        if not 0 <= size <= _BODY_MAX:
            raise ValueError(f"an answer of {size} bytes")
        return int(rest[:3]), await self._reader.readexactly(size)


def _parsed(content: bytes) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(content)
    return None


def _complaint(status: int, content: bytes) -> str:
    """Errors come as a list: each with what caused it behind it."""
    errors = _parsed(content)
    if isinstance(errors, list) and errors:
        return ": ".join(" ".join(str(error).split()) for error in errors)
    text = " ".join(content.decode(errors="replace").split())
    return text or f"HTTP status {status}"


async def events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The events, to the end; what is none is left out."""
    lines: list[bytes] = []
    with contextlib.suppress(OSError):
        while line := await reader.readline():
            lines.append(line)
            if line.strip():
                continue
            event = _parsed(b"".join(lines))
            lines.clear()
            if isinstance(event, dict):
                yield event
