"""A disk moves from one back-end process to the next, its requests under way and verified."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from perf.frontend.blk import WANTED_PROTOCOL, BlkFrontend, Pattern
from perf.frontend.connection import RING_FEATURES, RING_PACKED, USER_ADDR
from tests.frontend.server import Server
from vdev._native import ffi, lib
from vdev.errors import PeerError
from vdev.virtio.vhost_user.frontend import Frontend, SharedRegion
from vdev.virtio.vhost_user.payloads import Inflight

from .serving import make_image

SIZE = 16 << 20
MOVES = 20
REQUESTS = 4000
WRITEBACK: int = ffi.offsetof("struct virtio_blk_config", "writeback")
F_CONFIG_WCE = 1 << lib.VIRTIO_BLK_F_CONFIG_WCE
PROTOCOL = WANTED_PROTOCOL | 1 << lib.VHOST_USER_PROTOCOL_F_DEVICE_STATE
LEAVES: int = (
    1 << lib.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD
    | 1 << lib.VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT
)


class Mover(BlkFrontend):
    """A disk's front-end that goes over to other back-ends, with all that the last one knew.

    inflight: the region where they note what they leave in flight.
    """

    inflight: tuple[Inflight, int] | None = None

    def move(self, path: Path) -> None:
        frontend = self.frontend
        bases = [frontend.stop_ring(ring.index) for ring in self.rings]
        state, features = frontend.save_state(), frontend.features
        protocol = frontend.protocol_features
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(os.fspath(path))
        frontend.adopt(sock)
        frontend.negotiate_protocol(protocol)
        frontend.set_features(features)
        frontend.set_memory([SharedRegion(0, self.memory_size, USER_ADDR, 0, self._fds[0])])
        frontend.load_state(state)
        if self.inflight is not None:
            frontend.set_inflight(*self.inflight)
        for ring, base in zip(self.rings, bases, strict=True):
            frontend.start_ring(replace(ring, next_index=base))


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[list[Path]]:
    """The sockets of two processes that serve the same image, each while rings run there."""
    image = make_image(tmp_path / "disk.img", SIZE)
    paths = [tmp_path / f"{name}.sock" for name in ("here", "there")]
    with contextlib.ExitStack() as stack:
        for path in paths:
            server = Server.vdev(
                *("blk", "serve", "--socket-path", path, "--blk-file", image),
                *("--num-queues", "2", "--lock", "running"),
            )
            stack.enter_context(server)
        yield paths


@pytest.mark.parametrize("layout", ["split", "packed", "in flight"])
def test_moves_under_load(paths: list[Path], layout: str) -> None:
    features = RING_FEATURES | F_CONFIG_WCE | (RING_PACKED if layout == "packed" else 0)
    pattern = Pattern(depth=32, write_percent=50, poll=False, verify=True)
    with (
        Mover(
            paths[0],
            depth=32,
            block_size=4096,
            queues=2,
            features=features,
            protocol=PROTOCOL | (LEAVES if layout == "in flight" else 0),
        ) as disk,
        ThreadPoolExecutor(2) as threads,
    ):
        disk.frontend.set_config(WRITEBACK, b"\0")
        if layout == "in flight":
            disk.inflight = disk.frontend.get_inflight(2, disk.rings[0].size)
            disk.own(disk.inflight[1])
        moves = 0
        while moves < MOVES:
            loads = [
                threads.submit(
                    disk.run,
                    replace(pattern, start=queue * SIZE // 2, span=SIZE // 2, seed=moves + 1),
                    queue=queue,
                    requests=REQUESTS,
                )
                for queue in range(2)
            ]
            while not all(load.done() for load in loads):
                moves += 1
                disk.move(paths[moves % 2])
                assert disk.frontend.get_config(WRITEBACK, 1) == b"\0"
            for load in loads:
                outcome = load.result()
                assert outcome.requests == REQUESTS
                assert outcome.errors == outcome.corrupt == 0


def test_a_state_that_is_refused_leaves_the_disk_as_it_was(paths: list[Path]) -> None:
    with Frontend.connect(paths[0]) as frontend:
        frontend.negotiate_protocol(PROTOCOL)
        frontend.set_features(1 << lib.VIRTIO_F_VERSION_1 | F_CONFIG_WCE)
        state = frontend.save_state()
        frontend.set_config(WRITEBACK, b"\0")
        for bad in (b"", state[:-1], state + b"\0", bytes(1 << 20)):
            with pytest.raises(PeerError, match="did not transfer"):
                frontend.load_state(bad)
        assert frontend.get_config(WRITEBACK, 1) == b"\0"
        frontend.load_state(state)
        assert frontend.get_config(WRITEBACK, 1) == b"\1"
