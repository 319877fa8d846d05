"""``vdev serve``: workers that serve, and the process that starts them again when they crash.

Theory of operation.  The supervisor has the listening sockets and the control socket, and touches
no image, no guest memory and no message of a front-end, so nothing that a guest does can reach it.
A worker inherits the sockets.  When it ends unasked, the next is started at once: connections wait
meanwhile in the backlog of their socket, and what the guests had in flight stands in their
in-flight regions.  What the killed one had under way in the kernel is over before the next begins
(`open_image`, succession).

A worker that does not last is not started at once again, but after a time that doubles.  Meanwhile
front-ends are turned away, rather than left without an answer.

Rule: a worker that never served is the user's mistake, and ends the whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import vdev
from vdev.errors import UserError, VdevError
from vdev.server.child import Child
from vdev.server.control import Request
from vdev.server.devices import DeviceSpec
from vdev.server.notify import notify
from vdev.server.orders import Orders
from vdev.server.passage import Passage
from vdev.server.service import controlled, patience_of, program_of
from vdev.server.signals import on_signals
from vdev.server.socket_path import SocketPath

_log = logging.getLogger("vdev.supervisor")
_MAX_ANSWER = 1 << 26
_SUCCESSOR_WAITS = 10.0
"""Seconds that what a killed worker has under way may take to end."""


@dataclass(frozen=True)
class Patience:
    """When a worker that ended is started again, in seconds: at once where it lasted `lasting`,
    and the first time; then after `first`, and twice as long each time, up to `most`."""

    lasting: float = 10.0
    first: float = 0.1
    most: float = 10.0

    def next(self, delay: float | None, lasted: float) -> float:
        """The delay after one, None = there was none yet."""
        if delay is None or lasted >= self.lasting:
            return 0.0
        return min(max(2 * delay, self.first), self.most)


class WorkerFailed(VdevError):
    """A worker ended before it served; it has said why.  code: the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a worker ended with {code} before it served")
        self.code = code


@dataclass(frozen=True)
class _Process:
    """One that serves. channel: our end, of which the reader and writer are."""

    process: Child
    channel: socket.socket
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


@dataclass
class _Worker:
    """Those that serve `devices`, one after another; one of them is alive, or none."""

    devices: list[DeviceSpec]
    sockets: list[socket.socket]
    succession: int = field(default_factory=lambda: random.getrandbits(60))
    running: _Process | None = None
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)
    served: bool = False
    restarts: int = 0

    @property
    def names(self) -> str:
        return ", ".join(device.name for device in self.devices)

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


