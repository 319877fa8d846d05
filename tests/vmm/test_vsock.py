"""The socket device: streams both ways, their ends, their credit."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vmm.served import threads
from tests.vmm.vsock_guest import CID, OP, Guest, recv
from vdev.errors import UserError
from vdev.vmm.devices.vsock import EVENT, TRANSMIT, VsockDevice
from vdev.vmm.devices.vsock_packet import HEADER_SIZE, Header
from vdev.vmm.devices.vsock_stream import BUFFER

RECEIVING, SENDING, BOTH = 1, 2, 3


def test_a_header_is_laid_out_as_the_specification_says() -> None:
    header = Header(7, 2, 1024, 80, 5, 1, 5, 3, 4096, 9)
    data = struct.pack("<QQIIIHHIII", 7, 2, 1024, 80, 5, 1, 5, 3, 4096, 9)
    assert header.pack() == data
    assert len(data) == HEADER_SIZE == 44
    assert Header.unpack(data) == header
    assert header.reset() == Header(2, 7, 80, 1024, 0, 1, OP["RST"])


async def test_a_guest_connects(tmp_path: Path, fd_count: Callable[[], Counter[str]]) -> None:
    async with Guest(tmp_path) as guest:
        assert guest.device.config() == struct.pack("<Q", CID)
        with await guest.connect(1024, 52) as sock:
            await guest.send("RW", 1024, 52, b"from the guest")
            assert await recv(sock) == b"from the guest"
            sock.send(b"from the host")
            assert await guest.read(13) == b"from the host"
            await guest.send("SHUTDOWN", 1024, 52, flags=BOTH)
            await guest.expect("RST", 1024, 52)
            assert await recv(sock) == b""
        assert guest.device.describe()["streams"] == 0
    assert not guest.path.exists()


async def test_the_host_connects(tmp_path: Path, fd_count: Callable[[], Counter[str]]) -> None:
    async with Guest(tmp_path) as guest:
        sock, port = await guest.accept(80)
        with sock:
            sock.send(b"hello")
            assert await guest.read(5) == b"hello"
            await guest.send("RW", 80, port, b"world")
            assert await recv(sock) == b"world"
            await guest.send("RST", 80, port)
            assert await recv(sock) == b""


async def test_data_behind_the_line_is_the_guests(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        with guest.dial(b"CONNECT 80\nearly") as sock:
            header, _ = await guest.receive()
            await guest.send("RESPONSE", 80, header.src_port)
            assert await recv(sock) == b"OK %d\n" % header.src_port
            assert await guest.read(5) == b"early"


async def test_a_line_in_pieces(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        with guest.dial(b"") as sock:
            for at in range(11):
                sock.send(b"connect 80\n"[at : at + 1])
                await asyncio.sleep(0)
            header, _ = await guest.receive()
            assert (header.op, header.dst_port) == (OP["REQUEST"], 80)


@pytest.mark.parametrize(
    "line",
    [
        *(b"\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967296\n", b"CONNECT -1\n"),
        *(b"GET /\n", b"CONNECT 1 \n", b"x" * 32, b"CONNECT " + b"0" * 30 + b"1\n"),
    ],
)
async def test_lines_that_are_none(tmp_path: Path, line: bytes) -> None:
    async with Guest(tmp_path) as guest:
        # A reset where a part of the line was not read.
        with guest.dial(line) as sock, contextlib.suppress(ConnectionResetError):
            assert await recv(sock) == b""
        assert guest.device.describe()["streams"] == 0


async def test_nobody_listens(tmp_path: Path) -> None:
    (tmp_path / "vsock_53").write_text("not a socket")
    async with Guest(tmp_path) as guest:
        for port in (52, 53):
            await guest.send("REQUEST", 1024, port)
            await guest.expect("RST", 1024, port)


async def test_a_guest_that_refuses(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        with guest.dial(b"CONNECT 80\n") as sock:
            header, _ = await guest.receive()
            await guest.send("RST", 80, header.src_port)
            assert await recv(sock) == b""


async def test_a_guest_that_does_not_answer(tmp_path: Path) -> None:
    async with Guest(tmp_path, timeout=0.01) as guest:
        with guest.dial(b"CONNECT 80\n") as sock:
            header, _ = await guest.receive()
            assert await recv(sock) == b""
            await guest.expect("RST", 80, header.src_port)


async def test_a_program_that_leaves_before_the_answer(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        sock = guest.dial(b"CONNECT 80\n")
        header, _ = await guest.receive()
        sock.close()
        await guest.send("RESPONSE", 80, header.src_port)
        await guest.expect("RST", 80, header.src_port)


# ---- ends ----


async def test_the_guest_stops_sending(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        with await guest.connect(1024, 52) as sock:
            await guest.send("RW", 1024, 52, b"last words")
            await guest.send("SHUTDOWN", 1024, 52, flags=SENDING)
            assert await recv(sock) == b"last words"
            assert await recv(sock) == b""
            sock.send(b"still heard")
            assert await guest.read(11) == b"still heard"
            await guest.send("SHUTDOWN", 1024, 52, flags=RECEIVING)
            await guest.expect("RST", 1024, 52)


async def test_the_host_stops_sending(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        with await guest.connect(1024, 52) as sock:
            sock.send(b"last words")
            sock.shutdown(socket.SHUT_WR)
            assert await guest.read(10) == b"last words"
            assert (await guest.expect("SHUTDOWN", 1024, 52)).flags == SENDING
            await guest.send("RW", 1024, 52, b"still heard")
            assert await recv(sock) == b"still heard"


async def test_the_host_closes(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        sock = await guest.connect(1024, 52)
        sock.send(b"bye")
        sock.close()
        assert await guest.read(3) == b"bye"
        assert (await guest.expect("SHUTDOWN", 1024, 52)).flags == BOTH
        await guest.send("RW", 1024, 52, b"nobody reads this")
        await guest.expect("RST", 1024, 52)


async def test_what_was_sent_arrives_before_the_end(tmp_path: Path) -> None:
    """The program reads late: more than its socket holds waits with us, then comes the end."""
    async with Guest(tmp_path) as guest:
        with await guest.connect(1024, 52) as sock:
            sent = await fill(guest)
            await guest.send("SHUTDOWN", 1024, 52, flags=BOTH)
            assert await recv(sock, len(sent)) == sent
            assert await recv(sock) == b""
            await guest.expect("RST", 1024, 52)


# ---- credit ----


async def fill(guest: Guest) -> bytes:
    """Sends while there is credit and nobody reads; returns what was sent."""
    sent, forwarded = b"", 0
    while True:
        if free := BUFFER - (len(sent) - forwarded):
            part = bytes([len(sent) >> 12 & 0xFF]) * min(32 << 10, free)
            await guest.send("RW", 1024, 52, part)
            sent += part
            continue
        await guest.send("CREDIT_REQUEST", 1024, 52)
        now = (await guest.expect("CREDIT_UPDATE", 1024, 52)).fwd_cnt
        if now == forwarded:
            return sent
        forwarded = now


async def test_more_than_the_credit_resets(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        with await guest.connect(1024, 52) as sock:
            sent = await fill(guest)
            assert len(sent) > BUFFER  # the socket took some
            for _ in range(4):
                await guest.send("RW", 1024, 52, bytes(BUFFER // 2))
            await guest.expect("RST", 1024, 52)
            assert len(await recv(sock)) > 0


async def test_the_guests_credit_is_kept(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        with await guest.connect(1024, 52) as sock:
            await guest.send("CREDIT_UPDATE", 1024, 52, buf_alloc=10)
            sock.send(b"0123456789abcdefghijk")
            assert (await guest.receive())[1] == b"0123456789"
            assert (await guest.expect("CREDIT_REQUEST", 1024, 52)).fwd_cnt == 0
            await guest.send("CREDIT_UPDATE", 1024, 52, buf_alloc=10, fwd_cnt=4)
            header, data = await guest.receive()
            assert (header.op, data) == (OP["RW"], b"abcd")
            await guest.expect("CREDIT_REQUEST", 1024, 52)
            await guest.send("CREDIT_UPDATE", 1024, 52, buf_alloc=5, fwd_cnt=4)  # shrinks
            await guest.send("CREDIT_UPDATE", 1024, 52, buf_alloc=10, fwd_cnt=14)
            assert (await guest.receive())[1] == b"efghijk"


async def test_the_guest_learns_what_was_forwarded(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        with await guest.connect(1024, 52) as sock:
            got = 0
            for _ in range(5):
                await guest.send("RW", 1024, 52, bytes(BUFFER // 4))
                got += len(await recv(sock, BUFFER // 4))
            header = await guest.expect("CREDIT_UPDATE", 1024, 52)
            assert BUFFER // 2 < header.fwd_cnt <= got
            await guest.send("CREDIT_REQUEST", 1024, 52)
            header = await guest.expect("CREDIT_UPDATE", 1024, 52)
            assert (header.fwd_cnt, header.buf_alloc) == (got, BUFFER)


# ---- the device's life ----


async def test_many_streams_take_turns(tmp_path: Path) -> None:
    async with Guest(tmp_path, buffers=4) as guest:
        streams = {port: await guest.connect(port, 52) for port in range(1000, 1020)}
        for sock in streams.values():
            sock.send(bytes(8192))
        first = [(await guest.receive())[0].dst_port for _ in range(20)]
        assert sorted(first) == sorted(streams)
        second = [(await guest.receive())[0].dst_port for _ in range(20)]
        assert sorted(second) == sorted(streams)
        for port, sock in streams.items():
            await guest.send("RW", port, 52, b"%d" % port)
            assert await recv(sock) == b"%d" % port
            sock.close()


async def test_a_stop_loses_no_byte(tmp_path: Path) -> None:
    async with Guest(tmp_path, buffers=0) as guest:
        guest.post(1)
        with await guest.connect(1024, 52) as sock:
            sock.send(b"waits")
            await guest.served.stop()
            guest.post(2)
            await guest.served.start()
            assert await guest.read(5) == b"waits"


async def test_a_reset_ends_all_streams(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        with await guest.connect(1024, 52) as sock, guest.dial(b"CONNECT 80\n") as other:
            await guest.receive()
            await guest.served.stop()
            guest.device.reset()
            assert await recv(sock) == b""
            assert await recv(other) == b""
            await guest.served.start()
            await guest.send("RW", 1024, 52, b"x")
            await guest.expect("RST", 1024, 52)


@pytest.mark.parametrize("early", [False, True])
async def test_a_restored_guest_is_told(tmp_path: Path, early: bool) -> None:
    async with Guest(tmp_path) as guest:
        room = guest.served.room(4)
        if early:
            guest.device.transport_reset()
            await asyncio.sleep(0)
        head = guest.served.submit(EVENT, room)
        with await guest.connect(1024, 52) as sock:
            if not early:
                guest.device.transport_reset()
                assert await recv(sock) == b""
        element = await guest.served.used(EVENT)
        assert (element.id, element.len) == (head, 4)


async def test_paths_and_cids(tmp_path: Path, fd_count: Callable[[], Counter[str]]) -> None:
    path = tmp_path / "vsock"
    for cid in (-1, 0, 1, 2, 0xFFFFFFFF, 1 << 32):
        with pytest.raises(UserError, match="CID"):
            VsockDevice(cid, path, iothreads=threads())
    device = VsockDevice(3, path, iothreads=threads())
    with pytest.raises(UserError, match="in use"):
        VsockDevice(4, path, iothreads=threads())
    device.close()
    device.close()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    VsockDevice(3, path, iothreads=threads()).close()
    path.write_text("precious")
    with pytest.raises(UserError, match="in use"):
        VsockDevice(3, path, iothreads=threads())
    assert path.read_text() == "precious"
    for wrong in (tmp_path / "no" / "where", tmp_path / ("x" * 120)):
        with pytest.raises(UserError, match="vsock socket"):
            VsockDevice(3, wrong, iothreads=threads())


async def test_transmit_chains_in_pieces(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        with await guest.connect(1024, 52) as sock:
            packet = guest.header("RW", 1024, 52, len=6).pack() + b"pieces" + b"beyond"
            parts = [packet[at : at + 7] for at in range(0, len(packet), 7)]
            await guest.served.request(TRANSMIT, *map(guest.served.data, parts))
            assert await recv(sock) == b"pieces"


async def test_megabytes_both_ways(tmp_path: Path) -> None:
    """Each side sends as its credit allows, and both read."""
    size = 2 << 20
    up, down = random.Random(1).randbytes(size), random.Random(2).randbytes(size)
    got = bytearray()
    forwarded = 0
    moved = asyncio.Condition()
    transmit = asyncio.Lock()

    async with Guest(tmp_path) as guest:
        with await guest.connect(1024, 52) as sock:
            reader, writer = await asyncio.open_unix_connection(sock=sock.dup())

            async def receive() -> None:
                nonlocal forwarded
                while True:
                    header, data = await guest.receive()
                    got.extend(data)
                    guest.forwarded = len(got)
                    async with moved:
                        forwarded = header.fwd_cnt
                        moved.notify_all()
                    if header.op == OP["CREDIT_REQUEST"]:
                        async with transmit:
                            await guest.send("CREDIT_UPDATE", 1024, 52)

            async def send() -> None:
                sent = 0
                while sent < size:
                    async with moved:
                        while sent - forwarded == BUFFER:
                            await moved.wait()
                    part = up[sent : sent + min(BUFFER - (sent - forwarded), 16 << 10)]
                    async with transmit:
                        await guest.send("RW", 1024, 52, part)
                    sent += len(part)

            receiving = asyncio.ensure_future(receive())
            sending = asyncio.ensure_future(send())
            writer.write(down)
            assert await reader.readexactly(size) == up
            async with moved:
                await moved.wait_for(lambda: len(got) == size)
            assert got == down
            await sending
            receiving.cancel()
            await asyncio.wait([receiving])
            writer.close()
            await writer.wait_closed()
