"""Memory is plugged into a running guest and out again, its disks and its card on vhost-user."""

from __future__ import annotations

import asyncio
import signal

import pytest

from perf.fio_output import parse
from tests.lab.lab import Lab
from tests.lab.process import running
from tests.lab.qemu import RUN_TIMEOUT, Guest

pytestmark = pytest.mark.asyncio(loop_scope="session")
RAM_MIB = 256
DIMM_MIB = 512
LOAD_MIB = 64
LARGE_MIB = 256
"""What is in flight at once, in the guest's buffers: more than was free before."""

_VERIFY = "--verify=crc32c --do_verify=1 --verify_fatal=1 --direct=1 --ioengine=libaio"
# Goes on until it is told to stop.
DISK_LOAD = f"""
(
  code=0
  while [ $code = 0 ] && [ ! -e /run/stop ]; do
    fio --name=load --filename=/dev/vdb --size={LOAD_MIB}M --rw=randwrite --bsrange=4k-64k \
      {_VERIFY} --iodepth=8 --output-format=json --output=/run/fio
    code=$?
    echo $code >>/run/passes
  done
  flock /run/agent.lock sh -c 'echo event disk-load-over >/dev/ttyS1'
) >/run/fio.said 2>&1 &
"""
LARGE_LOAD = f"""
fio --name=large --filename=/dev/vdc --size={LARGE_MIB}M --rw=write --bs=4M {_VERIFY} \
  --iodepth={LARGE_MIB // 4} --output-format=json
"""
# What is plugged goes where nothing lies that cannot be moved, so that it can be taken out again.
ONLINE = "echo online_movable >/sys/devices/system/memory/auto_online_blocks"


async def _memory_mib(guest: Guest) -> int:
    total = await guest.run("awk '/MemTotal/ { print $2 }' /proc/meminfo")
    return int(total.output) >> 10


async def _plug(guest: Guest, name: str) -> None:
    before = await _memory_mib(guest)
    size = DIMM_MIB << 20
    await guest.monitor.execute(
        "object-add",
        id=f"{name}-ram",
        size=size,
        share=True,
        **{"qom-type": "memory-backend-memfd"},
    )
    await guest.monitor.execute("device_add", driver="pc-dimm", id=name, memdev=f"{name}-ram")
    enough = (before + DIMM_MIB - 16) << 10
    await guest.run(
        f"until [ $(awk '/MemTotal/ {{ print $2 }}' /proc/meminfo) -ge {enough} ]; "
        "do sleep 0.1; done"
    )


async def _unplug(guest: Guest, name: str) -> None:
    await guest.monitor.execute("device_del", id=name)
    gone = guest.monitor.event("DEVICE_DELETED", lambda data: data.get("device") == name)
    await asyncio.wait_for(gone, RUN_TIMEOUT)
    await guest.monitor.execute("object-del", id=f"{name}-ram")


@pytest.mark.long
async def test_memory_comes_and_goes_under_load(lab: Lab, networking: None) -> None:
    root = lab.blk("plug-root", await lab.root_image())
    load = lab.blk("plug-load", lab.blank("plug-load", LOAD_MIB << 20))
    large = lab.blk("plug-large", lab.blank("plug-large", LARGE_MIB << 20))
    wire = await lab.network()
    card = lab.net("plug-net", wire)
    disks = [root, load, large]
    async with (
        lab.serving(*disks, card) as server,
        lab.boot(disks, [card], memory_mib=RAM_MIB, arguments=("-m", "slots=4,maxmem=4G")) as guest,
        running(
            "ping",
            ["ping", "-q", "-i", "0.01", wire.guest_cidr(0).partition("/")[0]],
            lab.directory / "ping-plug.log",
        ) as flood,
    ):

        async def known() -> list[int]:
            """Bytes of guest memory that the disks and the card are served from."""
            sockets = [disk.socket for disk in disks] + [card.socket]
            return [(await server.status(socket))["memory"]["bytes"] for socket in sockets]

        few = await _memory_mib(guest)
        before = await known()
        assert few < LARGE_MIB
        await guest.run(ONLINE + "\n" + DISK_LOAD)
        for name in ("first", "second"):
            await _plug(guest, name)
            assert await known() == [size + (DIMM_MIB << 20) for size in before]
            outcome = parse((await guest.run(LARGE_LOAD)).output, 0)
            assert outcome.errors == 0
            await _unplug(guest, name)
            assert await _memory_mib(guest) == few
            assert await known() == before
        over = guest.event("disk-load-over")
        await guest.run("touch /run/stop")
        await over
        passes = (await guest.run("cat /run/passes")).output.split()
        assert set(passes) == {"0"}, (await guest.run("cat /run/fio.said /run/fio")).output
        assert (await guest.run("dmesg --level=emerg,alert,crit,err")).output == ""
        flood.signal(signal.SIGINT)
        assert await flood.wait() == 0, "not one was answered"
        await guest.shutdown()
