"""Whatever a front-end sends: a refusal or an answer, never another exception."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.protocol.messages import ADDR, REGION
from tests.protocol.test_session import QUEUES, new
from vdev._native import lib
from vdev.errors import PeerError
from vdev.memory import guest_address
from vdev.virtio.queue import F_RING_PACKED
from vdev.virtio.vhost_user.codec import Message
from vdev.virtio.vhost_user.layout import check_parts
from vdev.virtio.vhost_user.payloads import U64, IotlbMessage, MemoryRegion, VringAddr
from vdev.virtio.vhost_user.session import F_ACCESS_PLATFORM, Session
from vdev.virtio.vhost_user.table import ROWS, TABLE

# Small numbers meet limits, flags and indexes; large ones wrap.
number = st.one_of(
    st.integers(0, 300), st.sampled_from([2**15, 2**16, 2**31, 2**32 - 1]), st.integers(0, 2**64)
)
page = st.integers(0, 16).map(lambda n: n * 0x1000)
region = st.one_of(
    st.builds(
        MemoryRegion,
        page.map(lambda n: REGION.guest_addr + n),
        st.sampled_from([0x1000, 0x10000, REGION.size]),
        page.map(lambda n: REGION.user_addr + n),
        st.just(0),
    ),
    st.builds(MemoryRegion, number, number, number, number),
)
address = st.one_of(page.map(lambda n: ADDR.desc + n), number)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    row = draw(st.sampled_from(ROWS))
    payload = draw(
        st.one_of(
            st.binary(max_size=300),
            st.just(well_formed(draw, row.payload.name, row.payload.encode)),
        )
    )
    fds = draw(st.integers(0, 9) if draw(st.booleans()) else st.integers(*row.fds))
    request = draw(st.integers(0, 60)) if draw(st.integers(0, 19)) == 0 else row.request
    return Message(request, payload=payload, fds=list(range(fds)))


def well_formed(draw: st.DrawFn, layout: str, encode: Any) -> bytes:
    """A payload of the right size, its numbers cut to what their fields hold."""
    small = st.integers(0, QUEUES)
    bodies: dict[str, st.SearchStrategy[Any]] = {
        "u64": number.map(lambda n: n % 2**64),
        "vring state": st.tuples(small, number.map(lambda n: n % 2**32)),
        "vring addresses": st.tuples(
            small, st.integers(0, 2), address, address, address, number
        ).map(lambda t: VringAddr(t[0], t[1], *(n % 2**64 for n in t[2:]))),
        "memory table": st.lists(region, min_size=1, max_size=3).map(
            lambda rs: tuple(MemoryRegion(*(n % 2**64 for n in r)) for r in rs)
        ),
        "IOTLB message": st.tuples(page, page, address, st.integers(0, 4), st.integers(1, 4)).map(
            lambda t: IotlbMessage(t[0], t[1], t[2] % 2**64, *t[3:])
        ),
        "single memory region": region.map(lambda r: MemoryRegion(*(n % 2**64 for n in r))),
    }
    if layout not in bodies:
        return b""
    encoded = encode(draw(bodies[layout]))
    assert isinstance(encoded, bytes)
    return encoded


def check_invariants(session: Session) -> None:
    regions = session.regions
    for at, one in enumerate(regions):
        assert one.size
        assert one.guest_addr + one.size <= 2**64
        for other in regions[at + 1 :]:
            apart = one.guest_addr + one.size <= other.guest_addr
            assert apart or other.guest_addr + other.size <= one.guest_addr
    for entry in session.iotlb.entries:
        assert session.translated
        assert guest_address(regions, entry.user_addr, entry.size) == entry.guest_addr
    if session.logging:
        assert session.log is not None
        assert all(r.guest_addr + r.size <= 8 * 4096 * session.log.mmap_size for r in regions)
    for ring in session.rings:
        assert ring.size <= 32768
        assert not ring.started or session.packed or ring.size.bit_count() == 1
        if ring.placement is not None:
            check_parts(ring.placement)


@pytest.mark.parametrize(
    "left_out",
    [F_ACCESS_PLATFORM, F_ACCESS_PLATFORM | F_RING_PACKED, 0],
    ids=["packed", "split", "behind an IOMMU"],
)
@given(sent=st.lists(messages(), max_size=30))
def test_session_survives_anything(sent: list[Message], left_out: int) -> None:
    session = new()
    for request_id, offered in (
        (lib.VHOST_USER_SET_PROTOCOL_FEATURES, session.offered_protocol),
        (lib.VHOST_USER_SET_FEATURES, session.offered & ~left_out),
    ):
        message = Message(request_id, payload=U64.encode(offered))
        session.commit(session.check(message))
    for message in sent:
        try:
            request = session.check(message)
        except PeerError:
            continue
        assert TABLE[message.request] is request.row
        session.commit(request)
        check_invariants(session)
