"""The commands that serve: ``vdev blk serve``, ``vdev net serve``, ``vdev serve``."""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
from argparse import Namespace
from collections.abc import Callable, Coroutine
from typing import Any

from vdev.cli import EXIT_FAILED, EXIT_OK, EXIT_USER_ERROR
from vdev.errors import UserError
from vdev.server.devices import DeviceSpec, serve_devices
from vdev.server.listener import Endpoint
from vdev.server.orders import Orders
from vdev.server.service import Service

PROGRAM = (sys.executable, "-P", "-m", "vdev")
"""This vdev; whatever is called vdev in the current folder is not what serves."""


def blk(arguments: Namespace) -> int:
    """``vdev blk serve``."""
    return _serve_one(
        arguments,
        "blk",
        image=arguments.blk_file,
        read_only=arguments.read_only,
        num_queues=arguments.num_queues,
        serial=arguments.serial,
        cache=arguments.cache,
        engine=arguments.engine,
        lock=arguments.lock,
    )


def net(arguments: Namespace) -> int:
    """``vdev net serve``."""
    return _serve_one(
        arguments,
        "net",
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
    from vdev.server.devices import device_specs
    from vdev.server.supervisor import Supervisor

    wanted = load_config(arguments.config)

    async def work() -> None:
        supervisor = Supervisor(
            device_specs(wanted),
            PROGRAM,
            isolate=arguments.isolate,
            control=wanted.server.control,
            iothreads=wanted.server.iothreads,
            poll_us=wanted.server.poll_us,
            loop=arguments.loop,
        )
        await supervisor.run()

    return _supervise(work)


def supervisor(arguments: Namespace) -> int:
    """``vdev supervisor FD``, which is not for users."""
    from vdev.server import reexec
    from vdev.server.supervisor import Supervisor

    async def work() -> None:
        if arguments.attempt is not None:
            await reexec.answer_attempt(arguments.attempt, arguments.fd, Supervisor.restore)
        await Supervisor.restore(reexec.read(arguments.fd)).run()

    return _supervise(work)


def worker(arguments: Namespace) -> int:
    """``vdev worker FD``, which is not for users."""
    from vdev.server.worker import work

    orders = Orders.read(arguments.fd)
    return run_on_loop(orders.loop, lambda: work(orders, PROGRAM))


def _serve_one(arguments: Namespace, kind: str, **device: Any) -> int:
    where = f"fd {arguments.fd}" if arguments.fd is not None else arguments.socket_path
    spec = DeviceSpec(kind, f"{kind}0", where, device)
    orders = Orders([spec], arguments.iothreads, arguments.poll_us, arguments.loop)

    async def work() -> None:
        devices = serve_devices(
            [(spec, _endpoint(arguments))], iothreads=orders.iothreads, poll_us=orders.poll_us
        )
        await Service(control=arguments.control or True, orders=orders, program=PROGRAM).run(
            devices
        )

    return run_on_loop(arguments.loop, work)


def _supervise(work: Callable[[], Coroutine[Any, Any, None]]) -> int:
    from vdev.server.supervisor import WorkerFailed

    try:
        return run_on_loop("asyncio", work)
    except WorkerFailed as error:
        # It has said why.
        return EXIT_USER_ERROR if error.code == EXIT_USER_ERROR else EXIT_FAILED


def run_on_loop(loop: str, work: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Runs ``work`` on an event loop of that kind, to its end."""
    logging.basicConfig(format="vdev: %(message)s", level=logging.INFO)
    # Eventfds and memory of many queues are more than the usual soft limit, which is for select().
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    factory: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work())
    return EXIT_OK


def _endpoint(arguments: Namespace) -> Endpoint:
    if arguments.fd is not None:
        if arguments.connect:
            raise UserError("--connect needs --socket-path: an --fd is connected already")
        return Endpoint.from_fd(arguments.fd)
    if arguments.connect:
        return Endpoint.connect(arguments.socket_path)
    return Endpoint.listen(arguments.socket_path)
