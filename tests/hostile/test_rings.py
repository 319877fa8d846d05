"""Catalogue, rings 42-48: chains, indexes, addresses and indirect tables of a lying driver.

Letter Q: the ring breaks alone.  The legal cases that border on these are in test_rings_legal.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.frontend.blk import FEATURES, S_OK, SECTOR, T_FLUSH, T_IN, BlkClient, header
from tests.frontend.memory import GuestMemory, Region
from tests.frontend.ring import INDIRECT, NEXT, WRITE, Desc, SplitRing
from tests.frontend.session import F_INDIRECT

from .chains import END_OF_RAM, HOLE, Parts, parts, wide_chain
from .target import QUEUES, Target, check_serves, expect_broken

SIZE = 64
TABLE_MAX = 128
"""seg_max data segments, header and status: what an indirect table may hold on a small ring."""
Break = Callable[[Parts], object]


def broken_by(name: str, act: Break) -> object:
    return pytest.param(act, id=name)


# ---- 42, 43: chains and indexes ----


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
    """The inner table is in order: taken for what it says, it would serve."""
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


def test_r43_nothing_of_a_ring_too_full_is_served(victim: Target) -> None:
    """Every entry of the avail ring is in order; only the index says more than there are."""
    with victim.client(queues=QUEUES, size=8) as disk:
        p = parts(disk)
        address, size = p.good_table()
        heads = [disk.ring.add([Desc(address, size, flags=INDIRECT)]) for _ in range(8)]
        for position, head in enumerate(heads):
            disk.ring.set_avail(position, head)
        disk.ring.avail_idx = 9
        disk.ring.kick()
        disk.ring.wait_broken()
        assert disk.ring.used_idx == 0
        check_serves(disk, 1)


def ring_with_one_more(disk: BlkClient) -> SplitRing:
    """A stopped ring 0 whose table is followed by a descriptor that would serve, were it in it."""
    disk.get_vring_base(0)
    ring = disk.ring
    ring.desc = disk.memory.alloc(16 * (SIZE + 1), 16)
    ring.reset()
    address, size = parts(disk).good_table()
    ring.set_desc(SIZE, address, size, INDIRECT)
    disk.start_ring(0, ring)
    return ring


def test_r43_descriptor_behind_the_table_as_head(victim: Target) -> None:
    with victim.client(queues=QUEUES, size=SIZE) as disk:
        ring = ring_with_one_more(disk)
        ring.offer(SIZE)
        ring.kick()
        expect_broken(disk)


def test_r43_descriptor_behind_the_table_as_next(victim: Target) -> None:
    with victim.client(queues=QUEUES, size=SIZE) as disk:
        ring = ring_with_one_more(disk)
        status = disk.memory.alloc(1)
        ring.set_desc(SIZE, status, 1, WRITE)
        ring.set_desc(0, _flush_header(disk), 16, NEXT, SIZE)
        ring.offer(0)
        ring.kick()
        expect_broken(disk)


def test_r47_descriptor_behind_the_indirect_table(victim: Target) -> None:
    with victim.client(queues=QUEUES, size=SIZE) as disk:
        p = parts(disk)
        table = p.table((_flush_header(disk), 16, NEXT, 1), (p.status, 1, WRITE, 0))
        p.send(Desc(table, 16, flags=INDIRECT))
        expect_broken(disk)


def _flush_header(disk: BlkClient) -> int:
    address = disk.memory.alloc(16, 16)
    disk.memory.write(address, header(T_FLUSH))
    return address


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
