"""A switch of this process's, in an event loop of its own, and cards in its ports."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

from tests.frontend.net import NetClient
from vdev.net.fabric import PortSettings
from vdev.server.switch import Switch

from .frames import frame
from .namespace import Namespace

T = TypeVar("T")
Plug = Callable[..., NetClient]
"""Connects a card to the port of this name."""
EVERYONE = b"\xff" * 6


def mac(number: int) -> bytes:
    """The address of card `number`."""
    return bytes([2, 0, 0, 0, number >> 8, number & 0xFF])


def text(address: bytes) -> str:
    return address.hex(":")


def to(source: int, target: int | bytes, payload: int = 100) -> bytes:
    """A frame from one card to another, or to an address."""
    address = target if isinstance(target, bytes) else mac(target)
    return frame(payload, source=mac(source), to=address)


class Switched:
    """A `Switch` with these options, in debug mode; `ports` are made by name, with sockets."""

    def __init__(
        self,
        folder: Path,
        *ports: str,
        namespace: Namespace | None = None,
        settings: dict[str, dict[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self.folder = folder
        self._namespace = namespace
        self._names, self._settings = ports, settings or {}
        self._options = options
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run)

    def path(self, port: str) -> str:
        return os.fspath(self.folder / port)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error
        return self

    def __exit__(self, *exc: object) -> None:
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            if self._namespace is not None:
                self._namespace.enter()
            with asyncio.Runner(debug=True) as runner:
                runner.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with Switch(**self._options) as self.switch:
            for name in self._names:
                await self.switch.add_port(
                    name, socket=self.path(name), **self._settings.get(name, {})
                )
            self._ready.set()
            await self._stop.wait()

    def run(self, work: Callable[[Switch], Coroutine[Any, Any, T]]) -> T:
        """What comes of `work(switch)` on its event loop."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work(self.switch), self._loop).result()

    def table(self) -> dict[tuple[str, int], str]:
        """The port behind which each station is, by address and VLAN.

        All that went in before has come out when this returns: the message comes between passes.
        """
        stations = self.run(lambda switch: switch.table())
        return {(s["mac"], s["vlan"]): s["port"] for s in stations}

    def count(self, port: str, counter: str) -> int:
        """A counter of a port, of all frames that were sent before."""
        self.table()
        return self.switch.counters()[port][counter]

    def set(self, port: str, **changes: Any) -> None:
        """Changes settings of a port."""

        async def change(switch: Switch) -> None:
            settings: PortSettings = replace(switch.settings(port), **changes)
            await switch.change_port(port, settings)

        self.run(change)


def nothing_for(switched: Switched, *cards: NetClient) -> None:
    """Of all frames that were sent, none came to these cards."""
    switched.table()
    for card in cards:
        assert card.rx().pop() is None, "a frame came that was not for this card"
