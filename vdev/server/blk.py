"""Serving one block device on a vhost-user endpoint."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

from vdev.blk.device import BlkDevice
from vdev.blk.image import Image, open_image
from vdev.errors import UserError
from vdev.iothread import IOThread
from vdev.server.device_server import DeviceServer
from vdev.server.listener import Endpoint
from vdev.server.pool import running_iothreads

_log = logging.getLogger("vdev.blk")


@contextlib.asynccontextmanager
async def serve(
    socket_path: str | Endpoint,
    image: str,
    *,
    read_only: bool = False,
    num_queues: int = 1,
    serial: str | None = None,
    cache: str = "writeback",
    engine: str = "auto",
    poll_us: int = 32,
    iothreads: int | Sequence[IOThread] = 1,
    name: str = "blk0",
) -> AsyncIterator[DeviceServer]:
    """Serve ``image`` (a raw file, a block device or ``null:SIZE``) until the block ends.

    ``socket_path`` is the path to listen on, or an endpoint made otherwise.  ``iothreads`` is how
    many threads to start (queues are spread over them), or threads that run already and are
    shared.  ``poll_us`` is the ceiling of their polling window in microseconds.  ``cache`` and
    ``serial``: see `BlkDevice`.  One front-end after another is served.

    Raises UserError where the image, the socket or the engine cannot be had.
    """
    endpoint = Endpoint.listen(socket_path) if isinstance(socket_path, str) else socket_path
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(endpoint.close)
        disk = open_image(image, read_only=read_only, cache=cache)
        stack.callback(disk.close)
        _say_what_differs(disk, cache)
        threads = await stack.enter_async_context(
            running_iothreads(iothreads, poll_us=poll_us, io_uring=engine != "threads")
        )
        if engine == "io_uring" and not all(thread.has_io_uring for thread in threads):
            raise UserError(
                "engine io_uring: this kernel refuses io_uring (sysctl kernel.io_uring_disabled, "
                "or a container's seccomp filter): allow it, or use the engine auto or threads"
            )
        device = BlkDevice(
            disk, name=name, num_queues=num_queues, serial=serial, cache=cache, engine=engine
        )
        stack.callback(device.close)
        server = DeviceServer(device, endpoint, iothreads=threads, log=_log)
        stack.push_async_callback(server.close)
        await server.start()
        yield server


def _say_what_differs(disk: Image, cache: str) -> None:
    if cache == "none" and not disk.direct and not disk.is_null:
        _log.warning(
            "%s: its file system has no O_DIRECT: cache=none goes through the page cache", disk.path
        )
