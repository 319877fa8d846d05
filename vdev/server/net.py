"""Serving one network device on a vhost-user endpoint."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from vdev.descriptors import Descriptors
from vdev.iothread import IOThread
from vdev.net.device import NetDevice
from vdev.net.wiring import Wiring
from vdev.server.device_server import DeviceServer, Stand
from vdev.server.listener import Endpoint
from vdev.server.pool import running_iothreads

LOG = logging.getLogger("vdev.net")


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
        device, stand = await stack.enter_async_context(
            opened_card(
                tap=tap,
                bridge=bridge,
                queues=queues,
                mac=mac,
                mtu=mtu,
                address=address,
                poll_us=poll_us,
                iothreads=iothreads,
                name=name,
            )
        )
        endpoint = Endpoint.listen(socket_path) if isinstance(socket_path, str) else socket_path
        server = DeviceServer(device, endpoint, log=LOG, stand=stand)
        stack.push_async_callback(server.close)
        await server.start()
        yield server


@contextlib.asynccontextmanager
async def opened_card(
    *,
    tap: str | None,
    bridge: str | None,
    queues: int,
    mac: str | None,
    mtu: int | None,
    address: str | None,
    poll_us: int = 32,
    iothreads: int | Sequence[IOThread],
    name: str,
    inherited: tuple[dict[str, Any], Descriptors] | None = None,
) -> AsyncIterator[tuple[NetDevice, Stand]]:
    """The card that `serve` serves, and how to write down what it stands on.

    inherited: what that gave in another process, which has the tap open.
    """
    async with contextlib.AsyncExitStack() as stack:
        wiring = Wiring(tap=tap, bridge=bridge, queues=queues, mtu=mtu, address=address)
        if inherited is None:
            stack.push_async_callback(wiring.down)
            await wiring.up()
        else:
            wiring.inherit(*inherited)
            stack.push_async_callback(wiring.down)
        threads = await stack.enter_async_context(running_iothreads(iothreads, poll_us=poll_us))
        device = NetDevice(wiring.tap, iothreads=threads, name=name, mac=mac, mtu=wiring.mtu)
        if inherited is not None:
            # The tap's end of the cable is where it was.
            device.link_up = bool(inherited[0]["link_up"])
        stack.callback(device.close)

        def stand(fds: Descriptors) -> dict[str, Any]:
            return {**wiring.save(fds), "link_up": device.link_up}

        yield device, stand
