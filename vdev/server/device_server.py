"""A device served on one vhost-user endpoint, to one front-end after another."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Sequence
from typing import Any

from vdev.errors import VdevError
from vdev.iothread import IOThread
from vdev.ratelog import Log, RateLimitedLog
from vdev.server.listener import Endpoint
from vdev.virtio.device import Device
from vdev.virtio.vhost_user.backend import Backend
from vdev.virtio.vhost_user.connection import serve_connection

_PEER_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class DeviceServer:
    """Serves `device` at `endpoint`; its queues run on `iothreads`, those with fewest first.

    Device and iothreads stay the caller's; the endpoint is closed with the server.
    """

    def __init__(
        self,
        device: Device,
        endpoint: Endpoint,
        *,
        iothreads: Sequence[IOThread],
        log: Log | None = None,
    ) -> None:
        self.device = device
        self.endpoint = endpoint
        self.iothreads = iothreads
        self._log: Log = log if log is not None else logging.getLogger("vdev.server")
        self._warnings = RateLimitedLog(self._log)
        self._task: asyncio.Task[None] | None = None
        self._backend: Backend | None = None
        self._peer_pid = 0
        self._connections = 0

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
        serving = self._backend is not None
        done = self._task is None or self._task.done()
        return {
            "socket": self.endpoint.address,
            "state": "connected" if serving else "stopped" if done else "waiting",
            "front_end_pid": self._peer_pid if serving else None,
            "connections": self._connections,
            **(self._backend.status() if self._backend is not None else {}),
        }

    async def _serve(self) -> None:
        try:
            while (sock := await self.endpoint.next()) is not None:
                await self._serve_one(sock)
        except VdevError as error:
            self._log.error("%s: %s", self.device.name, error)
            raise
        finally:
            self.endpoint.close()

    async def _serve_one(self, sock: socket.socket) -> None:
        self._connections += 1
        self._peer_pid = _peer_pid(sock)
        try:
            self._backend = Backend(self.device, self.iothreads, self._warnings)
            await serve_connection(sock, self._backend, self._warnings)
        except Exception:
            # A fault of ours: this front-end's end, not that of the next one.
            self._log.exception("%s: serving a front-end failed", self.device.name)
        finally:
            sock.close()
            self._backend = None


def _peer_pid(sock: socket.socket) -> int:
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    return int(_PEER_CREDENTIALS.unpack(data)[0])