class Supervisor:
    """Serves `devices` in workers: in one, or isolated, in one for each.

    command: starts a worker, with the descriptor of its orders as the last argument.  control: see
    `controlled`.
    """

    def __init__(
        self,
        devices: Sequence[DeviceSpec],
        command: Sequence[str],
        *,
        isolate: bool = False,
        control: str | bool = True,
        iothreads: int = 1,
        poll_us: int = 32,
        loop: str = "uvloop",
        patience: Patience | None = None,
    ) -> None:
        self._devices = devices
        self._command = command
        self._isolate = isolate
        self._control = control
        self._iothreads = iothreads
        self._poll_us = poll_us
        self._loop = loop
        self._patience = patience or Patience()
        self._workers: list[_Worker] = []
        self._stop = asyncio.Event()
        self._started = time.monotonic()

    async def run(self) -> None:
        """Serves until SIGTERM, SIGINT, SIGHUP, the command "stop", or all workers were ended.

        Raises UserError where a socket cannot be had, WorkerFailed where a worker cannot serve.
        """
        with on_signals(self._stop.set), contextlib.ExitStack() as stack:
            sockets = [_listen(device.socket, stack) for device in self._devices]
            served = list(zip(self._devices, sockets, strict=True))
            groups = [[one] for one in served] if self._isolate else [served]
            self._workers = [_Worker([d for d, _ in g], [s for _, s in g]) for g in groups]
            async with controlled(self._control, self._handlers()):
                await self._keep_all()
            notify("STOPPING=1")

    async def _keep_all(self) -> None:
        keeping = [asyncio.ensure_future(self._keep(worker)) for worker in self._workers]
        all_ended = asyncio.gather(*keeping)
        asked = asyncio.ensure_future(self._stop.wait())
        ends: list[asyncio.Future[Any]] = [asked, all_ended]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stop.set()
            for worker in self._workers:
                _terminate(worker)
            outcomes = await asyncio.gather(*keeping, *ends, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _keep(self, worker: _Worker) -> None:
        """Starts it, again and again; returns when it has ended as it was told to."""
        delay: float | None = None
        while not self._stop.is_set():
            began = time.monotonic()
            code = await self._run_once(worker)
            if code == 0:
                return
            if self._stop.is_set() and code == -signal.SIGTERM:
                return  # it had not begun to serve
            if not worker.served:
                raise WorkerFailed(code)
            delay = self._patience.next(delay, time.monotonic() - began)
            worker.restarts += 1
            when = f"again in {delay:g} s, as it does not last" if delay else "again"
            _log.error("the worker of %s %s: it is started %s", worker.names, _end(code), when)
            async with _turned_away(worker.sockets if delay else []):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), delay)

    async def _run_once(self, worker: _Worker) -> int:
        """The exit code of one worker, or of the last that took over from it; or its signal as a
        negative number."""
        orders = replace(
            self._orders(worker),
            fds=[sock.fileno() for sock in worker.sockets],
            patience=_SUCCESSOR_WAITS if worker.served else 0.0,
        )
        running = worker.running = await self._start(orders, self._command)
        if self._stop.is_set():
            _terminate(worker)
        try:
            with contextlib.suppress(OSError):
                await worker.ask("status")
                self._has_begun(worker)
            while True:
                code = await running.process.wait()
                async with worker.moving:
                    if worker.running is running:
                        return code
                    running.writer.close()
                    running = worker.running
        finally:
            worker.running = None
            running.writer.close()

    def _orders(self, worker: _Worker) -> Orders:
        return Orders(
            worker.devices,
            self._iothreads,
            self._poll_us,
            self._loop,
            succession=worker.succession,
        )

    async def _start(self, orders: Orders, command: Sequence[str]) -> _Process:
        """A process with these orders, and a channel to it."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                env = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
                process = replace(orders, channel=theirs.fileno()).give(command, env)
        except BaseException:
            ours.close()
            raise
        streams = await asyncio.open_unix_connection(sock=ours, limit=_MAX_ANSWER)
        return _Process(process, ours, *streams)

    def _has_begun(self, worker: _Worker) -> None:
        before = all(worker.served for worker in self._workers)
        worker.served = True
        if not before and all(worker.served for worker in self._workers):
            notify("READY=1")

    # Commands

    def _handlers(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "stop": self.stop,
            "resize": self.resize,
            "link": self.link,
            "upgrade": self.upgrade,
        }

    async def status(self, _request: Request) -> dict[str, Any]:
        """The command "status": as of one server, and each worker's process."""
        answers = await asyncio.gather(*(_status(worker) for worker in self._workers))
        return {
            "pid": os.getpid(),
            "version": vdev.__version__,
            "uptime_s": round(time.monotonic() - self._started, 3),
            "iothreads": [thread for answer in answers for thread in answer["iothreads"]],
            "devices": [device for answer in answers for device in answer["devices"]],
            "workers": [
                {
                    "pid": worker.running.process.pid if worker.running is not None else None,
                    "devices": [device.name for device in worker.devices],
                    "restarts": worker.restarts,
                }
                for worker in self._workers
            ],
        }

    async def stop(self, _request: Request) -> None:
        """The command "stop": as SIGTERM does."""
        self._stop.set()

    async def upgrade(self, request: Request) -> dict[str, Any]:
        """The command "upgrade": as of one server, for each worker, one after another.

        The workers that start from now on are of that program, too.
        """
        command, patience = program_of(request, self._command), patience_of(request)
        pauses = [await self._replace(worker, command, patience) for worker in self._workers]
        self._command = command
        return {"pid": os.getpid(), "pause_ms": max(pauses)}

    async def _replace(self, worker: _Worker, command: Sequence[str], patience: float) -> float:
        async with worker.moving:
            ours, theirs = Passage.pair()
            with ours, theirs:
                orders = replace(self._orders(worker), passage=theirs.fileno())
                successor = await self._start(orders, command)
                theirs.close()
                try:
                    watched = successor.process.watch()
                    try:
                        fds = {"passage": ours.fileno(), "successor": watched}
                        answer = await worker.ask("upgrade", fds=fds, timeout=patience)
                    finally:
                        os.close(watched)
                except BaseException as error:
                    successor.writer.close()
                    successor.process.kill()
                    await successor.process.wait()
                    if isinstance(error, ConnectionError):
                        raise UserError(f"the worker of {worker.names} has ended") from None
                    raise
            worker.running = successor
            if self._stop.is_set():
                _terminate(worker)
            return float(answer["pause_ms"])

    async def resize(self, request: Request) -> Any:
        """The command "resize": asks the worker that has the device."""
        return await self._ask_owner("resize", request, "blk", "block device", "size")

    async def link(self, request: Request) -> Any:
        """The command "link": the same."""
        return await self._ask_owner("link", request, "net", "card", "up")

    async def _ask_owner(
        self, command: str, request: Request, kind: str, what: str, argument: str
    ) -> Any:
        name = request.get("device")
        for worker in self._workers:
            if len(self._workers) == 1 or name in [device.name for device in worker.devices]:
                try:
                    return await worker.ask(
                        command, device=name, **{argument: request.get(argument)}
                    )
                except ConnectionError:
                    raise UserError(f"device {name!r}: its worker is being started again") from None
        names = ", ".join(d.name for d in self._devices if d.kind == kind)
        raise UserError(f"device {name!r} is no {what} of this server: {names}")


async def _status(worker: _Worker) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = await worker.ask("status")
    except ConnectionError:
        devices = [
            {
                "name": d.name,
                "kind": d.kind,
                "socket": d.socket,
                "state": "restarting",
                "stats": None,
            }
            for d in worker.devices
        ]
        return {"iothreads": [], "devices": devices}
    return answer


def _listen(path: str, stack: contextlib.ExitStack) -> socket.socket:
    place = SocketPath(path)
    stack.callback(place.sock.close)
    stack.callback(place.remove)
    return place.sock


def _terminate(worker: _Worker) -> None:
    if worker.running is not None:
        worker.running.process.terminate()


def _end(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


@contextlib.asynccontextmanager
async def _turned_away(sockets: Sequence[socket.socket]) -> AsyncIterator[None]:
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
