"""A block back-end that goes wrong once it is under load: ``bad_backend.py HOW SOCKET IMAGE``.

HOW: "dies" by a signal, "hangs" with its connection open, or "lies": what is written is lost.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import vdev.blk

REQUESTS = 1000


async def main(how: str, socket: str, image: str) -> None:
    if how == "lies":
        image = f"null:{os.stat(image).st_size}"
    async with vdev.blk.serve(socket, image=image) as server:
        print(f"this one {how}", flush=True)
        # Counters cannot be awaited.
        while how == "lies" or server.device.stats()["total"]["requests"] < REQUESTS:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
