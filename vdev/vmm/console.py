"""A machine's console: what the guest writes, kept in part, and handed to whoever watches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

HISTORY = 256 << 10
"""Bytes of output that a new watcher sees."""
BACKLOG = 1 << 20
"""Bytes that wait for a slow watcher; beyond that the oldest are lost, and it is told."""


class Console:
    """`write_input(data)` carries bytes to the guest; the VMM calls `feed` with what it writes."""

    def __init__(
        self,
        write_input: Callable[[bytes], Awaitable[None]],
        resize: Callable[[int, int], None] = lambda columns, rows: None,
    ) -> None:
        self._write_input = write_input
        self._resize = resize
        self._history = bytearray()
        self._watchers: set[_Watcher] = set()
        self._closed = False

    @property
    def history(self) -> bytes:
        """The last bytes of output, at most HISTORY."""
        return bytes(self._history)

    async def write(self, data: bytes) -> None:
        """Types `data`; what is typed after the machine's end is lost."""
        if not self._closed:
            await self._write_input(data)

    def resize(self, columns: int, rows: int) -> None:
        """Tells the guest of the terminal's size, where its console has one."""
        if not self._closed and 0 < columns < 1 << 16 and 0 < rows < 1 << 16:
            self._resize(columns, rows)

    async def attach(self, *, history: bool = True) -> AsyncGenerator[bytes, None]:
        """The output from now on, the history first if wanted, until the machine ends."""
        watcher = _Watcher(self._history if history else b"")
        if self._closed:
            watcher.close()
        self._watchers.add(watcher)
        try:
            while data := await watcher.take():
                yield data
        finally:
            self._watchers.discard(watcher)

    def feed(self, data: bytes) -> None:
        """The guest wrote `data`."""
        self._history += data
        del self._history[:-HISTORY]
        for watcher in self._watchers:
            watcher.put(data)

    def close(self) -> None:
        """The machine has ended: watchers get what is left, then the end."""
        self._closed = True
        for watcher in self._watchers:
            watcher.close()


class _Watcher:
    def __init__(self, first: bytes | bytearray) -> None:
        self._pending = bytearray(first)
        self._lost = 0
        self._closed = False
        self._news = asyncio.Event()
        if first:
            self._news.set()

    def put(self, data: bytes) -> None:
        self._pending += data
        if (excess := len(self._pending) - BACKLOG) > 0:
            del self._pending[:excess]
            self._lost += excess
        self._news.set()

    def close(self) -> None:
        self._closed = True
        self._news.set()

    async def take(self) -> bytes:
        """What is there, waiting for it; empty = the end."""
        await self._news.wait()
        data = bytes(self._pending)
        self._pending.clear()
        if self._lost:
            data = b"\r\n[%d bytes of output lost]\r\n" % self._lost + data
            self._lost = 0
        if not self._closed:
            self._news.clear()
        return data
