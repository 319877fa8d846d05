"""A guest whose server is replaced under load: neither it nor its VMM sees more than a pause."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.lab import fio
from tests.lab.iperf import ping
from tests.lab.lab import Lab
from tests.lab.process import run
from tests.lab.server import Server, command

pytestmark = pytest.mark.asyncio(loop_scope="session")

_SIZE = 256 << 20
_UPGRADES = 5
_PINGS = 100


async def test_servers_that_are_replaced_again_and_again(lab: Lab, networking: None) -> None:
    root = lab.blk("upgrade-root", await lab.root_image())
    data = lab.blk("upgrade-data", lab.blank("upgrade-data", _SIZE), queues=2)
    wire = await lab.network()
    card = lab.net("upgrade-card", wire)
    async with (
        lab.serving(root, data, card) as server,
        lab.boot([root, data], [card]) as guest,
    ):
        pinging = asyncio.create_task(ping(guest, wire.host, _PINGS))
        load = asyncio.create_task(fio.verify(guest, "/dev/vdb", _SIZE >> 20))
        served = {await _worker(server)}
        for _ in range(_UPGRADES):
            assert not load.done(), "the load ended before all upgrades"
            await run(*command(), "upgrade", str(server.process.pid))
            served.add(await _worker(server))
        result, echoes = await load, await pinging
        assert (result.errors, result.read_bytes) == (0, _SIZE)
        assert echoes.received == echoes.sent == _PINGS
        assert len(served) == _UPGRADES + 1
        assert "supervisor" in _arguments(server.process.pid)
        seen = await guest.run("dmesg | grep -ciE 'I/O error|blk_update_request|EXT4-fs error'; :")
        assert seen.output.split() == ["0"]


async def _worker(server: Server) -> int:
    (status,) = json.loads(await run(*command(), "status", str(server.process.pid), "--json"))
    (worker,) = status["workers"]
    assert all(device["connections"] == 1 for device in status["devices"])
    return int(worker["pid"])


def _arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
