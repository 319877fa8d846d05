"""The block front-end and the native driver: a real server keeps every byte of a heavy load."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from perf import servers
from perf.frontend.blk import BlkFrontend, Pattern
from perf.frontend.connection import RING_FEATURES, RING_IN_ORDER, RING_PACKED
from perf.model import Disk, Place
from perf.serving import serving
from vdev._native import lib

SIZE = 8 << 20
RINGS = {
    "plain": 0,
    "event_idx": 1 << lib.VIRTIO_F_EVENT_IDX,
    "indirect": 1 << lib.VIRTIO_F_INDIRECT_DESC,
    "both": RING_FEATURES,
    "packed": RING_PACKED,
    "packed_both": RING_PACKED | RING_FEATURES,
    "in_order": RING_IN_ORDER,
    "in_order_both": RING_IN_ORDER | RING_FEATURES,
    "packed_in_order": RING_PACKED | RING_IN_ORDER | RING_FEATURES,
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of vdev, as installed, with a disk of two queues in a file."""
    place = Place(0, 1, tmp_path_factory.mktemp("disk"))
    file = place.directory / "image"
    file.write_bytes(bytes(SIZE))
    wanted = Disk(place.directory / "socket", SIZE, file, queues=2)
    launch = servers.find("vdev").blk([wanted], place.directory)
    with serving("vdev", launch, [wanted.socket], place, pinned=False):
        yield wanted.socket


@pytest.mark.parametrize("poll", [False, True], ids=["sleeping", "polling"])
@pytest.mark.parametrize("ring", RINGS)
def test_every_byte_is_kept(disk: Path, ring: str, poll: bool) -> None:
    with BlkFrontend(disk, depth=32, block_size=4096, features=RINGS[ring]) as frontend:
        assert frontend.capacity == SIZE
        assert frontend.has(lib.VIRTIO_F_RING_PACKED) == ring.startswith("packed")
        assert frontend.has(lib.VIRTIO_F_IN_ORDER) == ("in_order" in ring)
        written = Pattern(write_percent=40, verify=True, poll=poll)
        outcome = frontend.run(written, requests=4000)
        assert (outcome.requests, outcome.errors, outcome.corrupt) == (4000, 0, 0)
        again = Pattern(random=False, verify=True, poll=poll)
        outcome = frontend.run(again, requests=SIZE // 4096)
        assert (outcome.errors, outcome.corrupt) == (0, 0)


@pytest.mark.parametrize("ring", ["both", "packed_both"])
def test_what_is_in_flight_may_be_noted(disk: Path, ring: str) -> None:
    with BlkFrontend(
        disk, depth=32, block_size=4096, features=RINGS[ring], inflight=True
    ) as frontend:
        assert frontend.frontend.has_protocol(lib.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD)
        pattern = Pattern(write_percent=50, verify=True)
        outcome = frontend.run(pattern, requests=4000)
        assert (outcome.requests, outcome.errors, outcome.corrupt) == (4000, 0, 0)


@pytest.mark.parametrize("ring", ["both", "packed_both"])
def test_which_pages_are_written_may_be_noted(disk: Path, ring: str) -> None:
    with BlkFrontend(disk, depth=4, block_size=4096, features=RINGS[ring], logged=True) as frontend:
        assert frontend.has(lib.VHOST_F_LOG_ALL)
        outcome = frontend.run(Pattern(depth=4), requests=200)
        assert (outcome.requests, outcome.errors) == (200, 0)
        (rings,) = frontend.rings
        bits = os.pread(frontend.log_fd, 1 << 16, 0)
        logged = [page for page in range(8 * len(bits)) if bits[page // 8] >> page % 8 & 1]
        # What was read, and the part of the rings that the device writes.
        packed = frontend.has(lib.VIRTIO_F_RING_PACKED)
        assert (rings.desc // 4096 in logged) == packed
        assert packed or rings.used // 4096 in logged
        assert len([page for page in logged if page > rings.used // 4096]) >= 4


@pytest.mark.parametrize("depth", [1, 256])
def test_any_depth_finds_room(disk: Path, depth: int) -> None:
    with BlkFrontend(disk, depth=depth, block_size=8192, features=0) as frontend:
        pattern = Pattern(depth=depth, block_size=8192, write_percent=50, verify=True, poll=False)
        outcome = frontend.run(pattern, requests=1000)
        assert (outcome.requests, outcome.errors, outcome.corrupt) == (1000, 0, 0)


def test_each_queue_carries_its_own_load(disk: Path) -> None:
    with BlkFrontend(disk, depth=4, block_size=4096, queues=2) as frontend:
        for queue in (1, 0, 1):
            pattern = Pattern(depth=4, write_percent=50, verify=True)
            assert frontend.run(pattern, requests=500, queue=queue).corrupt == 0


def test_front_ends_follow_one_another_over_the_same_data(disk: Path) -> None:
    for seed in range(10):
        with BlkFrontend(disk, depth=32, block_size=4096) as frontend:
            pattern = Pattern(write_percent=50, verify=True, seed=seed, poll=False)
            outcome = frontend.run(pattern, requests=200)
            assert (outcome.errors, outcome.corrupt) == (0, 0)
