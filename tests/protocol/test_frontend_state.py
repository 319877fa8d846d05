"""The front-end transfers a state over either side's channel, whatever the back-end answers."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.protocol.fake_backend import PROTOCOL, Answer, FakeBackend
from vdev._native import lib
from vdev.errors import NotSupported, PeerError
from vdev.virtio.vhost_user import frontend as frontend_module
from vdev.virtio.vhost_user.codec import REPLY, encode
from vdev.virtio.vhost_user.frontend import Frontend
from vdev.virtio.vhost_user.payloads import U64

FdCount = Callable[[], Counter[str]]
SET = lib.VHOST_USER_SET_DEVICE_STATE_FD
CHECK = lib.VHOST_USER_CHECK_DEVICE_STATE
STATE = 1 << lib.VHOST_USER_PROTOCOL_F_DEVICE_STATE
NO_FD: int = lib.VHOST_USER_TRANSFER_NOFD
SILENCE = 0.2  # seconds that we wait for a back-end that does nothing


def says(request: int, value: int, fd: int = -1) -> Answer:
    def answer(sock: socket.socket, payload: bytes) -> None:
        data = encode(request, U64.encode(value), REPLY)
        socket.send_fds(sock, [data], [fd] if fd >= 0 else [])
        if fd >= 0:
            os.close(fd)

    return answer


@contextmanager
def connected(path: Path, set_fd: Answer, check: int = 0) -> Iterator[Frontend]:
    with ExitStack() as stack:
        answers = {SET: set_fd, CHECK: says(CHECK, check)}
        stack.enter_context(FakeBackend(path, answers, protocol=PROTOCOL | STATE))
        frontend = stack.enter_context(Frontend.connect(path, answer_seconds=SILENCE))
        frontend.negotiate_protocol(PROTOCOL | STATE)
        yield frontend


async def test_its_own_channel(tmp_path: Path, fd_count: FdCount) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"state")
    os.close(writer)
    with connected(tmp_path / "a", says(SET, 0, reader)) as frontend:
        assert frontend.save_state() == b"state"
    reader, writer = os.pipe()
    with connected(tmp_path / "b", says(SET, 0, writer)) as frontend:
        frontend.load_state(b"state")
    assert os.read(reader, 64) == b"state"
    os.close(reader)


async def test_our_channel(tmp_path: Path, fd_count: FdCount) -> None:
    """The fake closes its end at once: an empty state, and one that nobody wants."""
    with connected(tmp_path / "s", says(SET, NO_FD)) as frontend:
        assert frontend.save_state() == b""
        frontend.load_state(bytes(1 << 20))
        frontend.barrier()


@pytest.mark.parametrize("value", [NO_FD | 1, NO_FD | 255])
async def test_refused(tmp_path: Path, fd_count: FdCount, value: int) -> None:
    with connected(tmp_path / "s", says(SET, value)) as frontend:
        for transfer in (frontend.save_state, lambda: frontend.load_state(b"state")):
            with pytest.raises(PeerError, match="refused to transfer its state"):
                transfer()
        frontend.barrier()


async def test_it_says_that_it_went_wrong(tmp_path: Path, fd_count: FdCount) -> None:
    with connected(tmp_path / "s", says(SET, NO_FD), check=1) as frontend:
        for transfer in (frontend.save_state, lambda: frontend.load_state(b"state")):
            with pytest.raises(PeerError, match="did not transfer the device's state"):
                transfer()
        frontend.barrier()


@pytest.mark.parametrize("with_fd", [True, False])
async def test_the_answer_and_its_descriptors_disagree(
    tmp_path: Path, fd_count: FdCount, with_fd: bool
) -> None:
    lie = says(SET, NO_FD, os.eventfd(0)) if with_fd else says(SET, 0)
    with (
        connected(tmp_path / "s", lie) as frontend,
        pytest.raises(PeerError, match="broke the protocol"),
    ):
        frontend.save_state()


@pytest.mark.parametrize("end", [0, 1], ids=["save", "load"])
async def test_the_channel_stands_still(tmp_path: Path, fd_count: FdCount, end: int) -> None:
    ends = os.pipe()
    with connected(tmp_path / "s", says(SET, 0, ends[end])) as frontend:
        transfer = frontend.save_state if end == 0 else lambda: frontend.load_state(bytes(1 << 20))
        with pytest.raises(TimeoutError, match="not transferred in"):
            transfer()
    os.close(ends[1 - end])


async def test_a_state_without_end(
    tmp_path: Path, fd_count: FdCount, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frontend_module, "_MOST_STATE", 1000)
    reader, writer = os.pipe()
    os.write(writer, bytes(1001))
    with (
        connected(tmp_path / "s", says(SET, 0, reader)) as frontend,
        pytest.raises(PeerError, match="more than 1000 bytes"),
    ):
        frontend.save_state()
    os.close(writer)


async def test_not_offered(tmp_path: Path, fd_count: FdCount) -> None:
    with FakeBackend(tmp_path / "s"), Frontend.connect(tmp_path / "s") as frontend:
        frontend.negotiate_protocol(PROTOCOL | STATE)
        for transfer in (
            frontend.save_state,
            lambda: frontend.load_state(b""),
            lambda: frontend.set_log(4096, 0),
        ):
            with pytest.raises(NotSupported):
                transfer()
