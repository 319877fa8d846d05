"""The guest's side of a vsock device: packets in its rings, sockets on the host."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Self

from tests.frontend.ring import Desc
from tests.vmm.served import Served, readable, threads
from vdev._native import lib
from vdev.vmm.devices.vsock import RECEIVE, TRANSMIT, VsockDevice
from vdev.vmm.devices.vsock_packet import HEADER_SIZE, Header

CID = 7
HOST = 2
ROOM = HEADER_SIZE + 4096
BUFFER = 64 << 10
OP = {
    name: getattr(lib, f"VIRTIO_VSOCK_OP_{name}")
    for name in (
        *("INVALID", "REQUEST", "RESPONSE", "RST", "SHUTDOWN"),
        *("RW", "CREDIT_UPDATE", "CREDIT_REQUEST"),
    )
}
NAMES = {value: name for name, value in OP.items()}


class Guest:
    """A served vsock device at `directory`/vsock, and packets to and from it.

    buffers: receive buffers that are kept in the ring.
    """

    def __init__(self, directory: Path, *, buffers: int = 8, timeout: float = 60.0) -> None:
        self.path = directory / "vsock"
        self.device = VsockDevice(CID, self.path, iothreads=threads(), connect_timeout=timeout)
        self.served = Served(self.device)
        self.forwarded = 0
        self._want = buffers
        self._posted: dict[int, Desc] = {}

    async def __aenter__(self) -> Self:
        await self.served.__aenter__()
        self.post(self._want)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.served.__aexit__(*exc)

    def post(self, count: int, size: int = ROOM) -> None:
        """Gives the device more receive buffers."""
        for _ in range(count):
            room = self.served.room(size)
            self._posted[self.served.submit(RECEIVE, room)] = room

    def header(self, op: str, port: int, host_port: int, **fields: int) -> Header:
        """With these fields; `code` in place of an operation that has a name."""
        values = {"len": 0, "type": 1, "buf_alloc": BUFFER, "fwd_cnt": self.forwarded, **fields}
        return Header(
            values.pop("src_cid", CID),
            values.pop("dst_cid", HOST),
            port,
            host_port,
            op=values.pop("code", OP.get(op, 0)),
            **values,
        )

    async def send(
        self, op: str, port: int, host_port: int, data: bytes = b"", **fields: int
    ) -> None:
        """Sends a packet and waits until the device has it."""
        header = self.header(op, port, host_port, **{"len": len(data), **fields})
        await self.send_raw(header.pack() + data)

    async def send_raw(self, packet: bytes) -> None:
        buffer = self.served.data(packet)
        await self.served.request(TRANSMIT, buffer)
        self.served.release([buffer])

    async def receive(self) -> tuple[Header, bytes]:
        """The next packet from the device; its buffer is replaced."""
        element = await self.served.used(RECEIVE)
        room = self._posted.pop(element.id)
        packet = self.served.content(room, size=element.len)
        self.served.release([room])
        header = Header.unpack(packet[:HEADER_SIZE])
        assert header.len == len(packet) - HEADER_SIZE
        assert (header.src_cid, header.dst_cid) == (HOST, CID)
        if self._want:
            self.post(1)
        return header, packet[HEADER_SIZE:]

    async def expect(self, op: str, port: int, host_port: int) -> Header:
        """A packet of this kind is the next, but for news of credit."""
        header, _ = await self.receive()
        while op != "CREDIT_UPDATE" and header.op == OP["CREDIT_UPDATE"]:
            header, _ = await self.receive()
        found = (NAMES[header.op], header.dst_port, header.src_port)
        assert found == (op, port, host_port)
        return header

    async def read(self, size: int) -> bytes:
        """So many bytes of the one stream there is."""
        data = b""
        while len(data) < size:
            header, part = await self.receive()
            assert NAMES[header.op] in ("RW", "CREDIT_UPDATE")
            data += part
        assert len(data) == size
        self.forwarded += size
        return data

    async def connect(self, port: int, host_port: int) -> socket.socket:
        """A stream that the guest opened; returns the host's end of it."""
        with Listener(Path(f"{self.path}_{host_port}")) as listener:
            await self.send("REQUEST", port, host_port)
            await self.expect("RESPONSE", port, host_port)
            return await listener.accept()

    async def accept(self, port: int) -> tuple[socket.socket, int]:
        """A stream that the host opened; returns the host's end and the host's port."""
        sock = self.dial(b"CONNECT %d\n" % port)
        header, _ = await self.receive()
        assert (NAMES[header.op], header.dst_port) == ("REQUEST", port)
        await self.send("RESPONSE", port, header.src_port)
        assert await recv(sock) == b"OK %d\n" % header.src_port
        return sock, header.src_port

    def dial(self, data: bytes) -> socket.socket:
        """A program of the host that connects and says `data`."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.path))
        sock.setblocking(False)
        if data:
            sock.send(data)
        return sock


class Listener:
    """A program of the host that waits for guests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(str(path))
        self._sock.listen()
        self._sock.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()
        self.path.unlink()

    async def accept(self) -> socket.socket:
        sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
        return sock


async def recv(sock: socket.socket, size: int | None = None) -> bytes:
    """What there is next; or exactly `size` bytes."""
    if size is None:
        await readable(sock.fileno())
        return sock.recv(1 << 20)
    data = b""
    while len(data) < size:
        await readable(sock.fileno())
        part = sock.recv(size - len(data))
        assert part, f"the end after {len(data)} bytes"
        data += part
    return data
