"""Translations, as numbers: what messages in any order amount to, page by page."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tests.protocol.messages import REGION
from vdev._native import lib
from vdev.errors import PeerError
from vdev.memory import guest_address
from vdev.virtio.vhost_user.iotlb import MOST_ENTRIES, READ, WRITE, Iotlb, Lack
from vdev.virtio.vhost_user.layout import Part, Placement
from vdev.virtio.vhost_user.payloads import IotlbMessage, MemoryRegion

PAGE = 4096
RW = READ | WRITE
LOW = REGION._replace(guest_addr=0, size=32 * PAGE, user_addr=0x1000_0000)
HIGH = MemoryRegion(64 * PAGE, 32 * PAGE, LOW.user_addr + 32 * PAGE, 0)
REGIONS = (LOW, HIGH)
"""Their user addresses go on in each other, their guest addresses do not."""


def update(
    page: int, pages: int = 1, *, to: int = 0, access: int = RW, size: int | None = None
) -> IotlbMessage:
    size = pages * PAGE if size is None else size
    user_addr = LOW.user_addr + to * PAGE
    return IotlbMessage(page * PAGE, size, user_addr, access, lib.VHOST_USER_IOTLB_UPDATE)


def invalidate(page: int, pages: int = 1, *, size: int | None = None) -> IotlbMessage:
    size = pages * PAGE if size is None else size
    return IotlbMessage(page * PAGE, size, 0, 0, lib.VHOST_USER_IOTLB_INVALIDATE)


def after(*messages: IotlbMessage) -> Iotlb:
    iotlb = Iotlb()
    for message in messages:
        iotlb = iotlb.after(message, REGIONS)
    return iotlb


Pages = dict[int, tuple[int, int]]


def pages_of(iotlb: Iotlb) -> Pages:
    """IOVA → guest address and access, of each page; checks what holds of any."""
    assert all(low.end <= high.iova for low, high in pairwise(iotlb.entries))
    found = {}
    for entry in iotlb.entries:
        assert entry.guest_addr == guest_address(REGIONS, entry.user_addr, entry.size)
        for at in range(0, entry.size, PAGE):
            found[entry.iova + at] = entry.guest_addr + at, entry.access
    return found


@pytest.mark.parametrize("seed", range(20))
def test_messages_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    iotlb, pages = Iotlb(), Pages()
    for _ in range(300):
        page, count = rng.randrange(40), rng.choice([1, 1, 1, 2, 5])
        before = dict(pages)
        if rng.randrange(4):
            # Mostly the same translation for the same page.
            to = rng.randrange(32 - count) if rng.randrange(8) == 0 else min(page, 31 - count)
            access = rng.choice([READ, WRITE, RW])
            iotlb = iotlb.after(update(page, count, to=to, access=access), REGIONS)
            for n in range(count):
                iova, guest_addr = (page + n) * PAGE, (to + n) * PAGE
                was = pages.get(iova)
                more = was[1] if was is not None and was[0] == guest_addr else 0
                pages[iova] = guest_addr, access | more
        else:
            iotlb = iotlb.after(invalidate(page, count), REGIONS)
            for n in range(count):
                pages.pop((page + n) * PAGE, None)
        assert pages_of(iotlb) == pages
        extends = all(
            iova in pages and pages[iova][0] == guest and not access & ~pages[iova][1]
            for iova, (guest, access) in before.items()
        )
        assert iotlb.extends == extends
        for lack in (Lack(rng.randrange(45) * PAGE + 5, a) for a in (READ, WRITE)):
            there = pages.get(lack.iova & -PAGE)
            assert iotlb.lacks(lack) == (there is None or not there[1] & lack.access)


def test_pages_that_go_on_in_each_other_are_one_entry() -> None:
    assert len(after(update(5, to=5), update(7, to=7), update(6, to=6)).entries) == 1
    assert len(after(update(5, to=6), update(6, to=5)).entries) == 2
    assert len(after(update(5, to=5), update(6, to=6, access=READ)).entries) == 2
    # Two regions of memory; a part of one that is looked for must lie within one mapping.
    assert len(after(update(5, to=31), update(6, to=32)).entries) == 2


def test_a_part_of_an_entry_is_taken_back() -> None:
    iotlb = after(update(0, 8), invalidate(3, 2))
    assert [(e.iova // PAGE, e.size // PAGE) for e in iotlb.entries] == [(0, 3), (5, 3)]
    assert not iotlb.extends
    assert iotlb.after(invalidate(3, 2), REGIONS).extends


@pytest.mark.parametrize("size", [0, (1 << 64) - 1])
def test_everything_is_taken_back(size: int) -> None:
    """2^64 bytes have no number; QEMU says one less, or what is left of it in 64 bits."""
    assert after(update(0, 4), invalidate(0, size=size)).entries == ()


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(update(0, size=0), id="empty"),
        pytest.param(update((1 << 52) - 1, 2), id="past the end"),
        pytest.param(update((1 << 52) - 1), id="up to the end"),
        pytest.param(update(0, access=0), id="no access"),
        pytest.param(update(0, access=4), id="an unknown access"),
        pytest.param(update(0, to=64), id="outside memory"),
        pytest.param(update(0, 2, to=63), id="partly outside memory"),
        pytest.param(update(0, 2, to=31), id="over two regions"),
        pytest.param(
            update(0)._replace(user_addr=(1 << 64) - PAGE), id="a user address that wraps"
        ),
        pytest.param(invalidate(1, size=(1 << 64) - PAGE + 1), id="invalidated past the end"),
        pytest.param(invalidate(1, size=0), id="nothing invalidated"),
        pytest.param(update(0)._replace(type=lib.VHOST_USER_IOTLB_MISS), id="a miss"),
        pytest.param(update(0)._replace(type=lib.VHOST_USER_IOTLB_ACCESS_FAIL), id="a failure"),
        pytest.param(update(0)._replace(type=0), id="type 0"),
        pytest.param(update(0)._replace(type=9), id="an unknown type"),
    ],
)
def test_refused(message: IotlbMessage) -> None:
    with pytest.raises(PeerError):
        Iotlb().after(message, REGIONS)


def test_a_flood_is_not_kept() -> None:
    """When there are too many it begins anew, with what came last."""
    iotlb = Iotlb()
    for n in range(MOST_ENTRIES):
        iotlb = iotlb.after(update(2 * n), REGIONS)
        assert iotlb.extends
    assert len(iotlb.entries) == MOST_ENTRIES
    iotlb = iotlb.after(update(2 * MOST_ENTRIES), REGIONS)
    assert [entry.iova for entry in iotlb.entries] == [2 * MOST_ENTRIES * PAGE]
    assert not iotlb.extends


def test_memory_that_moves_or_goes() -> None:
    iotlb = after(update(0, to=3), update(9, to=40))
    moved = iotlb.moved((LOW._replace(guest_addr=1 << 32),))
    assert [(e.iova, e.guest_addr) for e in moved.entries] == [(0, (1 << 32) + 3 * PAGE)]
    assert iotlb.moved(()).entries == ()


RING = Placement(Part("d", PAGE, 2 * PAGE), Part("a", 4 * PAGE, 100), Part("u", 5 * PAGE, 100))


def test_what_a_ring_lacks() -> None:
    iotlb = after(update(1), update(4, access=WRITE))
    lacks = iotlb.lacks_of(RING, packed=False)
    assert lacks == {0: (2 * PAGE, READ), 1: (4 * PAGE, READ), 2: (5 * PAGE, WRITE)}
    iotlb = after(update(1, 2, access=READ), update(4, 2, to=4))
    assert iotlb.lacks_of(RING, packed=False) == {}
    assert iotlb.lacks_of(RING, packed=True) == {0: (PAGE, RW)}
    assert iotlb.lies(RING, packed=False) == [
        [(0, 2 * PAGE)],
        [(4 * PAGE, 100)],
        [(5 * PAGE, 100)],
    ]


def test_a_ring_in_pieces() -> None:
    iotlb = after(update(1, to=8), update(2, to=1), update(4, 2, to=4))
    assert iotlb.lacks_of(RING, packed=False) == {}
    assert iotlb.lies(RING, packed=False)[0] == [(8 * PAGE, PAGE), (PAGE, PAGE)]
