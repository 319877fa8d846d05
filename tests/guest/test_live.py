"""What happens to a guest while it runs: its disk grows, it is paused and goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.guest.pausing import check_pauses
from tests.lab.lab import Lab
from tests.lab.process import run
from tests.lab.qemu import Guest
from tests.lab.server import BlkDevice, Server, command

pytestmark = pytest.mark.asyncio(loop_scope="session")

_SIZE = 256 << 20


@dataclass(frozen=True)
class Machine:
    """A booted guest with a data disk, /dev/vdb."""

    server: Server
    guest: Guest
    data: BlkDevice


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def machine(lab: Lab) -> AsyncIterator[Machine]:
    root = lab.blk("live-root", await lab.root_image())
    data = lab.blk("live-data", lab.blank("live-data", _SIZE))
    async with lab.serving(root, data) as server, lab.boot([root, data]) as guest:
        yield Machine(server, guest, data)


async def _device_name(machine: Machine) -> str:
    pid = str(machine.server.process.pid)
    (status,) = json.loads(await run(*command(), "status", pid, "--json"))
    (name,) = (d["name"] for d in status["devices"] if d["socket"] == str(machine.data.socket))
    return str(name)


async def test_a_paused_guest_goes_on_where_it_was(machine: Machine) -> None:
    """QEMU stops the rings and lets go of the device on stop; on cont it takes it up again."""
    await check_pauses(machine.server, machine.guest, machine.data, _SIZE)


async def test_write_through_chosen_by_the_guest_outlives_a_pause(machine: Machine) -> None:
    cache_type = "/sys/block/vdb/cache_type"
    await machine.guest.run(f"echo 'write through' >{cache_type}")
    await machine.guest.monitor.execute("stop")
    await machine.guest.monitor.execute("cont")
    seen = await machine.guest.run(f"cat {cache_type}; dd if=/dev/zero of=/dev/vdb bs=4k count=1")
    assert seen.output.startswith("write through")
    pid = str(machine.server.process.pid)
    (status,) = json.loads(await run(*command(), "status", pid, "--json"))
    (device,) = (d for d in status["devices"] if d["socket"] == str(machine.data.socket))
    assert device["image"]["writeback"] is False


async def test_a_disk_grows_under_its_guest(machine: Machine) -> None:
    name, pid = await _device_name(machine), str(machine.server.process.pid)
    # The kernel's own message is the event to wait for: it comes when the guest has noticed.
    noticed = asyncio.create_task(
        machine.guest.run(
            "mkfifo /tmp/log; dmesg --follow >/tmp/log & "
            "grep -m1 'vdb.*new size' </tmp/log; kill $!"
        )
    )
    await run(*command(), "resize", pid, name, str(2 * _SIZE))
    await noticed
    seen = await machine.guest.run("blockdev --getsize64 /dev/vdb")
    assert seen.output.split() == [str(2 * _SIZE)]
    tail = await machine.guest.run(
        f"dd if=/dev/urandom of=/dev/vdb bs=1M count=1 seek={2 * (_SIZE >> 20) - 1} oflag=direct"
    )
    assert tail.code == 0
