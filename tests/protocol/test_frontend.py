"""The front-end against back-ends that lie, fall silent or hang up: an error, and nothing left."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.protocol.fake import TIMEOUT
from tests.protocol.fake_backend import FEATURES, PROTOCOL, Answer, FakeBackend
from tests.protocol.guest import BASE, PAGE, Guest
from vdev._native import lib
from vdev.errors import NotSupported, PeerError
from vdev.virtio.queue import QueueConfig
from vdev.virtio.vhost_user.codec import HEADER_SIZE, NEED_REPLY, REPLY, encode
from vdev.virtio.vhost_user.frontend import Frontend, SharedRegion
from vdev.virtio.vhost_user.payloads import CONFIG, U64, VRING_STATE, ConfigAccess, VringState
from vdev.virtio.vhost_user.remote import VhostUserDevice
from vdev.virtio.vhost_user.table import TABLE

FdCount = Callable[[], Counter[str]]
FEATURE = 1 << lib.VIRTIO_F_VERSION_1
FS_ID = 26
SILENCE = 0.2  # seconds that we wait for a back-end that will not answer

# Every message that `use` sends and that has an answer.
ANSWERED = (
    "GET_FEATURES",
    "GET_PROTOCOL_FEATURES",
    "GET_QUEUE_NUM",
    "GET_CONFIG",
    "SET_BACKEND_REQ_FD",
    "SET_STATUS",
    "SET_FEATURES",
    "GET_STATUS",
    "SET_MEM_TABLE",
    "SET_VRING_NUM",
    "SET_VRING_BASE",
    "SET_VRING_ADDR",
    "SET_VRING_ERR",
    "SET_VRING_CALL",
    "SET_VRING_KICK",
    "SET_VRING_ENABLE",
    "GET_VRING_BASE",
)
# Of a number, of a space, of a state; an ack before the device is there, with it, with a queue.
OF_EACH_KIND = (
    "GET_FEATURES",
    "GET_CONFIG",
    "GET_VRING_BASE",
    "SET_BACKEND_REQ_FD",
    "SET_MEM_TABLE",
    "SET_VRING_ENABLE",
)


def number(name: str) -> int:
    return int(getattr(lib, f"VHOST_USER_{name}"))


def answer(request: int, payload: bytes = bytes(8), *, flags: int = 0, size: int = -1) -> bytes:
    size = len(payload) if size < 0 else size
    return struct.pack("=III", request, lib.VHOST_USER_VERSION | REPLY | flags, size) + payload


def says(make: Callable[[int], bytes], *, then_ends: bool = False) -> Callable[[int], Answer]:
    def of(request: int) -> Answer:
        def act(sock: socket.socket, _payload: bytes) -> None:
            sock.sendall(make(request))
            if then_ends:
                raise EOFError

        return act

    return of


def drips(request: int) -> Answer:
    """One byte after another: something always comes, and it takes too long."""

    def act(sock: socket.socket, _payload: bytes) -> None:
        for byte in answer(request):
            sock.sendall(bytes([byte]))
            time.sleep(SILENCE / 5)

    return act


LIES: dict[str, tuple[Callable[[int], Answer], str]] = {
    "another request": (says(lambda request: answer(request + 1)), "expected one to"),
    "no reply": (says(lambda request: encode(request, bytes(8))), "flags"),
    "another version": (says(lambda request: answer(request, flags=2)), "flags"),
    "need_reply": (says(lambda request: answer(request, flags=NEED_REPLY)), "flags"),
    "reserved flags": (says(lambda request: answer(request, flags=1 << 31)), "flags"),
    "huge": (says(lambda request: answer(request, size=0xFFFF_FFFF)), "at most 4096"),
    "large": (says(lambda request: answer(request, bytes(4096))), "4096 bytes"),
    "short": (says(lambda request: answer(request, bytes(7))), "7 bytes"),
    "ends at once": (says(lambda request: b"", then_ends=True), "closed the connection|reset"),
    "ends in the header": (
        says(lambda request: answer(request)[: HEADER_SIZE - 1], then_ends=True),
        "closed the connection|reset",
    ),
    "ends in the payload": (
        says(lambda request: answer(request, bytes(7), size=8), then_ends=True),
        "bytes|closed the connection|reset",
    ),
    "silent": (says(lambda request: b""), "no answer to .* in 0.2 s"),
    "silent in the header": (says(lambda request: answer(request)[:5]), "no answer to"),
    "drips": (drips, "no answer to"),
}


@pytest.fixture
def guest() -> Iterator[Guest]:
    with Guest() as guest:
        yield guest


async def use(path: Path, guest: Guest) -> None:
    """A device from its connection to its end, with one queue that runs in between."""
    device = await VhostUserDevice.connect(
        path, device_id=FS_ID, config_size=64, answer_seconds=SILENCE
    )
    try:
        device.negotiate(FEATURE)
        queue = await device.start_queue(guest.queue(0), guest.memory)
        try:
            await device._link.call(device._link.frontend.stop_ring, 0)
        finally:
            await queue.stop()
    finally:
        device.close()


async def test_a_good_back_end_is_asked_all_that(guest: Guest, tmp_path: Path) -> None:
    with FakeBackend(tmp_path / "s") as back_end:
        await use(tmp_path / "s", guest)
    assert {number(name) for name in ANSWERED} <= set(back_end.said)


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        (name, lie)
        for name in ANSWERED
        for lie in LIES
        if name in OF_EACH_KIND or lie in ("another request", "ends at once", "silent")
    ],
)
async def test_lies(fd_count: FdCount, guest: Guest, tmp_path: Path, name: str, lie: str) -> None:
    request = number(name)
    act, message = LIES[lie]
    with (
        FakeBackend(tmp_path / "s", {request: act(request)}) as back_end,
        pytest.raises((PeerError, OSError), match=message) as caught,
    ):
        await asyncio.wait_for(use(tmp_path / "s", guest), TIMEOUT)
    assert back_end.said[-1] == request
    assert name in str(caught.value)


@pytest.mark.parametrize("name", [n for n in ANSWERED if TABLE[number(n)].reply is None])
async def test_refusals(fd_count: FdCount, guest: Guest, tmp_path: Path, name: str) -> None:
    """They say what was refused, and leave the connection as it was."""
    request = number(name)
    no = says(lambda request: answer(request, U64.encode(5)))
    with (
        FakeBackend(tmp_path / "s", {request: no(request)}) as back_end,
        pytest.raises(PeerError, match=f"refused {name}"),
    ):
        await use(tmp_path / "s", guest)
    assert back_end.said.count(request) == 1


async def test_descriptors_that_nobody_asked_for(
    fd_count: FdCount, guest: Guest, tmp_path: Path
) -> None:
    def sends_fds(sock: socket.socket, payload: bytes) -> None:
        data = answer(lib.VHOST_USER_GET_VRING_BASE, payload)
        socket.send_fds(sock, [data], [sock.fileno()] * 200)

    with FakeBackend(tmp_path / "s", {lib.VHOST_USER_GET_VRING_BASE: sends_fds}):
        await use(tmp_path / "s", guest)


@given(data=st.binary(max_size=64))
def test_any_bytes_as_an_answer(data: bytes) -> None:
    good = answer(lib.VHOST_USER_GET_FEATURES, U64.encode(FEATURES))
    for reply in (data, good[: len(data) % len(good)] + data):
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(reply)
            theirs.shutdown(socket.SHUT_WR)
            try:
                Frontend(ours).close()
            except (PeerError, OSError):
                assert not reply.startswith(good)
            else:
                assert reply[:HEADER_SIZE] == good[:HEADER_SIZE]
            assert ours.fileno() < 0


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"", "refused"),
        (CONFIG.encode(ConfigAccess(0, 0, 0, b"")), "refused"),
        (CONFIG.encode(ConfigAccess(8, 64, 0, bytes(64))), "64 bytes at 8"),
        (CONFIG.encode(ConfigAccess(0, 32, 0, bytes(32))), "32 bytes at 0"),
        (CONFIG.encode(ConfigAccess(0, 64, 0, bytes(32))), "32 bytes .* 64"),
    ],
)
async def test_wrong_spaces(fd_count: FdCount, tmp_path: Path, reply: bytes, message: str) -> None:
    request = lib.VHOST_USER_GET_CONFIG
    act = says(lambda request: answer(request, reply))(request)
    with FakeBackend(tmp_path / "s", {request: act}), pytest.raises(PeerError, match=message):
        await VhostUserDevice.connect(tmp_path / "s", device_id=FS_ID, config_size=64)


@pytest.mark.parametrize("state", [VringState(1, 0), VringState(0, 1 << 16)])
async def test_wrong_bases(guest: Guest, tmp_path: Path, state: VringState) -> None:
    request = lib.VHOST_USER_GET_VRING_BASE
    act = says(lambda request: answer(request, VRING_STATE.encode(state)))(request)
    with (
        FakeBackend(tmp_path / "s", {request: act}),
        pytest.raises(PeerError, match="asked for 0's"),
    ):
        await use(tmp_path / "s", guest)


async def test_a_space_of_the_callers_own(guest: Guest, tmp_path: Path) -> None:
    """As for virtiofsd: a tag and a number of queues that the back-end does not know."""
    protocol = PROTOCOL & ~(1 << lib.VHOST_USER_PROTOCOL_F_CONFIG)
    space = b"share".ljust(36, b"\0") + (1).to_bytes(4, "little")
    with FakeBackend(tmp_path / "s", protocol=protocol):
        device = await VhostUserDevice.connect(
            tmp_path / "s", device_id=FS_ID, num_queues=2, config=space
        )
        assert device.config() == space
        with pytest.raises(PeerError, match="read-only"):
            device.write_config(0, b"x")
        device.close()
    os.unlink(tmp_path / "s")
    with (
        FakeBackend(tmp_path / "s", protocol=protocol),
        pytest.raises(NotSupported, match="no configuration space, and none was given"),
    ):
        await VhostUserDevice.connect(tmp_path / "s", device_id=FS_ID)


async def test_a_back_end_without_protocol_features(guest: Guest, tmp_path: Path) -> None:
    features = FEATURES & ~(1 << lib.VHOST_USER_F_PROTOCOL_FEATURES)
    with FakeBackend(tmp_path / "s", features=features) as back_end:
        device = await VhostUserDevice.connect(tmp_path / "s", device_id=FS_ID, config=bytes(40))
        assert device.num_queues == 1
        device.negotiate(FEATURE)
        queue = await device.start_queue(guest.queue(0), guest.memory)
        with pytest.raises(NotSupported, match="enable"):
            await queue.set_enabled(False)
        assert await queue.stop() == 0
        device.reset()
        device.close()
    assert lib.VHOST_USER_SET_VRING_ENABLE not in back_end.said
    assert lib.VHOST_USER_GET_PROTOCOL_FEATURES not in back_end.said


async def test_legacy_back_ends_are_refused(fd_count: FdCount, tmp_path: Path) -> None:
    with (
        FakeBackend(tmp_path / "s", features=FEATURES & ~FEATURE),
        pytest.raises(PeerError, match="VERSION_1"),
    ):
        await VhostUserDevice.connect(tmp_path / "s", device_id=FS_ID, config_size=8)


async def test_features_that_do_not_suit(guest: Guest, tmp_path: Path) -> None:
    """After a reset the driver may try again."""
    request = lib.VHOST_USER_GET_STATUS
    with FakeBackend(tmp_path / "s", {request: says(lambda r: answer(r))(request)}) as back_end:
        device = await VhostUserDevice.connect(tmp_path / "s", device_id=FS_ID, config_size=8)
        device.negotiate(FEATURE)
        with pytest.raises(PeerError, match="does not work with the features"):
            await device.start_queue(guest.queue(0), guest.memory)
        device.reset()
        back_end.answers = {}
        device.negotiate(FEATURE)
        queue = await device.start_queue(guest.queue(1), guest.memory)
        assert await queue.stop() == 0
        device.close()
    assert back_end.status == 15


async def test_words_unasked_lose_the_back_end(fd_count: FdCount, tmp_path: Path) -> None:
    with FakeBackend(tmp_path / "s") as back_end:
        device = await VhostUserDevice.connect(tmp_path / "s", device_id=FS_ID, config_size=8)
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        device.lost.append(lost.set_result)
        assert back_end.sock is not None
        back_end.sock.sendall(answer(lib.VHOST_USER_GET_FEATURES))
        assert "unasked" in await asyncio.wait_for(lost, TIMEOUT)
        device.close()


async def test_the_channel(fd_count: FdCount, tmp_path: Path) -> None:
    """Changes are told, all else is refused, and a breach costs the channel alone."""
    loop = asyncio.get_running_loop()
    with FakeBackend(tmp_path / "s") as back_end:
        device = await VhostUserDevice.connect(tmp_path / "s", device_id=FS_ID, config_size=64)
        channel = back_end.channel
        assert channel is not None
        channel.setblocking(False)
        changed = asyncio.Event()
        device.config_changed.append(changed.set)
        back_end.space[0] = 200
        change = lib.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
        channel.sendall(encode(change, flags=NEED_REPLY))
        assert await loop.sock_recv(channel, 64) == answer(change)
        await asyncio.wait_for(changed.wait(), TIMEOUT)
        assert device.config()[0] == 200
        other = lib.VHOST_USER_BACKEND_VRING_CALL
        channel.setblocking(True)
        socket.send_fds(channel, [encode(other, bytes(8), NEED_REPLY)], [channel.fileno()])
        channel.setblocking(False)
        assert await loop.sock_recv(channel, 64) == answer(other, U64.encode(1))
        channel.sendall(encode(other, bytes(8)))
        channel.sendall(struct.pack("=III", change, 7, 0xFFFF_FFFF))
        assert await asyncio.wait_for(loop.sock_recv(channel, 64), TIMEOUT) == b""
        assert device.fault is None
        device.write_config(8, b"x")
        device.close()


async def test_a_flood_of_writes_is_bounded(fd_count: FdCount, tmp_path: Path) -> None:
    """While the back-end is busy with the first, a guest's writes do not pile up."""
    with FakeBackend(tmp_path / "s"):
        device = await VhostUserDevice.connect(tmp_path / "s", device_id=FS_ID, config_size=64)
        # No turn of the event loop in between: no answer is heard.
        for _ in range(64):
            device.write_config(8, b"x")
        with pytest.raises(PeerError, match="does not keep up"):
            device.write_config(8, b"x")
        device.close()


