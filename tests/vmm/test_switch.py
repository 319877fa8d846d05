"""The cards of machines in the ports of a switch: ``vdev run --net switch=W``."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from vdev._native import lib
from vdev.errors import UserError
from vdev.runtime import runtime_dir
from vdev.server.switch import Switch
from vdev.tables import decode, encode, parse_options
from vdev.virtio.queue import QueueConfig, first_index
from vdev.vmm.config import NicConfig
from vdev.vmm.ram import Ram

from .test_remote_cards import made

ETHERNET = bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(range(200))


def test_a_switch_is_found_by_its_name_or_its_path() -> None:
    nic = parse_options(NicConfig, "switch=lan0,queues=2", None, "")
    assert nic.socket == str(runtime_dir() / "lan0.switch")
    assert nic.queues == 2
    assert parse_options(NicConfig, "switch=/x/y", None, "").socket == "/x/y"
    assert decode(NicConfig, encode(nic), "") == nic  # as a snapshot has it
    with pytest.raises(UserError, match="switch or a socket, not both"):
        NicConfig(switch="a", socket="b")
    with pytest.raises(UserError, match="socket or a tap"):
        NicConfig(switch="a", tap="b")
    with pytest.raises(UserError, match="''"):
        NicConfig(switch="")


class _Driver:
    """One ring of one buffer, in a machine's RAM at `base`."""

    def __init__(self, ram: Ram, base: int, index: int) -> None:
        self.ram, self.base = ram, base
        self.features = 1 << lib.VIRTIO_F_VERSION_1
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        self.config = QueueConfig(
            *(index, 8, self.features, base, base + 0x1000, base + 0x2000),
            next_index=first_index(self.features),
            kick_fd=self.kick,
            call_fd=self.call,
        )

    def offer(self, size: int, flags: int) -> None:
        desc = (self.base + 0x3000).to_bytes(8, "little") + size.to_bytes(4, "little")
        self.ram.write(self.base, desc + flags.to_bytes(2, "little") + bytes(2))
        self.ram.write(self.base + 0x1000, bytes([0, 0, 1, 0, 0, 0]))
        os.eventfd_write(self.kick, 1)

    async def called(self) -> None:
        """Returns when the device has called."""
        loop, called = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.call, called.set)
        await called.wait()
        loop.remove_reader(self.call)

    def close(self) -> None:
        for fd in (self.kick, self.call):
            os.close(fd)


async def test_two_machines_reach_each_other(tmp_path: Path) -> None:
    path = str(tmp_path / "w")
    async with Switch(socket_path=path) as switch, made() as (here, stack), made() as (there, _):
        a = await here.nic(NicConfig(switch=path, mac="02:00:00:00:00:01", id="lan"), stack)
        b = await there.nic(NicConfig(switch=path, mac="02:00:00:00:00:02", id="lan"), stack)
        assert a.config()[:6] == bytes.fromhex("020000000001")
        assert {port["state"] for port in switch.ports()} == {"connected"}
        drivers = _Driver(here.ram, 0x10000, 1), _Driver(there.ram, 0x10000, 0)
        for card, driver in zip((a, b), drivers, strict=True):
            stack.callback(driver.close)
            card.negotiate(driver.features)
        sends = await a.start_queue(drivers[0].config, here.ram.memory)
        receives = await b.start_queue(drivers[1].config, there.ram.memory)
        drivers[1].offer(2048, 2)
        here.ram.write(0x13000, bytes(12) + ETHERNET)
        drivers[0].offer(12 + len(ETHERNET), 0)
        await drivers[1].called()
        assert bytes(there.ram.view(0x13000 + 12, len(ETHERNET))) == ETHERNET
        assert await sends.stop() == 1
        assert await receives.stop() == 1
