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

An upgrade replaces the workers, one after another, and then the supervisor itself (`reexec`), whose
process and sockets stay.  The next program takes over between two requests: nothing is being asked
of a worker, nor answered to anyone but who asked for the upgrade, and it is the next one that
answers that.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn, Self

import vdev
from vdev.descriptors import Descriptors
from vdev.errors import UserError, VdevError
from vdev.server import reexec
from vdev.server.control import ControlServer, ControlSocket, Request
from vdev.server.devices import DeviceSpec
from vdev.server.notify import notify
from vdev.server.orders import Orders
from vdev.server.passage import Passage
from vdev.server.service import Control, controlled, patience_of, program_of
from vdev.server.signals import held_back, on_signals
from vdev.server.socket_path import SocketPath
from vdev.server.supervised import Process, Worker, turned_away

_log = logging.getLogger("vdev.supervisor")
_SUCCESSOR_WAITS = 10.0
"""Seconds that what a killed worker has under way may take to end."""
_TURN = 0.001
"""Seconds in which the event loop sees what has come before."""


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


class Supervisor:
    """Serves `devices` in workers: in one, or isolated, in one for each.

    program: the vdev that it runs.  control: see `controlled`.
    """

    def __init__(
        self,
        devices: Sequence[DeviceSpec],
        program: Sequence[str],
        *,
        isolate: bool = False,
        control: Control = True,
        iothreads: int = 1,
        poll_us: int = 32,
        loop: str = "uvloop",
        patience: Patience | None = None,
    ) -> None:
        self._devices = devices
        self._program = program
        self._isolate = isolate
        self._control = control
        self._iothreads = iothreads
        self._poll_us = poll_us
        self._loop = loop
        self._patience = patience or Patience()
        self._workers: list[Worker] = []
        self._controller: ControlServer | None = None
        self._upgrading = asyncio.Lock()
        self._stop = asyncio.Event()
        self._started = time.monotonic()

    def _save(self, request: Request, program: Sequence[str], result: Any) -> reexec.Left:
        """All that `program` needs to go on in our place, and to answer the request."""
        assert self._controller is not None
        fds = Descriptors()
        state = {
            "program": list(program),
            "iothreads": self._iothreads,
            "poll_us": self._poll_us,
            "loop": self._loop,
            "patience": asdict(self._patience),
            "started": self._started,
            "control": {
                **self._controller.save(fds),
                "connections": self._controller.save_connections(fds, request.peer, result),
            },
            "workers": [worker.save(fds) for worker in self._workers],
        }
        return reexec.Left(state, fds)

    @classmethod
    def restore(cls, left: reexec.Left) -> Self:
        """What the last program of this process has left; `run` goes on with it."""
        state, fds = left
        workers = [Worker.restore(worker, fds) for worker in state["workers"]]
        supervisor = cls(
            [device for worker in workers for device in worker.devices],
            state["program"],
            control=ControlSocket.restore(state["control"], fds),
            iothreads=state["iothreads"],
            poll_us=state["poll_us"],
            loop=state["loop"],
            patience=Patience(**state["patience"]),
        )
        supervisor._workers = workers
        supervisor._started = state["started"]
        fds.close()
        return supervisor

    async def run(self) -> None:
        """Serves until SIGTERM, SIGINT, SIGHUP, the command "stop", or all workers were ended.

        Raises UserError where a socket cannot be had, WorkerFailed where a worker cannot serve.
        """
        with on_signals(self._stop.set), contextlib.ExitStack() as stack:
            if not self._workers:
                served = [(d, _kept(SocketPath(d.socket), stack)) for d in self._devices]
                groups = [[one] for one in served] if self._isolate else [served]
                self._workers = [Worker([d for d, _ in g], [p for _, p in g]) for g in groups]
            else:
                for worker in self._workers:
                    for place in worker.places:
                        _kept(place, stack)
                    await worker.resume()
            async with controlled(self._control, self._handlers()) as self._controller:
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
                worker.terminate()
            outcomes = await asyncio.gather(*keeping, *ends, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _keep(self, worker: Worker) -> None:
        """Starts it, again and again; returns when it has ended as it was told to."""
        while worker.running is not None or not self._stop.is_set():
            code = await self._run_once(worker)
            if code == 0:
                return
            if self._stop.is_set() and code == -signal.SIGTERM:
                return  # it had not begun to serve
            if not worker.served:
                raise WorkerFailed(code)
            delay = self._patience.next(worker.delay, time.monotonic() - worker.began)
            worker.delay = delay
            worker.restarts += 1
            when = f"again in {delay:g} s, as it does not last" if delay else "again"
            _log.error("the worker of %s %s: it is started %s", worker.names, _end(code), when)
            async with turned_away(worker.sockets if delay else []):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), delay)

    async def _run_once(self, worker: Worker) -> int:
        """The exit code of one worker, or of the last that took over from it; or its signal as a
        negative number."""
        async with worker.moving:
            running = worker.running or await self._start_first(worker)
        if self._stop.is_set():
            worker.terminate()
        with contextlib.suppress(OSError):
            await worker.ask("status")
            self._has_begun(worker)
        while True:
            await running.child.ended()
            async with worker.moving:
                if worker.running is running:
                    worker.running = None
                    running.writer.close()
                    return running.child.reap()
                assert worker.running is not None
                running = worker.running

    async def _start_first(self, worker: Worker) -> Process:
        """One that nobody is there to hand over to."""
        orders = replace(
            self._orders(worker),
            fds=[sock.fileno() for sock in worker.sockets],
            patience=_SUCCESSOR_WAITS if worker.served else 0.0,
        )
        worker.began = time.monotonic()
        worker.running = await self._start(orders, self._program)
        return worker.running

    def _orders(self, worker: Worker) -> Orders:
        return Orders(
            worker.devices,
            self._iothreads,
            self._poll_us,
            self._loop,
            succession=worker.succession,
        )

    async def _start(self, orders: Orders, program: Sequence[str]) -> Process:
        """A process with these orders, and a channel to it."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                env = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
                child = replace(orders, channel=theirs.fileno()).give(program, env)
        except BaseException:
            ours.close()
            raise
        return await Process.open(child, ours)

    def _has_begun(self, worker: Worker) -> None:
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
        answers = await asyncio.gather(*(worker.status() for worker in self._workers))
        return {
            "pid": os.getpid(),
            "version": vdev.__version__,
            "uptime_s": round(time.monotonic() - self._started, 3),
            "iothreads": [thread for answer in answers for thread in answer["iothreads"]],
            "devices": [device for answer in answers for device in answer["devices"]],
            "workers": [
                {
                    "pid": worker.running.child.pid if worker.running is not None else None,
                    "devices": [device.name for device in worker.devices],
                    "restarts": worker.restarts,
                }
                for worker in self._workers
            ],
        }

    async def stop(self, _request: Request) -> None:
        """The command "stop": as SIGTERM does."""
        self._stop.set()

    async def upgrade(self, request: Request) -> NoReturn:
        """The command "upgrade": as of one server, for each worker, one after another; then for
        this program, and it is the next one that answers."""
        program, patience = program_of(request, self._program), patience_of(request)
        if self._upgrading.locked():
            raise UserError("another program is taking over already")
        async with self._upgrading:
            try:
                # At first, too: a program that cannot go on is to change nothing.
                await reexec.attempt(program, self._save(request, program, None), patience)
            except UserError as error:
                raise UserError(f"{error}; this server goes on") from None
            pauses = [await self._replace(worker, program, patience) for worker in self._workers]
            self._program = program
            result = {"pid": os.getpid(), "pause_ms": max(pauses)}
            try:
                await reexec.attempt(program, self._save(request, program, None), patience)
                await self._become(request, program, result, patience)
            except UserError as error:
                raise UserError(
                    f"{error}; this supervisor goes on, with workers of the new program"
                ) from None

    async def _become(
        self, request: Request, program: Sequence[str], result: Any, patience: float
    ) -> NoReturn:
        """`reexec.become`, as soon as nothing is under way; requests that come wait for the next
        program.  Raises UserError."""
        assert self._controller is not None
        try:
            with self._controller.held():
                async with asyncio.timeout(patience):
                    while True:
                        await self._become_if_idle(request, program, result)
        except TimeoutError:
            raise UserError("a worker, or another command, is busy for too long") from None

    async def _become_if_idle(self, request: Request, program: Sequence[str], result: Any) -> None:
        assert self._controller is not None
        async with contextlib.AsyncExitStack() as stack:
            for worker in self._workers:
                await stack.enter_async_context(worker.moving)
            with held_back():
                await asyncio.sleep(_TURN)  # those that have come are noticed
                if self._stop.is_set():
                    raise UserError("the server is being ended")
                workers_idle = all(worker.is_idle for worker in self._workers)
                if workers_idle and self._controller.is_idle(request.peer):
                    reexec.become(program, self._save(request, program, result))

    async def _replace(self, worker: Worker, program: Sequence[str], patience: float) -> float:
        async with worker.moving:
            ours, theirs = Passage.pair()
            with ours, theirs:
                orders = replace(self._orders(worker), passage=theirs.fileno())
                successor = await self._start(orders, program)
                theirs.close()
                try:
                    watched = successor.child.watch()
                    try:
                        fds = {"passage": ours.fileno(), "successor": watched}
                        answer = await worker.ask("upgrade", fds=fds, timeout=patience)
                    finally:
                        os.close(watched)
                except BaseException as error:
                    successor.writer.close()
                    successor.child.kill()
                    await successor.child.wait()
                    if isinstance(error, ConnectionError):
                        raise UserError(f"the worker of {worker.names} has ended") from None
                    raise
            last, worker.running = worker.running, successor
            if self._stop.is_set():
                worker.terminate()
            assert last is not None
            await last.child.wait()
            last.writer.close()
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


def _kept(place: SocketPath, stack: contextlib.ExitStack) -> SocketPath:
    """Until the end of `stack`, when it is removed."""
    stack.callback(place.sock.close)
    stack.callback(place.remove)
    return place


def _end(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
