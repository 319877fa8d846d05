"""A server is followed by another process, and its front-ends notice a pause at most.

    old                                        new, started with `Orders` and one end of a `Passage`
    "stands": images, taps, control socket  →  opens its devices on them
                                            ←  "ready"
    reads no more messages
    "sessions": what front-ends have said   →  maps their memory
                                            ←  "prepared"
    drains the rings, and nobody serves them
    "rings": where they stopped             →  makes the queues, all but touching the rings
                                            ←  "serving"
                                               starts the queues, answers commands
    leaves                                  ←  closes the passage

Rule 1: until "serving" has been sent all is the old one's, and the new one leaves without undoing
anything, whatever happens; from then on all is the new one's, and the old one leaves like that.
Rule 2: "serving" is in the old one's hands or can never be sent: `Passage.withdraw` decides which.
Rule 3: each step has a time, and the old one goes on only when the new one has been ended: one that
serves and does not say so, or wakes up later, is none of ours, but it must not serve beside us.
So rings are served by one of the two, however either ends, and every chain is completed once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from vdev.descriptors import Descriptors
from vdev.errors import UserError, VdevError
from vdev.server.control import ControlSocket
from vdev.server.device_server import DeviceServer
from vdev.server.devices import DeviceSpec, opened_devices
from vdev.server.passage import Passage, PassageFailed

PATIENCE = 30.0
"""Seconds that a successor has to start, unless the user says otherwise."""
_PAUSE_MOST = 5.0
"""Seconds for each step once front-ends wait."""

_log = logging.getLogger("vdev.handover")


def leave(code: int) -> NoReturn:
    """Ends the process and takes nothing down: all of it is another one's."""
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


async def hand_over(
    passage: Passage,
    servers: Sequence[DeviceServer],
    control: Callable[[Descriptors], dict[str, Any] | None],
    end: Callable[[], Awaitable[object]],
    patience: float,
) -> float:
    """Returns when the successor at the other end serves; it is time to `leave`.

    The result: for how many milliseconds nobody served.

    control: writes down the control socket, if there is one of ours.  end: ends the successor.
    Raises UserError where there is no successor: these servers go on.
    """
    step, serving, halted, pause = "start", False, 0.0, 0.0
    try:
        async with asyncio.timeout(patience):
            fds = Descriptors()
            stands = [server.stand(fds) for server in servers]
            await passage.send("stands", {"devices": stands, "control": control(fds)}, fds)
            await passage.receive("ready")
        step = "take what front-ends have said"
        async with asyncio.timeout(_PAUSE_MOST):
            await asyncio.gather(*(server.pause() for server in servers))
            fds = Descriptors()
            await passage.send("sessions", [server.save(fds) for server in servers], fds)
            await passage.receive("prepared")
        step = "take the rings"
        async with asyncio.timeout(_PAUSE_MOST):
            halted = time.monotonic()
            rings = await asyncio.gather(*(server.halt() for server in servers))
            await passage.send("rings", rings)
            await passage.receive("serving")
            serving, pause = True, time.monotonic() - halted
            await passage.closed()
    except Exception as error:
        if serving or await passage.withdraw("serving"):
            return 1e3 * (pause or time.monotonic() - halted)
        # Of one that was killed and does not end the kernel has a hold; its threads serve no more.
        with contextlib.suppress(TimeoutError, OSError):
            await asyncio.wait_for(end(), _PAUSE_MOST)
        await asyncio.gather(*(server.resume() for server in servers))
        if not isinstance(error, VdevError | OSError):
            raise
        why = f"it takes too long to {step}" if isinstance(error, TimeoutError) else error
        raise UserError(f"the successor does not serve: {why}; this server goes on") from None
    return 1e3 * pause


@dataclass(frozen=True)
class Inheritance:
    """What comes first from the server that is followed: what its devices stand on, and its control
    socket, if it has one."""

    passage: Passage
    devices: list[dict[str, Any]]
    fds: Descriptors
    control: ControlSocket | None

    @classmethod
    async def receive(cls, passage: Passage) -> Inheritance:
        """Raises PassageFailed."""
        value, fds = await passage.receive("stands")
        saved = value["control"]
        control = ControlSocket.restore(saved, fds) if saved is not None else None
        return cls(passage, value["devices"], fds, control)


@contextlib.asynccontextmanager
async def succession(
    inheritance: Inheritance, specs: Sequence[DeviceSpec], **options: Any
) -> AsyncIterator[Sequence[DeviceServer]]:
    """The devices of the other server, served from here until the block ends.

    options: of `opened_devices`.  The process ends here where that cannot be.
    """
    async with contextlib.AsyncExitStack() as stack:
        try:
            servers = await _take_over(inheritance, specs, stack, options)
        except BaseException as error:
            await refuse(inheritance.passage, error)
        for server in servers:
            stack.push_async_callback(server.close)
            await server.start()
        yield servers


async def _take_over(
    inheritance: Inheritance,
    specs: Sequence[DeviceSpec],
    stack: contextlib.AsyncExitStack,
    options: dict[str, Any],
) -> list[DeviceServer]:
    passage = inheritance.passage
    inherited = [(stand, inheritance.fds) for stand in inheritance.devices]
    devices = await stack.enter_async_context(opened_devices(specs, inherited=inherited, **options))
    await passage.send("ready")
    sessions, fds = await passage.receive("sessions")
    servers = [
        DeviceServer.restore(opened.device, session, fds, log=opened.log, stand=opened.stand)
        for opened, session in zip(devices, sessions, strict=True)
    ]
    fds.close()
    await passage.send("prepared")
    rings, _ = await passage.receive("rings")
    counts = [server.set_halted(where) for server, where in zip(servers, rings, strict=True)]
    gate = _Gate(sum(counts))
    going: asyncio.Future[Any]
    going = asyncio.gather(*(server.go_on(gate.wait) for server in servers))
    reached: asyncio.Future[Any] = asyncio.ensure_future(gate.reached.wait())
    await asyncio.wait([going, reached], return_when=asyncio.FIRST_COMPLETED)
    if not reached.done():
        reached.cancel()
        await going  # which has failed
    await passage.send("serving")
    gate.open()
    await going
    return servers


class _Gate:
    """Where queues wait until `count` of them have come, and it is opened."""

    def __init__(self, count: int) -> None:
        self._missing = count
        self._opened = asyncio.Event()
        self.reached = asyncio.Event()
        if not count:
            self.reached.set()

    async def wait(self) -> None:
        self._missing -= 1
        if not self._missing:
            self.reached.set()
        await self._opened.wait()

    def open(self) -> None:
        self._opened.set()


async def refuse(passage: Passage, error: BaseException) -> NoReturn:
    """Says why, there and here, and ends the process."""
    if isinstance(error, VdevError):
        why = str(error)
    else:
        _log.exception("what the other server passed on cannot be used")
        why = f"what it was passed on cannot be used: {error!r}"
    with contextlib.suppress(PassageFailed):
        await passage.send("failed", why)
    print(f"vdev: {why}", file=sys.stderr, flush=True)
    leave(1)
