"""Guests come and go, servers too; neither leaves the other anything to repair."""

from __future__ import annotations

import asyncio

import pytest

from tests.lab import fio, image, network
from tests.lab.lab import Lab
from tests.lab.process import run
from tests.lab.qemu import GuestError

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.long
async def test_a_second_guest_finds_what_the_first_one_left(lab: Lab, networking: None) -> None:
    root = lab.blk("second-root", await lab.root_image())
    wire = await lab.network()
    nic = lab.net("second-net", wire)
    async with lab.serving(root, nic):
        async with lab.boot([root], [nic]) as first:
            await first.run(f"echo kept >/root/note; ping -c 1 {wire.host}")
            await first.shutdown()
        async with lab.boot([root], [nic]) as second:
            found = await second.run(f"cat /root/note; ping -q -c 1 {wire.host} >&2")
            assert found.output.startswith("kept")
            await second.shutdown()
    await run("fsck.ext4", "-fn", root.image)


async def test_a_killed_qemu_leaves_the_server_to_the_next_guest(lab: Lab) -> None:
    root = lab.blk("killed-root", await lab.root_image())
    data = lab.blk("killed-data", lab.blank("killed-data", 128 << 20), queues=2)
    async with lab.serving(root, data) as server:
        async with lab.boot([root, data]) as first:
            load = asyncio.create_task(
                fio.random(first, "/dev/vdb", rw="randwrite", seconds=600, mib=128)
            )
            # Writes are on their way once the image has grown.
            while image.allocated(data.image) < 1 << 20:
                await first.run("cat /sys/block/vdb/stat")
            await first.kill()
            with pytest.raises(GuestError, match="died"):
                await load
        async with lab.boot([root, data]) as second:
            verified = await fio.verify(second, "/dev/vdb", 32)
            assert verified.errors == 0
            assert verified.read_bytes == 32 << 20
            await second.shutdown()
        assert server.process.returncode is None


async def test_a_stopped_server_leaves_nothing_behind(lab: Lab, networking: None) -> None:
    before = set(await network.interfaces())
    data = lab.blk("gone-data", lab.blank("gone-data", 1 << 20))
    wire = await lab.network()
    nic = lab.net("gone-net", wire)
    async with lab.serving(data, nic) as server:
        present = await network.interfaces()
        assert present[wire.bridge] == [wire.host]
        assert len(set(present) - before) == 2, "a bridge and a tap"
        assert await server.stop() == 0
    assert set(await network.interfaces()) - before == set()
    assert not data.socket.exists()
    assert not nic.socket.exists()
