"""Catalogue, 25 and 42-52, of packed rings: the guest breaks its own ring and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.frontend.blk import LAYOUTS, S_OK, SECTOR, T_IN, BlkClient, header
from tests.frontend.packed import AVAIL, DESC_EVENT, SLOT, USED, WRAP
from tests.frontend.ring import INDIRECT, NEXT, WRITE, is_signalled
from tests.frontend.session import Refused
from tests.frontend.wire import Hung

from .chains import END_OF_RAM, HOLE
from .target import QUEUES, Target, check_serves

SIZE = 8


def packed_disk(victim: Target, *, size: int = SIZE, queues: int = QUEUES) -> BlkClient:
    return victim.client(size=size, queues=queues, features=LAYOUTS["packed"])


def expect_broken(disk: BlkClient) -> None:
    """Letter Q, as of split rings."""
    disk.rings[0].wait_broken()
    for other in range(1, len(disk.rings)):
        check_serves(disk, other)
        assert not is_signalled(disk.rings[other].err_fd), f"ring {other} broke too"


def good_read(disk: BlkClient) -> tuple[int, int]:
    """Guest addresses of a header, and of room for a sector and its status."""
    memory = disk.memory
    head, room = memory.alloc(16, 16), memory.alloc(SECTOR + 1, 16)
    memory.write(head, header(T_IN))
    return head, room


def table(disk: BlkClient, *entries: tuple[int, int, int, int]) -> int:
    data = b"".join(SLOT.pack(*entry) for entry in entries)
    address = disk.memory.alloc(len(data), 16)
    disk.memory.write(address, data)
    return address


def good_table(disk: BlkClient) -> int:
    head, room = good_read(disk)
    return table(disk, (head, 16, 0, 0), (room, SECTOR + 1, 0, WRITE))


def next_for_ever(disk: BlkClient) -> None:
    head, _ = good_read(disk)
    for n in range(SIZE):
        disk.packed_ring.put(head, 16, n, NEXT)


def id_out_of_range(disk: BlkClient) -> None:
    head, room = good_read(disk)
    disk.packed_ring.put(head, 16, 0, NEXT)
    disk.packed_ring.put(room, SECTOR + 1, SIZE, WRITE)


def zero_length(disk: BlkClient) -> None:
    head, _ = good_read(disk)
    disk.packed_ring.put(head, 0, 0, 0)


def beyond_ram(disk: BlkClient) -> None:
    disk.packed_ring.put(END_OF_RAM, 1, 0, WRITE)


def in_a_hole(disk: BlkClient) -> None:
    disk.packed_ring.put(HOLE, 16, 0, 0)


def four_gib(disk: BlkClient) -> None:
    disk.packed_ring.put(0, 2**32 - 1, 0, WRITE)


def readable_after_writable(disk: BlkClient) -> None:
    head, room = good_read(disk)
    disk.packed_ring.put(room, SECTOR + 1, 0, WRITE | NEXT)
    disk.packed_ring.put(head, 16, 0, 0)


def indirect_with_next(disk: BlkClient) -> None:
    disk.packed_ring.put(good_table(disk), 32, 0, INDIRECT | NEXT)


def indirect_behind_another(disk: BlkClient) -> None:
    head, _ = good_read(disk)
    disk.packed_ring.put(head, 16, 0, NEXT)
    disk.packed_ring.put(good_table(disk), 32, 0, INDIRECT)


def indirect_in_indirect(disk: BlkClient) -> None:
    outer = table(disk, (good_table(disk), 32, 0, INDIRECT))
    disk.packed_ring.put(outer, 16, 0, INDIRECT)


def indirect_of_length_0(disk: BlkClient) -> None:
    disk.packed_ring.put(good_table(disk), 0, 0, INDIRECT)


def indirect_of_an_odd_length(disk: BlkClient) -> None:
    disk.packed_ring.put(good_table(disk), 31, 0, INDIRECT)


def indirect_without_end(disk: BlkClient) -> None:
    disk.packed_ring.put(good_table(disk), 0xFFFFFFF0, 0, INDIRECT)


def indirect_outside(disk: BlkClient) -> None:
    disk.packed_ring.put(HOLE, 32, 0, INDIRECT)


WRONG: list[Callable[[BlkClient], None]] = [
    next_for_ever,
    id_out_of_range,
    zero_length,
    beyond_ram,
    in_a_hole,
    four_gib,
    readable_after_writable,
    indirect_with_next,
    indirect_behind_another,
    indirect_in_indirect,
    indirect_of_length_0,
    indirect_of_an_odd_length,
    indirect_without_end,
    indirect_outside,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda build: f"r52-{build.__name__}")
def test_wrong_chain(victim: Target, wrong: Callable[[BlkClient], None]) -> None:
    with packed_disk(victim) as disk:
        wrong(disk)
        disk.rings[0].kick()
        expect_broken(disk)


def test_r52_indirect_that_was_not_negotiated(victim: Target) -> None:
    with victim.client(size=SIZE, features=LAYOUTS["packed"] & ~(1 << 28)) as disk:
        disk.packed_ring.put(good_table(disk), 32, 0, INDIRECT)
        disk.rings[0].kick()
        expect_broken(disk)


@pytest.mark.parametrize(("place", "flags"), [(SIZE, DESC_EVENT), (0xFFFF, DESC_EVENT), (0, 3)])
def test_r52_wish_that_is_none(victim: Target, place: int, flags: int) -> None:
    """The request is served all the same."""
    with packed_disk(victim) as disk:
        disk.packed_ring.want(place, flags)
        pending = disk.submit(header(T_IN), SECTOR + 1)
        expect_broken(disk)
        disk.packed_ring.want(0, 0)
        used = disk.packed_ring.pop()
        assert used is not None
        assert used.id == pending.head
        assert disk.memory.read(pending.writable[0] + SECTOR, 1) == bytes([S_OK])


@pytest.mark.parametrize("bits", [AVAIL | USED, USED, 0], ids="r52-bits-{:#x}".format)
def test_bits_of_another_round(victim: Target, bits: int) -> None:
    """Not available: nothing happens, however often the ring is kicked."""
    with packed_disk(victim) as disk:
        head, _ = good_read(disk)
        disk.packed_ring.write_slot(0, head, 16, 0, bits)
        disk.rings[0].kick(100)
        with pytest.raises(Hung):
            disk.rings[0].wait_broken(timeout=0.1)
        disk.packed_ring.write_slot(0, 0, 0, 0, 0)
        check_serves(disk)


@pytest.mark.parametrize("base", [SIZE | WRAP, 0x7FFF, (SIZE | WRAP) << 16 | WRAP])
def test_cp25_base_outside_the_ring(victim: Target, base: int) -> None:
    with packed_disk(victim, queues=1) as disk:
        ring = disk.new_ring(SIZE)
        disk.rings.append(ring)
        with pytest.raises(Refused):
            disk.start_ring(1, ring, base=base)
        disk.start_ring(1, ring)
        check_serves(disk, 1)


def test_cp25_base_of_33_bits_split(victim: Target) -> None:
    """The wrap counters of a packed ring say nothing of a split one."""
    with victim.client() as disk:
        ring = disk.new_ring()
        disk.rings.append(ring)
        with pytest.raises(Refused):
            disk.configure_ring(1, ring, base=0x80008000)
        disk.start_ring(1, ring)
        check_serves(disk, 1)


@pytest.mark.parametrize("seed", range(8), ids="r49-seed-{}".format)
def test_scribbled_ring(victim: Target, seed: int) -> None:
    """Random descriptors, of which some are requests: the ring is served, or breaks, or waits."""
    chance = random.Random(seed)
    with packed_disk(victim) as disk:
        head, room = good_read(disk)
        tables = [good_table(disk), 0, HOLE]
        for _ in range(300):
            flags = chance.choice([0, NEXT, WRITE, WRITE | NEXT, INDIRECT, chance.randrange(65536)])
            disk.packed_ring.write_slot(
                chance.randrange(SIZE),
                chance.choice([head, room, *tables, chance.randrange(1 << 64)]),
                chance.choice([1, 16, 32, SECTOR + 1, chance.randrange(1 << 32)]),
                chance.choice([chance.randrange(SIZE), chance.randrange(65536)]),
                flags | chance.choice([AVAIL, USED]),
            )
            disk.rings[0].kick()
        for other in range(1, QUEUES):
            check_serves(disk, other)


def test_r52_ring_of_one(victim: Target) -> None:
    """Legal: both wrap counters change with every chain."""
    with packed_disk(victim, size=1) as disk:
        for n in range(5):
            done = disk.request(T_IN, n, room=SECTOR, indirect=True)
            assert (done.status, done.used) == (S_OK, SECTOR + 1)
