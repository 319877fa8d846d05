"""A guest whose disks' server is killed under load: it sees a pause, and nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import pytest

from tests.lab import fio
from tests.lab.lab import Lab
from tests.lab.process import run
from tests.lab.server import BlkDevice, Server, command

pytestmark = pytest.mark.asyncio(loop_scope="session")

_SIZE = 256 << 20
_KILLS = 5


@pytest.mark.parametrize("layout", ["packed", pytest.param("split", marks=pytest.mark.long)])
async def test_a_server_that_is_killed_again_and_again(lab: Lab, layout: str) -> None:
    root = lab.blk(f"kills-{layout}-root", await lab.root_image())
    data = lab.blk(f"kills-{layout}", lab.blank(f"kills-{layout}", _SIZE), queues=2)
    options = f"packed={'on' if layout == 'packed' else 'off'}"
    async with (
        lab.serving(root, data) as server,
        lab.boot([root, data], reconnect=True, device_options=options) as guest,
    ):
        load = asyncio.create_task(fio.verify(guest, "/dev/vdb", _SIZE >> 20))
        killed = set()
        for _ in range(_KILLS):
            pid = await _busy_worker(server, data, load)
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        result = await load
        assert (result.errors, result.read_bytes) == (0, _SIZE)
        assert len(killed) == _KILLS
        assert (await _status(server))["workers"][0]["restarts"] == _KILLS
        # The root disk had the same server.
        seen = await guest.run("dmesg | grep -ciE 'I/O error|blk_update_request|EXT4-fs error'; :")
        assert seen.output.split() == ["0"]
        await guest.run("mkdir /root/after && sync && rmdir /root/after")


async def _busy_worker(server: Server, disk: BlkDevice, load: asyncio.Task[Any]) -> int:
    """The process that has served some of the load by now."""
    while True:
        assert not load.done(), "the load ended before all kills"
        status = await _status(server)
        (worker,) = status["workers"]
        (device,) = (d for d in status["devices"] if d["socket"] == str(disk.socket))
        if device["stats"] and device["stats"]["total"]["requests"] > 100:
            pid: int = worker["pid"]
            return pid


async def _status(server: Server) -> dict[str, Any]:
    (status,) = json.loads(await run(*command(), "status", str(server.process.pid), "--json"))
    found: dict[str, Any] = status
    return found
