"""Commands for the guest, over its second serial port.

The other half is ``guest_init.sh``, which also describes the lines that are exchanged. What runs
in the guest may write one more kind of line to that port, "event name": for the host to know of
something when it happens, not when the command has ended.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import socket
from typing import Any, NamedTuple

# A guest that migrates goes on with the commands that were sent to its agent elsewhere.
_ids = itertools.count(1)


class Result(NamedTuple):
    """What a command in the guest came to."""

    code: int
    output: str


class AgentClosed(Exception):
    """The serial port was closed: the guest is gone."""


class Agent:
    """The host's end of the port; commands may run beside each other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._pending: dict[int, asyncio.Future[Result]] = {}
        self._events: dict[str, asyncio.Future[None]] = {}
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, port: socket.socket) -> Agent:
        """Use this socket, whose other end QEMU holds as the serial port."""
        # One line holds a command's whole output.
        return cls(*await asyncio.open_unix_connection(sock=port, limit=1 << 26))

    async def ready(self) -> None:
        """Wait until the guest's init has come up."""
        await asyncio.shield(self._ready)

    async def run(self, command: str) -> Result:
        """Run a shell command in the guest to its end."""
        number = next(_ids)
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._pending[number] = answer
        try:
            encoded = base64.b64encode(command.encode()).decode()
            self._writer.write(f"{number} {encoded}\n".encode())
            await self._writer.drain()
            return await answer
        finally:
            del self._pending[number]

    def event(self, name: str) -> asyncio.Future[None]:
        """Done when something in the guest next writes ``event NAME`` to the port."""
        event: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._events[name] = event
        return event

    async def close(self) -> None:
        """Give up the port; commands that are under way fail."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                self._take(line.decode().split())
        except OSError:
            pass
        finally:
            waiting: list[asyncio.Future[Any]] = [self._ready]
            for future in [*waiting, *self._pending.values(), *self._events.values()]:
                _fail(future)

    def _take(self, words: list[str]) -> None:
        if words == ["ready"]:
            if not self._ready.done():
                self._ready.set_result(None)
            return
        if words[0] == "event":
            event = self._events.pop(words[1], None)
            if event and not event.done():
                event.set_result(None)
            return
        number, code, *output = words
        answer = self._pending.get(int(number))
        if answer and not answer.done():
            text = base64.b64decode(output[0]).decode(errors="replace") if output else ""
            answer.set_result(Result(int(code), text))


def _fail(waiting: asyncio.Future[Any]) -> None:
    if not waiting.done():
        waiting.set_exception(AgentClosed("the guest's agent port was closed"))
        waiting.exception()  # Marks it as seen: nobody may be waiting any more.
