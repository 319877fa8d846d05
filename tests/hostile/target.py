"""The server under attack, and the policy letters by which its conduct is judged.

E: a nonzero acknowledgement where NEED_REPLY was asked, else a closed connection; state unchanged.
Q: that ring breaks and signals its err fd; it takes no more requests, the other rings go on.
I: the request gets its status.   D: the head comes back with length 0.
Always: the process lives, a healthy client is served, fds and mappings are back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.frontend import wire
from tests.frontend.blk import (
    SECTOR,
    T_FLUSH,
    T_IN,
    T_OUT,
    BlkClient,
    Pending,
    check_healthy,
    header,
)
from tests.frontend.ring import Ring, SplitRing, is_signalled, split
from tests.frontend.server import Server
from tests.frontend.wire import NEED_REPLY, VERSION, Closed, Request

QUEUES = 2
IMAGE_SIZE = 16 << 20
CAPACITY = IMAGE_SIZE // SECTOR
SPARE = QUEUES - 1
"""The ring that a default client leaves unconfigured, for a test to misconfigure."""

OWN_REPLY = {
    Request.GET_FEATURES,
    Request.GET_PROTOCOL_FEATURES,
    Request.GET_QUEUE_NUM,
    Request.GET_VRING_BASE,
    Request.GET_CONFIG,
    Request.GET_INFLIGHT_FD,
    Request.SET_LOG_BASE,
    Request.GET_MAX_MEM_SLOTS,
    Request.GET_STATUS,
}
"""Requests whose reply is not an acknowledgement, and cannot say no: NEED_REPLY changes nothing, so
their refusal is a closed connection."""


@dataclass(frozen=True)
class Bad:
    """A message to be refused."""

    request: int
    payload: bytes = b""
    fds: Sequence[int] = ()


Build = Callable[[BlkClient, ExitStack], Bad]


def case(name: str, build: Build) -> object:
    return pytest.param(build, id=name)


def expect_close(disk: BlkClient, bad: Bad, *, flags: int = VERSION) -> None:
    """Letter E where no acknowledgement was asked or none can be given."""
    try:
        disk.wire.send(bad.request, bad.payload, bad.fds, flags=flags)
    except Closed:
        return
    disk.wire.wait_closed()


def expect_error_ack(disk: BlkClient, bad: Bad) -> None:
    """Letter E with NEED_REPLY: a nonzero acknowledgement on a connection that goes on."""
    if bad.request in OWN_REPLY:
        expect_close(disk, bad, flags=VERSION | NEED_REPLY)
        return
    assert disk.wire.ack_of(bad.request, bad.payload, bad.fds) != 0
    check_unchanged(disk)


def expect_refusal(disk: BlkClient, bad: Bad, letter: str) -> None:
    if letter == "ack":
        expect_error_ack(disk, bad)
    else:
        expect_close(disk, bad)


def check_serves(disk: BlkClient, queue: int = 0, sector: int = 64) -> None:
    """This ring still carries requests of this very connection."""
    data = random.randbytes(SECTOR)
    disk.write(sector + queue, data, queue=queue)
    assert disk.read(sector + queue, SECTOR, queue=queue) == data


def check_unchanged(disk: BlkClient) -> None:
    """After an error acknowledgement the rings run on, and the spare ring can still be set up."""
    for queue in range(len(disk.rings)):
        check_serves(disk, queue)
    if len(disk.rings) == SPARE:
        start_spare(disk)
        check_serves(disk, SPARE)


def spare_ring(disk: BlkClient, stack: ExitStack, size: int = 64) -> SplitRing:
    """A ring in `disk`'s memory that is not known to the server yet."""
    ring = split(disk.new_ring(size))
    stack.callback(ring.close)
    return ring


def start_spare(disk: BlkClient, ring: Ring | None = None) -> SplitRing:
    """Set up and start the spare ring properly; from now on `disk` owns it."""
    if ring is None:
        ring = disk.new_ring()
    disk.rings.append(ring)
    disk.start_ring(SPARE, ring)
    return split(ring)


def submit_slow(disk: BlkClient, count: int = 12, queue: int = 0) -> list[Pending]:
    """Writes, each with a flush behind it, all made available at once.  Flushes wait for the disk,
    so they are in flight when the next message comes."""
    pending = []
    for n in range(count):
        data = random.randbytes(65536)
        request = header(T_OUT, 4096 + 128 * n) + data
        pending.append(disk.submit(request, 1, queue=queue, kick=False))
        pending.append(disk.submit(header(T_FLUSH), 1, queue=queue, kick=False))
    disk.rings[queue].kick()
    return pending


def expect_broken(disk: BlkClient, queue: int = 0) -> None:
    """Letter Q: the ring has broken, alone, and takes nothing more."""
    ring = split(disk.rings[queue])
    ring.wait_broken()
    used = ring.used_idx
    # A proper request, after the break: it must stay where it is.
    ring.set_desc(0, *_read_header(disk), 1, 1)
    ring.set_desc(1, disk.memory.alloc(SECTOR + 1), SECTOR + 1, 2)
    ring.offer(0)
    ring.kick()
    others = [other for other in range(len(disk.rings)) if other != queue]
    for other in others:
        check_serves(disk, other)
        assert not is_signalled(disk.rings[other].err_fd), f"ring {other} broke too"
    disk.barrier()
    assert ring.used_idx == used, "a broken ring went on"


def _read_header(disk: BlkClient) -> tuple[int, int]:
    request = header(T_IN)
    address = disk.memory.alloc(len(request), 16)
    disk.memory.write(address, request)
    return address, len(request)


class Target:
    """A vdev block server as a process, with an image of known content."""

    def __init__(self, directory: Path, loop: str) -> None:
        self.socket = directory / "disk.sock"
        self.image = directory / "disk.img"
        self.image.write_bytes(random.Random(1).randbytes(IMAGE_SIZE))
        self.server = Server.vdev(
            *("blk", "serve", "--socket-path", self.socket, "--blk-file", self.image),
            *("--num-queues", str(QUEUES), "--serial", "hostile", "--loop", loop),
            # asyncio's debug mode complains of coroutines and errors that nobody looked at.
            env={"PYTHONASYNCIODEBUG": "1" if loop == "asyncio" else ""},
        )
        try:
            check_healthy(self.socket, queues=QUEUES)
            self.baseline = self.server.holdings(self.socket)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.server.close()

    def client(
        self,
        *,
        queues: int = 1,
        **options: object,
    ) -> BlkClient:
        return BlkClient(self.socket, queues=queues, **options)  # type: ignore[arg-type]

    def connect(self) -> wire.Wire:
        return wire.Wire.connect(self.socket)

    def check_recovered(self) -> None:
        """What must hold after every case, whatever its letter."""
        self.server.check_alive()
        check_healthy(self.socket, queues=QUEUES)
        self.server.check_holdings(self.socket, self.baseline)
        self.server.check_alive()
        # A peer's fault is one line of the log; a traceback would be a fault of ours.
        output = self.server.output
        for sign in ("Traceback", "never awaited", "never retrieved"):
            assert sign not in output, output
