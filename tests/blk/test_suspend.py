"""A disk moves while much is in flight: what its server has not begun is the next one's to do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend.blk import LAYOUTS, S_OK, SECTOR, T_FLUSH, header
from tests.frontend.server import Server
from tests.frontend.session import F_IN_ORDER, F_RING_PACKED
from tests.frontend.survivor import PROTOCOL, Survivor
from tests.frontend.wire import INFLIGHT, Protocol
from tests.frontend.writer import AREA, Writer

from .serving import make_image

MOVES = 30
CHAIN = {"split": 16, "packed": 32}  # bytes of a descriptor's state, and of what is before all
LEAVES = PROTOCOL | Protocol.GET_VRING_BASE_INFLIGHT


def noted(disk: Survivor) -> int:
    """Chains in the in-flight region."""
    chain = CHAIN["packed" if disk.features & F_RING_PACKED else "split"]
    size, _, queues, entries = INFLIGHT.unpack_from(disk.description)
    data = os.pread(disk.inflight_fd, size, 0)
    part = -(-(chain + entries * chain) // 64) * 64
    return sum(
        data[queue * part + chain + entry * chain]
        for queue in range(queues)
        for entry in range(entries)
    )


@pytest.fixture(params=["auto", "threads"])
def paths(request: pytest.FixtureRequest, disk_directory: Path) -> Iterator[list[Path]]:
    """The sockets of two processes that serve the same image, each while rings run there."""
    image = make_image(disk_directory / "disk.img", AREA * SECTOR)
    paths = [disk_directory / f"{name}.sock" for name in ("here", "there")]
    with contextlib.ExitStack() as stack:
        for path in paths:
            server = Server.vdev(
                *("blk", "serve", "--socket-path", path, "--blk-file", image),
                *("--num-queues", "2", "--lock", "running", "--engine", request.param),
            )
            stack.enter_context(server)
        yield paths


@pytest.mark.parametrize("in_order", [False, True], ids=["any order", "in order"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_has_not_begun_goes_along(paths: list[Path], layout: str, in_order: bool) -> None:
    """But where chains are used in order: what is done waits for what is not.

    A fast disk has often begun all; so there are more moves until some went along.
    """
    left = move = 0
    features = LAYOUTS[layout] | (F_IN_ORDER if in_order else 0)
    with Survivor(paths[0], queues=2, size=128, features=features, protocol=LEAVES) as disk:
        writer = Writer(disk, seed=3)
        while move < MOVES or not (left or in_order):
            move += 1
            writer.fill()
            flushes = [disk.submit(header(T_FLUSH), 1, queue=n % 2) for n in range(20)]
            for queue in range(2):
                disk.get_vring_base(queue)
            left += noted(disk)
            disk.reconnect(paths[move % 2])
            for flush in flushes:
                assert disk.finish(flush).status == S_OK
            writer.take(writer.random.randrange(len(writer.writes) + 1))
        writer.finish()
        writer.check()
        assert noted(disk) == 0
    assert not (left and in_order)


def test_without_the_feature_all_is_done_before(paths: list[Path]) -> None:
    with Survivor(paths[0], queues=2, size=128) as disk:
        for _ in range(10):
            flushes = [disk.submit(header(T_FLUSH), 1, queue=n % 2) for n in range(20)]
            for queue in range(2):
                base = disk.get_vring_base(queue)
                assert disk.rings[queue].memory.read16(disk.rings[queue].used + 2) == base
            assert noted(disk) == 0
            disk.reconnect()
            for flush in flushes:
                assert disk.finish(flush).status == S_OK