async def test_a_flood_of_changes(fd_count: FdCount, tmp_path: Path) -> None:
    """The space is read no more often than it can be, and other work goes on."""
    with FakeBackend(tmp_path / "s") as back_end:
        device = await VhostUserDevice.connect(tmp_path / "s", device_id=FS_ID, config_size=64)
        assert back_end.channel is not None
        changed = asyncio.Event()
        device.config_changed.append(changed.set)
        flood = encode(lib.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG) * 5000
        await asyncio.to_thread(back_end.channel.sendall, flood)
        await asyncio.wait_for(changed.wait(), TIMEOUT)
        device.close()
    assert back_end.said.count(lib.VHOST_USER_GET_CONFIG) < 5000


async def test_acks_that_are_not_read(fd_count: FdCount, tmp_path: Path) -> None:
    with FakeBackend(tmp_path / "s") as back_end:
        device = await VhostUserDevice.connect(tmp_path / "s", device_id=FS_ID, config_size=64)
        channel = back_end.channel
        assert channel is not None
        flood = encode(lib.VHOST_USER_BACKEND_VRING_CALL, flags=NEED_REPLY) * 100_000

        def send() -> None:
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                channel.sendall(flood)

        await asyncio.wait_for(asyncio.to_thread(send), TIMEOUT)
        assert device.fault is None
        device.close()


