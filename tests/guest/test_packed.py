"""A guest whose disks and network card have packed rings."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.guest.pausing import check_pauses
from tests.guest.whole import Machine, booted
from tests.lab import fio
from tests.lab.iperf import iperf, ping
from tests.lab.lab import Lab

pytestmark = pytest.mark.asyncio(loop_scope="session")

_SIZE = 64 << 20
_RING_PACKED = 34


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def machine(lab: Lab, networking: None) -> AsyncIterator[Machine]:
    async with booted(lab, "packed", _SIZE, device_options="packed=on") as machine:
        yield machine


async def test_the_driver_accepted_them(machine: Machine) -> None:
    found = await machine.guest.run("cat /sys/bus/virtio/devices/*/features")
    features = found.output.split()
    assert len(features) >= 3
    assert all(bits[_RING_PACKED] == "1" for bits in features)


async def test_every_block_that_was_written_is_read_back(machine: Machine) -> None:
    result = await fio.verify(machine.guest, "/dev/vdb", _SIZE >> 20)
    assert (result.errors, result.read_bytes) == (0, _SIZE)


async def test_a_paused_guest_goes_on_where_it_was(machine: Machine) -> None:
    """QEMU asks where the rings were left, and says it again when the guest goes on."""
    await check_pauses(machine.server, machine.guest, machine.data, _SIZE)


@pytest.mark.parametrize("reverse", [False, True], ids=["out", "in"])
async def test_tcp(machine: Machine, reverse: bool) -> None:
    """Mergeable buffers: the segments that come in take several each."""
    address = machine.network.host
    assert (await ping(machine.guest, address, count=3)).received == 3
    result = await iperf(machine.guest, address, machine.lab.directory, seconds=2, reverse=reverse)
    assert result.received_bytes > 1 << 20
