"""What a backend writes down of itself is all that it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket

import pytest

from tests.frontend.wire import TIMEOUT
from tests.protocol.fake import FakeDevice, memory_file
from tests.protocol.messages import ADDR, REGION
from vdev._native import lib
from vdev.descriptors import Descriptors
from vdev.errors import PeerError
from vdev.ratelog import RateLimitedLog
from vdev.virtio.vhost_user.backend_channel import BackendChannel
from vdev.virtio.vhost_user.codec import encode
from vdev.virtio.vhost_user.iotlb import Iotlb, Translation
from vdev.virtio.vhost_user.movable import MovableBackend
from vdev.virtio.vhost_user.payloads import Inflight, Log

LOG = RateLimitedLog(logging.getLogger("test"), burst=10**6)
CHANGED = encode(lib.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)


async def test_nothing_of_a_session_is_left_out() -> None:
    """Who adds to the state of a session or of a ring adds it to what passes over, too."""
    backend = MovableBackend(FakeDevice(), LOG)
    saved = backend.save(Descriptors())["session"]
    # The device's own, and told apart.
    assert vars(backend.session).keys() - {"config_size"} == saved.keys()
    ring = backend.session.rings[0]
    assert {*ring.__slots__} - {"index", "base"} == saved["rings"][0].keys()
    await backend.close()
    assert vars(backend).keys() == {
        *("device", "session", "vrings", "_log"),
        *("_regions", "_region_fds", "_memory", "_dirty", "_dirty_fd"),
        *("_inflight", "_inflight_fd", "_channel"),
        "_view",  # made from the session's translations
        "_transfer",  # while there is one, it does not move
    }


async def test_it_is_the_same_afterwards() -> None:
    device = FakeDevice()
    backend = MovableBackend(device, LOG)
    session = backend.session
    session.owned, session.status = True, 7
    session.features, session.protocol_features = device.features, 5
    session.regions = (REGION,)
    session.iotlb = Iotlb((Translation(0x5000, 4096, REGION.guest_addr, 3, REGION.user_addr),))
    session.log, session.inflight = Log(1 << 20, 0), Inflight(1 << 20, 0, 1, 64)
    ring = session.rings[0]
    ring.size, ring.addresses, ring.enabled = 64, ADDR, True
    files = [memory_file(REGION.size), memory_file(1 << 20), memory_file(1 << 20)]
    backend._hold({REGION: files[0]})
    backend._dirty_fd, backend._inflight_fd = files[1:]
    sent = [*files]
    fds = Descriptors()
    text = json.dumps(backend.save(fds))
    other = MovableBackend(FakeDevice(), LOG)
    other.restore(json.loads(text), Descriptors(os.dup(fd) for fd in fds.all()))
    assert vars(other.session) == vars(session)
    assert [*fds.all()] == sent
    other.set_halted([{"base": 9, "fault": None}, {"base": None, "fault": "bad chain"}])
    assert [r["base"] for r in other.halted] == [9, None]
    assert other.halted[1]["fault"] == "bad chain"
    await other.close()
    await backend.close()


async def test_features_that_are_not_offered_any_more() -> None:
    backend = MovableBackend(FakeDevice(), LOG)
    backend.session.features = backend.device.features | 1 << 60
    state = backend.save(Descriptors())
    with pytest.raises(PeerError, match="features 0x1000000000000000 are in use"):
        backend.restore(state, Descriptors())
    await backend.close()


async def test_what_the_front_end_was_not_told_yet() -> None:
    """It is told once, by one of the two."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    channel = BackendChannel(ours.detach(), LOG)
    channel.config_changed()
    assert theirs.recv(100) == CHANGED
    while not channel._unsent:
        channel.config_changed()
    channel.config_changed()
    channel.pause()
    state = channel.save(fds := Descriptors())
    assert state is not None
    (sock,) = fds.all()
    other = BackendChannel.restore(state, Descriptors([os.dup(sock)]), LOG)
    received = b""
    other.resume()
    async with asyncio.timeout(TIMEOUT):
        while other._unsent or not received.endswith(CHANGED):
            with contextlib.suppress(BlockingIOError):
                received += theirs.recv(1 << 16)
            await asyncio.sleep(0)
    assert len(received) % len(CHANGED) == 0
    assert received == CHANGED * (len(received) // len(CHANGED))
    channel.close()
    other.close()
    theirs.close()
