"""Data goes where it belongs: patterns, framings, alignments, queues, engines, file systems."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import pytest

from tests.frontend import blk, session
from tests.frontend.blk import LAYOUTS, S_OK, SECTOR, T_IN, T_OUT, BlkClient, Pending, header
from tests.frontend.memory import GuestMemory, Region

from .serving import Disk, make_image

SIZE = 8 << 20
ENGINES = {
    "auto": (),
    "io_uring": ("--engine", "io_uring"),
    "threads": ("--engine", "threads"),
    "direct": ("--cache", "none"),
    "direct-threads": ("--cache", "none", "--engine", "threads"),
    "writethrough": ("--cache", "writethrough"),
    "unsafe": ("--cache", "unsafe"),
    "never-polling": ("--poll-us", "0"),
}


def random_requests(client: BlkClient, seed: int, count: int, *, depth: int = 16) -> bytearray:
    """Random reads and writes of random sizes, framings and alignments, `depth` at a time,
    checked against a model; returns what the disk should hold."""
    chance = random.Random(seed)
    model = bytearray(SIZE)
    busy: list[tuple[Pending, int, int, bool]] = []

    def settle(entry: tuple[Pending, int, int, bool]) -> None:
        pending, start, size, write = entry
        done = client.finish(pending)
        assert done.status == S_OK
        if write:
            assert done.used == 1
        else:
            assert done.used == size + 1
            assert done.data == model[start : start + size]

    for _ in range(count):
        sectors = chance.choice([1, 1, 2, 7, 8, 8, 64, 200])
        start = chance.randrange(SIZE // SECTOR - sectors) * SECTOR
        size = sectors * SECTOR
        # Requests in flight have no order: those that touch the same bytes wait for each other.
        for entry in [e for e in busy if e[1] < start + size and start < e[1] + e[2]]:
            settle(entry)
            busy.remove(entry)
        write = chance.random() < 0.5
        cuts = random_cuts(chance, size, chance.randint(1, 6))
        queue = chance.randrange(len(client.rings))
        if write:
            data = chance.randbytes(size)
            model[start : start + size] = data
            request = header(T_OUT, start // SECTOR) + data
            pending = client.submit(
                request, 1, out=[16, *cuts], queue=queue, indirect=chance.random() < 0.5
            )
        else:
            request = header(T_IN, start // SECTOR)
            pending = client.submit(
                request, size + 1, into=[*cuts, 1], queue=queue, indirect=chance.random() < 0.5
            )
        busy.append((pending, start, size, write))
        if len(busy) >= depth:
            settle(busy.pop(chance.randrange(len(busy))))
    for entry in busy:
        settle(entry)
    return model


def random_cuts(chance: random.Random, size: int, pieces: int) -> list[int]:
    marks = sorted({0, size, *(chance.randrange(1, size) for _ in range(pieces - 1))})
    return [b - a for a, b in itertools.pairwise(marks)]


BOTH_LAYOUTS = pytest.mark.parametrize("features", LAYOUTS.values(), ids=LAYOUTS)


@BOTH_LAYOUTS
@pytest.mark.parametrize("engine", ENGINES)
def test_random_requests(any_directory: Path, engine: str, features: int) -> None:
    """On tmpfs and on a disk, through every engine: what was read was right all along, and the
    image holds the model in the end."""
    image = make_image(any_directory / "disk.img", SIZE)
    with Disk(any_directory, image, "--num-queues", "2", *ENGINES[engine]) as disk:
        with disk.client(queues=2, size=128, features=features) as client:
            model = random_requests(client, seed=9, count=400)
            client.flush()
        assert image.read_bytes() == model


@pytest.mark.parametrize("first", [1, 3, 8, 511, 513], ids="first-of-{}".format)
@pytest.mark.parametrize("engine", ["auto", "direct"])
def test_buffers_at_odd_addresses(disk_directory: Path, engine: str, first: int) -> None:
    """A buffer may begin and end anywhere; O_DIRECT asks for alignment, the driver does not."""
    image = disk_directory / "disk.img"
    content = random.Random(3).randbytes(1 << 20)
    image.write_bytes(content)
    with Disk(disk_directory, image, *ENGINES[engine]) as disk, disk.client() as client:
        size = 2 * client.config().blk_size
        done = client.request(T_IN, 0, room=size, into=[first, size - first, 1])
        assert (done.status, done.data) == (S_OK, content[:size])
        data = os.urandom(size)
        done = client.request(T_OUT, size // SECTOR, data, out=[16 + first, size - first])
        assert (done.status, done.used) == (S_OK, 1)
        assert client.read(0, 3 * size) == content[:size] + data + content[2 * size : 3 * size]


def test_large_requests(shared: Disk) -> None:
    memory = GuestMemory.default()
    memory.add(Region(1 << 40, 32 << 20))
    with shared.client(memory=memory) as client:
        data = os.urandom(SIZE)
        client.write(0, data)
        assert client.read(0, SIZE) == data
        assert shared.image.read_bytes() == data


def test_queues_see_each_other(client: BlkClient) -> None:
    for n in range(4):
        data = os.urandom(4096)
        client.write(8 * n, data, queue=n)
        for other in range(4):
            assert client.read(8 * n, 4096, queue=other) == data


@BOTH_LAYOUTS
def test_queue_full_of_requests(shared: Disk, features: int) -> None:
    """As many requests as an indirect ring holds, on every queue, made available at once."""
    with shared.client(queues=4, size=64, features=features) as client:
        pending = [
            client.submit(header(T_IN, n * 8), 4097, queue=q, indirect=True, kick=False)
            for q in range(4)
            for n in range(64)
        ]
        image = shared.image.read_bytes()
        for ring in client.rings:
            ring.kick()
        for n, request in enumerate(pending):
            done = client.finish(request)
            at = n % 64 * 4096
            assert (done.status, done.data) == (S_OK, image[at : at + 4096])


@pytest.mark.parametrize(
    "left_out",
    [
        ("F_EVENT_IDX",),
        ("F_INDIRECT",),
        ("F_EVENT_IDX", "F_INDIRECT"),
        ("F_PROTOCOL_FEATURES",),
        ("F_ANY_LAYOUT",),
    ],
    ids="-".join,
)
@BOTH_LAYOUTS
def test_without_ring_features(shared: Disk, left_out: tuple[str, ...], features: int) -> None:
    """libblkio, for one, negotiates neither EVENT_IDX nor INDIRECT."""
    for name in left_out:
        features &= ~getattr(session, name)
    with shared.client(features=features) as client:
        assert client.features & ~features == 0
        for n in range(50):
            data = os.urandom(SECTOR)
            client.write(n, data)
            assert client.read(n, SECTOR) == data


@pytest.mark.parametrize("slots", [False, True], ids=["table", "slots"])
@pytest.mark.parametrize(
    ("size", "layout"),
    [(size, "split") for size in (2, 4, 128, 1024)]
    + [(size, "packed") for size in (2, 3, 100, 1024)],
)
def test_ring_sizes(shared: Disk, size: int, layout: str, slots: bool) -> None:
    with shared.client(size=size, slots=slots, features=LAYOUTS[layout]) as client:
        for n in range(3 * min(size, 128)):
            pending = client.submit(header(T_IN, n), SECTOR + 1)
            assert client.finish(pending).status == S_OK


def test_kicks_only_when_wanted(shared: Disk) -> None:
    """A driver that obeys avail_event strictly never waits in vain."""
    with shared.client() as client:
        for n in range(2000):
            old = client.ring.avail_idx
            pending = client.submit(header(T_IN, n), SECTOR + 1, kick=False)
            if client.ring.wants_kick(old, client.ring.avail_idx):
                client.ring.kick()
            assert client.finish(pending).status == S_OK


def test_kicks_only_when_wanted_without_event_idx(shared: Disk) -> None:
    with shared.client(features=blk.FEATURES & ~session.F_EVENT_IDX) as client:
        for n in range(2000):
            pending = client.submit(header(T_IN, n), SECTOR + 1, kick=False)
            if client.ring.wants_kick(0, 0):
                client.ring.kick()
            assert client.finish(pending).status == S_OK


@pytest.mark.parametrize("left_out", [0, session.F_EVENT_IDX], ids=["event-idx", "no-event-idx"])
def test_kicks_only_when_wanted_by_a_packed_ring(shared: Disk, left_out: int) -> None:
    with shared.client(features=LAYOUTS["packed"] & ~left_out) as client:
        for n in range(2000):
            old = client.packed_ring.fill
            pending = client.submit(header(T_IN, n), SECTOR + 1, kick=False)
            if client.packed_ring.wants_kick(old):
                client.packed_ring.kick()
            assert client.finish(pending).status == S_OK


def test_a_packed_ring_goes_on_where_it_was_stopped(shared: Disk) -> None:
    """Round after round, in chains that do not fit into the ring a whole number of times."""
    with shared.client(features=LAYOUTS["packed"], size=7) as client:
        for _ in range(20):
            assert client.request(T_IN, 0, room=SECTOR, into=[SECTOR, 1]).status == S_OK
            base = client.get_vring_base(0)
            assert base == client.packed_ring.index
            client.packed_ring.base = base
            client.start_ring(0, client.packed_ring)
