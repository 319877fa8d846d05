"""Texts with descriptors between two processes of ours, of which one may be gone or another's."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from vdev.descriptors import Descriptors
from vdev.server.passage import Passage, PassageFailed

FdCount = Callable[[], Counter[str]]
Ends = tuple[Passage, Passage]


@pytest_asyncio.fixture
async def ends(fd_count: FdCount) -> AsyncIterator[Ends]:
    """Both, and no descriptor more when they are closed."""
    left, right = (Passage(sock) for sock in Passage.pair())
    yield left, right
    left.close()
    right.close()


@pytest.mark.parametrize("count", [0, 1, 252, 253, 254, 600])
async def test_any_number_of_descriptors(ends: Ends, count: int) -> None:
    left, right = ends
    fds = Descriptors()
    files = [os.memfd_create(str(number)) for number in range(count)]
    places = [fds.put(fd) for fd in files]
    value = {"places": places, "text": "x" * 300_000}
    sending = asyncio.ensure_future(left.send("all", value, fds))
    got, came = await right.receive("all")
    await sending
    assert got == value
    for number, (ours, place) in enumerate(zip(files, got["places"], strict=True)):
        theirs = came.take(place)
        assert os.path.samestat(os.fstat(ours), os.fstat(theirs)), number
        os.close(ours)
        os.close(theirs)
    with pytest.raises(ValueError, match="no descriptor"):
        came.take(0)
    assert came.take(None) == -1


async def test_what_nobody_takes_is_closed(ends: Ends, fd_count: FdCount) -> None:
    left, right = ends
    before = fd_count()
    fds = Descriptors()
    fds.put(1)
    fds.put(2)
    assert fds.put(-1) is None
    await left.send("two", None, fds)
    _, came = await right.receive("two")
    came.close()
    await left.send("two", None, fds)
    with pytest.raises(PassageFailed, match="'two' came where three was due"):
        await right.receive("three")
    assert fd_count() == before


async def test_why_it_failed_there(ends: Ends) -> None:
    left, right = ends
    await left.send("failed", "no more paper")
    with pytest.raises(PassageFailed, match="no more paper"):
        await right.receive("anything")


async def test_the_other_end_goes_away(ends: Ends) -> None:
    left, right = ends
    receiving = asyncio.ensure_future(right.receive("word"))
    await asyncio.sleep(0)
    left.close()
    with pytest.raises(PassageFailed, match="'word' did not come: the other end has gone"):
        await receiving
    with pytest.raises(PassageFailed, match="'word' cannot be sent"):
        await right.send("word")


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b'{"what": "word"}', b"\xff"])
async def test_a_text_that_is_damaged(text: bytes, fd_count: FdCount) -> None:
    ours, theirs = Passage.pair()
    fd = os.memfd_create("text")
    os.write(fd, text)
    socket.send_fds(theirs, [b"\1\0\0\0"], [fd])
    os.close(fd)
    passage = Passage(ours)
    with pytest.raises(PassageFailed, match="damaged"):
        await passage.receive("word")
    passage.close()
    theirs.close()


@pytest.mark.parametrize("packet", [b"\1", b"\1\0\0\0"])
async def test_a_packet_of_anothers(packet: bytes, fd_count: FdCount) -> None:
    ours, theirs = Passage.pair()
    theirs.send(packet)
    passage = Passage(ours)
    with pytest.raises(PassageFailed, match=r"no packet of vdev's"):
        await passage.receive("word")
    passage.close()
    theirs.close()


async def test_a_word_that_came_before_the_withdrawal(ends: Ends) -> None:
    left, right = ends
    await left.send("serving")
    assert await right.withdraw("serving")


@pytest.mark.parametrize("said", [None, "failed", "prepared"])
async def test_none_can_be_sent_after_the_withdrawal(ends: Ends, said: str | None) -> None:
    left, right = ends
    if said is not None:
        await left.send(said)
    assert not await right.withdraw("serving")
    with pytest.raises(PassageFailed, match="cannot be sent"):
        await left.send("serving")
