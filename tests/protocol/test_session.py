"""The session, state by state and without any I/O: what is accepted, and what a refusal leaves."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.protocol.messages import ADDR, BODIES, REGION
from vdev._native import lib
from vdev.errors import NotSupported, PeerError
from vdev.virtio.queue import F_RING_PACKED
from vdev.virtio.spec import RING_FEATURES
from vdev.virtio.vhost_user.codec import Message
from vdev.virtio.vhost_user.payloads import ConfigAccess, MemoryRegion, VringAddr, VringState
from vdev.virtio.vhost_user.session import (
    F_ACCESS_PLATFORM,
    F_PROTOCOL,
    F_VERSION_1,
    MEM_SLOTS,
    Session,
)
from vdev.virtio.vhost_user.table import PROTOCOL_FEATURES, ROWS, TABLE, Needs, Row

QUEUES = 2
CONFIG_SIZE = 64
SPLIT = RING_FEATURES & ~F_RING_PACKED
FEATURES = SPLIT | F_PROTOCOL
OFFERED = [row for row in ROWS if row.refusal is None]
_EXTRAS = ("MTU", "RARP", "INFLIGHT_SHMFD")
EXTRAS = sum(1 << getattr(lib, f"VHOST_USER_PROTOCOL_F_{name}") for name in _EXTRAS)

# What each message says in a session where everything is set up, where zeroes will not do.
GOOD: dict[str, Any] = {
    "set_features": FEATURES,
    "set_protocol_features": PROTOCOL_FEATURES | EXTRAS,
    "set_vring_num": VringState(0, 64),
    "net_set_mtu": 1500,
    "add_mem_reg": REGION._replace(guest_addr=0x100_0000, user_addr=0x10_0000),
    "rem_mem_reg": REGION,
    "set_status": 0,
}


def new() -> Session:
    return Session(
        features=RING_FEATURES | F_ACCESS_PLATFORM,
        protocol_features=PROTOCOL_FEATURES | EXTRAS,
        num_queues=QUEUES,
        config_size=CONFIG_SIZE,
    )


def message(request: int, body: Any, fds: int | None = None) -> Message:
    row = TABLE[request]
    if fds is None:
        fds = len(body) if row.handler == "set_mem_table" else row.fds[0]
        if row.handler in ("set_vring_kick", "set_vring_call", "set_vring_err"):
            fds = 0 if body & lib.VHOST_USER_VRING_NOFD else 1
    return Message(request, payload=row.payload.encode(body), fds=list(range(10, 10 + fds)))


def say(session: Session, name: str, body: Any = None, fds: int | None = None) -> None:
    """The message is accepted and carried out."""
    request = getattr(lib, f"VHOST_USER_{name}")
    session.commit(session.check(message(request, body, fds)))


def refused(session: Session, name: str, body: Any = None, fds: int | None = None) -> str:
    """The message is refused, and leaves no trace."""
    before = copy.deepcopy(vars(session))
    with pytest.raises(PeerError) as info:
        say(session, name, body, fds)
    assert vars(session) == before
    return str(info.value)


def agreed() -> Session:
    session = new()
    say(session, "SET_OWNER")
    say(session, "SET_PROTOCOL_FEATURES", PROTOCOL_FEATURES | EXTRAS)
    say(session, "SET_FEATURES", FEATURES)
    return session


def with_memory() -> Session:
    session = agreed()
    say(session, "SET_MEM_TABLE", (REGION,))
    return session


def ready() -> Session:
    session = with_memory()
    say(session, "SET_VRING_NUM", VringState(0, 64))
    say(session, "SET_VRING_ADDR", ADDR)
    return session


def running() -> Session:
    session = ready()
    say(session, "SET_VRING_KICK", 0)
    assert session.rings[0].started
    return session


EVERY = pytest.mark.parametrize("row", OFFERED, ids=lambda row: row.name)


@EVERY
def test_accepted_where_everything_is_set_up(row: Row) -> None:
    session = ready()
    if row.needs & Needs.NO_OWNER:
        session.owned = False
    if row.needs & Needs.IOMMU:
        session.features = FEATURES | F_ACCESS_PLATFORM
    body = GOOD.get(row.handler, BODIES[row.payload])
    session.commit(session.check(message(row.request, body)))


@EVERY
def test_needs(row: Row) -> None:
    """Each need of the row, missing, refuses the message that is accepted otherwise."""
    body = GOOD.get(row.handler, BODIES[row.payload])
    for need, session in (
        (Needs.NO_OWNER, ready()),
        (Needs.FEATURES, without(ready(), "features")),
        (Needs.PROTOCOL, without(ready(), "features", "protocol_features")),
        (Needs.MEMORY, agreed()),
        (Needs.IOMMU, ready()),
        (Needs.RING_READY, with_memory()),
    ):
        if row.needs & need:
            with pytest.raises(PeerError):
                session.check(message(row.request, body))


def without(session: Session, *names: str) -> Session:
    for name in names:
        setattr(session, name, None)
    return session


@EVERY
def test_protocol_feature_not_agreed(row: Row) -> None:
    if row.protocol_feature is None:
        return
    session = ready()
    assert session.protocol_features is not None
    session.protocol_features &= ~(1 << row.protocol_feature)
    with pytest.raises(NotSupported, match="was not agreed"):
        session.check(message(row.request, GOOD.get(row.handler, BODIES[row.payload])))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_too_many_descriptors(row: Row) -> None:
    session = ready()
    session.owned = False
    body = GOOD.get(row.handler, BODIES[row.payload])
    for count in (row.fds[1] + 1, 9, 32):
        with pytest.raises(PeerError):
            session.check(message(row.request, body, count))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_refusals_say_their_message(row: Row) -> None:
    if row.refusal is not None:
        with pytest.raises(NotSupported, match=row.name):
            ready().check(message(row.request, BODIES[row.payload]))


@pytest.mark.parametrize("request_id", [0, 23, 26, 27, 33, 41, 44, 1000, 2**32 - 1])
def test_unknown_request(request_id: int) -> None:
    with pytest.raises(NotSupported, match="unknown"):
        new().check(Message(request_id))


def test_order_of_qemu() -> None:
    """QEMU enables rings of a net device before it sets features, and calls before memory."""
    session = new()
    say(session, "SET_PROTOCOL_FEATURES", PROTOCOL_FEATURES)
    say(session, "SET_OWNER")
    say(session, "SET_VRING_CALL", 0)
    say(session, "SET_VRING_ENABLE", VringState(0, 1))
    say(session, "SET_FEATURES", FEATURES)
    say(session, "SET_STATUS", 8)
    say(session, "SET_MEM_TABLE", (REGION,))
    say(session, "SET_VRING_NUM", VringState(0, 64))
    say(session, "SET_VRING_BASE", VringState(0, 0))
    say(session, "SET_VRING_ADDR", ADDR)
    say(session, "SET_VRING_KICK", 0)
    say(session, "SET_STATUS", 15)
    assert session.rings[0].started
    assert session.rings[0].enabled


def test_started_and_enabled_are_independent() -> None:
    session = running()
    assert not session.rings[0].enabled
    say(session, "SET_VRING_ENABLE", VringState(0, 1))
    say(session, "GET_VRING_BASE", VringState(0, 0))
    assert session.rings[0].enabled
    assert not session.rings[0].started
    say(session, "SET_VRING_ENABLE", VringState(1, 1))
    assert not session.rings[1].started


def test_features_without_protocol_features_enable_all_rings() -> None:
    session = new()
    say(session, "SET_FEATURES", RING_FEATURES)
    assert all(ring.enabled for ring in session.rings)
    refused(session, "SET_VRING_ENABLE", VringState(0, 0))


def test_features() -> None:
    session = new()
    assert "not offered" in refused(session, "SET_FEATURES", FEATURES | 1 << 63)
    refused(session, "SET_FEATURES", FEATURES & ~F_VERSION_1)
    session = running()
    say(session, "SET_FEATURES", FEATURES)
    refused(session, "SET_FEATURES", FEATURES & ~(1 << lib.VIRTIO_F_EVENT_IDX))
    say(session, "GET_VRING_BASE", VringState(0, 0))
    say(session, "SET_FEATURES", FEATURES & ~(1 << lib.VIRTIO_F_EVENT_IDX))


def test_protocol_features_not_offered() -> None:
    for bit in (6, 8, 14, 17, 18, 20, 63):
        refused(new(), "SET_PROTOCOL_FEATURES", 1 << bit)


def test_owner() -> None:
    session = new()
    say(session, "SET_OWNER")
    refused(session, "SET_OWNER")
    say(session, "RESET_OWNER")
    say(session, "SET_OWNER")


def test_reset_owner_disables_rings_only() -> None:
    session = running()
    say(session, "SET_VRING_ENABLE", VringState(0, 1))
    say(session, "RESET_OWNER")
    assert not session.rings[0].enabled
    assert session.rings[0].started
    assert session.features == FEATURES


@pytest.mark.parametrize("name", ["RESET_DEVICE", "SET_STATUS"])
def test_reset_keeps_memory_and_protocol_features(name: str) -> None:
    session = running()
    say(session, "SET_STATUS", 15)
    say(session, name, 0)
    assert session.status == 0
    assert session.features is None
    assert session.owned
    assert session.regions == (REGION,)
    assert session.protocol_features == PROTOCOL_FEATURES | EXTRAS
    assert not any(ring.started or ring.enabled or ring.size for ring in session.rings)


TOP = 1 << 64
BAD_REGIONS = {
    "empty": REGION._replace(size=0),
    "guest wraps": REGION._replace(guest_addr=TOP - REGION.size + 1),
    "user wraps": REGION._replace(user_addr=TOP - REGION.size + 1),
    "offset wraps": REGION._replace(mmap_offset=TOP - 4096),
    "offset over 2^63": REGION._replace(mmap_offset=1 << 63),
    "everything": REGION._replace(size=TOP - 1),
}


@pytest.mark.parametrize("region", BAD_REGIONS.values(), ids=BAD_REGIONS.keys())
def test_bad_region(region: MemoryRegion) -> None:
    refused(agreed(), "SET_MEM_TABLE", (region,))
    refused(agreed(), "ADD_MEM_REG", region)


def test_region_to_the_very_end_is_legal() -> None:
    say(agreed(), "SET_MEM_TABLE", (REGION._replace(guest_addr=TOP - REGION.size),))


FAR = 0x1000_0000
OVERLAPS = {
    "guest": REGION._replace(user_addr=FAR, guest_addr=REGION.guest_addr + REGION.size - 1),
    "user": REGION._replace(guest_addr=FAR, user_addr=REGION.user_addr - REGION.size + 1),
    "same": REGION,
    "inside": MemoryRegion(REGION.guest_addr + 4096, 4096, FAR, 0),
    "around": MemoryRegion(0, FAR, FAR, 0),
}


@pytest.mark.parametrize("other", OVERLAPS.values(), ids=OVERLAPS.keys())
def test_overlapping_regions(other: MemoryRegion) -> None:
    refused(agreed(), "SET_MEM_TABLE", (REGION, other))
    refused(agreed(), "SET_MEM_TABLE", (other, REGION))
    refused(with_memory(), "ADD_MEM_REG", other)


def test_adjacent_regions_are_legal() -> None:
    session = with_memory()
    say(
        session,
        "ADD_MEM_REG",
        REGION._replace(
            guest_addr=REGION.guest_addr + REGION.size, user_addr=REGION.user_addr + REGION.size
        ),
    )
    assert len(session.regions) == 2


@pytest.mark.parametrize("fds", [0, 1, 3, 8])
def test_descriptors_unlike_the_regions(fds: int) -> None:
    two = (REGION, REGION._replace(guest_addr=0, user_addr=FAR))
    refused(agreed(), "SET_MEM_TABLE", two, fds)


def test_memory_slots() -> None:
    session = agreed()
    for at in range(MEM_SLOTS):
        place = at * 0x1000
        say(session, "ADD_MEM_REG", MemoryRegion(place, 0x1000, FAR + place, 0))
    assert "slots" in refused(session, "ADD_MEM_REG", MemoryRegion(1 << 40, 0x1000, 0, 0))
    say(session, "REM_MEM_REG", MemoryRegion(0, 0x1000, FAR, 0))
    say(session, "ADD_MEM_REG", MemoryRegion(1 << 40, 0x1000, 0, 0))


def test_remove_region() -> None:
    session = with_memory()
    refused(session, "REM_MEM_REG", REGION._replace(size=REGION.size - 4096))
    refused(session, "REM_MEM_REG", REGION._replace(user_addr=FAR))
    refused(session, "REM_MEM_REG", REGION._replace(guest_addr=0))
    # The offset does not count, and a descriptor may come along.
    say(session, "REM_MEM_REG", REGION._replace(mmap_offset=77), 1)
    assert session.regions == ()
    refused(session, "REM_MEM_REG", REGION)


BAD_INDEXES = [QUEUES, 0xFF, 0x10000, 0x8000_0000]


@pytest.mark.parametrize("index", BAD_INDEXES)
def test_ring_index(index: int) -> None:
    session = ready()
    for name in ("SET_VRING_NUM", "SET_VRING_BASE", "GET_VRING_BASE", "SET_VRING_ENABLE"):
        refused(session, name, VringState(index, 1))
    refused(session, "SET_VRING_ADDR", ADDR._replace(ring=index))
    for name in ("SET_VRING_KICK", "SET_VRING_CALL", "SET_VRING_ERR"):
        refused(session, name, index)


@pytest.mark.parametrize("size", [0, 3, 63, 32769, 65536, 2**32 - 1])
def test_ring_size(size: int) -> None:
    refused(with_memory(), "SET_VRING_NUM", VringState(0, size))


@pytest.mark.parametrize("size", [1, 2, 32768])
def test_extreme_ring_sizes(size: int) -> None:
    say(with_memory(), "SET_VRING_NUM", VringState(0, size))


def test_running_ring_does_not_change() -> None:
    session = running()
    refused(session, "SET_VRING_NUM", VringState(0, 32))
    refused(session, "SET_VRING_BASE", VringState(0, 0))
    refused(session, "SET_VRING_ADDR", ADDR._replace(desc=ADDR.desc + 0x4000))
    say(session, "SET_VRING_NUM", VringState(0, 64))
    say(session, "SET_VRING_ADDR", ADDR._replace(flags=1))
    say(session, "SET_VRING_KICK", 0)


def test_base() -> None:
    session = ready()
    say(session, "SET_VRING_BASE", VringState(0, 0xFFFF))
    refused(session, "SET_VRING_BASE", VringState(0, 0x10000))
    for _ in range(2):
        say(session, "GET_VRING_BASE", VringState(1, 0))


U = REGION.user_addr
END = U + REGION.size
BAD_RINGS = {
    "desc misaligned": ADDR._replace(desc=U + 8),
    "avail misaligned": ADDR._replace(avail=ADDR.avail + 1),
    "used misaligned": ADDR._replace(used=ADDR.used + 2),
    "desc tail outside": ADDR._replace(desc=END - 16 * 64 + 16),
    "avail tail outside": ADDR._replace(avail=END - 6 - 2 * 64 + 2),
    "used tail outside": ADDR._replace(used=END - 6 - 8 * 64 + 2),
    "desc below": ADDR._replace(desc=U - 16),
    "avail nowhere": ADDR._replace(avail=0),
    "used at the end": ADDR._replace(used=END),
    "used wraps": ADDR._replace(used=TOP - 4),
    "avail in desc": ADDR._replace(avail=U + 16),
    "used in avail": ADDR._replace(used=ADDR.avail + 4),
    "all the same": ADDR._replace(avail=U, used=U),
    "unknown flag": ADDR._replace(flags=2),
}


@pytest.mark.parametrize("addresses", BAD_RINGS.values(), ids=BAD_RINGS.keys())
def test_bad_ring_addresses(addresses: VringAddr) -> None:
    refused(ready(), "SET_VRING_ADDR", addresses)


def test_ring_in_the_last_bytes() -> None:
    session = ready()
    say(session, "SET_VRING_ADDR", ADDR._replace(desc=END - 16 * 64))
    say(session, "SET_VRING_KICK", 0)


def test_ring_that_grew_out_of_its_place() -> None:
    """The size comes after the addresses: checked where the ring starts."""
    session = ready()
    say(session, "SET_VRING_NUM", VringState(0, 512))
    refused(session, "SET_VRING_KICK", 0)


def test_rings_that_overlap_each_other() -> None:
    session = running()
    say(session, "SET_VRING_NUM", VringState(1, 64))
    say(session, "SET_VRING_ADDR", ADDR._replace(ring=1))
    refused(session, "SET_VRING_KICK", 1)
    say(session, "GET_VRING_BASE", VringState(0, 0))
    say(session, "SET_VRING_KICK", 1)


def test_kick_needs_size_and_addresses() -> None:
    session = with_memory()
    refused(session, "SET_VRING_KICK", 0)
    say(session, "SET_VRING_NUM", VringState(0, 64))
    refused(session, "SET_VRING_KICK", 0)


@pytest.mark.parametrize("name", ["SET_VRING_KICK", "SET_VRING_CALL", "SET_VRING_ERR"])
def test_no_fd_bit(name: str) -> None:
    nofd = lib.VHOST_USER_VRING_NOFD
    refused(ready(), name, 0, 0)
    refused(ready(), name, nofd, 1)
    say(ready(), name, nofd)
    refused(ready(), name, 1 << 9)
    refused(ready(), name, 1 << 32)


def test_memory_taken_from_a_running_ring() -> None:
    session = running()
    say(session, "REM_MEM_REG", REGION)
    assert session.rings[0].started  # broken; it stops like any other
    say(session, "GET_VRING_BASE", VringState(0, 0))
    assert not session.rings[0].started


def test_ring_that_moves_with_its_memory() -> None:
    session = running()
    say(session, "SET_MEM_TABLE", (REGION._replace(guest_addr=0),))
    placement = session.rings[0].placement
    assert placement is not None
    assert placement.desc.start == 0


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 0), (0, 65), (60, 5), (64, 1), (2**32 - 1, 1), (2**32 - 1, 256)]
)
@pytest.mark.parametrize("name", ["GET_CONFIG", "SET_CONFIG"])
def test_config_out_of_bounds(name: str, offset: int, size: int) -> None:
    refused(agreed(), name, ConfigAccess(offset, size, 0, bytes(size)))


@pytest.mark.parametrize("name", ["GET_CONFIG", "SET_CONFIG"])
def test_config_flags(name: str) -> None:
    say(agreed(), name, ConfigAccess(0, 64, 1, bytes(64)))
    refused(agreed(), name, ConfigAccess(0, 4, 2, bytes(4)))


@pytest.mark.parametrize("mtu", [0, 67, 65536, 2**63])
def test_bad_mtu(mtu: int) -> None:
    refused(agreed(), "NET_SET_MTU", mtu)


@pytest.mark.parametrize("mtu", [68, 65535])
def test_extreme_mtu(mtu: int) -> None:
    say(agreed(), "NET_SET_MTU", mtu)
