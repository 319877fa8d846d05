"""A connection from its first message to its end: effects, answers, and what is left behind."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.protocol.fake import FakeDevice, Peer, memory_file, until
from tests.protocol.messages import ADDR, REGION
from vdev._native import lib
from vdev.iothread import IOThread
from vdev.ratelog import RateLimitedLog
from vdev.virtio.queue import F_RING_PACKED
from vdev.virtio.spec import RING_FEATURES
from vdev.virtio.vhost_user.backend import Backend
from vdev.virtio.vhost_user.channel import Channel
from vdev.virtio.vhost_user.codec import encode
from vdev.virtio.vhost_user.connection import serve_connection
from vdev.virtio.vhost_user.payloads import VRING_STATE, ConfigAccess, VringState
from vdev.virtio.vhost_user.session import F_LOG_ALL, F_PROTOCOL, MEM_SLOTS

SPLIT = RING_FEATURES & ~(F_RING_PACKED | 1 << lib.VIRTIO_F_IN_ORDER)
FEATURES = SPLIT | F_PROTOCOL
ALL = 0xFFFF_FFFF_FFFF_FFFF
LOG = RateLimitedLog(logging.getLogger("test"), burst=10**6)
FdCount = Callable[[], Counter[str]]


@dataclass
class Served:
    device: FakeDevice
    backend: Backend
    peer: Peer
    task: asyncio.Future[None]

    async def negotiate(self, without: int = 0) -> None:
        offered = await self.peer.ask("GET_PROTOCOL_FEATURES")
        await self.peer.send("SET_PROTOCOL_FEATURES", offered & ~without)
        await self.peer.send("SET_OWNER")
        await self.peer.send("SET_FEATURES", FEATURES)

    async def share(self) -> None:
        """One region of memory; its file is closed here, as front-ends may."""
        fd = memory_file(REGION.size)
        await self.peer.send("SET_MEM_TABLE", (REGION,), [fd])
        os.close(fd)

    async def start_ring(self, base: int = 0) -> None:
        await self.peer.send("SET_VRING_NUM", VringState(0, 64))
        await self.peer.send("SET_VRING_BASE", VringState(0, base))
        await self.peer.send("SET_VRING_ADDR", ADDR)
        for name in ("KICK", "CALL", "ERR"):
            fd = os.eventfd(0)
            await self.peer.send(f"SET_VRING_{name}", 0, [fd])
            os.close(fd)
        await self.peer.send("SET_VRING_ENABLE", VringState(0, 1))


@pytest_asyncio.fixture
async def iothread(fd_count: FdCount) -> AsyncIterator[IOThread]:
    thread = IOThread(poll_us=0)
    thread.start()
    yield thread
    await thread.close()


@pytest_asyncio.fixture
async def served(iothread: IOThread) -> AsyncIterator[Served]:
    ours, theirs = socket.socketpair()
    device = FakeDevice([iothread])
    backend = Backend(device, LOG)
    task = asyncio.ensure_future(serve_connection(Channel(ours), backend, LOG))
    served = Served(device, backend, Peer(theirs), task)
    yield served
    served.peer.close()
    await asyncio.wait([task])
    assert task.cancelled() or task.exception() is None
    assert device.said[-1] == ("reset",)
    assert device.config_changed == []
    assert iothread.queues == 0
    device.close()


async def test_negotiation(served: Served) -> None:
    peer = served.peer
    assert await peer.ask("GET_FEATURES") == RING_FEATURES | F_PROTOCOL | F_LOG_ALL
    offered = await peer.ask("GET_PROTOCOL_FEATURES")
    for bit in (0, 1, 2, 3, 4, 5, 9, 10, 12, 13, 15, 16, 19, 20):
        assert offered >> bit & 1
    assert offered.bit_count() == 14
    await served.negotiate()
    assert await peer.ask("GET_QUEUE_NUM") == 2
    assert await peer.ask("GET_MAX_MEM_SLOTS") == MEM_SLOTS
    assert served.device.said == [("negotiate", SPLIT)]


async def test_ring_life(served: Served, iothread: IOThread) -> None:
    peer = served.peer
    await served.negotiate()
    await served.share()
    await served.start_ring()
    assert await peer.ack("SET_STATUS", 15) == 0
    assert iothread.queues == 1
    status = served.backend.status()
    assert status["queues"][0]["started"]
    assert status["device_status"] == ["ACKNOWLEDGE", "DRIVER", "DRIVER_OK", "FEATURES_OK"]
    for _ in range(2):
        assert await peer.ask("GET_VRING_BASE", VringState(0, 0)) == VringState(0, 0)
        assert iothread.queues == 0
    assert await peer.ask("GET_VRING_BASE", VringState(1, 0)) == VringState(1, 0)
    await served.start_ring()
    assert await peer.ask("GET_STATUS") == 15
    assert iothread.queues == 1


async def test_a_ring_keeps_its_base_when_the_status_is_cleared(served: Served) -> None:
    """QEMU pauses a guest in this order, and starts the ring again at the base it was told."""
    peer = served.peer
    await served.negotiate()
    await served.share()
    await served.start_ring(base=7)
    assert await peer.ack("SET_STATUS", 15) == 0
    assert await peer.ack("SET_STATUS", 0) == 0
    assert await peer.ask("GET_VRING_BASE", VringState(0, 0)) == VringState(0, 7)


async def test_memory_changes_under_a_running_ring(served: Served) -> None:
    peer = served.peer
    await served.negotiate()
    await served.share()
    await served.start_ring()
    other = REGION._replace(guest_addr=0x100_0000, user_addr=0x100_0000)
    fd = memory_file(REGION.size)
    for _ in range(10):
        assert await peer.ack("ADD_MEM_REG", other, [fd]) == 0
        assert await peer.ack("REM_MEM_REG", other) == 0
    # The same front-end addresses, elsewhere for the guest.
    assert await peer.ack("SET_MEM_TABLE", (REGION._replace(guest_addr=0),), [fd]) == 0
    placement = served.backend.session.rings[0].placement
    assert placement is not None
    assert placement.desc.start == 0
    assert served.backend.vrings[0].queue is not None
    os.close(fd)


async def test_memory_taken_from_a_running_ring(served: Served) -> None:
    peer = served.peer
    await served.negotiate()
    await served.share()
    await served.start_ring()
    err = os.eventfd(0, os.EFD_NONBLOCK)
    assert await peer.ack("SET_VRING_ERR", 0, [err]) == 0
    assert await peer.ack("REM_MEM_REG", REGION) == 0
    assert os.eventfd_read(err) == 1
    os.close(err)
    queue = served.backend.vrings[0].queue
    assert queue is not None
    assert queue.fault == "ring unmapped"
    assert await peer.ask("GET_VRING_BASE", VringState(0, 0)) == VringState(0, 0)
    await served.share()
    await served.start_ring()
    assert await peer.ask("GET_STATUS") == 0
    assert served.backend.status()["queues"][0]["broken"] is None


async def test_call_and_kick_are_replaced_while_running(served: Served) -> None:
    await served.negotiate()
    await served.share()
    await served.start_ring()
    for _ in range(20):
        for name in ("KICK", "CALL", "ERR"):
            fd = os.eventfd(0)
            assert await served.peer.ack(f"SET_VRING_{name}", 0, [fd]) == 0
            os.close(fd)
    for name in ("KICK", "CALL", "ERR"):
        nofd = lib.VHOST_USER_VRING_NOFD
        assert await served.peer.ack(f"SET_VRING_{name}", nofd) == 0


@pytest.mark.parametrize("kind", ["/", "/dev/null", "/proc/self/maps", "pipe", "socket"])
@pytest.mark.parametrize("name", ["KICK", "CALL", "ERR"])
async def test_wrong_kind_of_descriptor(served: Served, kind: str, name: str) -> None:
    await served.negotiate()
    await served.share()
    await served.start_ring()
    if kind == "pipe":
        fds = list(os.pipe())
    elif kind == "socket":
        fds = [s.detach() for s in socket.socketpair()]
    else:
        fds = [os.open(kind, os.O_RDONLY)]
    assert await served.peer.ack(f"SET_VRING_{name}", 0, fds[:1]) == 1
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("kind", ["/", "/dev/null", "short", "read-only", "eventfd"])
@pytest.mark.parametrize("name", ["SET_MEM_TABLE", "ADD_MEM_REG"])
async def test_wrong_kind_of_memory(served: Served, kind: str, name: str) -> None:
    await served.negotiate()
    await served.share()
    region = REGION._replace(guest_addr=0x100_0000, user_addr=0x100_0000)
    if kind == "short":
        fd = memory_file(region.size - 1)
    elif kind == "read-only":
        held = memory_file(region.size)
        fd = os.open(f"/proc/self/fd/{held}", os.O_RDONLY)
        os.close(held)
    elif kind == "eventfd":
        fd = os.eventfd(0)
    else:
        fd = os.open(kind, os.O_RDONLY)
    body = (region,) if name == "SET_MEM_TABLE" else region
    assert await served.peer.ack(name, body, [fd]) == 1
    os.close(fd)
    assert served.backend.session.regions == (REGION,)


@pytest.mark.parametrize("name", ["SET_STATUS", "RESET_DEVICE"])
async def test_reset(served: Served, iothread: IOThread, name: str) -> None:
    await served.negotiate()
    await served.share()
    await served.start_ring()
    assert await served.peer.ack(name, 0) == 0
    assert iothread.queues == 0
    assert served.device.said[-1] == ("reset",)
    await served.peer.send("SET_FEATURES", FEATURES)
    await served.start_ring()
    assert await served.peer.ask("GET_STATUS") == 0
    assert iothread.queues == 1


async def test_config(served: Served) -> None:
    peer = served.peer
    await served.negotiate()
    got = await peer.ask("GET_CONFIG", ConfigAccess(4, 3, 1, bytes(3)))
    assert got == ConfigAccess(4, 3, 1, b"\4\5\6")
    assert await peer.ack("SET_CONFIG", ConfigAccess(40, 1, 0, b"x")) == 0
    assert served.device.space[40] == ord("x")
    assert await peer.ack("SET_CONFIG", ConfigAccess(0, 1, 0, b"x")) == 1
    for bad in (ConfigAccess(0, 0, 0, b""), ConfigAccess(60, 5, 0, bytes(5))):
        await peer.send("GET_CONFIG", bad)
        assert (await peer.reply())[2] == b""


async def test_net_messages(served: Served) -> None:
    await served.negotiate()
    assert await served.peer.ack("NET_SET_MTU", 9000) == 0
    assert await served.peer.ack("NET_SET_MTU", 67) == 1
    assert await served.peer.ack("SEND_RARP", int.from_bytes(b"\x52\x54\0\1\2\3", "little")) == 0
    assert served.device.said[1:] == [("mtu", 9000), ("announce", b"\x52\x54\0\1\2\3")]


async def test_refusal_without_a_way_to_say_so_closes(served: Served) -> None:
    await served.negotiate()
    await served.peer.send("SET_VRING_NUM", VringState(0, 3))
    await served.peer.closed()
    await served.task


@pytest.mark.parametrize("name", ["GET_VRING_BASE"])
async def test_refusal_of_a_message_with_its_own_reply_closes(served: Served, name: str) -> None:
    await served.negotiate()
    await served.peer.send(name, VringState(9, 0), need_reply=True)
    await served.peer.closed()


async def test_need_reply_without_reply_ack(served: Served) -> None:
    await served.negotiate(without=1 << lib.VHOST_USER_PROTOCOL_F_REPLY_ACK)
    await served.peer.send("SET_VRING_NUM", VringState(0, 64), need_reply=True)
    assert await served.peer.ask("GET_QUEUE_NUM") == 2
    await served.peer.send("SET_VRING_NUM", VringState(0, 3), need_reply=True)
    await served.peer.closed()


async def test_unknown_request_is_refused(served: Served) -> None:
    await served.negotiate()
    served.peer.send_raw(encode(99, b"", lib.VHOST_USER_NEED_REPLY))
    assert await served.peer.reply() == (99, 5, (1).to_bytes(8, "little"))
    served.peer.send_raw(encode(99))
    await served.peer.closed()


async def test_descriptors_nobody_wants(served: Served, fd_count: FdCount) -> None:
    await served.negotiate()
    fd = os.eventfd(0)
    assert await served.peer.ack("SET_FEATURES", FEATURES, [fd] * 8) == 1
    before = fd_count()
    for _ in range(1000):
        assert await served.peer.ack("SET_FEATURES", FEATURES, [fd] * 8) == 1
    assert fd_count() == before
    os.close(fd)


async def test_config_change_is_told(served: Served) -> None:
    await served.negotiate()
    for _ in range(3):
        ours, theirs = socket.socketpair()
        assert await served.peer.ack("SET_BACKEND_REQ_FD", None, [theirs.fileno()]) == 0
        theirs.close()
        end = Peer(ours)
        served.device.notify_config()
        assert await end.reply() == (lib.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, 1, b"")
        # Nothing is to be said on it: this one is closed, the connection is not.
        ours.send(b"x")
        await end.closed()
        served.device.notify_config()
        end.close()
    assert await served.peer.ask("GET_QUEUE_NUM") == 2


async def test_channel_that_nobody_reads(served: Served) -> None:
    await served.negotiate()
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    await served.peer.ack("SET_BACKEND_REQ_FD", None, [theirs.fileno()])
    theirs.close()
    for _ in range(10_000):
        served.device.notify_config()
    assert await served.peer.ask("GET_QUEUE_NUM") == 2
    end = Peer(ours)
    assert served.backend._channel is not None
    received = b""
    while True:
        try:
            received += ours.recv(1 << 16)
        except BlockingIOError:
            if not served.backend._channel._unsent:
                break
            await asyncio.sleep(0)
    message = encode(lib.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG)
    count = len(received) // len(message)
    assert received == message * count
    assert 0 < count < 10_000
    end.close()


@pytest.mark.parametrize("kind", ["pipe", "datagram", "tcp"])
async def test_wrong_kind_of_channel(served: Served, kind: str) -> None:
    await served.negotiate()
    if kind == "pipe":
        fds = list(os.pipe())
    elif kind == "datagram":
        fds = [s.detach() for s in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)]
    else:
        fds = [socket.socket(socket.AF_INET).detach()]
    assert await served.peer.ack("SET_BACKEND_REQ_FD", None, fds[:1]) == 1
    for fd in fds:
        os.close(fd)


async def test_flood_leaves_the_loop_to_others(served: Served) -> None:
    """A front-end that always has a message waiting: others get their turn in between."""
    await served.negotiate()
    count = 2000
    data = encode(lib.VHOST_USER_SET_VRING_NUM, VRING_STATE.encode(VringState(0, 64)))
    served.peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    served.peer.send_raw(data * count)
    turns = 0
    await served.peer.send("GET_QUEUE_NUM")
    reply = asyncio.ensure_future(served.peer.reply())
    while not reply.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns >= count


async def test_drained_before_the_front_end_sees_the_end(served: Served) -> None:
    """Who finds the connection closed takes the used rings for final."""
    await served.negotiate()
    await served.share()
    await served.start_ring()
    assert await served.peer.ask("GET_STATUS") == 0
    seen: list[bytes | None] = []

    def reset() -> None:
        served.device.said.append(("reset",))
        try:
            seen.append(served.peer.sock.recv(1))
        except BlockingIOError:
            seen.append(None)

    served.device.reset = reset  # type: ignore[method-assign]
    served.task.cancel()
    await asyncio.wait([served.task])
    assert seen == [None]


@pytest.mark.parametrize("steps", range(4))
async def test_server_ends_in_the_middle(iothread: IOThread, fd_count: FdCount, steps: int) -> None:
    """Cancelled anywhere, everything is given back."""
    before = fd_count()
    ours, theirs = socket.socketpair()
    device = FakeDevice([iothread])
    backend = Backend(device, LOG)
    task = asyncio.ensure_future(serve_connection(Channel(ours), backend, LOG))
    served = Served(device, backend, Peer(theirs), task)
    await served.negotiate()
    await served.share()
    await served.start_ring()
    if steps:
        await until(lambda: iothread.queues)
        await served.peer.send("GET_VRING_BASE", VringState(0, 0))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()  # impatient
    await asyncio.wait([task])
    served.peer.close()
    assert iothread.queues == 0
    assert device.said[-1] == ("reset",)
    device.close()
    assert fd_count() == before
