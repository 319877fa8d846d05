"""The commands that serve: ``vdev blk serve``, ``vdev net serve``, ``vdev serve``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from vdev.cli import EXIT_OK
from vdev.errors import UserError
from vdev.server.device_server import DeviceServer
from vdev.server.listener import Endpoint
from vdev.server.service import Service


def blk(arguments: Namespace) -> int:
    """``vdev blk serve``."""
    from vdev.server.blk import serve

    return _serve_one(
        arguments,
        serve,
        image=arguments.blk_file,
        read_only=arguments.read_only,
        num_queues=arguments.num_queues,
        serial=arguments.serial,
        cache=arguments.cache,
        engine=arguments.engine,
    )


def net(arguments: Namespace) -> int:
    """``vdev net serve``."""
    from vdev.server.net import serve

    return _serve_one(
        arguments,
        serve,
        tap=arguments.tap,
        bridge=arguments.bridge,
        queues=arguments.queues,
        mac=arguments.mac,
        mtu=arguments.mtu,
        address=arguments.address,
    )


def config(arguments: Namespace) -> int:
    """``vdev serve CONFIG.toml``."""
    from vdev.config import load_config
    from vdev.server.config_server import serve_config

    wanted = load_config(arguments.config)
    return _run(arguments, lambda: Service(control=wanted.server.control).run(serve_config(wanted)))


def _serve_one(
    arguments: Namespace,
    serve: Callable[..., contextlib.AbstractAsyncContextManager[DeviceServer]],
    **device: Any,
) -> int:
    async def work() -> None:
        server = serve(
            _endpoint(arguments),
            **device,
            poll_us=arguments.poll_us,
            iothreads=arguments.iothreads,
        )
        await Service(control=arguments.control or True).run(_one(server))

    return _run(arguments, work)


def _run(arguments: Namespace, work: Callable[[], Coroutine[Any, Any, None]]) -> int:
    logging.basicConfig(format="vdev: %(message)s", level=logging.INFO)
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if arguments.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work())
    return EXIT_OK


@contextlib.asynccontextmanager
async def _one(
    server: contextlib.AbstractAsyncContextManager[DeviceServer],
) -> AsyncIterator[Sequence[DeviceServer]]:
    async with server as device:
        yield [device]


def _endpoint(arguments: Namespace) -> Endpoint:
    if arguments.fd is not None:
        if arguments.connect:
            raise UserError("--connect needs --socket-path: an --fd is connected already")
        return Endpoint.from_fd(arguments.fd)
    if arguments.connect:
        return Endpoint.connect(arguments.socket_path)
    return Endpoint.listen(arguments.socket_path)
