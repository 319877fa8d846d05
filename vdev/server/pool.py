"""The iothreads of a server, from its start to its end."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from vdev.errors import UserError
from vdev.iothread import IOThread


@contextlib.asynccontextmanager
async def running_iothreads(
    iothreads: int | Sequence[IOThread], *, poll_us: int = 32, io_uring: bool = True
) -> AsyncIterator[Sequence[IOThread]]:
    """`iothreads` new threads that end with the block, or those of the caller, left running."""
    if not isinstance(iothreads, int):
        yield iothreads
        return
    if iothreads < 1:
        raise UserError(f"{iothreads} iothreads: a server has at least 1")
    if poll_us < 0:
        raise UserError(f"poll window of {poll_us} µs: 0 (never poll) or more")
    async with contextlib.AsyncExitStack() as stack:
        threads = [IOThread(poll_us=poll_us, io_uring=io_uring) for _ in range(iothreads)]
        for thread in threads:
            thread.start()
            stack.push_async_callback(thread.close)
        yield threads
