"""A block back-end that goes wrong once it is under load: ``bad_backend.py HOW SOCKET IMAGE``.

HOW: "dies" by a signal, "hangs" with its connection open, "lies": what is written is lost, or
"fails": what is written is refused.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import vdev.blk

REQUESTS = 1000
ENDS = {"dies": signal.SIGKILL, "hangs": signal.SIGSTOP}


async def main(how: str, socket: str, image: str) -> None:
    if how == "lies":
        image = f"null:{os.stat(image).st_size}"
    async with vdev.blk.serve(socket, image=image, read_only=how == "fails") as server:
        print(f"this one {how}", flush=True)
        if how in ENDS:
            # Counters cannot be awaited.
            while server.device.stats()["total"]["requests"] < REQUESTS:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            os.kill(os.getpid(), ENDS[how])
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
