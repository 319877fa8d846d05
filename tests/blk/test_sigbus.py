"""Guest memory that is taken away: a front-end truncates the file behind a region.

Touching it raises SIGBUS in the server.  That must break the device whose memory it was, and
neither the process nor another device in it.
"""

from __future__ import annotations

import os
import select
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend.blk import (
    S_IOERR,
    SECTOR,
    T_FLUSH,
    T_IN,
    T_OUT,
    BlkClient,
    check_healthy,
    header,
)
from tests.frontend.memory import GuestMemory, Region
from tests.frontend.ring import INDIRECT, Desc, is_signalled, pack_table
from tests.frontend.server import Server

from .serving import make_image

FAR = 1 << 40
SIZE = 1 << 20


class Pair:
    """Two disks in one process."""

    def __init__(self, directory: Path, engine: str) -> None:
        self.sockets = [directory / f"{name}.sock" for name in "ab"]
        tables = []
        for name in "ab":
            make_image(directory / f"{name}.img", 16 << 20)
            tables.append(
                f'[[blk]]\nsocket = "{name}.sock"\nimage = "{name}.img"\nqueues = 2\n'
                f'engine = "{engine}"\n'
            )
        config = directory / "config.toml"
        config.write_text("\n".join(tables))
        self.server = Server.vdev("serve", config)
        # What it holds before its first guest.
        self.idle: tuple[Counter[str], Counter[str]] = (Counter(), Counter())


