"""The devices of a configuration: each a description that can be handed to another process."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vdev.descriptors import Descriptors
from vdev.server.blk import LOG as BLK_LOG
from vdev.server.blk import opened_disk
from vdev.server.device_server import DeviceServer, Stand
from vdev.server.listener import Endpoint
from vdev.server.pool import running_iothreads
from vdev.virtio.device import Device

if TYPE_CHECKING:
    from vdev.config import Config


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device to serve.

    kind: "blk" or "net".  socket: the path of its socket.  arguments: of `serve`, as JSON has them.
    """

    kind: str
    name: str
    socket: str
    arguments: dict[str, Any]


def device_specs(config: Config) -> list[DeviceSpec]:
    """What ``config`` has to serve."""
    disks = [
        DeviceSpec(
            "blk",
            disk.name or "blk",
            disk.socket,
            {
                "image": disk.image,
                "read_only": disk.read_only,
                "num_queues": disk.queues,
                "serial": disk.serial,
                "cache": disk.cache,
                "engine": disk.engine,
                "lock": disk.lock,
            },
        )
        for disk in config.blk
    ]
    cards = [
        DeviceSpec(
            "net",
            card.name or "net",
            card.socket,
            {
                "tap": card.tap,
                "bridge": card.bridge,
                "queues": card.queues,
                "mac": card.mac,
                "mtu": card.mtu,
                "address": card.address,
            },
        )
        for card in config.net
    ]
    return disks + cards


@dataclass(frozen=True, slots=True)
class Opened:
    """A device of a description. stand, log: see `DeviceServer`."""

    device: Device
    stand: Stand
    log: logging.Logger


@contextlib.asynccontextmanager
async def serve_devices(
    devices: Sequence[tuple[DeviceSpec, Endpoint]], **options: Any
) -> AsyncIterator[Sequence[DeviceServer]]:
    """Serve each device at its endpoint until the block ends; options: see `opened_devices`.

    Where one cannot be served, those before it are taken down again and its UserError is raised.
    """
    async with contextlib.AsyncExitStack() as stack:
        for _, endpoint in devices:
            stack.callback(endpoint.close)
        opened = await stack.enter_async_context(
            opened_devices([spec for spec, _ in devices], **options)
        )
        servers = []
        for one, (_, endpoint) in zip(opened, devices, strict=True):
            server = DeviceServer(one.device, endpoint, log=one.log, stand=one.stand)
            stack.push_async_callback(server.close)
            await server.start()
            servers.append(server)
        yield servers


@contextlib.asynccontextmanager
async def opened_devices(
    specs: Sequence[DeviceSpec],
    *,
    iothreads: int,
    poll_us: int,
    succession: int | None = None,
    patience: float = 0.0,
    inherited: Sequence[tuple[dict[str, Any], Descriptors]] | None = None,
) -> AsyncIterator[Sequence[Opened]]:
    """The devices, all on the same iothreads, until the block ends.

    ``succession``: of the first device, those of the others follow; ``patience``: see `open_image`.
    ``inherited``: what each stands on in another process, and there is open.  Raises UserError.
    """
    async with contextlib.AsyncExitStack() as stack:
        io_uring = any(spec.arguments.get("engine") != "threads" for spec in specs)
        threads = await stack.enter_async_context(
            running_iothreads(iothreads, poll_us=poll_us, io_uring=io_uring)
        )
        opened = []
        for number, spec in enumerate(specs):
            stands_on = inherited[number] if inherited is not None else None
            if spec.kind == "blk":
                disk = opened_disk(
                    **spec.arguments,
                    iothreads=threads,
                    name=spec.name,
                    succession=succession + number if succession is not None else None,
                    patience=patience,
                    inherited=stands_on,
                )
                opened.append(Opened(*await stack.enter_async_context(disk), BLK_LOG))
            else:
                from vdev.server.net import LOG, opened_card  # brings all wiring

                card = opened_card(
                    **spec.arguments, iothreads=threads, name=spec.name, inherited=stands_on
                )
                opened.append(Opened(*await stack.enter_async_context(card), LOG))
        yield opened
