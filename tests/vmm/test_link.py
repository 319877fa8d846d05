"""A machine's card is told that its cable was pulled: by an interrupt, with a new generation."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.lab import host
from tests.net.namespace import Namespace
from tests.vmm.driver import PciDriver
from tests.vmm.rig import Rig
from vdev._native import ffi, lib
from vdev.net.device import NetDevice
from vdev.net.tap import Tap

STATUS: int = ffi.offsetof("struct virtio_net_config", "status")
FEATURES = 1 << lib.VIRTIO_F_VERSION_1 | 1 << lib.VIRTIO_NET_F_STATUS


@pytest_asyncio.fixture
async def card() -> AsyncIterator[PciDriver]:
    if lacks := host.lacks_network():
        pytest.skip(lacks)
    with Namespace() as namespace:
        tap = namespace.run(lambda: Tap.create("tap0"))
        try:
            async with Rig() as rig:
                plugged = rig.plug("nic0", NetDevice(tap, iothreads=[rig.iothread]))
                driver = PciDriver(rig, plugged.slot)
                await driver.probe()
                await driver.enable_msix()
                yield driver
                driver.close()
        finally:
            tap.close()


async def test_a_pulled_cable_interrupts(card: PciDriver) -> None:
    device = card.transport.device
    assert isinstance(device, NetDevice)
    await card.start(0, features=FEATURES)
    await card.set_common(0x10, 2, 2)  # msix_config
    for up in (False, True):
        before = await card.generation()
        device.set_link(up)
        await card.rig.vm.raised(card.gsi(2))
        assert await card.generation() == before + 1
        assert await card.config(STATUS, 2) == int(up)
