"""Sockets with descriptors, on both event loops."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import socket
import struct
import termios
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio

from tests.protocol.fake import Peer, until
from tests.protocol.messages import BODIES
from vdev._native import lib
from vdev.errors import PeerError
from vdev.virtio.vhost_user import channel as channel_module
from vdev.virtio.vhost_user.channel import MAX_FDS, Channel, close_fds
from vdev.virtio.vhost_user.codec import encode
from vdev.virtio.vhost_user.table import ROWS

KICK = encode(lib.VHOST_USER_SET_VRING_KICK, bytes(8))
FdCount = Callable[[], Counter[str]]


@pytest_asyncio.fixture
async def ends(fd_count: FdCount) -> AsyncIterator[tuple[Channel, Peer]]:
    """Both ends of a connection, and no descriptor more when they are closed."""
    ours, theirs = socket.socketpair()
    channel, peer = Channel(ours), Peer(theirs)
    yield channel, peer
    channel.close()
    peer.close()


@pytest.fixture
def null() -> Iterator[int]:
    """Some descriptor to pass."""
    fd = os.open("/dev/null", os.O_RDONLY)
    yield fd
    os.close(fd)


Ends = tuple[Channel, Peer]


async def test_every_message(ends: Ends) -> None:
    channel, peer = ends
    for row in ROWS:
        payload = row.payload.encode(BODIES[row.payload])
        peer.send_raw(encode(row.request, payload))
        message = await channel.receive()
        assert message is not None
        assert (message.request, message.payload) == (row.request, payload)


async def test_byte_by_byte(ends: Ends, null: int) -> None:
    channel, peer = ends
    task = asyncio.ensure_future(channel.receive())
    for at in range(len(KICK)):
        assert not task.done()
        peer.send_raw(KICK[at : at + 1], [null] if at == 0 else [])
        await asyncio.sleep(0)
    message = await task
    assert message is not None
    assert len(message.fds) == 1
    assert not os.get_inheritable(message.fds[0])
    close_fds(message.fds)


async def test_descriptors_stay_with_their_message(ends: Ends) -> None:
    channel, peer = ends
    read, write = os.pipe()
    peer.send_raw(KICK, [read])
    peer.send_raw(KICK)
    peer.send_raw(KICK, [write, write])
    counts = []
    for _ in range(3):
        message = await channel.receive()
        assert message is not None
        counts.append(len(message.fds))
        close_fds(message.fds)
    assert counts == [1, 0, 2]
    close_fds([read, write])


async def test_end(ends: Ends) -> None:
    channel, peer = ends
    peer.send_raw(KICK)
    peer.close()
    assert await channel.receive() is not None
    assert await channel.receive() is None


@pytest.mark.parametrize("ending", [1, 11, 12, 19])
async def test_end_inside_a_message(ends: Ends, ending: int, null: int) -> None:
    channel, peer = ends
    peer.send_raw(KICK[:ending], [null])
    peer.close()
    with pytest.raises(PeerError, match="the connection ended"):
        await channel.receive()


async def test_closing_inside_a_message_closes_its_descriptors(ends: Ends, null: int) -> None:
    channel, peer = ends
    peer.send_raw(KICK[:3], [null])
    task = asyncio.ensure_future(channel.receive())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("count", [MAX_FDS + 1, 253])
async def test_more_descriptors_than_there_is_room(ends: Ends, count: int, null: int) -> None:
    channel, peer = ends
    rights = array.array("i", [null] * count)
    peer.sock.sendmsg([KICK], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    with pytest.raises(PeerError, match="file descriptors"):
        await channel.receive()


@pytest.mark.parametrize("ending", [4, 12, 16])
async def test_descriptors_with_a_later_part(ends: Ends, ending: int, null: int) -> None:
    channel, peer = ends
    peer.send_raw(KICK[:ending], [null])
    task = asyncio.ensure_future(channel.receive())
    await asyncio.sleep(0)
    peer.send_raw(KICK[ending:], [null])
    with pytest.raises(PeerError, match="middle of a message"):
        await task


async def test_bad_header_with_descriptors(ends: Ends, null: int) -> None:
    channel, peer = ends
    peer.send_raw(struct.pack("=III", 1, 0, 0), [null] * 8)
    with pytest.raises(PeerError, match="version 0"):
        await channel.receive()


@pytest.mark.parametrize("ending", [1, 12, 19])
async def test_half_open_peer(
    ends: Ends, ending: int, null: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "STALL", 0.01)
    channel, peer = ends
    peer.send_raw(KICK[:ending], [null])
    with pytest.raises(PeerError, match="inside a message"):
        await channel.receive()


async def test_silence_between_messages_is_no_stall(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "STALL", 0.001)
    channel, peer = ends
    task = asyncio.ensure_future(channel.receive())
    await asyncio.sleep(0.02)
    peer.send_raw(KICK)
    assert await task is not None


async def test_send_waits_for_a_slow_reader(ends: Ends) -> None:
    channel, peer = ends
    data = os.urandom(4 << 20)
    task = asyncio.ensure_future(channel.send(data))
    await asyncio.sleep(0)
    assert not task.done()
    assert await peer.read(len(data)) == data
    await task


async def test_send_to_nobody(ends: Ends) -> None:
    channel, peer = ends
    peer.close()
    with pytest.raises(OSError, match="Broken pipe"):
        await channel.send(KICK)


async def test_cancelled_wait_can_be_taken_up_again(ends: Ends) -> None:
    channel, peer = ends
    for part in (KICK[:5], KICK[5:15]):
        peer.send_raw(part)
        task = asyncio.ensure_future(channel.receive())
        await until(lambda: peer_read_all(peer))
        task.cancel()
        await asyncio.wait([task])
    peer.send_raw(KICK[15:])
    assert await channel.receive() is not None


def peer_read_all(peer: Peer) -> bool:
    """Whether all that was sent has been read (SIOCOUTQ)."""
    out = fcntl.ioctl(peer.sock.fileno(), termios.TIOCOUTQ, bytes(4))
    return out == bytes(4)
