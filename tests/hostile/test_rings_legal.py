"""Catalogue, rings 42-47: what looks odd and is legal.  It must be served."""

from __future__ import annotations

import os

import pytest

from tests.frontend.blk import S_OK, SECTOR, T_IN, BlkClient, header
from tests.frontend.memory import GuestMemory, Region
from tests.frontend.ring import INDIRECT, NEXT, WRITE, Desc, pack_table

from .chains import END_OF_RAM, HOLE, Parts, parts, wide_chain
from .target import IMAGE_SIZE, QUEUES, Target, expect_broken

SIZE = 64
TABLE_MAX = 128


def serve_chain(disk: BlkClient, chain: list[Desc], *, indirect: bool = False) -> int:
    """Submit and wait; returns used.len."""
    head = disk.ring.submit(chain, indirect=indirect)
    used = disk.ring.wait()
    assert used.id == head
    return used.len


def expect_read(victim: Target, p: Parts, data: int, size: int, used: int) -> None:
    assert used == size + 1
    assert p.memory.read(p.status, 1) == bytes([S_OK])
    assert p.memory.read(data, size) == victim.image.read_bytes()[:size]


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_r42_chain_of_the_queue_size(victim: Target, indirect: bool) -> None:
    with victim.client(size=SIZE) as disk:
        p = parts(disk)
        chain = wide_chain(p, SIZE)
        used = serve_chain(disk, chain, indirect=indirect)
        expect_read(victim, p, chain[1].addr, (SIZE - 2) * SECTOR, used)


def test_r47_table_longer_than_the_queue(victim: Target) -> None:
    """Linux does this: seg_max segments in a table, whatever the size of the ring."""
    with victim.client(size=8) as disk:
        p = parts(disk)
        chain = wide_chain(p, TABLE_MAX)
        used = serve_chain(disk, chain, indirect=True)
        expect_read(victim, p, chain[1].addr, (TABLE_MAX - 2) * SECTOR, used)


def test_r43_ring_made_available_whole(victim: Target) -> None:
    """avail.idx jumps by exactly the size of the ring."""
    with victim.client(size=8, queues=QUEUES) as disk:
        pending = [
            disk.submit(header(T_IN, n), SECTOR + 1, indirect=True, kick=False) for n in range(8)
        ]
        disk.ring.kick()
        for request in pending:
            assert disk.finish(request).status == S_OK


def test_r45_address_0(victim: Target) -> None:
    with victim.client() as disk:
        p = parts(disk)
        chain = [Desc(p.head, 16), Desc(0, SECTOR, write=True), Desc(p.status, 1, write=True)]
        expect_read(victim, p, 0, SECTOR, serve_chain(disk, chain))


def test_r45_header_at_address_0(victim: Target) -> None:
    with victim.client() as disk:
        p = parts(disk)
        p.memory.write(0, header(T_IN))
        chain = [Desc(0, 16), *p.chain()[1:]]
        expect_read(victim, p, p.data, SECTOR, serve_chain(disk, chain))


def test_r45_last_byte_of_memory(victim: Target) -> None:
    with victim.client() as disk:
        p = parts(disk)
        last = END_OF_RAM - 1
        data = END_OF_RAM - 1 - SECTOR
        disk.memory.write(last, b"\xee")
        chain = [Desc(p.head, 16), Desc(data, SECTOR + 1, write=True)]
        used = serve_chain(disk, chain)
        disk.memory.write(p.status, disk.memory.read(last, 1))
        expect_read(victim, p, data, SECTOR, used)


def adjacent_memory() -> tuple[GuestMemory, int]:
    """Four regions of different files without a gap, from which rings stay away; and the first
    seam.  The second and third region are one page long."""
    memory = GuestMemory.default()
    at = 1 << 34
    for size in (1 << 20, 4096, 4096, 1 << 20):
        memory.add(Region(at, size))
        at += size
    return memory, (1 << 34) + (1 << 20)


@pytest.mark.parametrize("before", [1, 100, 512, 4096], ids="r46-{}-before-the-seam".format)
@pytest.mark.parametrize("size", [SECTOR, 4096, 16384], ids="{}-bytes".format)
def test_r46_data_over_adjacent_regions(victim: Target, size: int, before: int) -> None:
    memory, seam = adjacent_memory()
    with victim.client(memory=memory) as disk:
        p = parts(disk)
        data = seam - before
        chain = [Desc(p.head, 16), Desc(data, size, write=True), Desc(p.status, 1, write=True)]
        expect_read(victim, p, data, size, serve_chain(disk, chain))


