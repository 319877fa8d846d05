"""The session of a front-end with an IOMMU."""

from __future__ import annotations

from tests.protocol.messages import ADDR, BODIES, REGION
from tests.protocol.test_session import FEATURES, new, refused, say, with_memory
from vdev._native import lib
from vdev.virtio.vhost_user.payloads import IOTLB, VringState
from vdev.virtio.vhost_user.session import F_ACCESS_PLATFORM, Session
from vdev.virtio.vhost_user.table import PROTOCOL_FEATURES

UPDATE = BODIES[IOTLB]


def translated() -> Session:
    session = with_memory()
    say(session, "SET_FEATURES", FEATURES | F_ACCESS_PLATFORM)
    say(session, "IOTLB_MSG", UPDATE)
    assert session.iotlb.entries
    return session


def test_addresses_are_iovas_where_there_is_an_iommu() -> None:
    session = translated()
    say(session, "SET_VRING_NUM", VringState(0, 64))
    refused(session, "SET_VRING_ADDR", ADDR._replace(avail=ADDR.desc))
    refused(session, "SET_VRING_ADDR", ADDR._replace(desc=8))
    refused(session, "SET_VRING_ADDR", ADDR._replace(desc=(1 << 64) - 16))
    say(session, "SET_VRING_ADDR", ADDR._replace(desc=0))
    say(session, "SET_VRING_KICK", 0)
    placement = session.rings[0].placement
    assert placement is not None
    assert (placement.desc.start, placement.used.start) == (0, ADDR.used)


def test_when_translations_are_forgotten() -> None:
    """With the memory that they lie in; and while no ring runs nobody would take them back."""
    session = translated()
    say(session, "SET_VRING_NUM", VringState(0, 64))
    say(session, "SET_VRING_ADDR", ADDR)
    say(session, "SET_VRING_KICK", 0)
    say(session, "SET_FEATURES", FEATURES | F_ACCESS_PLATFORM)
    say(session, "GET_VRING_BASE", VringState(1, 0))
    assert session.iotlb.entries
    say(session, "GET_VRING_BASE", VringState(0, 0))
    assert not session.iotlb.entries
    for name, body in (
        ("SET_FEATURES", FEATURES | F_ACCESS_PLATFORM),
        ("RESET_DEVICE", None),
        ("SET_STATUS", 0),
        ("REM_MEM_REG", REGION),
    ):
        session = translated()
        say(session, name, body)
        assert not session.iotlb.entries, name


def test_an_iommu_needs_a_way_to_ask_and_acks() -> None:
    for name in ("BACKEND_REQ", "REPLY_ACK"):
        session = new()
        bit = 1 << getattr(lib, f"VHOST_USER_PROTOCOL_F_{name}")
        say(session, "SET_PROTOCOL_FEATURES", PROTOCOL_FEATURES & ~bit)
        refused(session, "SET_FEATURES", FEATURES | F_ACCESS_PLATFORM)
        say(session, "SET_FEATURES", FEATURES)
