"""A process that serves as it was ordered: for a `Supervisor`, or in the place of another process.

For a supervisor it inherits the listening sockets, and one end of a connection: on that it answers
commands, the first as soon as it serves; when the supervisor ends, it ends too.  In the place of
another process it inherits one end of a `Passage`, and all else comes through that.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

from vdev.server.devices import serve_devices
from vdev.server.handover import Inheritance, succession
from vdev.server.listener import Endpoint
from vdev.server.orders import Orders
from vdev.server.passage import Passage
from vdev.server.service import Service


async def work(orders: Orders, program: Sequence[str]) -> None:
    """Carries them out, until it is told to end; program: see `Service`. Raises UserError."""
    options = {
        "iothreads": orders.iothreads,
        "poll_us": orders.poll_us,
        "succession": orders.succession,
        "patience": orders.patience,
    }
    channel = socket.socket(fileno=orders.channel) if orders.channel is not None else False
    if orders.passage is None:
        endpoints = [
            Endpoint.listen_fd(fd, device.socket)
            for fd, device in zip(orders.fds, orders.devices, strict=True)
        ]
        devices = serve_devices(list(zip(orders.devices, endpoints, strict=True)), **options)
        service = Service(control=channel, orders=orders, program=program)
    else:
        passage = Passage(socket.socket(fileno=orders.passage))
        inheritance = await Inheritance.receive(passage)
        devices = succession(inheritance, orders.devices, **options)
        service = Service(
            control=channel or inheritance.control or False,
            orders=orders,
            program=program,
            ready=passage.close,
        )
    await service.run(devices)