@pytest.fixture(scope="module", params=["auto", "threads"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    served = Pair(tmp_path_factory.mktemp("sigbus"), request.param)
    with served.server:
        served.idle = served.server.holdings(served.sockets[0])
        for socket in served.sockets:
            check_healthy(socket, queues=2)
        yield served
        served.server.check_alive()
        assert "Traceback" not in served.server.output
        assert "started again" not in served.server.output


@pytest.fixture
def neighbour(pair: Pair) -> Iterator[BlkClient]:
    """A client of the other disk, served before, during and after."""
    with BlkClient(pair.sockets[1], queues=2) as client:
        client.write(0, b"\1" * SECTOR)
        yield client
        for queue in range(2):
            assert client.read(0, SECTOR, queue=queue) == b"\1" * SECTOR
            assert not is_signalled(client.rings[queue].err_fd)
    pair.server.check_alive()
    check_healthy(pair.sockets[0], queues=2)
    pair.server.check_holdings(pair.sockets[0], pair.idle)


def victim(pair: Pair) -> tuple[BlkClient, Region]:
    """A client of the first disk, with one region more, which is going to be truncated."""
    memory = GuestMemory.default()
    doomed = memory.add(Region(FAR, SIZE))
    return BlkClient(pair.sockets[0], memory=memory), doomed


def expect_broken_or_error(client: BlkClient, status: int | None) -> None:
    """The ring breaks; where only the kernel touched the memory, the request may end in IOERR."""
    ring = client.ring
    poller = select.poll()
    poller.register(ring.err_fd, select.POLLIN)
    poller.register(ring.call_fd, select.POLLIN)
    while not is_signalled(ring.err_fd):
        assert poller.poll(10_000), "neither broken nor completed"
        if ring.pop():
            assert status is None or client.memory.read(status, 1) != b"\0"
            return
        if is_signalled(ring.call_fd):
            os.eventfd_read(ring.call_fd)


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_ring_truncated(pair: Pair, neighbour: BlkClient, part: str) -> None:
    client, doomed = victim(pair)
    with client:
        ring = client.new_ring()
        setattr(ring, part, client.memory.alloc(2048, 16, region=doomed))
        ring.reset()
        client.rings.append(ring)
        client.start_ring(1, ring)
        assert client.read(0, SECTOR, queue=1)
        chain = [Desc(client.memory.alloc(16, 16), 16), Desc(client.memory.alloc(1), 1, write=True)]
        client.memory.write(chain[0].addr, header(T_FLUSH))
        head = ring.add(chain)
        if part != "avail":
            ring.offer(head)
        doomed.truncate(0)
        ring.kick()
        ring.wait_broken()
        assert neighbour.read(0, SECTOR)
        client.get_vring_base(1)


@pytest.mark.parametrize("what", ["header", "table", "status"])
def test_what_the_server_touches_is_truncated(pair: Pair, neighbour: BlkClient, what: str) -> None:
    client, doomed = victim(pair)
    with client:
        memory = client.memory
        lost = memory.alloc(SECTOR, 16, region=doomed)
        request, data, status = memory.alloc(16, 16), memory.alloc(SECTOR, 16), memory.alloc(1)
        memory.write(request, header(T_IN))
        chain = [
            Desc(lost if what == "header" else request, 16),
            Desc(data, SECTOR, write=True),
            Desc(lost if what == "status" else status, 1, write=True),
        ]
        if what == "table":
            memory.write(lost, pack_table(chain))
            chain = [Desc(lost, 48, flags=INDIRECT)]
        doomed.truncate(0)
        client.ring.submit(chain)
        client.ring.wait_broken()
        assert neighbour.read(0, SECTOR)


@pytest.mark.parametrize("kind", [T_IN, T_OUT], ids=["read", "write"])
@pytest.mark.parametrize("keep", [0, 4096], ids=["all", "tail"])
def test_data_truncated(pair: Pair, neighbour: BlkClient, kind: int, keep: int) -> None:
    client, doomed = victim(pair)
    with client:
        memory = client.memory
        data = doomed.guest_addr
        request, status = memory.alloc(16, 16), memory.alloc(1)
        memory.write(request, header(kind))
        memory.write(status, b"\xee")
        doomed.truncate(keep)
        client.ring.submit(
            [
                Desc(request, 16),
                Desc(data, 16384, write=kind == T_IN),
                Desc(status, 1, write=True),
            ]
        )
        expect_broken_or_error(client, status)
        if not is_signalled(client.ring.err_fd):
            assert memory.read(status, 1) == bytes([S_IOERR])
        assert neighbour.read(0, SECTOR)


@pytest.mark.parametrize("kind", [T_IN, T_OUT], ids=["read", "write"])
def test_truncated_with_io_in_flight(pair: Pair, neighbour: BlkClient, kind: int) -> None:
    """Twenty times over, since where the truncation meets the requests is up to chance."""
    for _ in range(20):
        client, doomed = victim(pair)
        with client:
            memory = client.memory
            heads = []
            for n in range(16):
                request, status = memory.alloc(16, 16), memory.alloc(1)
                memory.write(request, header(kind, 128 * n))
                chain = [
                    Desc(request, 16),
                    Desc(doomed.guest_addr + 65536 * (n % 16), 65536, write=kind == T_IN),
                    Desc(status, 1, write=True),
                ]
                heads.append(client.ring.add(chain))
            client.ring.offer(*heads)
            client.ring.kick()
            doomed.truncate(0)
            base = client.get_vring_base(0)
            assert client.ring.used_idx == base
        assert neighbour.read(0, SECTOR)


def test_truncated_and_never_touched(pair: Pair, neighbour: BlkClient) -> None:
    """Memory that nobody uses may go; the device goes on."""
    client, doomed = victim(pair)
    with client:
        doomed.truncate(0)
        assert client.read(0, SECTOR)
        assert neighbour.read(0, SECTOR)


def test_everything_truncated(pair: Pair, neighbour: BlkClient) -> None:
    client, _ = victim(pair)
    with client:
        for region in client.memory.regions:
            region.truncate(0)
        client.ring.kick()
        client.ring.wait_broken()
        assert neighbour.read(0, SECTOR)


def test_memory_replaced_after_a_truncation(pair: Pair, neighbour: BlkClient) -> None:
    """A broken ring comes back in good memory, on the same connection."""
    client, doomed = victim(pair)
    with client:
        memory = client.memory
        lost = memory.alloc(16, 16, region=doomed)
        doomed.truncate(0)
        client.ring.submit([Desc(lost, 16), Desc(memory.alloc(1), 1, write=True)])
        client.ring.wait_broken()
        memory.regions.remove(doomed)
        client.set_mem_table(memory.regions)
        client.get_vring_base(0)
        client.ring.reset()
        client.start_ring(0, client.ring)
        assert client.read(0, SECTOR)
        memory.regions.append(doomed)
