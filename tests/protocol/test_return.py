"""A device whose back-end is killed, and comes back: its queues go on as if nothing had been."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.frontend.server import Server
from tests.machines.test_dialer import forked
from tests.protocol.fake import TIMEOUT
from tests.protocol.guest import RING_FEATURES, Guest
from tests.protocol.test_connection import FdCount
from tests.protocol.test_remote_device import DISK, QUEUES, image, verify
from vdev._native import lib
from vdev.runtime import runtime_dir
from vdev.server.control import request
from vdev.virtio.vhost_user.remote import VhostUserDevice

__all__ = ["image"]  # a fixture

KILLS = 10
REQUESTS = 3000


@pytest.fixture
def server(tmp_path: Path, image: Path) -> Iterator[Server]:
    config = tmp_path / "config.toml"
    config.write_text(
        f'[[blk]]\nsocket = "s"\nimage = "{image}"\nqueues = {QUEUES}\ncache = "none"\n'
    )
    with Server([sys.executable, "-m", "tests.frontend.supervised", str(config)]) as server:
        yield server
        assert "Traceback" not in server.output


async def connect(path: Path, **options: Any) -> VhostUserDevice:
    return await VhostUserDevice.connect(
        path, device_id=lib.VIRTIO_ID_BLOCK, **{"away_seconds": TIMEOUT, **options}
    )


def status(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = request(runtime_dir() / f"{server.pid}.sock", "status")
    return found


async def busy_worker(server: Server) -> int:
    """The worker's process, once it has served something."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            found = await asyncio.to_thread(status, server)
            (device,) = found["devices"]
            if device["stats"] and device["stats"]["total"]["requests"]:
                pid: int = found["workers"][0]["pid"]
                return pid


@pytest.fixture
def dial(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """How to connect again: oneself, or through a dialer, as a confined machine."""
    if request.param == "connect":
        yield {}
        return
    dialer, child = forked(str(tmp_path / "s"))
    yield {"dial": dialer.connect}
    dialer.close()
    os.waitpid(child, 0)


@pytest.mark.parametrize("dial", ["connect", "dialer"], indirect=True)
async def test_killed_under_load(
    dial: dict[str, Any], fd_count: FdCount, server: Server, tmp_path: Path
) -> None:
    device = await connect(tmp_path / "s", **dial)
    try:
        with Guest() as guest:
            device.negotiate(RING_FEATURES)
            rings = [guest.queue(index) for index in range(QUEUES)]
            faults: list[str] = []
            queues = [await device.start_queue(r, guest.memory, faults.append) for r in rings]

            async def load() -> int:
                """How much was done while the server was being killed."""
                done = 0
                while len(killed) < KILLS:
                    await asyncio.gather(*(verify(guest, ring, REQUESTS) for ring in rings))
                    done += REQUESTS
                return done

            killed: set[int] = set()
            loading = asyncio.ensure_future(load())
            for _ in range(KILLS):
                pid = await busy_worker(server)
                assert not loading.done()
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            done = await loading
            assert len(killed) == KILLS
            assert [await queue.stop() for queue in queues] == [done % 65536] * QUEUES
            assert faults == []
            assert device.fault is None
    finally:
        device.close()


async def test_what_is_asked_meanwhile_waits(server: Server, tmp_path: Path) -> None:
    device = await connect(tmp_path / "s")
    try:
        with Guest() as guest:
            device.negotiate(RING_FEATURES | 1 << lib.VIRTIO_BLK_F_CONFIG_WCE)
            rings = [guest.queue(index) for index in range(QUEUES)]
            queue = await device.start_queue(rings[0], guest.memory)
            device.write_config(32, b"\0")
            await verify(guest, rings[0], 100)
            os.kill(await busy_worker(server), signal.SIGKILL)
            # Whichever of these meets the end of the back-end is asked again.
            other = await device.start_queue(rings[1], guest.memory)
            await queue.set_enabled(False)
            await queue.set_enabled(True)
            await verify(guest, rings[0], 100)
            await verify(guest, rings[1], 100)
            assert [await queue.stop(), await other.stop()] == [200, 100]
            assert device.config()[32] == 0
            (found,) = status(server)["devices"]
            assert found["image"]["writeback"] is False
            device.reset()
    finally:
        device.close()


async def test_a_resize_in_the_meantime_is_told(
    server: Server, image: Path, tmp_path: Path
) -> None:
    device = await connect(tmp_path / "s")
    try:
        changed = asyncio.Event()
        device.config_changed.append(changed.set)
        os.truncate(image, 2 * DISK)
        os.kill(server.worker_pid, signal.SIGKILL)
        await asyncio.wait_for(changed.wait(), TIMEOUT)
        assert int.from_bytes(device.config()[:8], "little") * 512 == 2 * DISK
    finally:
        device.close()


async def test_one_that_does_not_come_back(
    fd_count: FdCount, server: Server, tmp_path: Path
) -> None:
    device = await connect(tmp_path / "s", away_seconds=0.2)
    try:
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        device.lost.append(lost.set_result)
        with Guest() as guest:
            device.negotiate(RING_FEATURES)
            ring = guest.queue(0)
            queue = await device.start_queue(ring, guest.memory)
            await verify(guest, ring, 77)
            server.stop()
            assert await asyncio.wait_for(lost, TIMEOUT) == device.fault
            assert queue.fault == device.fault is not None
            assert await queue.stop() == 77
            with pytest.raises(OSError, match="lost"):
                await device.start_queue(ring, guest.memory)
    finally:
        device.close()


async def test_closed_while_it_is_away(fd_count: FdCount, server: Server, tmp_path: Path) -> None:
    """Nobody waits for it then, and no region, ring or in-flight region of it stays."""
    device = await connect(tmp_path / "s", away_seconds=3600)
    with Guest() as guest:
        device.negotiate(RING_FEATURES)
        queue = await device.start_queue(guest.queue(0), guest.memory)
        os.unlink(tmp_path / "s")
        server.process.kill()
        stop = asyncio.ensure_future(queue.stop())
        await asyncio.sleep(0)
        device.close()
        await asyncio.wait([stop])
        assert stop.cancelled() or stop.exception() or stop.result() == 0
    del queue, stop, device
    gc.collect()  # errors that were expected hold regions too