def test_r46_write_over_adjacent_regions(victim: Target) -> None:
    memory, seam = adjacent_memory()
    with victim.client(memory=memory) as disk:
        p = parts(disk)
        data = os.urandom(12 * 1024)
        memory.write(seam - 17, header(1, 16) + data)
        chain = [Desc(seam - 17, 16 + len(data)), Desc(p.status, 1, write=True)]
        assert serve_chain(disk, chain) == 1
        assert memory.read(p.status, 1) == bytes([S_OK])
        assert disk.read(16, len(data)) == data


@pytest.mark.parametrize("split", range(1, 16))
def test_r46_header_over_adjacent_regions(victim: Target, split: int) -> None:
    memory, seam = adjacent_memory()
    with victim.client(memory=memory) as disk:
        p = parts(disk)
        memory.write(seam - split, header(T_IN))
        chain = [Desc(seam - split, 16), *p.chain()[1:]]
        expect_read(victim, p, p.data, SECTOR, serve_chain(disk, chain))


def test_r46_adjacent_regions_then_a_hole(victim: Target) -> None:
    memory, _ = adjacent_memory()
    with victim.client(memory=memory, queues=QUEUES) as disk:
        end = memory.regions[-1].end
        p = parts(disk)
        p.send(Desc(p.head, 16), Desc(end - 256, SECTOR, write=True), Desc(p.status, 1, write=True))
        expect_broken(disk)


def test_r46_adjacent_slots_added_backwards(victim: Target) -> None:
    memory = GuestMemory.default()
    upper = memory.add(Region((1 << 34) + 8192, 8192))
    lower = memory.add(Region(1 << 34, 8192))
    assert lower.end == upper.guest_addr
    with victim.client(memory=memory, slots=True) as disk:
        p = parts(disk)
        data = lower.end - 4096
        chain = [Desc(p.head, 16), Desc(data, 8192, write=True), Desc(p.status, 1, write=True)]
        expect_read(victim, p, data, 8192, serve_chain(disk, chain))


@pytest.mark.parametrize("before", [8, 16, 17, 40], ids="r47-table-{}-before-the-seam".format)
def test_r47_table_over_two_regions(victim: Target, before: int) -> None:
    memory, seam = adjacent_memory()
    with victim.client(memory=memory) as disk:
        p = parts(disk)
        table = pack_table(p.chain())
        memory.write(seam - before, table)
        chain = [Desc(seam - before, len(table), flags=INDIRECT)]
        expect_read(victim, p, p.data, SECTOR, serve_chain(disk, chain))


def test_r47_write_flag_on_the_table_is_ignored(victim: Target) -> None:
    """virtio 1.3, section 2.7.5.3.2: the device must ignore it."""
    with victim.client() as disk:
        p = parts(disk)
        address, size = p.good_table()
        chain = [Desc(address, size, write=True, flags=INDIRECT)]
        expect_read(victim, p, p.data, SECTOR, serve_chain(disk, chain))


def test_r47_table_at_the_end_of_a_chain(victim: Target) -> None:
    """A chain of ordinary descriptors may end in one table."""
    with victim.client() as disk:
        p = parts(disk)
        rest = pack_table(p.chain()[1:])
        address = disk.memory.alloc(len(rest), 16)
        disk.memory.write(address, rest)
        chain = [Desc(p.head, 16), Desc(address, len(rest), flags=INDIRECT)]
        expect_read(victim, p, p.data, SECTOR, serve_chain(disk, chain))


def test_r47_entries_in_any_order(victim: Target) -> None:
    """Only `next` says where a table goes on; unused entries may hold anything."""
    with victim.client() as disk:
        p = parts(disk)
        address = p.table(
            (p.head, 16, NEXT, 4),
            (HOLE, 0, INDIRECT | NEXT, 0xFFFF),
            (p.status, 1, WRITE, 0xFFFF),
            (HOLE, 0, 0, 0),
            (p.data, SECTOR, WRITE | NEXT, 2),
        )
        chain = [Desc(address, 80, flags=INDIRECT)]
        expect_read(victim, p, p.data, SECTOR, serve_chain(disk, chain))


def test_r45_whole_image_in_one_request(victim: Target) -> None:
    memory = GuestMemory.default()
    big = memory.add(Region(1 << 40, IMAGE_SIZE + (1 << 16)))
    with victim.client(memory=memory) as disk:
        done = disk.finish(disk.submit(header(T_IN), IMAGE_SIZE + 1, region=big))
        assert (done.status, done.used) == (S_OK, IMAGE_SIZE + 1)
        assert done.data == victim.image.read_bytes()
