"""A shared folder: virtiofsd, without a configuration space of its own, answers FUSE requests."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.protocol.fake import TIMEOUT
from tests.protocol.guest import BASE, PAGE, Guest
from vdev._native import lib
from vdev.virtio.queue import QueueConfig
from vdev.virtio.vhost_user.remote import VhostUserDevice

FdCount = Callable[[], Counter[str]]
FS_ID = 26
REQUESTS = 1  # the queue of requests; queue 0 is for forgetting
PROGRAMS = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
CONTENT = b"seen through a ring"

# The FUSE protocol (linux/fuse.h): headers, and the two requests that a test needs.
IN_HEADER = struct.Struct("=IIQQIIII")  # len opcode unique node uid gid pid padding
OUT_HEADER = struct.Struct("=IiQ")  # len error unique
INIT, INIT_BODY, INIT_OUT = 26, struct.pack("=IIII", 7, 31, 0, 0), 64
LOOKUP, LOOKUP_OUT, SIZE_AT = 1, 128, 48
ROOT = 1
BUFFERS = BASE + 16 * PAGE


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """The socket of a virtiofsd, which ends with its only front-end."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(CONTENT)
    path = tmp_path / "s"
    program = next((p for p in PROGRAMS if os.access(p, os.X_OK)), None)
    assert program, "virtiofsd is part of the set-up (qemu-system-common, or virtiofsd)"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path))
        listener.listen(1)
        fd = listener.fileno()
        server = subprocess.Popen(
            [program, f"--fd={fd}", "-o", f"source={folder}", "-o", "sandbox=chroot"],
            pass_fds=[fd],
        )
        pidfd = os.pidfd_open(server.pid)
        yield path
        readable, _, _ = select.select([pidfd], [], [], TIMEOUT)
        os.close(pidfd)
        if not readable:
            server.kill()
        server.wait()
        assert readable, "virtiofsd does not end with its front-end"


async def ask(guest: Guest, ring: QueueConfig, at: int, request: bytes, out_size: int) -> bytes:
    """The answer to the `at`th request of the ring."""
    offset = BUFFERS - BASE
    guest.map[offset : offset + len(request)] = request
    table = struct.pack("<QIHH", BUFFERS, len(request), 1, 1)
    table += struct.pack("<QIHH", BUFFERS + PAGE, out_size, 2, 0)
    guest.map[ring.desc - BASE : ring.desc - BASE + len(table)] = table
    guest.write16(ring.avail + 4 + 2 * at, 0)
    guest.write16(ring.avail + 2, at + 1)
    os.eventfd_write(ring.kick_fd, 1)
    while struct.unpack_from("<H", guest.map, ring.used - BASE + 2) != (at + 1,):
        # It calls once without a reason, when the ring starts.
        await asyncio.to_thread(select.select, [ring.call_fd], [], [], TIMEOUT)
        os.eventfd_read(ring.call_fd)
    return guest.map[offset + PAGE : offset + PAGE + out_size]


def fuse(opcode: int, unique: int, node: int, body: bytes) -> bytes:
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, node, 0, 0, 1, 0) + body


async def test_a_file_is_found(fd_count: FdCount, shared: Path) -> None:
    space = b"share".ljust(36, b"\0") + (1).to_bytes(4, "little")
    device = await VhostUserDevice.connect(shared, device_id=FS_ID, num_queues=2, config=space)
    try:
        assert device.config() == space
        with Guest() as guest:
            features = 1 << lib.VIRTIO_F_VERSION_1
            device.negotiate(features)
            ring = guest.queue(REQUESTS, features)
            queue = await device.start_queue(ring, guest.memory)

            answer = await ask(
                guest, ring, 0, fuse(INIT, 1, 0, INIT_BODY), OUT_HEADER.size + INIT_OUT
            )
            _, error, unique = OUT_HEADER.unpack_from(answer)
            assert (error, unique) == (0, 1)
            assert struct.unpack_from("=I", answer, OUT_HEADER.size) == (7,)

            answer = await ask(
                guest, ring, 1, fuse(LOOKUP, 2, ROOT, b"file\0"), OUT_HEADER.size + LOOKUP_OUT
            )
            _, error, unique = OUT_HEADER.unpack_from(answer)
            assert (error, unique) == (0, 2)
            size_at = OUT_HEADER.size + SIZE_AT
            assert struct.unpack_from("=Q", answer, size_at) == (len(CONTENT),)

            assert await queue.stop() == 2
        assert device.fault is None
    finally:
        device.close()
