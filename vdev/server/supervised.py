"""What a `Supervisor` has of each of its workers: the process that serves, its sockets, its past.

Rule: a process is reaped, and another one put in its place, only by whoever holds `moving`.  So
while it is held, the process that is noted is there, be it as one that has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from vdev.descriptors import Descriptors
from vdev.errors import UserError
from vdev.server.child import Child
from vdev.server.devices import DeviceSpec
from vdev.server.socket_path import SocketPath

_MAX_ANSWER = 1 << 26


@dataclass(frozen=True)
class Process:
    """One that serves. channel: our end, of which the reader and writer are."""

    child: Child
    channel: socket.socket
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @classmethod
    async def open(cls, child: Child, channel: socket.socket) -> Self:
        """Takes the channel over."""
        streams = await asyncio.open_unix_connection(sock=channel, limit=_MAX_ANSWER)
        return cls(child, channel, *streams)


@dataclass
class Worker:
    """Those that serve `devices`, one after another; one of them is alive, or none.

    places: where front-ends connect.  began: when the last was started, as `time.monotonic`; delay:
    how many seconds after its predecessor's end, None = there was none.
    """

    devices: list[DeviceSpec]
    places: list[SocketPath]
    succession: int = field(default_factory=lambda: random.getrandbits(60))
    running: Process | None = None
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)
    served: bool = False
    restarts: int = 0
    began: float = 0.0
    delay: float | None = None
    _left: tuple[Child, socket.socket] | None = None

    @property
    def names(self) -> str:
        return ", ".join(device.name for device in self.devices)

    @property
    def sockets(self) -> list[socket.socket]:
        return [place.sock for place in self.places]

    @property
    def is_idle(self) -> bool:
        """Whether there is one, whose end nobody has noticed, and nothing is being asked of it."""
        there = self.running is not None and not self.running.writer.is_closing()
        return there and not self.asking.locked()

    def save(self, fds: Descriptors) -> dict[str, Any]:
        """All of it, for `restore` in the next program; its process, too, if there is one.

        It stays true while `moving` is held and it `is_idle`, until the event loop's next turn.
        """
        running = self.running
        return {
            "devices": [asdict(device) for device in self.devices],
            "places": [place.save(fds) for place in self.places],
            "succession": self.succession,
            "pid": running.child.pid if running is not None else None,
            "channel": fds.put(running.channel.fileno()) if running is not None else None,
            "served": self.served,
            "restarts": self.restarts,
            "began": self.began,
            "delay": self.delay,
        }

    @classmethod
    def restore(cls, state: dict[str, Any], fds: Descriptors) -> Self:
        """What `save` gave; `resume` is due."""
        devices = [DeviceSpec(**device) for device in state["devices"]]
        worker = cls(
            devices,
            [
                SocketPath.restore(device.socket, place, fds)
                for device, place in zip(devices, state["places"], strict=True)
            ],
            succession=state["succession"],
            served=state["served"],
            restarts=state["restarts"],
            began=state["began"],
            delay=state["delay"],
        )
        if state["channel"] is not None:
            worker._left = Child(state["pid"]), socket.socket(fileno=fds.take(state["channel"]))
        return worker

    async def resume(self) -> None:
        """Listens to the process that the last program has left, if it did."""
        if self._left is not None:
            self.running = await Process.open(*self._left)
            self._left = None

    async def ask(
        self, command: str, *, fds: Mapping[str, int] | None = None, **arguments: Any
    ) -> Any:
        """What it answers. Raises UserError where it refuses, ConnectionError where it is gone."""
        asked = {"command": command, **arguments, "fds": list(fds or ())}
        line = json.dumps(asked).encode() + b"\n"
        async with self.asking:
            if (running := self.running) is None:
                raise ConnectionError
            try:
                # Nothing else is on its way, so a line goes at once.
                socket.send_fds(running.channel, [line], list((fds or {}).values()))
            except OSError:
                raise ConnectionError from None
            line = await running.reader.readline()
        if not line:
            raise ConnectionError
        answer = json.loads(line)
        if not answer["ok"]:
            raise UserError(answer["error"])
        return answer["result"]

    async def status(self) -> dict[str, Any]:
        """What it says of its iothreads and devices, or what is known while there is none."""
        try:
            answer: dict[str, Any] = await self.ask("status")
        except ConnectionError:
            devices = [
                {
                    "name": d.name,
                    "kind": d.kind,
                    "socket": d.socket,
                    "state": "restarting",
                    "stats": None,
                }
                for d in self.devices
            ]
            return {"iothreads": [], "devices": devices}
        return answer

    def terminate(self) -> None:
        """SIGTERM to the one that is alive, if one is."""
        if self.running is not None:
            self.running.child.terminate()


@contextlib.asynccontextmanager
async def turned_away(sockets: Sequence[socket.socket]) -> AsyncIterator[None]:
    """Whoever connects meanwhile is hung up on, and may try again."""
    loop = asyncio.get_running_loop()

    def turn_away(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.accept()[0].close()

    for sock in sockets:
        sock.setblocking(False)
        loop.add_reader(sock.fileno(), turn_away, sock)
    try:
        yield
    finally:
        for sock in sockets:
            loop.remove_reader(sock.fileno())
