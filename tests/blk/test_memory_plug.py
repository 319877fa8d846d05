"""Memory that comes and goes while a disk is in use, by slots and by tables, of every kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perf.hugepages import reserved
from perf.model import Unsupported
from tests.frontend import wire
from tests.frontend.blk import S_OK, SECTOR, T_IN, T_OUT, BlkClient, header
from tests.frontend.memory import PAGE, USER_BASE, GuestMemory, Region
from tests.frontend.ring import Desc
from tests.frontend.wire import Request
from tests.frontend.writer import AREA, Writer

from .serving import Disk, make_image

FAR = 1 << 40
HUGE = 2 << 20
SLOTS = 509
TURNS = 120

Back = Callable[[int], int]
"""Gives a file of so many bytes to map, which is the caller's."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    image = make_image(tmp_path / "disk.img", AREA * SECTOR)
    with Disk(tmp_path, image, "--num-queues", "2") as served:
        idle = served.server.holdings(served.socket)
        yield served
        served.server.check_holdings(served.socket, idle)
        assert "Traceback" not in served.server.output


@pytest.fixture(params=["memfd", "file", "hugepages"])
def back(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Back]:
    def memfd(size: int) -> int:
        fd = os.memfd_create("plugged", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        return fd

    def file(size: int) -> int:
        fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
        os.ftruncate(fd, size)
        return fd

    def huge(size: int) -> int:
        fd = os.memfd_create("plugged", os.MFD_CLOEXEC | os.MFD_HUGETLB)
        os.ftruncate(fd, size)
        return fd

    if request.param != "hugepages":
        yield memfd if request.param == "memfd" else file
        return
    try:
        with reserved(16):
            yield huge
    except Unsupported as error:
        pytest.skip(str(error))


class Plugged:
    """A disk's client whose memory grows and shrinks under its writes.

    Each region begins in the middle of its file.
    """

    def __init__(self, disk: BlkClient, back: Back) -> None:
        self.disk = disk
        self.writer = Writer(disk, seed=2)
        self.regions: list[Region] = []
        self._gone: Region | None = None
        self._back = back
        self._at = FAR

    def new(self) -> Region:
        fd = self._back(2 * HUGE)
        region = Region(self._at, HUGE, offset=HUGE, fd=fd)
        os.close(fd)
        self._at += HUGE
        self.disk.memory.add(region)
        self.regions.append(region)
        return region

    def drop(self) -> Region:
        """A region without requests, all others having theirs."""
        region = self.regions.pop(self.writer.random.randrange(len(self.regions)))
        self.writer.leave(region)
        self.disk.memory.regions.remove(region)
        return region

    def turn(self, tell: Callable[[Region, bool], None]) -> None:
        """A region more, or one less, with writes in flight in all of them."""
        writer = self.writer
        writer.fill()
        self._check_gone()
        if len(self.regions) < 2 or (len(self.regions) < 5 and writer.random.randrange(2)):
            tell(self.new(), True)
            writer.regions = list(self.regions)
        else:
            region = self.drop()
            tell(region, False)
            # Whatever is written from here on is the guest's business no more.
            region.map[:] = b"\xaa" * HUGE
            self._gone = region
        writer.take(writer.random.randrange(len(writer.writes) + 1))

    def check(self) -> None:
        self.writer.finish()
        self.writer.check()
        assert self.writer.done > TURNS
        self._check_gone()

    def _check_gone(self) -> None:
        if self._gone is not None:
            assert self._gone.map[:].count(b"\xaa") == HUGE
            self._gone.close()
            self._gone = None


def test_slots_come_and_go_under_load(disk: Disk, back: Back) -> None:
    with disk.client(queues=2, slots=True) as client:
        plugged = Plugged(client, back)

        def tell(region: Region, comes: bool) -> None:
            (client.add_mem_reg if comes else client.rem_mem_reg)(region)

        for _ in range(TURNS):
            plugged.turn(tell)
        plugged.check()


def test_tables_are_replaced_on_live_rings(disk: Disk, back: Back) -> None:
    with disk.client(queues=2) as client:
        plugged = Plugged(client, back)

        def tell(_region: Region, _comes: bool) -> None:
            client.set_mem_table(list(reversed(client.memory.regions)))

        for _ in range(TURNS):
            plugged.turn(tell)
        plugged.check()


def test_all_slots_are_served(disk: Disk) -> None:
    """Each by requests that lie in it, in no order, and by some over two neighbours."""
    size = 4 * PAGE
    with disk.client(slots=True, size=256) as client:
        assert client.get_max_mem_slots() == SLOTS
        fd = os.memfd_create("slots", os.MFD_CLOEXEC)
        os.ftruncate(fd, SLOTS * size)
        count = SLOTS - len(client.memory.regions)
        at = [n * 101 % count for n in range(count)]
        plugged = [Region(FAR + n * size, size, offset=n * size, fd=fd) for n in at]
        os.close(fd)
        for n, region in enumerate(plugged):
            client.memory.add(region)
            client.add_mem_reg(region)
            sector = 8 * (n % 256)
            data = os.urandom(SECTOR)
            write = client.submit(header(T_OUT, sector) + data, 1, region=region)
            assert client.finish(write).status == S_OK
            read = client.submit(header(T_IN, sector), SECTOR + 1, region=plugged[n // 2])
            assert client.finish(read).data == data
        for region in plugged:
            if region.end < FAR + count * size:
                across(client, region.end - SECTOR)
        while plugged:
            region = plugged.pop(len(plugged) // 2)
            client.memory.regions.remove(region)
            client.rem_mem_reg(region)
            region.close()
        assert client.read(0, SECTOR)


def across(client: BlkClient, address: int) -> None:
    """A write of two sectors at `address`, and back."""
    request, status = client.memory.alloc(16, 16), client.memory.alloc(1)
    data = os.urandom(2 * SECTOR)
    for kind in (T_OUT, T_IN):
        client.memory.write(request, header(kind))
        client.memory.write(address, data if kind == T_OUT else bytes(2 * SECTOR))
        client.ring.submit(
            [
                Desc(request, 16),
                Desc(address, 2 * SECTOR, write=kind == T_IN),
                Desc(status, 1, write=True),
            ]
        )
        client.ring.wait()
        assert client.memory.read(status, 1) == bytes([S_OK])
    assert client.memory.read(address, 2 * SECTOR) == data
    client.memory.release(request, 16)
    client.memory.release(status, 1)


@pytest.mark.parametrize("back", ["hugepages"], indirect=True)
def test_a_part_of_a_huge_page(disk: Disk, back: Back) -> None:
    """Regions may begin and end anywhere in a page, whatever its size."""
    fd = back(HUGE)
    with disk.client(slots=True) as client:
        whole = client.memory.add(Region(FAR, HUGE, fd=fd))
        os.close(fd)
        part = wire.region(FAR + PAGE, 3 * PAGE, USER_BASE + FAR + PAGE, PAGE)
        client.do(Request.ADD_MEM_REG, wire.single_region(part), [whole.fd])
        data = os.urandom(SECTOR)
        client.write(8, data)
        read = client.submit(header(T_IN, 8), SECTOR + 1, region=whole)
        assert PAGE <= read.writable[0] - FAR < 4 * PAGE
        assert client.finish(read).data == data
        client.ring.submit([Desc(FAR, 16), Desc(client.memory.alloc(1), 1, write=True)])
        client.ring.wait_broken()


def test_a_file_that_is_cut_short_breaks_its_rings_only(disk: Disk, back: Back) -> None:
    memory = GuestMemory.default()
    fd = back(2 * HUGE)
    doomed = memory.add(Region(FAR, HUGE, offset=HUGE, fd=fd))
    os.close(fd)
    with disk.client(queues=2, memory=memory) as client:
        pending = client.submit(header(T_IN), SECTOR + 1, queue=1, region=doomed)
        assert client.finish(pending).status == S_OK
        doomed.truncate(HUGE)
        status = memory.alloc(1)
        client.rings[1].submit([Desc(FAR + 2 * PAGE, 16), Desc(status, 1, write=True)])
        client.rings[1].wait_broken()
        client.get_vring_base(1)
        memory.regions.remove(doomed)
        client.set_mem_table(memory.regions)
        doomed.close()
        client.rings[1].reset()
        client.start_ring(1, client.rings[1])
        for queue in range(2):
            client.write(8 * queue, bytes(SECTOR), queue=queue)
