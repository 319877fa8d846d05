"""A network card served by this process in a namespace, with its counters within reach."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import uvloop

import vdev.net
from vdev.net.device import NetDevice
from vdev.server.device_server import DeviceServer

from .namespace import Namespace

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


class Served:
    """`vdev.net.serve` with these options, in an event loop of its own, in debug mode."""

    def __init__(
        self, namespace: Namespace, path: Path, *, loop: str = "asyncio", **options: Any
    ) -> None:
        self.path = os.fspath(path)
        self._namespace = namespace
        self._factory = LOOPS[loop]
        self._options = options
        self._ready = threading.Event()
        self._server: DeviceServer | None = None
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run)

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
            self._namespace.enter()
            with asyncio.Runner(debug=True, loop_factory=self._factory) as runner:
                runner.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        async with vdev.net.serve(self.path, **self._options) as server:
            self._server = server
            self._ready.set()
            await self._stop.wait()

    @property
    def device(self) -> NetDevice:
        assert self._server is not None
        assert isinstance(self._server.device, NetDevice)
        return self._server.device

    def features(self) -> list[str]:
        """The names of those that the driver accepted."""
        assert self._server is not None
        names: list[str] = self._server.status()["features"]
        return names

    @property
    def tap(self) -> str:
        return self.device.tap.name

    def count(self, queue: int, counter: str) -> int:
        """A counter of a queue: 2n receives, 2n + 1 transmits."""
        value: int = self.device.stats()["queues"][queue][counter]
        return value

    def call(self, function: Callable[[], object]) -> None:
        """`function()` on the server's event loop, as its callers must."""
        assert self._loop is not None

        async def run() -> None:
            function()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result()
