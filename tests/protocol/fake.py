"""A device that remembers what it was told, and a front-end's end of a socket."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

from vdev._native import ffi, lib
from vdev.errors import PeerError
from vdev.iothread import IOThread
from vdev.virtio.device import NativeDevice
from vdev.virtio.spec import RING_FEATURES
from vdev.virtio.vhost_user.codec import HEADER_SIZE, NEED_REPLY, encode
from vdev.virtio.vhost_user.table import TABLE

TIMEOUT = 20  # seconds; only a hang takes as long


class FakeDevice(NativeDevice):
    """Two queues of a null disk; every call is written down in `said`."""

    supports_inflight = True
    supports_mtu = True
    supports_rarp = True

    def __init__(self, iothreads: Sequence[IOThread] = ()) -> None:
        super().__init__(iothreads)
        self.name = "fake"
        self.device_id = lib.VIRTIO_ID_BLOCK
        self.num_queues = 2
        self.features = RING_FEATURES
        self.space = bytearray(range(64))
        self.said: list[tuple[Any, ...]] = []
        config = ffi.new(
            "struct vhost_blk_config *",
            {"fd": -1, "flags": lib.VHOST_BLK_NULL, "capacity": 2048, "num_queues": 2},
        )
        config.seg_max = 8
        out = ffi.new("struct vhost_device **")
        assert lib.vhost_blk_new(config, out) == 0
        self.native = out[0]

    def config(self) -> bytes:
        return bytes(self.space)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset < 32:
            raise PeerError("read-only")
        self.space[offset : offset + len(data)] = data

    def negotiate(self, features: int) -> None:
        super().negotiate(features)
        self.said.append(("negotiate", features))

    def reset(self) -> None:
        self.said.append(("reset",))

    def queue_enabled(self, index: int, enabled: bool) -> None:
        self.said.append(("enabled", index, enabled))

    def set_mtu(self, mtu: int) -> None:
        self.said.append(("mtu", mtu))

    def announce(self, mac: bytes) -> None:
        self.said.append(("announce", mac))


class Peer:
    """The front-end's end: sends messages, reads replies."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    async def send(
        self, name: str, body: Any = None, fds: Sequence[int] = (), need_reply: bool = False
    ) -> None:
        request = getattr(lib, f"VHOST_USER_{name}")
        payload = TABLE[request].payload.encode(body)
        self.send_raw(encode(request, payload, NEED_REPLY if need_reply else 0), fds)

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        assert socket.send_fds(self.sock, [data], fds) == len(data)

    async def read(self, size: int) -> bytes:
        data = b""
        loop = asyncio.get_running_loop()
        while len(data) < size:
            piece = await asyncio.wait_for(loop.sock_recv(self.sock, size - len(data)), TIMEOUT)
            if not piece:
                raise EOFError
            data += piece
        return data

    async def reply(self) -> tuple[int, int, bytes]:
        """Request, flags, payload."""
        request, flags, size = struct.unpack("=III", await self.read(HEADER_SIZE))
        return request, flags, await self.read(size)

    async def ask(self, name: str, body: Any = None, fds: Sequence[int] = ()) -> Any:
        """The value of the message's own reply."""
        await self.send(name, body, fds)
        request, flags, payload = await self.reply()
        assert request == getattr(lib, f"VHOST_USER_{name}")
        assert flags == lib.VHOST_USER_VERSION | lib.VHOST_USER_REPLY
        layout = TABLE[request].reply
        assert layout is not None
        return layout.decode(payload)

    async def ack(self, name: str, body: Any = None, fds: Sequence[int] = ()) -> int:
        """The value of the ack that NEED_REPLY asks for: 0 = done."""
        await self.send(name, body, fds, need_reply=True)
        request, flags, payload = await self.reply()
        assert request == getattr(lib, f"VHOST_USER_{name}")
        assert flags == lib.VHOST_USER_VERSION | lib.VHOST_USER_REPLY
        return int(struct.unpack("=Q", payload)[0])

    async def closed(self) -> None:
        """The other side hangs up, with nothing said before."""
        loop = asyncio.get_running_loop()
        try:
            assert await asyncio.wait_for(loop.sock_recv(self.sock, 1), TIMEOUT) == b""
        except ConnectionResetError:
            return

    def close(self) -> None:
        self.sock.close()


def memory_file(size: int) -> int:
    fd = os.memfd_create("vdev-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


async def until(condition: Any) -> None:
    """Waits for the other tasks to bring this about."""
    async with asyncio.timeout(TIMEOUT):
        while not condition():  # noqa: ASYNC110  (what others do has no event)
            await asyncio.sleep(0.001)
