"""Catalogue, rings 49-51: memory that changes under the server's eyes, and noise.

What the driver gets for this is undefined; what the server does is not: it reads each field once,
checks what it read, and keeps its own indexes.
"""

from __future__ import annotations

import os
import random
import select
import signal
from collections.abc import Callable

import pytest

from tests.frontend.blk import S_OK, SECTOR, T_IN, T_OUT, BlkClient, header
from tests.frontend.ring import (
    DESC,
    INDIRECT,
    NEXT,
    WRITE,
    Desc,
    SplitRing,
    pack_table,
    split,
    wait_fd,
)
from tests.frontend.wire import TIMEOUT

from .target import QUEUES, Target, check_serves

ROUNDS = 1500


def wait_used_or_broken(ring: SplitRing) -> bool:
    """True when a completion came, False when the ring broke."""
    poller = select.poll()
    poller.register(ring.call_fd, select.POLLIN)
    poller.register(ring.err_fd, select.POLLIN)
    while ring.pop() is None:
        ready = [fd for fd, _ in poller.poll(TIMEOUT * 1000)]
        assert ready, "neither served nor broken: the server hangs"
        if ring.err_fd in ready:
            return False
        os.eventfd_read(ring.call_fd)
        ring.used_event = ring.last_used
    ring.used_event = ring.last_used
    return True


class Scribbler:
    """A process that goes on rewriting guest memory until the block ends: beside the driver, as
    another CPU of the guest would, with no interpreter lock between them."""

    def __init__(self, act: Callable[[random.Random], None]) -> None:
        self._act = act
        self._pid = 0

    def __enter__(self) -> None:
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                chance = random.Random(49)
                while os.getppid() == parent:
                    self._act(chance)
            finally:
                os._exit(0)

    def __exit__(self, *exc: object) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def restart(disk: BlkClient) -> None:
    disk.get_vring_base(0)
    disk.ring.reset()
    while select.select([disk.ring.err_fd], [], [], 0)[0]:
        os.eventfd_read(disk.ring.err_fd)
    disk.start_ring(0, disk.ring)


def rewrite_while_served(disk: BlkClient, chain: list[Desc], act: Callable[..., None]) -> None:
    """Submit the chain over and over while another process rewrites it; a broken ring is set up
    again.  The other ring is served all along."""
    table = pack_table(chain)
    address = disk.memory.alloc(len(table), 16)
    disk.memory.write(address, table)
    with Scribbler(lambda chance: act(chance, address)):
        for n in range(ROUNDS):
            disk.ring.submit([Desc(address, len(table), flags=INDIRECT)])
            if not wait_used_or_broken(disk.ring):
                restart(disk)
            if n % 100 == 0:
                check_serves(disk, 1)


@pytest.mark.parametrize("field", ["address", "length", "flags", "next"], ids="r49-{}".format)
def test_r49_descriptor_rewritten(victim: Target, field: str) -> None:
    with victim.client(queues=QUEUES) as disk:
        head = disk.memory.alloc(16, 16)
        disk.memory.write(head, header(T_IN))
        data = disk.memory.alloc(4096, 16)
        good = (data, SECTOR, WRITE | NEXT, 2)
        bad = {
            "address": [(1 << 40, SECTOR, WRITE | NEXT, 2), (data + 512, SECTOR, WRITE | NEXT, 2)],
            "length": [(data, n, WRITE | NEXT, 2) for n in (0, 1, 1024, 0xFFFFFFFF)],
            "flags": [(data, SECTOR, n, 2) for n in (0, NEXT, WRITE, INDIRECT, 0xFFFF)],
            "next": [(data, SECTOR, WRITE | NEXT, n) for n in (0, 1, 3, 0xFFFF)],
        }[field]

        def act(chance: random.Random, table: int) -> None:
            disk.memory.write(table + 16, DESC.pack(*chance.choice([good, *bad])))

        chain = [Desc(head, 16), Desc(data, SECTOR, True), Desc(data + 2048, 1, True)]
        rewrite_while_served(disk, chain, act)


def test_r49_header_rewritten(victim: Target) -> None:
    """Type and sector change after the offer: whatever is served lies inside the disk."""
    with victim.client(queues=QUEUES) as disk:
        head = disk.memory.alloc(16, 16)
        data = disk.memory.alloc(SECTOR + 1, 16)
        headers = [header(kind, sector) for kind in (T_IN, 4, 8, 99) for sector in (0, 1 << 55)]

        def act(chance: random.Random, table: int) -> None:
            disk.memory.write(head, chance.choice(headers))

        chain = [Desc(head, 16), Desc(data, SECTOR, True), Desc(data + SECTOR, 1, True)]
        rewrite_while_served(disk, chain, act)


