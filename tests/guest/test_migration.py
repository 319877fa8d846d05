"""A running guest moves from one QEMU to another and back, its disks and its card on vhost-user.

Each QEMU has a server of its own; both serve the same images, which they lock only while the
guest runs there, and plug their taps into the same bridge.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from perf.fio_output import parse
from tests.lab.lab import Lab
from tests.lab.process import run, running
from tests.lab.qemu import Guest
from tests.lab.server import BlkDevice, NetDevice

pytestmark = pytest.mark.asyncio(loop_scope="session")
MOVES = 6
MIB = 96
# Both go on until they are told to stop, wherever the guest is then.
DISK_LOAD = f"""
(
  code=0
  while [ $code = 0 ] && [ ! -e /run/stop ]; do
    fio --name=moving --filename=/dev/vdb --size={MIB}M --rw=randwrite --bsrange=4k-64k \\
      --verify=crc32c --do_verify=1 --verify_fatal=1 --direct=1 --ioengine=libaio --iodepth=16 \\
      --output-format=json --output=/run/fio
    code=$?
    echo $code >>/run/passes
  done
  flock /run/agent.lock sh -c 'echo event disk-load-over >/dev/ttyS1'
) >/run/fio.said 2>&1 &
"""
NET_LOAD = """
bash -c 'exec 4>/dev/tcp/{host}/{port}
  i=0; while [ ! -e /run/stop ]; do echo $((i++)); done >&4' >/run/sender.said 2>&1 &
"""


class Home:
    """A QEMU with its server's devices."""

    def __init__(self, lab: Lab, name: str, disks: Sequence[BlkDevice], card: NetDevice) -> None:
        def moved(device: Any) -> Any:
            return replace(device, socket=lab.directory / f"{name}-{device.socket.name}")

        self._lab = lab
        self.disks = [moved(disk) for disk in disks]
        self.card = moved(card)
        self._stack = contextlib.AsyncExitStack()

    async def enter(self, **settings: Any) -> Guest:
        boot = self._lab.boot(self.disks, [self.card], **settings)
        return await self._stack.enter_async_context(boot)

    async def leave(self) -> None:
        await self._stack.aclose()


class Numbers:
    """What a guest sends: the numbers from 0, a line each."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._changed = asyncio.Condition()
        self._ended = False

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            self._data += data
            async with self._changed:
                self._changed.notify_all()
        self._ended = True
        writer.close()
        async with self._changed:
            self._changed.notify_all()

    async def more(self) -> None:
        """Returns when something has come."""
        before = len(self._data)
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._data) > before or self._ended)
        assert not self._ended

    async def all(self) -> int:
        """How many came up to the stream's end, none of them missing, changed or twice."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._ended)
        lines = self._data.decode().split("\n")
        assert lines.pop() == ""
        assert lines == [str(number) for number in range(len(lines))]
        return len(lines)


@pytest.mark.parametrize("layout", ["packed", pytest.param("split", marks=pytest.mark.long)])
async def test_a_guest_goes_there_and_back_under_load(
    lab: Lab, networking: None, layout: str
) -> None:
    disks = [
        lab.blk(f"moving-{layout}-root", await lab.root_image(), lock="running"),
        lab.blk(f"moving-{layout}-data", lab.blank(f"moving-{layout}", MIB << 20), lock="running"),
    ]
    wire = await lab.network()
    card = lab.net(f"moving-{layout}-net", wire)
    options = f"packed={'on' if layout == 'packed' else 'off'}"
    here, there = (Home(lab, name, disks, card) for name in ("here", "there"))
    async with contextlib.AsyncExitStack() as stack:
        for home in (here, there):
            await stack.enter_async_context(lab.serving(*home.disks, home.card))
            stack.push_async_callback(home.leave)
        guest = await here.enter(device_options=options)
        stream = Numbers()
        server = await asyncio.start_server(stream.take, wire.host, 0)
        stack.push_async_callback(server.wait_closed)
        stack.callback(server.close)
        port = server.sockets[0].getsockname()[1]
        await guest.run(DISK_LOAD + NET_LOAD.format(host=wire.host, port=port))
        guest_address = wire.guest_cidr(0).partition("/")[0]
        flood = await stack.enter_async_context(
            running(
                "ping",
                ["ping", "-q", "-i", "0.01", guest_address],
                lab.directory / f"ping-{layout}.log",
            )
        )
        for move in range(MOVES):
            socket = lab.directory / f"{layout}{move}.sock"
            target = await there.enter(incoming=socket, device_options=options)
            await guest.migrate(socket)
            await here.leave()
            here, there, guest = there, here, target
            await stream.more()
        over = guest.event("disk-load-over")
        await guest.run("touch /run/stop")
        await over
        passes = (await guest.run("cat /run/passes")).output.split()
        assert set(passes) == {"0"}, (await guest.run("cat /run/fio.said /run/fio")).output
        assert parse((await guest.run("cat /run/fio")).output, 0).errors == 0
        assert (await guest.run("dmesg --level=emerg,alert,crit,err")).output == ""
        assert await stream.all() > MOVES
        flood.signal(signal.SIGINT)
        assert await flood.wait() == 0, "not one was answered"
        assert "duplicates" not in flood.log.read_text()
        await guest.shutdown()
    await run("fsck.ext4", "-fn", disks[0].image)
