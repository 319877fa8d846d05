"""One `vdev serve` process: its devices, its start (awaited, not guessed) and its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .process import Process, run, running, while_running

START_TIMEOUT = 60.0


@dataclass(frozen=True)
class BlkDevice:
    """A ``[[blk]]`` table."""

    socket: Path
    image: Path
    read_only: bool = False
    queues: int = 1
    serial: str | None = None
    cache: str | None = None
    engine: str | None = None
    lock: str | None = None


@dataclass(frozen=True)
class NetDevice:
    """A ``[[net]]`` table."""

    socket: Path
    bridge: str | None = None
    tap: str | None = None
    queues: int = 1
    mac: str | None = None
    mtu: int | None = None
    address: str | None = None


def command() -> list[str]:
    """The vdev beside this Python, or the one that the environment variable VDEV names."""
    named = os.environ.get("VDEV")
    return shlex.split(named) if named else [str(Path(sys.executable).with_name("vdev"))]


def config(blk: Sequence[BlkDevice], net: Sequence[NetDevice]) -> str:
    """The TOML text for these devices; what is not set is left out."""
    tables = []
    for kind, devices in (("blk", blk), ("net", net)):
        for device in devices:
            settings = {name: value for name, value in vars(device).items() if value is not None}
            lines = (f"{name} = {_toml(value)}" for name, value in settings.items())
            tables.append("\n".join((f"[[{kind}]]", *lines)))
    return "\n\n".join(tables) + "\n"


def _toml(value: Path | str | int | bool) -> str:
    # JSON's strings, numbers and booleans are TOML's.
    return json.dumps(str(value) if isinstance(value, Path) else value)


class Server:
    """A vdev server whose sockets are listening."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.told_to_stop = False

    @property
    def died(self) -> bool:
        """Whether it has ended without being told to."""
        return self.process.returncode is not None and not self.told_to_stop

    async def stop(self) -> int:
        """End it by SIGTERM and return its exit code."""
        self.told_to_stop = True
        return await self.process.stop()

    async def status(self, socket: Path) -> dict[str, Any]:
        """What ``vdev status`` says of the device on this socket."""
        (status,) = json.loads(await run(*command(), "status", str(self.process.pid), "--json"))
        (device,) = (d for d in status["devices"] if d["socket"] == str(socket))
        return dict(device)

    async def queue_stats(self, socket: Path) -> list[dict[str, Any]]:
        """The counters of each queue of that device."""
        queues: list[dict[str, Any]] = (await self.status(socket))["stats"]["queues"]
        return queues


@contextlib.asynccontextmanager
async def serving(
    blk: Sequence[BlkDevice], net: Sequence[NetDevice], name: str, directory: Path
) -> AsyncIterator[Server]:
    """A server of these devices, from READY=1 to a clean end."""
    file = directory / f"{name}.toml"
    file.write_text(config(blk, net))
    # A server that nobody can stop any more must still remove its bridges: SIGTERM, not SIGKILL.
    async with (
        _NotifySocket(directory / f"{name}.notify") as notify,
        running(
            "vdev serve",
            [*command(), "serve", file],
            directory / f"{name}.log",
            env={"NOTIFY_SOCKET": str(notify.path)},
            death_signal=signal.SIGTERM,
        ) as process,
    ):
        ready = while_running(process, notify.ready(), "before it was ready")
        await asyncio.wait_for(ready, START_TIMEOUT)
        server = Server(process)
        try:
            yield server
        finally:
            if server.died:
                raise process.ended("before it was told to")
            if await server.stop():
                raise process.ended("when told to stop")


class _NotifySocket:
    """The receiving end of systemd's notify protocol."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    async def __aenter__(self) -> _NotifySocket:
        self._socket.bind(str(self.path))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._socket.close()
        self.path.unlink(missing_ok=True)

    async def ready(self) -> None:
        """Wait for READY=1."""
        loop = asyncio.get_running_loop()
        while b"READY=1" not in (await loop.sock_recv(self._socket, 4096)).split(b"\n"):
            pass
