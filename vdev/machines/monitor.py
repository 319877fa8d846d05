"""QEMU's monitor (QMP), by the library qemu.qmp."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

from qemu.qmp import EventListener, ExecuteError, Message, QMPClient, QMPError, Runstate

from vdev.errors import UserError

# The library logs the end of QEMU, which is our business, as an error of its own.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class Monitor:
    """A connection to QEMU's monitor; `on_event(name, data)` hears of everything QEMU tells."""

    def __init__(self, sock: socket.socket, on_event: Callable[[str, Any], None]) -> None:
        self._sock = sock
        self._client = QMPClient("qemu")
        self._listener = EventListener()
        self._client.register_listener(self._listener)
        self._on_event = on_event
        self._events: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Takes the greeting. Raises UserError where QEMU is gone."""
        try:
            await self._client.connect(self._sock)
        except (QMPError, OSError, EOFError) as error:
            raise UserError(f"QEMU's monitor: {error}") from None
        self._events = asyncio.ensure_future(self._watch())

    async def _watch(self) -> None:
        async for event in self._listener:
            self._hear(event)

    def _hear(self, event: Message) -> None:
        self._on_event(str(event["event"]), event.get("data", {}))

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Runs a command. Raises UserError."""
        try:
            return await self._client.execute(command, dict(arguments or {}))
        except ExecuteError as error:
            raise UserError(f"QEMU: {command}: {error}") from None
        except (QMPError, OSError) as error:
            raise UserError(f"QEMU has ended: {command}: {error}") from None

    async def ended(self) -> None:
        """Returns when QEMU has closed its end, and all that it told before was heard."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        for event in self._listener.clear():
            self._hear(event)

    async def close(self) -> None:
        """Lets go of QEMU."""
        if self._events is not None:
            self._events.cancel()
            await asyncio.gather(self._events, return_exceptions=True)
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()
        self._sock.close()
