"""Endpoints and the server: who is served when, and what is left behind."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tests.protocol.fake import FakeDevice, Peer, until
from vdev.errors import UserError
from vdev.iothread import IOThread
from vdev.ratelog import RateLimitedLog
from vdev.server import listener
from vdev.server.device_server import DeviceServer
from vdev.server.listener import Endpoint

FdCount = Callable[[], Counter[str]]
LOG = RateLimitedLog(logging.getLogger("test"))


@pytest_asyncio.fixture
async def iothread(fd_count: FdCount) -> AsyncIterator[IOThread]:
    thread = IOThread(poll_us=0)
    thread.start()
    yield thread
    await thread.close()


@asynccontextmanager
async def serving(endpoint: Endpoint, iothread: IOThread) -> AsyncIterator[DeviceServer]:
    device = FakeDevice([iothread])
    server = DeviceServer(device, endpoint)
    await server.start()
    try:
        yield server
    finally:
        await server.close()
        device.close()


def connect(path: Path) -> Peer:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(os.fspath(path))
    return Peer(sock)


async def test_one_after_another(tmp_path: Path, iothread: IOThread) -> None:
    path = tmp_path / "s"
    async with serving(Endpoint.listen(path), iothread) as server:
        assert server.status()["state"] == "waiting"
        for count in range(1, 6):
            peer = connect(path)
            await peer.ask("GET_FEATURES")
            status = server.status()
            assert status["state"] == "connected"
            assert status["front_end_pid"] == os.getpid()
            assert status["connections"] == count
            peer.close()
        await until(lambda: server.status()["state"] == "waiting")
    assert server.status()["state"] == "stopped"
    assert not path.exists()


async def test_second_waits_for_the_first(tmp_path: Path, iothread: IOThread) -> None:
    path = tmp_path / "s"
    async with serving(Endpoint.listen(path), iothread):
        first, second = connect(path), connect(path)
        await first.ask("GET_FEATURES")
        await second.send("GET_FEATURES")
        assert await first.ask("GET_PROTOCOL_FEATURES")
        first.close()
        assert len(await second.read(20)) == 20
        second.close()


async def test_silent_clients_lock_nobody_out(tmp_path: Path, iothread: IOThread) -> None:
    path = tmp_path / "s"
    async with serving(Endpoint.listen(path), iothread):
        silent = [connect(path) for _ in range(listener.MAX_WAITING + 10)]
        for _ in range(3):
            peer = connect(path)
            await peer.ask("GET_FEATURES")
            peer.close()
        await silent[0].closed()  # beyond the most that may wait, the oldest goes
        late = silent[-1]
        await late.ask("GET_FEATURES")
        for peer in silent:
            peer.close()


async def test_too_many_that_speak(
    tmp_path: Path, iothread: IOThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "MAX_WAITING", 2)
    path = tmp_path / "s"
    async with serving(Endpoint.listen(path), iothread) as server:
        peers = [connect(path) for _ in range(3)]
        await peers[0].ask("GET_FEATURES")
        for peer in peers[1:]:
            await peer.send("GET_FEATURES")
        await until(lambda: len(server.endpoint._speaking) == 2)  # type: ignore[attr-defined]
        extra = connect(path)
        await extra.closed()
        extra.close()
        for peer in peers:
            peer.close()


async def test_connects_and_disconnects(tmp_path: Path, iothread: IOThread) -> None:
    path = tmp_path / "s"
    async with serving(Endpoint.listen(path), iothread):
        for at in range(300):
            peer = connect(path)
            if at % 3 == 1:
                peer.send_raw(b"\1")
            if at % 3 == 2:
                await peer.ask("GET_FEATURES")
            peer.close()
        peer = connect(path)
        await peer.ask("GET_FEATURES")
        peer.close()


async def test_fault_of_ours_ends_one_connection(tmp_path: Path, iothread: IOThread) -> None:
    path = tmp_path / "s"
    async with serving(Endpoint.listen(path), iothread) as server:
        server.device.features = "broken"  # type: ignore[assignment]
        peer = connect(path)
        await peer.send("GET_FEATURES")
        await peer.closed()
        peer.close()
        server.device.features = 1 << 32
        peer = connect(path)
        await peer.ask("GET_FEATURES")
        peer.close()


async def test_listening_descriptor(tmp_path: Path, iothread: IOThread) -> None:
    path = tmp_path / "s"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(os.fspath(path))
    sock.listen()
    async with serving(Endpoint.from_fd(sock.detach()), iothread):
        for _ in range(2):
            peer = connect(path)
            await peer.ask("GET_FEATURES")
            peer.close()
    assert path.exists()  # not ours to remove


async def test_connected_descriptor(iothread: IOThread) -> None:
    ours, theirs = socket.socketpair()
    async with serving(Endpoint.from_fd(ours.detach()), iothread) as server:
        peer = Peer(theirs)
        await peer.ask("GET_FEATURES")
        peer.close()
        await server.wait()
        assert server.status()["state"] == "stopped"


async def test_connects_as_client_again_and_again(
    tmp_path: Path, iothread: IOThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "RETRY_FIRST", 0.01)
    monkeypatch.setattr(listener, "RETRY_MOST", 0.01)
    path = tmp_path / "s"
    loop = asyncio.get_running_loop()
    async with serving(Endpoint.connect(path), iothread) as server:
        # It has tried in vain before anybody listens.
        await until(lambda: server.endpoint._delay > 0)  # type: ignore[attr-defined]
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as front_end:
            front_end.setblocking(False)
            front_end.bind(os.fspath(path))
            front_end.listen()
            for _ in range(3):
                sock, _ = await loop.sock_accept(front_end)
                peer = Peer(sock)
                await peer.ask("GET_FEATURES")
                peer.close()


async def test_connects_once_without_retry(tmp_path: Path, iothread: IOThread) -> None:
    async with serving(Endpoint.connect(tmp_path / "s", retry=False), iothread) as server:
        with pytest.raises(UserError, match="cannot connect"):
            await server.wait()


@pytest.mark.parametrize("ready", [False, True])
async def test_stale_path_is_replaced(tmp_path: Path, iothread: IOThread, ready: bool) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as old:
        old.bind(os.fspath(path))
        if ready:
            old.listen()
    async with serving(Endpoint.listen(path), iothread):
        peer = connect(path)
        await peer.ask("GET_FEATURES")
        peer.close()


async def test_path_that_is_not_ours_any_more_stays(tmp_path: Path, iothread: IOThread) -> None:
    path = tmp_path / "s"
    async with serving(Endpoint.listen(path), iothread):
        path.unlink()
        path.write_text("somebody else's")
    assert path.read_text() == "somebody else's"


async def test_busy_path(tmp_path: Path, iothread: IOThread) -> None:
    path = tmp_path / "s"
    async with serving(Endpoint.listen(path), iothread):
        with pytest.raises(UserError, match="another process listens") as info:
            Endpoint.listen(path).open(LOG)
        assert str(path) in str(info.value)
        peer = connect(path)
        await peer.ask("GET_FEATURES")
        peer.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 200, "at most 107"),
        ("nowhere/s", "there is no folder"),
        ("file", "no socket is there"),
        ("file/s", "not a folder"),
        ("folder", "no socket is there"),
    ],
)
async def test_bad_path(tmp_path: Path, name: str, words: str, fd_count: FdCount) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    endpoint = Endpoint.listen(tmp_path / name)
    with pytest.raises(UserError, match=words) as info:
        endpoint.open(LOG)
    assert str(tmp_path / name) in str(info.value)
    endpoint.close()


@pytest.mark.parametrize("length", [107, 108])
async def test_longest_path(
    tmp_path_factory: pytest.TempPathFactory, length: int, iothread: IOThread
) -> None:
    folder = tmp_path_factory.mktemp("p")
    path = f"{folder}/".ljust(length, "x")
    if len(path) > length:
        pytest.fail(f"{folder} is too long a place for this test")
    if length == 107:
        async with serving(Endpoint.listen(path), iothread):
            connect(Path(path)).close()
    else:
        with pytest.raises(UserError, match="108 bytes"):
            Endpoint.listen(path).open(LOG)


def test_descriptor_that_is_no_socket() -> None:
    read, write = os.pipe()
    with pytest.raises(UserError, match="not a socket"):
        Endpoint.from_fd(read)
    with pytest.raises(UserError, match="not a socket"):
        Endpoint.from_fd(10**6)
    os.close(read)
    os.close(write)
    with socket.socket(socket.AF_INET) as tcp, pytest.raises(UserError, match="Unix stream"):
        Endpoint.from_fd(tcp.fileno())


def test_descriptor_that_leads_nowhere() -> None:
    endpoint = Endpoint.from_fd(socket.socket(socket.AF_UNIX).detach())
    with pytest.raises(UserError, match="neither listening nor connected"):
        endpoint.open(LOG)
    endpoint.close()
