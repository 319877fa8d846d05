"""A device that another process serves: real back-ends, and what they do to us."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vdev.blk
from tests.frontend.server import Server
from tests.protocol.fake import TIMEOUT
from tests.protocol.guest import BASE, PAGE, RING_FEATURES, SIZE, Guest
from vdev._native import lib
from vdev.errors import PeerError
from vdev.memory import GuestMemory
from vdev.virtio.queue import F_RING_PACKED, QueueConfig, first_index
from vdev.virtio.vhost_user.remote import VhostUserDevice

FdCount = Callable[[], Counter[str]]
DISK = 8 << 20
QUEUES = 2
PER_QUEUE = DISK // QUEUES
PATTERN_REQUESTS = 3000


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest() as guest:
        yield guest


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(DISK))
    return path


def start_vdev(path: Path, image: Path) -> tuple[int, Callable[[], None]]:
    options = ["--socket-path", str(path), "--blk-file", str(image), "--num-queues", str(QUEUES)]
    server = Server.vdev("blk", "serve", *options)
    return server.pid, server.close


def start_qsd(path: Path, image: Path) -> tuple[int, Callable[[], None]]:
    """It goes to the background when it listens."""
    pidfile = path.with_suffix(".pid")
    program = shutil.which("qemu-storage-daemon")
    assert program, "qemu-storage-daemon is part of the set-up"
    subprocess.run(
        [
            *(program, "--daemonize", "--pidfile", pidfile),
            *("--blockdev", f"driver=file,node-name=disk,filename={image}"),
            "--export",
            f"type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={QUEUES},"
            f"addr.type=unix,addr.path={path}",
        ],
        check=True,
    )
    pid = int(pidfile.read_text())
    pidfd = os.pidfd_open(pid)

    def stop() -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        readable, _, _ = select.select([pidfd], [], [], TIMEOUT)
        os.close(pidfd)
        assert readable, "qemu-storage-daemon does not end"

    return pid, stop


BACK_ENDS = {"vdev": start_vdev, "qsd": start_qsd}


@pytest.fixture(params=BACK_ENDS)
def back_end(request: pytest.FixtureRequest, tmp_path: Path, image: Path) -> Iterator[int]:
    """A disk with QUEUES queues at tmp_path / "s"; its process id."""
    pid, stop = BACK_ENDS[request.param](tmp_path / "s", image)
    yield pid
    stop()


@contextlib.asynccontextmanager
async def connected(path: Path, num_queues: int | None = None) -> AsyncIterator[VhostUserDevice]:
    device = await VhostUserDevice.connect(
        path, device_id=lib.VIRTIO_ID_BLOCK, num_queues=num_queues
    )
    try:
        yield device
    finally:
        device.close()


async def verify(guest: Guest, ring: QueueConfig, requests: int = PATTERN_REQUESTS) -> None:
    start = ring.index * PER_QUEUE
    result = await guest.load(ring, requests=requests, start=start, span=PER_QUEUE)
    assert (result.requests, result.errors, result.corrupt) == (requests, 0, 0)


async def test_a_disk_serves_all_its_queues(
    fd_count: FdCount, guest: Guest, back_end: int, tmp_path: Path
) -> None:
    async with connected(tmp_path / "s") as device:
        assert device.num_queues == QUEUES
        assert int.from_bytes(device.config()[:8], "little") * 512 == DISK
        assert not device.features >> lib.VHOST_USER_F_PROTOCOL_FEATURES & 1
        assert device.features & RING_FEATURES == RING_FEATURES
        rings = [guest.queue(index) for index in range(QUEUES)]
        for _driver in range(2):
            device.negotiate(RING_FEATURES)
            queues = [await device.start_queue(ring, guest.memory) for ring in rings]
            await asyncio.gather(*(verify(guest, ring) for ring in rings))
            bases = [await queue.stop() for queue in queues]
            assert bases == [PATTERN_REQUESTS] * QUEUES
            assert [await queue.stop() for queue in queues] == bases
            device.reset()
            for ring in rings:
                guest.clear(ring)
        assert device.fault is None


async def test_a_stopped_queue_goes_on_where_it_was(
    guest: Guest, back_end: int, tmp_path: Path
) -> None:
    async with connected(tmp_path / "s", num_queues=1) as device:
        device.negotiate(RING_FEATURES)
        ring = guest.queue(0)
        base = 0
        for round_ in range(3):
            queue = await device.start_queue(replace(ring, next_index=base), guest.memory)
            await verify(guest, ring, 100)
            base = await queue.stop()
            assert base == 100 * (round_ + 1)


async def test_a_packed_queue_goes_on_where_it_was(
    guest: Guest, image: Path, tmp_path: Path
) -> None:
    features = RING_FEATURES | F_RING_PACKED
    _pid, stop = start_vdev(tmp_path / "s", image)
    try:
        async with connected(tmp_path / "s", num_queues=1) as device:
            device.negotiate(features)
            ring = guest.queue(0, features)
            base = first_index(features)
            for round_ in range(3):
                queue = await device.start_queue(replace(ring, next_index=base), guest.memory)
                await verify(guest, ring, 100)
                base = await queue.stop()
                # Indirect tables: a descriptor a request, in a ring of 256.
                done = 100 * (round_ + 1)
                place = done % 256 | (0 if done // 256 % 2 else 0x8000)
                assert base == place << 16 | place
    finally:
        stop()


async def test_fewer_queues_than_the_disk_has(back_end: int, tmp_path: Path) -> None:
    async with connected(tmp_path / "s", num_queues=1) as device:
        assert device.num_queues == 1
        assert device.config()[34:36] == b"\1\0"
        with pytest.raises(PeerError, match="queue 1"):
            await device.start_queue(QueueConfig(1, 64, 0, 0, 0, 0), GuestMemory(()))
    with pytest.raises(PeerError, match="300 queues"):
        await VhostUserDevice.connect(tmp_path / "s", device_id=2, num_queues=300)


async def test_memory_is_replaced_under_a_queue(
    guest: Guest, back_end: int, tmp_path: Path
) -> None:
    """The user addresses of the ring change with it: it is started again from its index."""
    async with connected(tmp_path / "s", num_queues=1) as device:
        device.negotiate(RING_FEATURES)
        ring = guest.queue(0)
        queue = await device.start_queue(ring, guest.memory)
        await verify(guest, ring, 500)
        await queue.set_memory(GuestMemory([guest.region(0, SIZE)]))
        await verify(guest, ring, 500)
        call, kick = guest.eventfd(), guest.eventfd()
        await queue.set_call(call)
        await queue.set_kick(kick)
        await verify(guest, replace(ring, call_fd=call, kick_fd=kick), 500)
        assert await queue.stop() == 1500


async def test_memory_grows_under_a_queue(guest: Guest, back_end: int, tmp_path: Path) -> None:
    """Region by region, to more than one table can hold."""
    async with connected(tmp_path / "s", num_queues=1) as device:
        device.negotiate(RING_FEATURES)
        ring = guest.queue(0)
        queue = await device.start_queue(ring, guest.memory)
        regions = guest.memory.regions
        for count in range(1, 9):
            more = guest.region(SIZE - count * PAGE, PAGE, guest_addr=BASE + SIZE * (1 + count))
            regions = (*regions, more)
            await queue.set_memory(GuestMemory(regions))
            await verify(guest, ring, 50)
        assert len(regions) == 10
        regions = regions[:2]
        await queue.set_memory(GuestMemory(regions))
        await verify(guest, ring, 50)
        assert await queue.stop() == 450


async def test_a_killed_back_end_is_noticed(
    fd_count: FdCount, guest: Guest, back_end: int, tmp_path: Path
) -> None:
    """Its queues break, and stop where the guest was told that they were."""
    async with connected(tmp_path / "s", num_queues=1) as device:
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        device.lost.append(lost.set_result)
        device.negotiate(RING_FEATURES)
        ring = guest.queue(0)
        faults: list[str] = []
        queue = await device.start_queue(ring, guest.memory, faults.append)
        await verify(guest, ring, 777)
        os.kill(back_end, signal.SIGKILL)
        assert await asyncio.wait_for(lost, TIMEOUT) == device.fault
        assert faults == [device.fault]
        assert queue.fault == device.fault is not None
        assert os.eventfd_read(ring.err_fd) == 1
        with pytest.raises(OSError, match="lost"):
            await queue.set_call(ring.call_fd)
        assert await queue.stop() == 777
        with pytest.raises(OSError, match="lost"):
            await device.start_queue(ring, guest.memory)
        device.reset()


async def test_a_ring_that_its_guest_broke_is_told(guest: Guest, tmp_path: Path) -> None:
    async with vdev.blk.serve(str(tmp_path / "s"), "null:1M"), connected(tmp_path / "s") as device:
        device.negotiate(RING_FEATURES)
        ring = guest.queue(0)
        broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        queue = await device.start_queue(ring, guest.memory, broken.set_result)
        guest.write16(ring.avail + 2, ring.size + 1)
        os.eventfd_write(ring.kick_fd, 1)
        fault = await asyncio.wait_for(broken, TIMEOUT)
        assert queue.fault == fault
        assert device.fault is None
        assert os.eventfd_read(ring.err_fd) == 1
        await queue.stop()


async def test_a_resize_is_told(image: Path, tmp_path: Path) -> None:
    async with (
        vdev.blk.serve(str(tmp_path / "s"), str(image)) as server,
        connected(tmp_path / "s") as device,
    ):
        disk = server.device
        assert isinstance(disk, vdev.blk.BlkDevice)
        for times in (2, 3, 4):
            changed = asyncio.Event()
            device.config_changed[:] = [changed.set]
            disk.resize(DISK * times)
            await asyncio.wait_for(changed.wait(), TIMEOUT)
            assert int.from_bytes(device.config()[:8], "little") * 512 == DISK * times


async def test_the_space_is_written(image: Path, tmp_path: Path) -> None:
    async with (
        vdev.blk.serve(str(tmp_path / "s"), str(image)) as server,
        connected(tmp_path / "s") as device,
    ):
        device.negotiate(RING_FEATURES | 1 << lib.VIRTIO_BLK_F_CONFIG_WCE)
        with Guest() as guest:
            queue = await device.start_queue(guest.queue(0), guest.memory)
            device.write_config(32, b"\0")
            device.write_config(0, bytes(8))  # refused, which nobody waits for
            await queue.stop()
        assert isinstance(server.device, vdev.blk.BlkDevice)
        assert not server.device.writeback
        assert device.config()[32] == 0
        assert device.fault is None


async def test_memory_of_ours_alone_is_no_memory_for_others(
    fd_count: FdCount, guest: Guest, tmp_path: Path
) -> None:
    async with vdev.blk.serve(str(tmp_path / "s"), "null:1M"), connected(tmp_path / "s") as device:
        device.negotiate(RING_FEATURES)
        private = GuestMemory([guest.region(0, SIZE, shared=False)])
        with pytest.raises(ValueError, match="shared=True"):
            await device.start_queue(guest.queue(0), private)
        assert device.fault is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 100}, "ring size 100"),
        ({"size": 0}, "ring size 0"),
        ({"desc": BASE + SIZE}, "outside guest memory"),
        ({"used": BASE + SIZE - 8}, "not within one memory region"),
        ({"avail": BASE + 1}, "not aligned"),
        ({"avail": BASE, "used": BASE}, "reaches into"),
    ],
)
async def test_wrong_rings_are_refused(
    guest: Guest, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    async with vdev.blk.serve(str(tmp_path / "s"), "null:1M"), connected(tmp_path / "s") as device:
        device.negotiate(RING_FEATURES)
        ring = guest.queue(0)
        with pytest.raises(PeerError, match=message):
            await device.start_queue(replace(ring, **changes), guest.memory)
        queue = await device.start_queue(ring, guest.memory)
        assert await queue.stop() == 0


@pytest.mark.parametrize("turns", range(4))
async def test_cancelled_starts_leave_no_ring_behind(
    fd_count: FdCount, guest: Guest, tmp_path: Path, turns: int
) -> None:
    async with (
        vdev.blk.serve(str(tmp_path / "s"), "null:1M") as server,
        connected(tmp_path / "s") as device,
    ):
        device.negotiate(RING_FEATURES)
        ring = guest.queue(0)
        start = asyncio.ensure_future(device.start_queue(ring, guest.memory))
        for _ in range(turns):
            await asyncio.sleep(0)
        start.cancel()
        await asyncio.wait([start])
        assert start.cancelled()
        assert [thread.queues for thread in server.device.iothreads] == [0]
        queue = await device.start_queue(ring, guest.memory)
        assert await queue.stop() == 0


async def test_nobody_listens(fd_count: FdCount, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await VhostUserDevice.connect(tmp_path / "s", device_id=2)
