"""The back-end channel to a peer that does not do what it should."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable

import pytest

from tests.protocol.fake import TIMEOUT, until
from vdev._native import lib
from vdev.ratelog import RateLimitedLog
from vdev.virtio.vhost_user.backend_channel import BackendChannel
from vdev.virtio.vhost_user.codec import REPLY, encode
from vdev.virtio.vhost_user.payloads import IOTLB, U64, IotlbMessage

FdCount = Callable[[], Counter[str]]
LOG = RateLimitedLog(logging.getLogger("test"), burst=10**6)
TOLD = encode(lib.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)


async def test_a_peer_that_never_reads(fd_count: FdCount) -> None:
    """Case 37: what waits for it is one message, however often there is something to tell; and
    when it reads after all, the last word is not missing."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.setblocking(False)
        channel = BackendChannel(theirs.detach(), LOG)
        try:
            told = 0
            while not channel._waiting:
                channel.config_changed()
                told += 1
            for _ in range(1000):
                channel.config_changed()
            assert len(channel._unsent) <= len(TOLD)
            data = b""
            loop = asyncio.get_running_loop()
            while channel._unsent or len(data) < (told + 1) // 2 * len(TOLD):
                data += await asyncio.wait_for(loop.sock_recv(ours, 1 << 20), TIMEOUT)
            assert data == TOLD * (len(data) // len(TOLD))
            channel.config_changed()
            assert await asyncio.wait_for(loop.sock_recv(ours, 1 << 20), TIMEOUT)
        finally:
            channel.close()


async def test_of_misses_the_last_of_each_waits(fd_count: FdCount) -> None:
    """Whoever asks anew, while the peer does not read, asks for that alone."""
    ours, theirs = socket.socketpair()
    with ours:
        ours.setblocking(False)
        channel = BackendChannel(theirs.detach(), LOG)
        try:
            while not channel._waiting:
                channel.config_changed()
            for n in range(1000):
                channel.miss("a ring", n, 1)
            assert len(channel._waiting) == 2
            miss = IotlbMessage(999, 0, 0, 1, lib.VHOST_USER_IOTLB_MISS)
            last = encode(lib.VHOST_USER_BACKEND_IOTLB_MSG, IOTLB.encode(miss))
            data = b""
            loop = asyncio.get_running_loop()
            while not data.endswith(last):
                data += await asyncio.wait_for(loop.sock_recv(ours, 1 << 20), TIMEOUT)
            before = data.removesuffix(last)
            assert before == TOLD * (len(before) // len(TOLD))
        finally:
            channel.close()


@pytest.mark.parametrize(
    "said",
    [
        encode(lib.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, U64.encode(0), REPLY),
        encode(lib.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, bytes(4096), REPLY),
        b"x",
    ],
    ids=["a reply", "a long one", "garbage"],
)
async def test_a_reply_that_nobody_asked_for(fd_count: FdCount, said: bytes) -> None:
    """Case 37: the channel closes, and what is to be told afterwards goes nowhere."""
    ours, theirs = socket.socketpair()
    with ours:
        channel = BackendChannel(theirs.detach(), LOG)
        ours.sendall(said)
        await until(lambda: channel.closed)
        channel.config_changed()
