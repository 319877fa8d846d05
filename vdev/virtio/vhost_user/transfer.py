"""A device's state on its way through a pipe of the front-end's, beside all else on the loop.

Theory of operation.  A front-end may keep both ends of its pipe, leave it full or empty, and change
at any time whether it blocks.  So bytes go between it and a pipe of our own by splice(2), which can
be told not to block whatever the pipe says.

Source: vhost-user specification, "Migrating back-end state".
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Self

from vdev.errors import PeerError
from vdev.virtio.vhost_user.channel import STALL, close_fds
from vdev.virtio.vhost_user.state import MAX_STATE

_PIECE = 4096  # bytes that a pipe takes whatever its owner may have of them


class Transfer:
    """One transfer, from `start` to its outcome; owns its end of the pipe."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    @classmethod
    def start(cls, fd: int, run: Callable[[int], Coroutine[Any, Any, None]]) -> Self:
        """Begins to `run` with the pipe `fd`, which it closes at the end.

        Raises PeerError, and `fd` stays the caller's, where that is no pipe.
        """
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            raise PeerError("the descriptor for the device's state is not a pipe")
        task = asyncio.ensure_future(run(fd))

        def ended(task: asyncio.Task[None]) -> None:
            os.close(fd)
            if not task.cancelled():
                task.exception()  # nobody need ask

        task.add_done_callback(ended)
        return cls(task)

    async def outcome(self) -> None:
        """Waits for the end. Raises PeerError or OSError where it is not a good one."""
        await self._task

    async def cancel(self) -> None:
        """Ends it, whatever it has come to."""
        self._task.cancel()
        await asyncio.wait([self._task])


async def send(fd: int, data: bytes) -> None:
    """Writes all of `data` to the pipe `fd`.

    Raises PeerError where nobody reads it in time, OSError where that fails.
    """
    with _own_pipe() as (reader, writer):
        for at in range(0, len(data), _PIECE):
            left = os.write(writer, data[at : at + _PIECE])
            while left:
                left -= await _splice(reader, fd, left, fd)


async def receive(fd: int) -> bytes:
    """Reads the pipe `fd` to its end.

    Raises PeerError where more comes than any state has, or nothing for too long; OSError where
    reading fails.
    """
    data = b""
    with _own_pipe() as (reader, writer):
        while count := await _splice(fd, writer, _PIECE, fd):
            data += os.read(reader, count)
            if len(data) > MAX_STATE:
                raise PeerError(f"device state of more than {MAX_STATE} bytes")
    return data


@contextmanager
def _own_pipe() -> Iterator[tuple[int, int]]:
    fds = os.pipe()
    try:
        yield fds
    finally:
        close_fds(fds)


async def _splice(source: int, target: int, size: int, theirs: int) -> int:
    """Moves up to `size` bytes as soon as the pipe `theirs`, one of the two, is ready."""
    while True:
        try:
            return os.splice(source, target, size, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            await _ready(theirs, writes=theirs == target)


async def _ready(fd: int, *, writes: bool) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if writes else (loop.add_reader, loop.remove_reader)
    )
    add(fd, ready.set)
    try:
        async with asyncio.timeout(STALL):
            await ready.wait()
    except TimeoutError:
        raise PeerError(f"no byte of the device's state for {STALL:g} s") from None
    finally:
        remove(fd)
