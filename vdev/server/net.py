"""Serving one network device on a vhost-user endpoint."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

from vdev.iothread import IOThread
from vdev.net.device import NetDevice
from vdev.net.wiring import Wiring
from vdev.server.device_server import DeviceServer
from vdev.server.listener import Endpoint
from vdev.server.pool import running_iothreads

_log = logging.getLogger("vdev.net")


@contextlib.asynccontextmanager
async def serve(
    socket_path: str | Endpoint,
    *,
    tap: str | None = None,
    bridge: str | None = None,
    queues: int = 1,
    mac: str | None = None,
    mtu: int | None = None,
    address: str | None = None,
    poll_us: int = 32,
    iothreads: int | Sequence[IOThread] = 1,
    name: str = "net0",
) -> AsyncIterator[DeviceServer]:
    """Serve a network card until the block ends; its wire is a tap.

    ``tap``: an existing one is used as it is and left behind as it was; a missing one is made and
    removed again.  ``bridge``: the tap, made for it if none is named, is plugged into this bridge,
    which is made if it is missing and removed again once nobody uses it.  ``queues`` counts
    receive and transmit pairs.  ``address``, like "10.0.0.1/24", is for the host's end: the
    bridge, or the tap where there is none.  ``mac`` and ``mtu``: see `NetDevice`.  Sockets,
    ``poll_us`` and ``iothreads``: as in `vdev.blk.serve`.

    Raises UserError where the tap, the bridge or the socket cannot be had.
    """
    async with contextlib.AsyncExitStack() as stack:
        wiring = Wiring(tap=tap, bridge=bridge, queues=queues, mtu=mtu, address=address)
        stack.push_async_callback(wiring.down)
        await wiring.up()
        device = NetDevice(wiring.tap, name=name, mac=mac, mtu=wiring.mtu)
        stack.callback(device.close)
        threads = await stack.enter_async_context(running_iothreads(iothreads, poll_us=poll_us))
        endpoint = Endpoint.listen(socket_path) if isinstance(socket_path, str) else socket_path
        server = DeviceServer(device, endpoint, iothreads=threads, log=_log)
        stack.push_async_callback(server.close)
        await server.start()
        yield server
