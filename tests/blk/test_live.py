"""A disk in use: clients come and go, call fds and memory are exchanged, the server is ended."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend.blk import (
    F_FLUSH,
    FEATURES,
    S_OK,
    SECTOR,
    T_IN,
    T_OUT,
    BlkClient,
    check_healthy,
    header,
)
from tests.frontend.memory import GuestMemory, Region
from tests.frontend.ring import Desc, wait_fd
from tests.frontend.session import F_EVENT_IDX, F_INDIRECT, F_PROTOCOL_FEATURES, Session
from tests.frontend.wire import Request, Wire

from .serving import Disk, make_image

FAR = 1 << 40


# ---- one client after another ----


def test_clients_after_one_another(shared: Disk) -> None:
    """Each with other features, queues, ring sizes and ways to share memory."""
    data = os.urandom(SECTOR)
    with shared.client() as client:
        client.write(1000, data)
    for n in range(40):
        features = FEATURES
        for bit in (F_EVENT_IDX, F_INDIRECT, F_PROTOCOL_FEATURES, F_FLUSH):
            if n & 1 << n % 4:
                features &= ~bit
        slots = bool(n & 1) and bool(features & F_PROTOCOL_FEATURES)
        size = 8 << n % 5
        with shared.client(queues=1 + n % 4, size=size, features=features, slots=slots) as client:
            assert client.read(1000, SECTOR, queue=n % 4) == data


def test_next_client_waits_for_its_turn(shared: Disk) -> None:
    """It may connect while another is served, and is answered when that one has left."""
    with shared.client() as first, Wire.connect(shared.socket) as second:
        second.send(Request.GET_FEATURES)
        first.write(0, bytes(SECTOR))
        assert not select.select([second.sock], [], [], 0)[0]
        first.close()
        assert second.reply_to(Request.GET_FEATURES).u64
        with BlkClient(second) as client:
            assert client.read(0, SECTOR) == bytes(SECTOR)


def test_silent_connection_locks_nobody_out(shared: Disk) -> None:
    with Wire.connect(shared.socket):
        check_healthy(shared.socket, queues=4)


# ---- call fds ----


def test_call_fd_replaced_while_running(shared: Disk) -> None:
    """No completion is lost between two call fds."""
    with shared.client() as client:
        for n in range(300):
            pending = client.submit(header(T_IN, n % 64), 64 * SECTOR + 1)
            old = client.ring.call_fd
            client.ring.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            client.set_vring_call(0, client.ring.call_fd)
            os.close(old)
            assert client.finish(pending).status == S_OK


def test_new_call_fd_is_signalled_for_what_the_old_one_missed(shared: Disk) -> None:
    """A front-end that only sleeps on the new fd, and does not look at the ring, wakes up."""
    with shared.client() as client:
        pending = client.submit(header(T_IN), SECTOR + 1)
        wait_fd(client.ring.call_fd, "no call")
        os.close(client.ring.call_fd)
        client.ring.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        client.set_vring_call(0, client.ring.call_fd)
        wait_fd(client.ring.call_fd, "the completion before the exchange was not signalled")
        assert client.finish(pending).status == S_OK


def test_err_fd_replaced_while_running(shared: Disk) -> None:
    with shared.client() as client:
        client.read(0, SECTOR)
        ring = client.ring
        os.close(ring.err_fd)
        ring.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        client.do(Request.SET_VRING_ERR, bytes(8), [ring.err_fd])
        ring.avail_idx = 5000
        ring.kick()
        ring.wait_broken()


# ---- memory ----


def test_memory_added_and_removed_with_io_in_flight(shared: Disk) -> None:
    image = shared.image.read_bytes()
    with shared.client(slots=True, size=128) as client:
        for round_ in range(30):
            with Region(FAR + round_ * (1 << 30), 1 << 20) as extra:
                pending = [
                    client.submit(header(T_IN, 128 * n), 65536 + 1, kick=False) for n in range(8)
                ]
                client.ring.kick()
                client.add_mem_reg(extra)
                client.memory.add(extra)
                inside = client.submit(header(T_IN, 8), 4097, region=extra)
                assert client.finish(inside).data == image[4096:8192]
                client.rem_mem_reg(extra)
                client.memory.regions.remove(extra)
                for n, request in enumerate(pending):
                    done = client.finish(request)
                    assert done.status == S_OK
                    assert done.data == image[65536 * n : 65536 * (n + 1)]


def test_memory_table_replaced_under_a_running_ring(shared: Disk) -> None:
    """The same guest memory in more, fewer and other regions; rings and buffers stay valid."""
    whole = Region(0, 4 << 20)
    with shared.client(memory=GuestMemory(whole)) as client:
        half = 2 << 20
        low = Region(0, half, fd=whole.fd)
        high = Region(half, half, offset=half, fd=whole.fd)
        with low, high:
            for n in range(60):
                table = [[whole], [low, high], [high, low]][n % 3]
                pending = client.submit(header(T_IN, n), 8 * SECTOR + 1)
                client.set_mem_table(table)
                assert client.finish(pending).status == S_OK
                # Over the seam of the two halves.
                client.memory.write(half - 8, header(T_IN, n))
                assert client.read(n, SECTOR)


def test_memory_at_a_new_guest_address(shared: Disk) -> None:
    """The front-end moves a region that holds a running ring: user addresses are the same, and
    the ring goes on at the new guest address."""
    with shared.client() as client:
        low, high = client.memory.regions
        assert client.read(0, SECTOR)
        high.guest_addr += 1 << 30
        client.set_mem_table([low, high])
        assert client.read(0, SECTOR)
        high.guest_addr -= 1 << 30


# ---- draining ----


@pytest.fixture
def slow(disk_directory: Path) -> Iterator[Disk]:
    """A disk whose reads wait for the hardware: O_DIRECT, so that much is in flight for long."""
    image = disk_directory / "disk.img"
    image.write_bytes(os.urandom(16 << 20))
    with Disk(disk_directory, image, "--cache", "none") as disk:
        yield disk


def submit_reads(client: BlkClient, region: Region, count: int = 60) -> None:
    """Reads of 64 KiB into `region`, headers and statuses elsewhere, made available at once."""
    memory = client.memory
    heads = []
    for n in range(count):
        request = memory.alloc(32, 16, region=memory.regions[0])
        memory.write(request, header(T_IN, 128 * n))
        data = memory.alloc(65536, 4096, region=region)
        heads.append(
            client.ring.add(
                [
                    Desc(request, 16),
                    Desc(data, 65536, write=True),
                    Desc(request + 16, 1, write=True),
                ]
            )
        )
    client.ring.offer(*heads)
    client.ring.kick()


@pytest.mark.parametrize("how", ["stop", "remove", "table", "reset-device", "reset-status"])
def test_nothing_is_written_after_the_answer(slow: Disk, how: str) -> None:
    """Whatever ends the use of guest memory drains first: no read lands there afterwards."""
    memory = GuestMemory(Region(0, 4 << 20))
    with slow.client(memory=memory, slots=True, size=256) as client:
        extra = memory.add(Region(FAR, 8 << 20))
        client.add_mem_reg(extra)
        submit_reads(client, extra)
        if how == "stop":
            assert client.get_vring_base(0) == client.ring.used_idx
        elif how == "remove":
            client.rem_mem_reg(extra)
        elif how == "table":
            client.set_mem_table(memory.regions[:1])
        elif how == "reset-device":
            client.do(Request.RESET_DEVICE)
        else:
            client.set_status(0)
        extra.map[:] = b"\xaa" * extra.size
        for _ in range(20):
            client.barrier()
        assert extra.map[:].count(b"\xaa") == extra.size


@pytest.mark.parametrize("how", ["close", "sigterm"])
def test_nothing_is_left_in_flight_at_the_end(slow: Disk, how: str) -> None:
    """A client that leaves, and a server that is ended, in the middle of 60 reads."""
    for _ in range(1 if how == "sigterm" else 10):
        memory = GuestMemory(Region(0, 4 << 20))
        with slow.client(memory=memory, size=256) as client:
            extra = memory.add(Region(FAR, 8 << 20))
            client.add_mem_reg(extra)
            submit_reads(client, extra)
            if how == "sigterm":
                assert slow.server.stop() == 0
                completed = client.ring.used_idx
                filled = extra.map[:].count(b"\0") < extra.size
                assert filled or completed == 0
    if how == "close":
        check_healthy(slow.socket)


# ---- the end ----


@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_sigterm_with_io_in_flight(tmp_path: Path, engine: str) -> None:
    """What was popped completes, the image holds it, the exit code is 0, nothing is left."""
    image = make_image(tmp_path / "disk.img", 16 << 20)
    with Disk(tmp_path, image, "--engine", engine) as disk, disk.client(size=128) as client:
        data = os.urandom(65536)
        for n in range(30):
            client.submit(header(T_OUT, 128 * n) + data, 1, kick=False)
        client.ring.kick()
        assert disk.server.stop() == 0
        served = 0
        while client.ring.pop():
            served += 1
        written = image.read_bytes()
        blocks = [written[n * 65536 : (n + 1) * 65536] for n in range(30)]
        assert blocks.count(data) >= served
        assert "Traceback" not in disk.server.output
        assert not disk.socket.exists()


def test_sigterm_with_silent_and_waiting_clients(tmp_path: Path) -> None:
    image = make_image(tmp_path / "disk.img", 1 << 20)
    with Disk(tmp_path, image) as disk:
        silent = Wire.connect(disk.socket)
        client = disk.client()
        waiting = Wire.connect(disk.socket)
        waiting.send(Request.GET_FEATURES)
        assert disk.server.stop() == 0
        for connection in (silent, client.wire, waiting):
            connection.wait_closed()
            connection.close()
        client.close()
        assert disk.server.output == ""


def test_server_holds_no_memory_of_a_client_that_left(shared: Disk) -> None:
    check_healthy(shared.socket)
    baseline = shared.server.holdings(shared.socket)
    for _ in range(20):
        with shared.client(queues=4) as client:
            client.submit(header(T_IN), SECTOR + 1)
    shared.server.check_holdings(shared.socket, baseline)


def test_first_answer_needs_no_ring(shared: Disk) -> None:
    with Session(shared.socket) as session:
        assert session.get_features()
        assert session.get_protocol_features()
