"""DISCARD gives room back, WRITE_ZEROES gives zeroes (virtio 1.3, section 5.2.6.2)."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend.blk import S_OK, T_DISCARD, T_WRITE_ZEROES, UNMAP, BlkClient, segment

from .serving import Disk, allocated, make_image

SIZE = 8 << 20
MIB = 1 << 20
SECTORS = MIB // 512
METADATA = 64 << 10  # a file in many pieces has blocks for their list, which are its own as well


@pytest.fixture(params=["auto", "threads", "direct"])
def served(
    any_directory: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[BlkClient, Path, bytes]]:
    """A client, the image, and its content: 8 MiB without a hole."""
    image = any_directory / "disk.img"
    content = random.Random(4).randbytes(SIZE)
    image.write_bytes(content)
    fd = os.open(image, os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    options = ("--cache", "none") if request.param == "direct" else ("--engine", request.param)
    with Disk(any_directory, image, *options) as disk, disk.client() as client:
        yield client, image, content


def zeroed(content: bytes, start: int, size: int) -> bytes:
    return content[:start] + bytes(size) + content[start + size :]


def test_discard_makes_a_hole(served: tuple[BlkClient, Path, bytes]) -> None:
    client, image, content = served
    before = allocated(image)
    client.discard(2 * SECTORS, 3 * SECTORS)
    client.flush()
    assert before - allocated(image) == pytest.approx(3 * MIB, abs=METADATA)
    assert image.stat().st_size == SIZE
    # Around the hole nothing has changed; the hole itself reads as zeroes on a file.
    assert image.read_bytes() == zeroed(content, 2 * MIB, 3 * MIB)
    assert client.read(2 * SECTORS, MIB) == bytes(MIB)


def test_discard_of_everything(served: tuple[BlkClient, Path, bytes]) -> None:
    client, image, _ = served
    client.discard(0, SIZE // 512)
    client.flush()
    assert allocated(image) == 0
    assert image.stat().st_size == SIZE


def test_discard_of_several_segments(served: tuple[BlkClient, Path, bytes]) -> None:
    client, image, content = served
    before = allocated(image)
    data = b"".join(segment(n * SECTORS, SECTORS // 2) for n in range(4))
    done = client.request(T_DISCARD, 0, data)
    assert (done.status, done.used) == (S_OK, 1)
    client.flush()
    assert before - allocated(image) == pytest.approx(2 * MIB, abs=METADATA)
    for n in range(4):
        content = zeroed(content, n * MIB, MIB // 2)
    assert image.read_bytes() == content


def test_discard_of_odd_ranges_keeps_the_rest(served: tuple[BlkClient, Path, bytes]) -> None:
    """A range that is not whole blocks: what lies in it may become zero, nothing else does."""
    client, image, content = served
    block = client.config().blk_size // 512
    client.discard(3 * block, 5 * block)
    client.flush()
    now = image.read_bytes()
    low, high = 3 * block * 512, 8 * block * 512
    assert now[:low] == content[:low]
    assert now[high:] == content[high:]
    assert set(now[low:high]) == {0} or now[low:high] == content[low:high]


@pytest.mark.parametrize("unmap", [False, True], ids=["keep", "unmap"])
def test_write_zeroes(served: tuple[BlkClient, Path, bytes], unmap: bool) -> None:
    client, image, content = served
    before = allocated(image)
    client.write_zeroes(SECTORS, 2 * SECTORS, unmap=unmap)
    client.flush()
    assert client.read(SECTORS, MIB) == bytes(MIB)
    assert image.read_bytes() == zeroed(content, MIB, 2 * MIB)
    given_back = before - allocated(image)
    if unmap:
        assert given_back == pytest.approx(2 * MIB, abs=METADATA), (
            "unmap may give the room back, and does on a file"
        )
    else:
        assert given_back == pytest.approx(0, abs=METADATA), (
            "without unmap the room must stay reserved"
        )


@pytest.mark.parametrize("unmap", [False, True], ids=["keep", "unmap"])
def test_write_zeroes_of_odd_ranges(served: tuple[BlkClient, Path, bytes], unmap: bool) -> None:
    """Zeroes are exact to the sector, unlike discards."""
    client, image, content = served
    block = client.config().blk_size
    step = block // 512
    for first, count in [(1, 1), (7, 3), (31, 33), (100, 1000)]:
        client.write_zeroes(first * step, count * step, unmap=unmap)
        content = zeroed(content, first * block, count * block)
    client.flush()
    assert image.read_bytes() == content


def test_write_zeroes_of_several_segments(served: tuple[BlkClient, Path, bytes]) -> None:
    client, image, content = served
    data = segment(0, 64) + segment(SECTORS, 64, UNMAP) + segment(2 * SECTORS, 8)
    assert client.request(T_WRITE_ZEROES, 0, data).status == S_OK
    client.flush()
    for start, size in [(0, 64), (MIB, 64), (2 * MIB, 8)]:
        content = zeroed(content, start, size * 512)
    assert image.read_bytes() == content


def test_write_zeroes_at_the_very_end(served: tuple[BlkClient, Path, bytes]) -> None:
    client, image, content = served
    block = client.config().blk_size
    for unmap in (False, True):
        client.write_zeroes((SIZE - block) // 512, block // 512, unmap=unmap)
        client.flush()
        assert image.read_bytes() == zeroed(content, SIZE - block, block)
        assert image.stat().st_size == SIZE


def test_write_after_discard(served: tuple[BlkClient, Path, bytes]) -> None:
    client, image, content = served
    client.discard(0, SECTORS)
    data = os.urandom(4096)
    client.write(8, data)
    assert client.read(8, 4096) == data
    assert client.read(0, 4096) == bytes(4096)
    client.flush()
    assert image.read_bytes()[MIB:] == content[MIB:]


def test_discard_on_a_hole(any_directory: Path) -> None:
    image = make_image(any_directory / "disk.img", SIZE)
    with Disk(any_directory, image) as disk, disk.client() as client:
        client.discard(0, SECTORS)
        client.write_zeroes(0, SECTORS, unmap=True)
        client.flush()
        assert allocated(image) == 0
