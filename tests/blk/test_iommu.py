"""A disk whose driver is behind an IOMMU: translations come when they are asked for, and go."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.frontend.blk import S_OK, SECTOR, T_IN, T_OUT, header
from tests.frontend.iommu import (
    EVERYTHING,
    LAYOUTS,
    READ,
    WRITE,
    IommuDisk,
    IommuMemory,
)
from tests.frontend.log import DirtyLog, changes, snapshot
from tests.frontend.memory import PAGE, Region
from tests.frontend.ring import is_signalled
from tests.frontend.session import F_LOG_ALL, PROTOCOL_WANTED
from tests.frontend.wire import TIMEOUT, Protocol
from tests.frontend.writer import AREA, DEPTH, Writer

from .serving import Disk, make_image

EVERY = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(scope="module", params=["auto", "threads"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Disk]:
    directory = tmp_path_factory.mktemp("iommu")
    image = make_image(directory / "disk.img", AREA * SECTOR)
    with Disk(directory, image, "--num-queues", "2", "--engine", request.param) as disk:
        yield disk
        disk.server.check_alive()
        assert "Traceback" not in disk.server.output


@EVERY
@pytest.mark.parametrize("granted", [READ | WRITE, None], ids=["all", "as asked"])
def test_what_is_written_is_read_back(served: Disk, layout: str, granted: int | None) -> None:
    """Buffers of up to 64 KiB lie all over memory, a page here and a page there."""
    with IommuDisk(served.socket, features=LAYOUTS[layout], start=False) as disk:
        disk.iommu.granted = granted
        for index, ring in enumerate(disk.rings):
            disk.start_ring(index, ring)
        for indirect in (False, True):
            for size in (SECTOR, 4096, 65536):
                data = random.randbytes(size)
                written = disk.request(T_OUT, 0, data, indirect=indirect)
                read = disk.request(T_IN, 0, room=size, indirect=indirect)
                assert (written.status, read.status) == (S_OK, S_OK)
                assert read.data == data
        asked = len(disk.iommu.misses)
        assert asked == len(set(disk.iommu.misses))  # nothing twice
        disk.write(0, b"a" * SECTOR)
        assert len(disk.iommu.misses) == asked  # in pages that are known


@EVERY
def test_translations_come_and_go_under_load(served: Disk, layout: str) -> None:
    """Pages in use are taken back and asked for again; free ones lie somewhere else then."""
    with IommuDisk(served.socket, features=LAYOUTS[layout], queues=2) as disk:
        disk.write_zeroes(0, AREA)
        writer = Writer(disk, seed=1)
        rng = random.Random(2)
        rings = [at & -PAGE for ring in disk.rings for at in (ring.desc, ring.avail, ring.used)]
        for turn in range(100):
            writer.fill()
            page = rng.choice(list(disk.iommu.memory.pages))
            match turn % 5:
                case 0:
                    disk.iommu.invalidate(0, EVERYTHING)
                case 1:
                    disk.iommu.invalidate(rng.choice(rings), PAGE)
                case 2:
                    disk.iommu.invalidate(page, 16 * PAGE)
                case _:
                    free = disk.iommu.memory.free_pages()
                    disk.iommu.swap(*rng.sample(free, 2))
            writer.read()
            writer.take(rng.randrange(DEPTH))
        writer.finish()
        writer.check()
        assert writer.done > 100


def test_a_request_waits_and_others_do_not(served: Disk) -> None:
    with IommuDisk(served.socket, queues=2) as disk:
        disk.write(0, b"1" * SECTOR)
        page, room = disk.iommu.memory.free_pages()[:2]
        disk.iommu.deny([page, room])
        asked = len(disk.iommu.misses)
        waiting = disk.submit(header(T_IN), SECTOR + 1)
        assert (waiting.readable[0], waiting.writable[0]) == (page, room)
        disk.iommu.wait_asked(asked + 1, timeout=TIMEOUT)
        assert disk.read(0, SECTOR, queue=1) == b"1" * SECTOR
        for _ in range(100):  # the server does not ask again
            disk.rings[0].kick()
        disk.barrier()
        assert len([miss for miss in disk.iommu.misses[asked:] if miss[0] & -PAGE == page]) == 1
        assert not is_signalled(disk.rings[0].err_fd)
        disk.iommu.denied.clear()
        disk.iommu.update(page, PAGE)
        assert disk.finish(waiting).data == b"1" * SECTOR


@EVERY
def test_a_ring_that_waits_stops_and_starts(served: Disk, layout: str) -> None:
    with IommuDisk(served.socket, features=LAYOUTS[layout]) as disk:
        disk.write(0, b"2" * SECTOR)
        (ring,) = disk.rings
        disk.iommu.deny(disk.iommu.memory.free_pages()[:1])
        disk.iommu.denied.update(disk.iommu.memory.pages)
        asked = len(disk.iommu.misses)
        waiting = disk.submit(header(T_IN), SECTOR + 1)
        disk.iommu.wait_asked(asked + 1, timeout=TIMEOUT)
        base = disk.get_vring_base(0)
        disk.start_ring(0, ring, base=base)  # what was known is forgotten: this waits, too
        assert disk.get_vring_base(0) == base
        disk.iommu.denied.clear()
        disk.start_ring(0, ring, base=base)
        assert disk.finish(waiting).data == b"2" * SECTOR


def test_a_ring_starts_when_it_is_there(served: Disk) -> None:
    """Its parts come one by one; meanwhile the server answers, and the other ring is served."""
    with IommuDisk(served.socket, queues=2, start=False) as disk:
        first, second = disk.rings
        parts = [at & -PAGE for at in (first.desc, first.avail, first.used)]
        disk.iommu.denied.update(parts)
        disk.start_ring(0, first)
        disk.start_ring(1, second)
        disk.write(0, b"3" * SECTOR, queue=1)
        request = disk.submit(header(T_IN), SECTOR + 1)
        for part in parts:
            assert first.pop() is None
            disk.iommu.denied.discard(part)
            disk.iommu.update(part, PAGE)
        assert disk.finish(request).data == b"3" * SECTOR


def test_the_channel_may_come_late(served: Disk) -> None:
    """What was lacking before it came is asked for on it."""

    class Late(IommuDisk):
        def share(self, memory: object, *, slots: bool = False) -> None:
            assert isinstance(memory, IommuMemory)
            self.set_mem_table(memory.regions)

    with Late(served.socket, start=False) as disk:
        disk.start_ring(0, disk.rings[0])
        super(Late, disk).share(disk.memory)
        disk.write(0, b"4" * SECTOR)


def test_what_is_known_goes_with_a_reset(served: Disk) -> None:
    with IommuDisk(served.socket) as disk:
        disk.write(0, b"5" * SECTOR)
        (ring,) = disk.rings
        features = disk.features
        for _ in range(2):
            disk.set_status(0)
            ring.reset()
            asked = len(disk.iommu.misses)
            disk.set_features(features)
            disk.start_ring(0, ring)
            assert disk.read(0, SECTOR) == b"5" * SECTOR
            assert len(disk.iommu.misses) > asked


def test_memory_that_goes_takes_its_translations_along(served: Disk) -> None:
    """A region is replaced by another with the same addresses, under load; in slots, one by one."""
    memory = IommuMemory(*(Region(n << 32, 1 << 20) for n in range(4)))
    with IommuDisk(served.socket, queues=2, memory=memory, slots=True) as disk:
        disk.write_zeroes(0, AREA)
        writer = Writer(disk, seed=3)
        for _ in range(10):
            writer.fill()
            region = writer.random.choice(disk.memory.regions)
            disk.rem_mem_reg(region)
            disk.add_mem_reg(region)
            disk.set_mem_table(disk.memory.regions)
            writer.read()
            writer.take(writer.random.randrange(DEPTH))
        writer.finish()
        writer.check()


@EVERY
def test_the_log_is_of_guest_memory(served: Disk, layout: str) -> None:
    protocol = PROTOCOL_WANTED | Protocol.LOG_SHMFD
    with (
        IommuDisk(served.socket, features=LAYOUTS[layout], protocol=protocol) as disk,
        DirtyLog(disk.memory) as log,
    ):
        disk.start_logging(log, disk.rings)
        log.take()
        memory = disk.iommu.memory
        pending = disk.submit(header(T_IN), 65536 + 1, kick=False)
        before = snapshot(memory)
        memory.write(pending.writable[0], bytes(65536 + 1))
        disk.rings[0].kick()
        disk.used_of(pending)
        disk.set_features(disk.features)
        after = snapshot(memory)
        found = log.take()
        (ring,) = disk.rings
        ours = {memory.guest_addr(ring.avail) & -PAGE}
        asked = range(pending.writable[0] & -PAGE, sum(pending.writable), PAGE)
        buffers = {memory.guest_addr(page) for page in asked}
        rings = {memory.guest_addr(at) & -PAGE for at in (ring.desc, ring.used)}
        assert buffers <= found <= buffers | rings
        assert changes(before, after) - ours <= found
        assert log.stray() == 0
        disk.set_features(disk.features & ~F_LOG_ALL)


def test_front_ends_without_one_see_nothing_of_it(served: Disk) -> None:
    with served.client() as disk:
        data = os.urandom(4096)
        disk.write(0, data)
        assert disk.read(0, 4096) == data
