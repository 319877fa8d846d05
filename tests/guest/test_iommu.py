"""A guest whose disks and network card are behind an IOMMU: its driver gives them IOVAs."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.guest.pausing import check_pauses
from tests.guest.whole import Machine, booted
from tests.lab.iperf import iperf, ping
from tests.lab.lab import Lab

pytestmark = pytest.mark.asyncio(loop_scope="session")

_SIZE = 16 << 20
_ACCESS_PLATFORM = 33


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def machine(lab: Lab, networking: None) -> AsyncIterator[Machine]:
    async with booted(lab, "iommu", _SIZE, iommu=True) as machine:
        yield machine


async def test_the_driver_accepted_it(machine: Machine) -> None:
    found = await machine.guest.run("cat /sys/bus/virtio/devices/*/features")
    features = found.output.split()
    assert len(features) >= 3
    assert all(bits[_ACCESS_PLATFORM] == "1" for bits in features)
    groups = await machine.guest.run("ls /sys/kernel/iommu_groups/*/devices | grep -c :")
    assert int(groups.output) >= 3


async def test_every_block_that_was_written_is_read_back(machine: Machine) -> None:
    """Across pauses: after each QEMU says nothing of what it said before."""
    await check_pauses(machine.server, machine.guest, machine.data, _SIZE)


@pytest.mark.parametrize("reverse", [False, True], ids=["out", "in"])
async def test_tcp(machine: Machine, reverse: bool) -> None:
    address = machine.network.host
    assert (await ping(machine.guest, address, count=3)).received == 3
    result = await iperf(machine.guest, address, machine.lab.directory, seconds=2, reverse=reverse)
    # Each packet's page is asked for: a busy host comes to little.
    assert result.received_bytes > 1 << 16
