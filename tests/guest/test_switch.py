"""Two guests of QEMU's in the ports of one switch."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest
import pytest_asyncio

from tests.frontend.server import Server
from tests.lab.iperf import iperf_client, ping
from tests.lab.lab import Lab
from tests.lab.process import run
from tests.lab.qemu import Guest
from tests.lab.server import command

pytestmark = pytest.mark.asyncio(loop_scope="session")

_NAME = f"lab-{os.getpid()}"


@dataclass(frozen=True)
class Wired:
    """Two guests that reach each other by a switch alone; addresses of theirs on it."""

    here: Guest
    there: Guest
    address: str

    async def counters(self) -> dict[str, dict[str, int]]:
        """Of each port by its name."""
        ports = json.loads(await run(*command(), "switch", "ports", _NAME, "--json"))
        return {port["name"]: port["counters"] for port in ports}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def wired(lab: Lab) -> AsyncIterator[Wired]:
    path = lab.directory / "switch.sock"
    network = await lab.network()
    with Server([*command(), "switch", "serve", _NAME, "--socket-path", str(path)]):
        roots = [lab.blk(f"switch-{n}", await lab.root_image()) for n in range(2)]
        nics = [replace(lab.net(f"switch-nic{n}", network), socket=path) for n in range(2)]
        async with (
            lab.serving(*roots),
            lab.boot([roots[0]], [nics[0]]) as here,
            lab.boot([roots[1]], [nics[1]]) as there,
        ):
            address = network.guest_cidr(1)
            await there.run(f"ip address flush dev eth0 && ip address add {address} dev eth0")
            yield Wired(here, there, address.partition("/")[0])


async def test_they_ping_each_other(wired: Wired) -> None:
    result = await ping(wired.here, wired.address, 10)
    assert result.received == result.sent == 10
    stations = json.loads(await run(*command(), "switch", "table", _NAME, "--json"))
    assert {station["port"] for station in stations} == {"guest0", "guest1"}


@pytest.mark.parametrize("reverse", [False, True], ids=["there", "back"])
async def test_tcp_crosses_in_segments_larger_than_the_mtu(wired: Wired, reverse: bool) -> None:
    before = await wired.counters()
    await wired.there.run(f"iperf3 --server --one-off --daemon --bind {wired.address}")
    result = await iperf_client(wired.here, wired.address, seconds=2, reverse=reverse)
    assert result.received_bytes > 1 << 20
    after = await wired.counters()
    sender = "guest1" if reverse else "guest0"
    frames, octets = (
        after[sender][name] - before[sender][name] for name in ("in_frames", "in_bytes")
    )
    assert octets / frames > 1514
    assert all(port["finished"] == 0 for port in after.values())
    print(f"{result.bits_per_second / 1e9:.2f} Gbit/s, {octets / frames:.0f} bytes a frame")


async def test_what_a_guest_checks_arrives_whole(wired: Wired) -> None:
    """A file over TCP, and its sum at both ends."""
    sink = f"socat -u TCP-LISTEN:7000,bind={wired.address} OPEN:/tmp/got,creat"
    await wired.there.run(f"command -v socat && ({sink} </dev/null >/dev/null 2>&1 &)")
    await wired.here.run("head -c 50000000 /dev/urandom >/tmp/sent")
    await wired.here.run(f"socat -u OPEN:/tmp/sent TCP:{wired.address}:7000,retry=50,interval=0.1")
    sent = (await wired.here.run("sha256sum </tmp/sent")).output
    await wired.there.run("while pgrep socat; do sleep 0.1; done")
    assert (await wired.there.run("sha256sum </tmp/got")).output == sent
