"""What the session lets a front-end say of its dirty log, state by state and without any I/O."""

from __future__ import annotations

from tests.protocol.messages import ADDR, REGION
from tests.protocol.test_session import (
    CONFIG_SIZE,
    FEATURES,
    new,
    refused,
    running,
    say,
    with_memory,
)
from vdev._native import lib
from vdev.virtio.spec import RING_FEATURES
from vdev.virtio.vhost_user.payloads import Log, MemoryRegion, VringAddr, VringState
from vdev.virtio.vhost_user.session import F_LOG_ALL, Session

LOG_ALL = FEATURES | F_LOG_ALL
REGION_END = REGION.guest_addr + REGION.size
WHOLE = Log(REGION_END // 4096 // 8, 0)  # bytes that have bits for REGION, and no more


def test_log() -> None:
    session = running()
    say(session, "SET_LOG_BASE", WHOLE)
    assert not session.logging
    say(session, "SET_FEATURES", LOG_ALL)
    assert session.logging
    for log in (Log(0, 0), WHOLE._replace(mmap_size=WHOLE.mmap_size - 1), Log(2**63, 2**63)):
        refused(session, "SET_LOG_BASE", log)
    say(session, "SET_LOG_BASE", Log(2**62, 2**62 - 1))
    say(session, "SET_LOG_BASE", WHOLE)
    say(session, "SET_FEATURES", FEATURES)
    assert not session.logging


def test_only_logging_changes_while_rings_run() -> None:
    session = running()
    other = 1 << lib.VIRTIO_F_EVENT_IDX
    refused(session, "SET_FEATURES", LOG_ALL & ~other)
    say(session, "SET_FEATURES", LOG_ALL)
    refused(session, "SET_FEATURES", FEATURES & ~other)
    say(session, "SET_FEATURES", FEATURES)


def test_what_the_log_must_have_bits_for() -> None:
    session = running()
    say(session, "SET_LOG_BASE", WHOLE)
    more = MemoryRegion(guest_addr=REGION_END, size=4096, user_addr=0x1000, mmap_offset=0)
    inside = VringAddr(*ADDR[:5], log=REGION_END - 6 - 8 * 64)._replace(flags=1)
    # Nothing is logged yet: the log will be replaced in time.
    say(session, "ADD_MEM_REG", more)
    refused(session, "SET_FEATURES", LOG_ALL)
    say(session, "REM_MEM_REG", more)
    say(session, "SET_FEATURES", LOG_ALL)
    refused(session, "ADD_MEM_REG", more)
    refused(session, "SET_MEM_TABLE", (REGION, more))
    say(session, "SET_MEM_TABLE", (REGION,))
    say(session, "SET_VRING_ADDR", inside)
    for outside in (inside.log + 1, REGION_END, 2**64 - 4):
        refused(session, "SET_VRING_ADDR", inside._replace(log=outside))
        say(session, "SET_VRING_ADDR", inside._replace(log=outside, flags=0))


def test_a_ring_that_grew_out_of_the_log() -> None:
    session = with_memory()
    say(session, "SET_LOG_BASE", WHOLE)
    say(session, "SET_FEATURES", LOG_ALL)
    say(session, "SET_VRING_ADDR", ADDR._replace(flags=1, log=REGION_END - 100))
    say(session, "SET_VRING_NUM", VringState(0, 64))
    refused(session, "SET_VRING_KICK", 0)
    say(session, "SET_VRING_NUM", VringState(0, 8))
    say(session, "SET_VRING_KICK", 0)


def test_logging_is_offered_with_its_protocol_feature() -> None:
    assert new().offered & F_LOG_ALL
    without_log = Session(
        features=RING_FEATURES, protocol_features=0, num_queues=1, config_size=CONFIG_SIZE
    )
    assert not without_log.offered & F_LOG_ALL
