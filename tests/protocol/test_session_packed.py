"""Rings that are packed: other sizes, areas and bases than those of split ones."""

from __future__ import annotations

import pytest

from tests.protocol.messages import ADDR, REGION
from tests.protocol.test_session import FEATURES, agreed, message, new, ready, refused, say
from vdev._native import lib
from vdev.virtio.queue import F_RING_PACKED
from vdev.virtio.vhost_user.payloads import Log, VringAddr, VringState
from vdev.virtio.vhost_user.session import F_LOG_ALL, Session

NEW = 0x80008000
END = REGION.user_addr + REGION.size
# As small as can be: the areas of events touch the descriptors and each other.
CLOSE = ADDR._replace(avail=ADDR.desc + 16 * 100, used=ADDR.desc + 16 * 100 + 4)


def packed() -> Session:
    session = agreed()
    say(session, "SET_FEATURES", FEATURES | F_RING_PACKED)
    say(session, "SET_MEM_TABLE", (REGION,))
    return session


def packed_ready() -> Session:
    session = packed()
    say(session, "SET_VRING_NUM", VringState(0, 100))
    say(session, "SET_VRING_ADDR", CLOSE)
    return session


def test_it_is_offered() -> None:
    assert new().offered & F_RING_PACKED


def test_sizes_need_be_no_powers_of_two() -> None:
    for size in (1, 3, 100, 32767, 32768):
        say(packed(), "SET_VRING_NUM", VringState(0, size))
    for size in (0, 32769, 2**32 - 1):
        refused(packed(), "SET_VRING_NUM", VringState(0, size))


def test_a_size_that_was_good_for_packed_rings_only() -> None:
    session = packed_ready()
    say(session, "SET_FEATURES", FEATURES)
    assert "power of 2" in refused(session, "SET_VRING_KICK", 0)


@pytest.mark.parametrize(
    "addresses",
    [
        CLOSE._replace(desc=ADDR.desc + 8),
        CLOSE._replace(avail=CLOSE.used + 2),
        CLOSE._replace(used=CLOSE.used + 2),
        CLOSE._replace(avail=CLOSE.used),
        CLOSE._replace(avail=CLOSE.avail - 4),
        CLOSE._replace(used=END),
        CLOSE._replace(desc=END - 16 * 99),
    ],
)
def test_bad_addresses(addresses: VringAddr) -> None:
    refused(packed_ready(), "SET_VRING_ADDR", addresses)


def test_areas_in_the_last_bytes() -> None:
    session = packed_ready()
    say(session, "SET_VRING_ADDR", CLOSE._replace(avail=END - 8, used=END - 4))
    say(session, "SET_VRING_KICK", 0)
    assert session.rings[0].started


def test_bases() -> None:
    session = packed_ready()
    assert session.base(0) == NEW
    for base in (0, 0x8000, 0x00630063, 2**32 - 1):
        say(session, "SET_VRING_BASE", VringState(0, base))
        assert session.base(0) == base
    split = ready()
    assert split.base(0) == 0
    assert "16 bits" in refused(split, "SET_VRING_BASE", VringState(0, NEW))


def test_the_area_of_events_is_what_the_log_must_hold() -> None:
    session = packed_ready()
    last = REGION.guest_addr + REGION.size
    say(session, "SET_LOG_BASE", Log(last // 4096 // 8, 0))
    say(session, "SET_FEATURES", FEATURES | F_RING_PACKED | F_LOG_ALL)
    logged = CLOSE._replace(flags=1, log=last - 4)
    say(session, "SET_VRING_ADDR", logged)
    refused(session, "SET_VRING_ADDR", logged._replace(log=last))


def test_the_layout_does_not_change_while_a_ring_runs() -> None:
    session = packed_ready()
    say(session, "SET_VRING_KICK", 0)
    refused(session, "SET_FEATURES", FEATURES)
    kick = lib.VHOST_USER_SET_VRING_KICK
    assert session.check(message(kick, 0)).body.ring == 0