def test_r49_ranges_rewritten(victim: Target) -> None:
    with victim.client(queues=QUEUES) as disk:
        head = disk.memory.alloc(32, 16)
        status = disk.memory.alloc(1)
        disk.memory.write(head, header(13))
        ranges = [
            sector.to_bytes(8, "little") + count.to_bytes(4, "little") + flags.to_bytes(4, "little")
            for sector in (256, 1 << 50)
            for count in (1, 8, 0xFFFFFFFF)
            for flags in (0, 1, 0xFF)
        ]

        def act(chance: random.Random, table: int) -> None:
            disk.memory.write(head + 16, chance.choice(ranges))

        rewrite_while_served(disk, [Desc(head, 32), Desc(status, 1, True)], act)


def test_r49_whole_ring_rewritten(victim: Target) -> None:
    """Noise over the descriptor table and the avail ring, its index included."""
    with victim.client(queues=QUEUES) as disk:
        ring = disk.ring

        def act(chance: random.Random) -> None:
            disk.memory.write(ring.desc, chance.randbytes(16 * ring.size))
            disk.memory.write(ring.avail, chance.randbytes(6 + 2 * ring.size))

        with Scribbler(act):
            for n in range(200):
                ring.kick()
                if select.select([ring.err_fd], [], [], 0)[0]:
                    restart(disk)
                if n % 20 == 0:
                    check_serves(disk, 1)


# ---- 50: buffers that are rings ----


def ring_addresses(ring: SplitRing) -> dict[str, int]:
    return {"desc": ring.desc, "avail": ring.avail, "used": ring.used}


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@pytest.mark.parametrize("queue", [0, 1], ids=["r50-own-ring", "r50-other-ring"])
def test_r50_read_into_a_ring(victim: Target, part: str, queue: int) -> None:
    """The disk's content lands on a ring: that driver's loss, and no one else's."""
    with victim.client(queues=QUEUES) as disk:
        target = ring_addresses(split(disk.rings[queue]))[part] & ~0xF
        head = disk.memory.alloc(16, 16)
        status = disk.memory.alloc(1)
        disk.memory.write(head, header(T_IN, 8))
        disk.ring.submit([Desc(head, 16), Desc(target, SECTOR, True), Desc(status, 1, True)])
        for ring in disk.rings:
            ring.kick()
        for index in range(QUEUES):
            disk.get_vring_base(index)


@pytest.mark.parametrize("part", ["desc", "avail", "used"], ids="r50-write-from-{}".format)
def test_r50_write_from_a_ring(victim: Target, part: str) -> None:
    with victim.client() as disk:
        source = ring_addresses(disk.ring)[part] & ~0xF
        head = disk.memory.alloc(16, 16)
        status = disk.memory.alloc(1)
        disk.memory.write(head, header(T_OUT, 8))
        disk.ring.submit([Desc(head, 16), Desc(source, SECTOR), Desc(status, 1, True)])
        assert disk.ring.wait().len == 1
        assert disk.memory.read(status, 1) == bytes([S_OK])


def test_r50_status_in_the_used_index(victim: Target) -> None:
    with victim.client(queues=QUEUES) as disk:
        head = disk.memory.alloc(16, 16)
        disk.memory.write(head, header(T_IN))
        disk.ring.submit([Desc(head, 16), Desc(disk.ring.used + 2, 1, True)])
        check_serves(disk, 1)
        disk.get_vring_base(0)


# ---- 51: the server's own fields, wrapping indexes, noise ----


def test_r51_guest_scribbles_on_the_used_ring(victim: Target) -> None:
    """The device keeps its own used index and never reads it back."""
    with victim.client() as disk:
        ring = disk.ring
        for n in range(50):
            ring.used_event = n
            ring.used_idx = 0xBEEF
            ring.used_flags = 0xFFFF
            request = disk.submit(header(T_IN, n), SECTOR + 1)
            # Not `ring.wait`: it would take our own scribble for a completion.
            wait_fd(ring.call_fd, "no call")
            assert ring.used_idx == n + 1
            assert disk.finish(request).status == S_OK


@pytest.mark.parametrize("base", [65535, 65530, 65472, 32767], ids="r51-from-{}".format)
def test_r51_indexes_wrap(victim: Target, base: int) -> None:
    with victim.client(size=16, base=base) as disk:
        for n in range(200):
            assert disk.read(n, SECTOR)
        assert disk.get_vring_base(0) == (base + 200) & 0xFFFF


def test_r51_avail_flags_are_noise(victim: Target) -> None:
    """With EVENT_IDX the flags mean nothing (virtio 1.3, section 2.7.7.2)."""
    with victim.client() as disk:
        disk.ring.avail_flags = 0xFFFF
        check_serves(disk)


def test_r51_hundred_thousand_spurious_kicks(victim: Target) -> None:
    with victim.client(queues=QUEUES) as disk:
        for n in range(100_000):
            disk.ring.kick()
            if n % 2000 == 0:
                check_serves(disk, 1)
        check_serves(disk, 0)


def test_r51_kicks_on_stopped_and_disabled_rings(victim: Target) -> None:
    with victim.client(queues=QUEUES) as disk:
        disk.enable(1, False)
        disk.get_vring_base(0)
        for ring in disk.rings:
            for _ in range(1000):
                ring.kick()
        disk.barrier()
        disk.enable(1)
        check_serves(disk, 1)
