"""A guest that QEMU pauses while its disk is under load."""

from __future__ import annotations

import asyncio

from tests.lab import fio
from tests.lab.qemu import Guest
from tests.lab.server import BlkDevice, Server

PAUSES = 3
REQUESTS = 100
"""That the load makes between two pauses."""


async def check_pauses(server: Server, guest: Guest, data: BlkDevice, size: int) -> None:
    """Its second disk, `data` of `size` bytes, is written and read back across pauses."""

    async def requests() -> int:
        return sum(queue["requests"] for queue in await server.queue_stats(data.socket))

    load = asyncio.create_task(fio.verify(guest, "/dev/vdb", size >> 20))
    for _ in range(PAUSES):
        seen = await requests()
        while await requests() < seen + REQUESTS:
            assert not load.done(), "the load ended before it was paused"
        await guest.monitor.execute("stop")
        await guest.monitor.execute("cont")
    result = await load
    assert (result.errors, result.read_bytes) == (0, size)
