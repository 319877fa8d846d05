"""Serving one block device on a vhost-user endpoint."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

from vdev.blk.device import BlkDevice
from vdev.blk.image import Image, open_image
from vdev.descriptors import Descriptors
from vdev.errors import UserError
from vdev.iothread import IOThread
from vdev.server.device_server import DeviceServer, Stand
from vdev.server.listener import Endpoint
from vdev.server.pool import running_iothreads

LOG = logging.getLogger("vdev.blk")


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
    lock: str = "open",
    poll_us: int = 32,
    iothreads: int | Sequence[IOThread] = 1,
    name: str = "blk0",
    succession: int | None = None,
    patience: float = 0.0,
) -> AsyncIterator[DeviceServer]:
    """Serve ``image`` (a raw file, a block device or ``null:SIZE``) until the block ends.

    ``socket_path`` is the path to listen on, or an endpoint made otherwise.  ``iothreads`` is how
    many threads to start (queues are spread over them), or threads that run already and are
    shared.  ``poll_us`` is the ceiling of their polling window in microseconds.  ``cache`` and
    ``serial``: see `BlkDevice`; ``lock``, ``succession`` and ``patience``: see `open_image`.  One
    front-end after another is served.

    Raises UserError where the image, the socket or the engine cannot be had.
    """
    endpoint = Endpoint.listen(socket_path) if isinstance(socket_path, str) else socket_path
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(endpoint.close)
        device, stand = await stack.enter_async_context(
            opened_disk(
                image,
                read_only=read_only,
                num_queues=num_queues,
                serial=serial,
                cache=cache,
                engine=engine,
                lock=lock,
                poll_us=poll_us,
                iothreads=iothreads,
                name=name,
                succession=succession,
                patience=patience,
            )
        )
        server = DeviceServer(device, endpoint, log=LOG, stand=stand)
        stack.push_async_callback(server.close)
        await server.start()
        yield server


@contextlib.asynccontextmanager
async def opened_disk(
    image: str,
    *,
    read_only: bool,
    num_queues: int,
    serial: str | None,
    cache: str,
    engine: str,
    lock: str,
    poll_us: int = 32,
    iothreads: int | Sequence[IOThread],
    name: str,
    succession: int | None,
    patience: float = 0.0,
    inherited: tuple[dict[str, Any], Descriptors] | None = None,
) -> AsyncIterator[tuple[BlkDevice, Stand]]:
    """The disk that `serve` serves, and how to write down what it stands on.

    inherited: what that gave in another process, which has the image open.
    """
    state, fds = inherited or ({}, Descriptors())
    fd = fds.take(state.get("image"))
    async with contextlib.AsyncExitStack() as stack:
        try:
            disk = open_image(
                image,
                read_only=read_only,
                cache=cache,
                lock=lock,
                fd=fd if fd >= 0 else None,
                succession=succession,
                patience=patience,
            )
        finally:
            if fd >= 0:
                os.close(fd)
        stack.callback(disk.close)
        disk.size = int(state.get("size", disk.size))
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
            disk,
            iothreads=threads,
            name=name,
            num_queues=num_queues,
            serial=serial,
            cache=cache,
            engine=engine,
        )
        stack.callback(device.close)

        def stand(fds: Descriptors) -> dict[str, Any]:
            return {"image": fds.put(disk.fd), "size": disk.size}

        yield device, stand


def _say_what_differs(disk: Image, cache: str) -> None:
    if cache == "none" and not disk.direct and not disk.is_null:
        LOG.warning(
            "%s: its file system has no O_DIRECT: cache=none goes through the page cache", disk.path
        )
