"""Catalogue, rings 42-48: chains, indexes, addresses and indirect tables of a lying driver.

Letter Q: the ring breaks alone.  Legal cases stand beside the illegal ones they border on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.frontend.blk import FEATURES, S_OK, SECTOR, T_FLUSH, T_IN, BlkClient, header
from tests.frontend.memory import GuestMemory, Region
from tests.frontend.ring import DESC, INDIRECT, NEXT, WRITE, Desc, SplitRing, pack_table
from tests.frontend.session import F_INDIRECT

from .target import IMAGE_SIZE, QUEUES, Target, check_serves, expect_broken

SIZE = 64
TABLE_MAX = 128
"""seg_max data segments, header and status: what an indirect table may hold on a small ring."""
HOLE = 1 << 36
END_OF_RAM = (1 << 32) + (4 << 20)


@dataclass(frozen=True)
class Parts:
    """Guest addresses of a proper read of sector 0: header, data, status."""

    disk: BlkClient
    head: int
    data: int
    status: int

    @property
    def ring(self) -> SplitRing:
        return self.disk.ring

    @property
    def memory(self) -> GuestMemory:
        return self.disk.memory

    def chain(self) -> list[Desc]:
        return [
            Desc(self.head, 16),
            Desc(self.data, SECTOR, write=True),
            Desc(self.status, 1, write=True),
        ]

    def table(self, *entries: tuple[int, int, int, int]) -> int:
        """Write raw descriptors somewhere and return the address of this table."""
        packed = b"".join(DESC.pack(*entry) for entry in entries)
        address = self.memory.alloc(len(packed), 16)
        self.memory.write(address, packed)
        return address

    def good_table(self) -> tuple[int, int]:
        packed = pack_table(self.chain())
        address = self.memory.alloc(len(packed), 16)
        self.memory.write(address, packed)
        return address, len(packed)

    def send(self, *chain: Desc) -> int:
        return self.ring.submit(chain)

    def raw(self, *entries: tuple[int, int, int, int], head: int = 0) -> None:
        """Fill the descriptor table from its start and make `head` available."""
        for index, entry in enumerate(entries):
            self.ring.set_desc(index, *entry)
        self.ring.offer(head)
        self.ring.kick()


def parts(disk: BlkClient) -> Parts:
    found = Parts(
        disk, disk.memory.alloc(16, 16), disk.memory.alloc(SECTOR, 16), disk.memory.alloc(1)
    )
    disk.memory.write(found.head, header(T_IN))
    disk.memory.write(found.status, b"\xee")
    return found


Break = Callable[[Parts], object]


def broken_by(name: str, act: Break) -> object:
    return pytest.param(act, id=name)


# ---- 42, 43: chains and indexes ----


def wide_chain(p: Parts, entries: int) -> list[Desc]:
    """A read whose chain has exactly `entries` descriptors."""
    count = entries - 2
    data = p.memory.alloc(count * SECTOR, 16)
    return [
        Desc(p.head, 16),
        *(Desc(data + n * SECTOR, SECTOR, write=True) for n in range(count)),
        Desc(p.status, 1, write=True),
    ]


def avail_back_by_one(p: Parts) -> None:
    check_serves(p.disk)
    p.ring.avail_idx = p.ring.avail_idx - 1
    p.ring.kick()


def avail_ahead(by: int) -> Break:
    def act(p: Parts) -> None:
        p.ring.avail_idx = p.ring.avail_idx + by
        p.ring.kick()

    return act


def offer(head: int) -> Break:
    def act(p: Parts) -> None:
        p.ring.offer(head)
        p.ring.kick()

    return act


def nested_table(p: Parts) -> None:
    inner, size = p.good_table()
    p.send(Desc(p.table((inner, size, INDIRECT, 0)), 16, flags=INDIRECT))


def next_in_table(index: int) -> Break:
    def act(p: Parts) -> None:
        table = p.table((p.head, 16, NEXT, index), (p.data, SECTOR, WRITE, 0))
        p.send(Desc(table, 32, flags=INDIRECT))

    return act


def loop_in_table(p: Parts) -> None:
    table = p.table((p.head, 16, NEXT, 1), (p.data, SECTOR, WRITE | NEXT, 1))
    p.send(Desc(table, 32, flags=INDIRECT))


def table_of(length: Callable[[int], int]) -> Break:
    def act(p: Parts) -> None:
        address, size = p.good_table()
        p.send(Desc(address, length(size), flags=INDIRECT))

    return act


def table_at(address: int) -> Break:
    return lambda p: p.send(Desc(address, 48, flags=INDIRECT))


def indirect_with_next(p: Parts) -> None:
    address, size = p.good_table()
    p.raw((address, size, INDIRECT | NEXT, 1), (p.status, 1, WRITE, 0))


def two_tables(p: Parts) -> None:
    address, size = p.good_table()
    p.raw((address, size, INDIRECT | NEXT, 1), (address, size, INDIRECT, 0))


def table_too_long(p: Parts) -> None:
    p.ring.submit(wide_chain(p, TABLE_MAX + 1), indirect=True)


def data_at(address: int, length: int = SECTOR) -> Break:
    return lambda p: p.send(
        Desc(p.head, 16), Desc(address, length, write=True), Desc(p.status, 1, write=True)
    )


def header_at(address: int, length: int = 16) -> Break:
    return lambda p: p.send(Desc(address, length), Desc(p.status, 1, write=True))


def status_at(address: int) -> Break:
    return lambda p: p.send(
        Desc(p.head, 16), Desc(p.data, SECTOR, write=True), Desc(address, 1, write=True)
    )


def over_the_end(p: Parts) -> None:
    data_at(p.memory.regions[0].end - 100)(p)


def readable_after_writable(p: Parts) -> None:
    p.send(Desc(p.head, 16), Desc(p.status, 1, write=True), Desc(p.data, SECTOR))


def readable_between(p: Parts) -> None:
    p.send(
        Desc(p.head, 8),
        Desc(p.data, SECTOR, write=True),
        Desc(p.head + 8, 8),
        Desc(p.status, 1, write=True),
    )


@pytest.mark.parametrize(
    "act",
    [
        broken_by("r42-loop-of-one", lambda p: p.raw((p.head, 16, NEXT, 0))),
        broken_by("r42-loop-of-two", lambda p: p.raw((p.head, 8, NEXT, 1), (p.head, 8, NEXT, 0))),
        broken_by(
            "r42-loop-of-writable",
            lambda p: p.raw((p.head, 16, NEXT, 1), (p.data, 1, WRITE | NEXT, 1)),
        ),
        broken_by("r42-loop-in-an-indirect-table", loop_in_table),
        broken_by("r43-next-is-the-size", lambda p: p.raw((p.head, 16, NEXT, SIZE))),
        broken_by("r43-next-65535", lambda p: p.raw((p.head, 16, NEXT, 0xFFFF))),
        broken_by("r43-head-is-the-size", offer(SIZE)),
        broken_by("r43-head-65535", offer(0xFFFF)),
        broken_by("r43-avail-ahead-by-size-plus-1", avail_ahead(SIZE + 1)),
        broken_by("r43-avail-ahead-by-32768", avail_ahead(0x8000)),
        broken_by("r43-avail-back-by-one", avail_back_by_one),
        broken_by("r43-avail-back-by-one-at-the-start", avail_ahead(-1)),
        broken_by("r45-data-beyond-ram", data_at(END_OF_RAM)),
        broken_by("r45-data-in-a-hole", data_at(HOLE)),
        broken_by("r45-data-over-the-end-of-a-region", over_the_end),
        broken_by("r45-data-wraps", data_at((1 << 64) - 256)),
        broken_by("r45-data-at-the-last-address", data_at((1 << 64) - 1)),
        broken_by("r45-length-2-32-minus-1", data_at(0x2000, 0xFFFFFFFF)),
        broken_by("r45-header-beyond-ram", header_at(END_OF_RAM)),
        broken_by("r45-header-over-the-end", header_at(END_OF_RAM - 8)),
        broken_by("r45-header-wraps", header_at((1 << 64) - 8)),
        broken_by("r45-status-beyond-ram", status_at(END_OF_RAM)),
        broken_by("r45-status-in-a-hole", status_at(HOLE)),
        broken_by("r47-nested", nested_table),
        broken_by("r47-with-next", indirect_with_next),
        broken_by("r47-two-in-a-chain", two_tables),
        broken_by("r47-length-0", table_of(lambda size: 0)),
        broken_by("r47-length-8", table_of(lambda size: 8)),
        broken_by("r47-length-not-a-multiple-of-16", table_of(lambda size: size - 1)),
        broken_by("r47-length-plus-8", table_of(lambda size: size + 8)),
        broken_by("r47-length-2-32-minus-16", table_of(lambda size: 0xFFFFFFF0)),
        broken_by("r47-chain-too-long", table_too_long),
        broken_by("r47-table-beyond-ram", table_at(END_OF_RAM)),
        broken_by("r47-table-over-the-end", table_at(END_OF_RAM - 32)),
        broken_by("r47-table-wraps", table_at((1 << 64) - 16)),
        broken_by("r47-next-out-of-the-table", next_in_table(2)),
        broken_by("r47-next-65535", next_in_table(0xFFFF)),
        broken_by("r48-readable-after-writable", readable_after_writable),
        broken_by("r48-readable-between-writable", readable_between),
        broken_by("r48-data-of-length-0", data_at(0x2000, 0)),
        broken_by("r48-header-of-length-0", header_at(0x2000, 0)),
    ],
)
def test_ring_breaks_alone(victim: Target, act: Break) -> None:
    with victim.client(queues=QUEUES, size=SIZE) as disk:
        act(parts(disk))
        expect_broken(disk)


def test_r47_indirect_not_negotiated(victim: Target) -> None:
    with victim.client(queues=QUEUES, features=FEATURES & ~F_INDIRECT) as disk:
        disk.submit(header(T_IN), SECTOR + 1, indirect=True)
        expect_broken(disk)


def test_r45_total_over_2_32(victim: Target) -> None:
    memory = GuestMemory.default()
    huge = memory.add(Region(1 << 40, 1 << 30))
    with victim.client(queues=QUEUES, memory=memory) as disk:
        p = parts(disk)
        p.send(
            Desc(p.head, 16),
            *(Desc(huge.guest_addr, huge.size, write=True) for _ in range(4)),
            Desc(p.status, 1, write=True),
        )
        expect_broken(disk)


def test_r44_same_head_twice_in_flight(victim: Target) -> None:
    """A flush waits for the disk, so the second offer meets the first in flight."""
    with victim.client(queues=QUEUES) as disk:
        p = parts(disk)
        p.memory.write(p.head, header(T_FLUSH))
        head = p.ring.add([Desc(p.head, 16), Desc(p.status, 1, write=True)])
        p.ring.offer(head, head)
        p.ring.kick()
        p.ring.wait_broken()
        # The first is completed all the same, once.
        assert p.ring.wait().id == head
        assert p.memory.read(p.status, 1) == bytes([S_OK])
        assert p.ring.pop() is None
        check_serves(disk, 1)


# ---- legal, though it looks odd ----


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
