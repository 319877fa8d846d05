"""Many devices in one process, as a configuration file says."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

from vdev.config import Config
from vdev.server.blk import serve as serve_blk
from vdev.server.device_server import DeviceServer
from vdev.server.pool import running_iothreads


@contextlib.asynccontextmanager
async def serve_config(config: Config) -> AsyncIterator[Sequence[DeviceServer]]:
    """Serve every device of ``config`` until the block ends, all on the same iothreads.

    Where one cannot be served, those before it are taken down again and its UserError is raised.
    """
    async with contextlib.AsyncExitStack() as stack:
        threads = await stack.enter_async_context(
            running_iothreads(config.server.iothreads, poll_us=config.server.poll_us)
        )
        servers = [
            await stack.enter_async_context(
                serve_blk(
                    disk.socket,
                    disk.image,
                    read_only=disk.read_only,
                    num_queues=disk.queues,
                    serial=disk.serial,
                    cache=disk.cache,
                    engine=disk.engine,
                    iothreads=threads,
                    name=disk.name or "blk",
                )
            )
            for disk in config.blk
        ]
        if config.net:
            from vdev.server.net import serve as serve_net  # brings pyroute2

            servers += [
                await stack.enter_async_context(
                    serve_net(
                        card.socket,
                        tap=card.tap,
                        bridge=card.bridge,
                        queues=card.queues,
                        mac=card.mac,
                        mtu=card.mtu,
                        address=card.address,
                        iothreads=threads,
                        name=card.name or "net",
                    )
                )
                for card in config.net
            ]
        yield servers
