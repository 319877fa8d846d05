"""Transfers of the device's state on the loop: nothing blocks it, nothing is left behind."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections import Counter
from collections.abc import Callable

import pytest

from vdev.errors import PeerError
from vdev.virtio.vhost_user import transfer as module
from vdev.virtio.vhost_user.state import MAX_STATE
from vdev.virtio.vhost_user.transfer import Transfer, receive, send

FdCount = Callable[[], Counter[str]]


async def test_whole_through_a_pipe_of_one_page(fd_count: FdCount) -> None:
    """Both ends block, as their owner wants them, and yet both run on one loop."""
    data = os.urandom(MAX_STATE)
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    got: list[bytes] = []

    async def take(fd: int) -> None:
        got.append(await receive(fd))

    sending = Transfer.start(writer, lambda fd: send(fd, data))
    receiving = Transfer.start(reader, take)
    await sending.outcome()
    await receiving.outcome()
    assert got == [data]


@pytest.mark.parametrize("writes", [False, True], ids=["receive", "send"])
async def test_a_peer_that_stands_still(
    fd_count: FdCount, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    monkeypatch.setattr(module, "STALL", 0.05)
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with pytest.raises(PeerError, match="no byte of the device's state for"):
        await (send(writer, bytes(8192)) if writes else receive(reader))
    os.close(reader)
    os.close(writer)


async def test_more_than_any_state(fd_count: FdCount) -> None:
    reader, writer = os.pipe()
    sending = asyncio.ensure_future(send(writer, bytes(MAX_STATE + 1)))
    with pytest.raises(PeerError, match="device state of more than"):
        await receive(reader)
    await sending
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("turns", [0, 1, 3])
async def test_cancelled(fd_count: FdCount, turns: int) -> None:
    """Before its first step as well: the pipe is closed."""
    reader, writer = os.pipe()

    async def take(fd: int) -> None:
        await receive(fd)

    transfer = Transfer.start(reader, take)
    for _ in range(turns):
        await asyncio.sleep(0)
    await transfer.cancel()
    with pytest.raises(BrokenPipeError):
        os.write(writer, b"x")
    os.close(writer)


async def test_an_outcome_that_nobody_asks_for(fd_count: FdCount) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    transfer = Transfer.start(writer, lambda fd: send(fd, b"state"))
    del transfer
    while True:
        try:
            os.fstat(writer)
        except OSError:
            break
        await asyncio.sleep(0)
