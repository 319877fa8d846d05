"""A machine in a port of a switch, whose uplink is a tap of the host's."""

from __future__ import annotations

import os
from pathlib import Path

from tests.lab.innermost import Material
from tests.vmm.kvm.guest import booted, config_of
from vdev.server.switch import Switch
from vdev.vmm.config import NicConfig


async def test_it_pings_the_host_through_the_switch(material: Material, tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "w")
    async with Switch(socket_path=path) as switch:
        await switch.add_port("up", tap="switched0", address="10.77.0.1/24")
        config = config_of(material.generic, nics=(NicConfig(switch=path),))
        async with booted(config) as guest:
            await guest.sh("modprobe virtio_net")
            await guest.sh("ip addr add 10.77.0.2/24 dev eth0 && ip link set eth0 up")
            await guest.sh("ping -c 3 -W 10 10.77.0.1")
            ports = {station["port"] for station in await switch.table()}
            assert ports == {"guest0", "up"}
