"""A hostile guest and hostile programs of the host: nothing dies, grows, or stops the others."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.frontend.ring import Desc, split
from tests.vmm.served import SIZE
from tests.vmm.vsock_guest import CID, HOST, OP, ROOM, Guest, recv
from vdev.vmm.devices import vsock
from vdev.vmm.devices.vsock import ANSWERS_MOST, RECEIVE, TRANSMIT
from vdev.vmm.devices.vsock_packet import HEADER_SIZE, Header
from vdev.vmm.devices.vsock_stream import BUFFER

STREAM = (1024, 52)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> object:
    """No guest has anything to say in our log."""
    yield
    assert caplog.records == []


async def serves(guest: Guest, port: int = 5000) -> None:
    """A well-behaved stream still works."""
    with await guest.connect(port, 99) as sock:
        await guest.send("RW", port, 99, b"well")
        assert await recv(sock) == b"well"
        await guest.send("RST", port, 99)


@pytest.mark.parametrize("size", [1, 8, HEADER_SIZE - 1])
async def test_packets_without_a_header(tmp_path: Path, size: int) -> None:
    async with Guest(tmp_path) as guest:
        await guest.send_raw(bytes(size))
        assert await guest.served.request(TRANSMIT, guest.served.room(HEADER_SIZE)) == 0
        assert guest.device.dropped == {"no header": 2}
        await serves(guest)


async def test_packets_of_another_source_are_dropped(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        with await guest.connect(*STREAM) as sock:
            for cid in (0, 1, HOST, CID + 1, CID | 1 << 32):
                for op in OP:
                    await guest.send(op, *STREAM, b"spoofed", src_cid=cid)
            await guest.send("RW", *STREAM, b"mine")
            assert await recv(sock) == b"mine"
        assert guest.device.dropped == {"source is not the guest": 5 * len(OP)}


@pytest.mark.parametrize("fields", [{"dst_cid": 0}, {"dst_cid": CID}, {"type": 2}, {"type": 0}])
async def test_where_nobody_is_the_answer_is_a_reset(
    tmp_path: Path, fields: dict[str, int]
) -> None:
    async with Guest(tmp_path) as guest:
        await guest.send("RST", *STREAM, b"", **fields)
        await guest.send("REQUEST", *STREAM, b"", **fields)
        room = guest.served.memory.read  # the answer comes from where the packet went
        element = await guest.served.used(RECEIVE)
        assert element.len == HEADER_SIZE
        posted = guest._posted[element.id]
        header = Header.unpack(room(posted.addr, HEADER_SIZE))
        asked = guest.header("REQUEST", *STREAM, **fields)
        assert header == asked.reset()
        await serves(guest)


@pytest.mark.parametrize("op", [*OP, "unknown"])
async def test_operations_on_no_stream(tmp_path: Path, op: str) -> None:
    async with Guest(tmp_path) as guest:
        await guest.send(op, *STREAM, b"", **({"code": 200} if op == "unknown" else {}))
        if op != "RST":
            await guest.expect("RST", *STREAM)
        await serves(guest)


@pytest.mark.parametrize(
    ("op", "fields"),
    [
        ("REQUEST", {}),
        ("RESPONSE", {}),
        ("INVALID", {}),
        ("unknown", {"code": 0xFFFF}),
        ("RW", {"len": 5}),
        ("RW", {"len": BUFFER + 1}),
        ("RW", {"len": 0xFFFFFFFF}),
        ("RW", {"fwd_cnt": 1}),
        ("CREDIT_UPDATE", {"fwd_cnt": 0x7FFFFFFF}),
    ],
)
async def test_violations_end_their_stream_alone(
    tmp_path: Path, op: str, fields: dict[str, int]
) -> None:
    async with Guest(tmp_path) as guest:
        with await guest.connect(*STREAM) as sock, await guest.connect(2048, 53) as other:
            await guest.send(op, *STREAM, b"four", **fields)
            await guest.expect("RST", *STREAM)
            assert await recv(sock) == b""
            await guest.send("RW", 2048, 53, b"on it goes")
            assert await recv(other) == b"on it goes"
            await serves(guest)


async def test_data_before_the_answer_and_after_the_end(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        with guest.dial(b"CONNECT 80\n") as sock:
            header, _ = await guest.receive()
            await guest.send("RW", 80, header.src_port, b"early")
            await guest.expect("RST", 80, header.src_port)
            assert await recv(sock) == b""
        with await guest.connect(*STREAM) as sock:
            await guest.send("SHUTDOWN", *STREAM, flags=2)
            await guest.send("RW", *STREAM, b"late")
            await guest.expect("RST", *STREAM)
            assert await recv(sock) == b""


async def test_a_flood_without_buffers_for_the_answers(tmp_path: Path) -> None:
    async with Guest(tmp_path, buffers=0) as guest:
        ring = guest.served.rings[TRANSMIT]
        packet = guest.served.data(guest.header("RW", *STREAM).pack())
        for _ in range(ANSWERS_MOST):
            await guest.served.request(TRANSMIT, packet)
        for _ in range(SIZE):
            ring.submit([packet])
        # No more is taken now, and the queue stops at once although the guest never lets it go on.
        taken, answered, _ = await guest.served.stop()
        assert (taken, answered) == (0, ANSWERS_MOST)
        await guest.served.start()
        for at in range(ANSWERS_MOST + SIZE):
            guest.post(1)
            await guest.expect("RST", *STREAM)
            if at < SIZE:
                await guest.served.used(TRANSMIT)


@pytest.mark.parametrize("size", [1, HEADER_SIZE - 1])
async def test_receive_buffers_that_hold_no_header(tmp_path: Path, size: int) -> None:
    async with Guest(tmp_path, buffers=0) as guest:
        for _ in range(8):
            guest.served.submit(RECEIVE, guest.served.room(size))
        await guest.send("RW", *STREAM)
        for _ in range(8):
            assert (await guest.served.used(RECEIVE)).len == 0
        guest.post(1)
        await guest.expect("RST", *STREAM)
        assert guest.device.dropped == {"receive buffer too small": 8}


async def test_receive_buffers_for_headers_only(tmp_path: Path) -> None:
    async with Guest(tmp_path, buffers=0) as guest:
        guest.post(1)
        with await guest.connect(*STREAM) as sock:
            sock.send(b"x")
            guest.post(8, size=HEADER_SIZE)
            for _ in range(8):
                await guest.expect("CREDIT_UPDATE", *STREAM)
            guest.post(1, size=HEADER_SIZE + 1)
            assert await guest.read(1) == b"x"


async def test_streams_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock, "STREAMS_MOST", 8)
    async with Guest(tmp_path) as guest:
        with contextlib.ExitStack() as stack:
            for port in range(6):
                stack.enter_context(await guest.connect(port, 52))
            for _ in range(2):
                stack.enter_context(guest.dial(b""))
            beyond = stack.enter_context(guest.dial(b"CONNECT 80\n"))
            with contextlib.suppress(ConnectionResetError):
                assert await recv(beyond) == b""
            await guest.send("REQUEST", 6, 52)
            await guest.expect("RST", 6, 52)
            for port in range(6):
                await guest.send("RST", port, 52)
            await serves(guest)
        assert guest.device.describe()["streams"] == 0


async def test_a_guest_that_reopens_for_ever(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        for port in range(300):
            with await guest.connect(port, 52):
                await guest.send("RST", port, 52)
        assert guest.device.describe()["streams"] == 0


async def test_programs_that_come_and_go(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        for _ in range(100):
            guest.dial(b"CONN").close()
            guest.dial(b"").close()
            await asyncio.sleep(0)
        await serves(guest)
        assert guest.device.describe()["streams"] == 0


async def test_a_chain_of_gigabytes(tmp_path: Path) -> None:
    async with Guest(tmp_path) as guest:
        with await guest.connect(*STREAM) as sock:
            high = guest.served.memory.regions[1]
            header = guest.header("RW", *STREAM, len=0x7FFFFFFF)
            big = [Desc(high.guest_addr, high.size)] * (SIZE - 1)
            await guest.served.request(TRANSMIT, guest.served.data(header.pack()), *big)
            await guest.expect("RST", *STREAM)
            assert await recv(sock) == b""


small = st.integers(0, 3)
headers = st.builds(
    Header,
    src_cid=st.sampled_from([CID] * 9 + [0]),
    dst_cid=st.sampled_from([HOST] * 9 + [CID]),
    src_port=small,
    dst_port=st.sampled_from([52, 52, 52, 53, vsock.FIRST_PORT]),
    len=st.sampled_from([0, 1, 16, 17, BUFFER, 0xFFFFFFFF]),
    type=st.sampled_from([1] * 9 + [2]),
    op=st.sampled_from([1, 1, 2, 3, 4, 5, 5, 5, 6, 7, 0, 8]),
    flags=st.integers(0, 7),
    buf_alloc=st.sampled_from([0, 1, 100, 0xFFFFFFFF]),
    fwd_cnt=st.sampled_from([0, 0, 0, 1, 16, 0xFFFFFFFF]),
)
packets = st.one_of(
    st.tuples(headers, st.binary(max_size=16)).map(lambda pair: pair[0].pack() + pair[1]),
    st.binary(min_size=1, max_size=60),
)


@settings(max_examples=60)
@given(st.lists(packets, max_size=30))
async def test_whatever_the_guest_sends(sent: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with Guest(Path(directory), buffers=0) as guest:
            taken: list[bytes] = []

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                with contextlib.suppress(OSError):
                    writer.write(b"hello")
                    taken.append(await reader.read(1 << 16))
                writer.close()

            server = await asyncio.start_unix_server(serve, f"{guest.path}_52")
            with guest.dial(b"CONNECT 1\n"):
                for at, packet in enumerate(sent):
                    await guest.send_raw(packet)
                    if at % 3 == 0 and split(guest.served.rings[RECEIVE])._free:
                        guest.served.submit(RECEIVE, guest.served.room(ROOM))
                    while (element := guest.served.rings[RECEIVE].pop()) is not None:
                        assert element.len == 0 or element.len >= HEADER_SIZE
                    assert guest.device.describe()["streams"] <= len(sent) + 1
            await guest.served.stop()
            guest.device.reset()
            guest.served.reset_rings()
            guest._posted.clear()
            guest._want = 8
            await guest.served.start()
            guest.post(8)
            await serves(guest)
            server.close()
            await server.wait_closed()
