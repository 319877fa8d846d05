"""A device served on one vhost-user endpoint, to one front-end after another."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Self

from vdev.descriptors import Descriptors
from vdev.errors import UserError, VdevError
from vdev.ratelog import Log, RateLimitedLog
from vdev.server.listener import Endpoint
from vdev.virtio.device import Device
from vdev.virtio.vhost_user.channel import Channel
from vdev.virtio.vhost_user.connection import serve_connection
from vdev.virtio.vhost_user.movable import MovableBackend
from vdev.virtio.vhost_user.rings import Gate

Stand = Callable[[Descriptors], dict[str, Any]]


class _Connection:
    """A front-end, and what was agreed with it."""

    def __init__(self, channel: Channel, backend: MovableBackend) -> None:
        self.channel = channel
        self.backend = backend
        self.peer_pid = channel.peer_pid


class DeviceServer:
    """Serves `device` at `endpoint`.

    The device stays the caller's; the endpoint is closed with the server.
    stand: writes down what the device stands on (image, tap), for a successor in another process.
    """

    def __init__(
        self,
        device: Device,
        endpoint: Endpoint,
        *,
        log: Log | None = None,
        stand: Stand | None = None,
    ) -> None:
        self.device = device
        self.endpoint = endpoint
        self._log: Log = log if log is not None else logging.getLogger("vdev.server")
        self._warnings = RateLimitedLog(self._log)
        self._stand = stand
        self._task: asyncio.Task[None] | None = None
        self._connection: _Connection | None = None
        self._connections = 0
        self._halting: asyncio.Future[list[dict[str, Any]]] | None = None

    async def start(self) -> None:
        """Opens the endpoint and serves from now on. Raises UserError."""
        if self._task is not None:
            raise RuntimeError(f"{self.device.name} is already being served")
        self.endpoint.open(self._warnings)
        self._task = asyncio.ensure_future(self._serve())

    async def wait(self) -> None:
        """Returns when no more front-ends will come: a connected fd that hung up, or `close`.

        Raises UserError where the endpoint failed.
        """
        if self._task is not None:
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.result()

    async def close(self) -> None:
        """Ends the service: queues stop and drain, the front-end is disconnected."""
        self.abort()
        if self._task is not None:
            await asyncio.wait([self._task])

    def abort(self) -> None:
        """Begins to end the service and does not wait for it."""
        self.endpoint.close()
        if self._task is not None:
            self._task.cancel()

    def status(self) -> dict[str, Any]:
        """Where it is served, to whom, and what was agreed."""
        connection = self._connection
        done = self._task is None or self._task.done()
        return {
            "socket": self.endpoint.address,
            "state": "connected" if connection else "stopped" if done else "waiting",
            "front_end_pid": connection.peer_pid if connection else None,
            "connections": self._connections,
            **(connection.backend.status() if connection else {}),
        }

    async def _serve(self) -> None:
        try:
            if self._connection is not None:
                self._connection.backend.resume()
                await self._serve_connection(self._connection.channel)
            while (sock := await self.endpoint.next()) is not None:
                self._connections += 1
                await self._serve_connection(Channel(sock))
        except VdevError as error:
            self._log.error("%s: %s", self.device.name, error)
            raise
        finally:
            self.endpoint.close()

    async def _serve_connection(self, channel: Channel) -> None:
        try:
            if self._connection is None:
                backend = MovableBackend(self.device, self._warnings)
                self._connection = _Connection(channel, backend)
            await serve_connection(channel, self._connection.backend, self._warnings)
        except Exception:
            # A fault of ours: this front-end's end, not that of the next one.
            self._log.exception("%s: serving a front-end failed", self.device.name)
        finally:
            channel.close()
            self._connection = None

    # Moving to another process: `pause`, `save`, `halt`; there `restore`, `set_halted`, `go_on` and
    # `start`.  The front-end's messages wait from `pause` on, its requests from `halt` on; `resume`
    # ends both here.

    def stand(self, fds: Descriptors) -> dict[str, Any]:
        """What the device stands on. Raises UserError where that cannot be passed on."""
        if self._stand is None:
            raise UserError(f"{self.device.name}: a device of this kind cannot move")
        return self._stand(fds)

    async def pause(self) -> None:
        """Returns when no message of the front-end is under way."""
        self.endpoint.pause()
        if (connection := self._connection) is not None:
            connection.channel.pause()
            await connection.channel.at_rest.wait()
            connection.backend.pause()

    def save(self, fds: Descriptors) -> dict[str, Any]:
        """All that `restore` needs, while paused."""
        connection = self._connection
        return {
            "endpoint": self.endpoint.save(fds),
            "connections": self._connections,
            "channel": connection.channel.save(fds) if connection else None,
            "backend": connection.backend.save(fds) if connection else None,
        }

    @classmethod
    def restore(
        cls,
        device: Device,
        state: dict[str, Any],
        fds: Descriptors,
        *,
        log: Log | None = None,
        stand: Stand | None = None,
    ) -> Self:
        """What `save` gave, of `device` in another process; it is served from `start` on.

        Raises what `MovableBackend.restore` raises.
        """
        server = cls(device, Endpoint.restore(state["endpoint"], fds), log=log, stand=stand)
        server._connections = int(state["connections"])
        if state["channel"] is not None:
            channel = Channel.restore(state["channel"], fds)
            backend = MovableBackend(device, server._warnings)
            backend.restore(state["backend"], fds)
            server._connection = _Connection(channel, backend)
        return server

    async def halt(self) -> list[dict[str, Any]]:
        """Where the rings stand, when they are drained. Raises OSError."""
        self.device.hold(True)
        backend = self._connection.backend if self._connection is not None else None
        self._halting = asyncio.ensure_future(_halt(backend))
        return await asyncio.shield(self._halting)

    def set_halted(self, rings: list[dict[str, Any]]) -> int:
        """What `halt` gave; returns how many rings `go_on` starts."""
        if self._connection is None:
            return 0
        self._connection.backend.set_halted(rings)
        return len(self._connection.backend.to_start)

    async def go_on(self, gate: Gate | None = None) -> None:
        """Serves the rings where they stand. Raises what `MovableBackend.go_on` raises."""
        if self._connection is not None:
            await self._connection.backend.go_on(gate)

    async def resume(self) -> None:
        """As if there had been no pause; a front-end that cannot be served again loses us."""
        if (halting := self._halting) is not None:
            self._halting = None
            try:
                await halting
                await self.go_on()
            except (OSError, VdevError) as error:
                self._log.error("%s: cannot go on: %s", self.device.name, error)
                if self._connection is not None:
                    self._connection.channel.hang_up()
            self.device.hold(False)
        if self._connection is not None:
            self._connection.backend.resume()
            self._connection.channel.resume()
        self.endpoint.resume()


async def _halt(backend: MovableBackend | None) -> list[dict[str, Any]]:
    if backend is None:
        return []
    await backend.halt()
    return backend.halted