@pytest.mark.parametrize(
    ("missing", "resets"),
    [(0, "SET_STATUS"), (1 << lib.VHOST_USER_PROTOCOL_F_STATUS, "RESET_DEVICE")],
)
def test_resets(tmp_path: Path, missing: int, resets: str) -> None:
    protocol = (PROTOCOL | 1 << lib.VHOST_USER_PROTOCOL_F_RESET_DEVICE) & ~missing
    with (
        FakeBackend(tmp_path / "s", protocol=protocol) as back_end,
        Frontend.connect(tmp_path / "s") as frontend,
    ):
        assert not frontend.reset_device()
        frontend.negotiate_protocol(protocol)
        assert frontend.reset_device()
        assert back_end.said[-1] == number(resets)


def test_more_regions_than_fit(tmp_path: Path) -> None:
    with (
        FakeBackend(tmp_path / "s") as back_end,
        Frontend.connect(tmp_path / "s") as frontend,
        Guest() as guest,
    ):
        regions = [
            SharedRegion(BASE + n * PAGE, PAGE, BASE + n * PAGE, n * PAGE, guest.fd)
            for n in range(9)
        ]
        with pytest.raises(NotSupported, match="no memory slots, and takes 8"):
            frontend.set_memory(regions)
        frontend.negotiate_protocol(PROTOCOL)
        with pytest.raises(NotSupported, match="9 memory regions: the back-end takes 8"):
            frontend.set_memory(regions)
        frontend.set_memory(regions[:7])
        frontend.set_memory(regions[:8])
        frontend.set_memory(regions[:7])
        said = Counter(back_end.said)
        assert said[lib.VHOST_USER_SET_MEM_TABLE] == 2
        assert said[lib.VHOST_USER_ADD_MEM_REG] == 1


def test_rings_lie_in_the_memory_given(tmp_path: Path) -> None:
    with FakeBackend(tmp_path / "s"), Frontend.connect(tmp_path / "s") as frontend:
        frontend.set_features(FEATURE)
        with pytest.raises(PeerError, match="outside guest memory"):
            frontend.start_ring(QueueConfig(0, 64, 0, 0, 0x1000, 0x2000))


def test_a_back_end_that_is_busy_is_tried_again(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(tmp_path / "s"))
        listener.listen(8)
        listener.setblocking(True)

        def serve() -> None:
            for _ in range(3):
                listener.accept()[0].close()
            with listener.accept()[0] as sock:
                sock.sendall(answer(lib.VHOST_USER_GET_FEATURES, U64.encode(FEATURES)))
                sock.recv(64)

        thread = threading.Thread(target=serve)
        thread.start()
        with Frontend.connect(tmp_path / "s", patience=TIMEOUT) as frontend:
            assert frontend.offered == FEATURES
        thread.join()
