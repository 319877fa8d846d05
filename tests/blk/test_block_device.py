"""A block device of the host as the image, and disks that shrink or fail under their clients."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.frontend.blk import S_IOERR, S_OK, SECTOR, T_IN, T_OUT, header

from .serving import Disk, allocated

SIZE = 8 << 20
MIB = 1 << 20
PAGE = 4096


@dataclass
class Loop:
    """A loop device and the file behind it."""

    device: Path
    backing: Path
    content: bytes


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    content = os.urandom(SIZE)
    backing = tmp_path / "backing.img"
    backing.write_bytes(content)
    made = subprocess.run(
        ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    yield Loop(device, backing, content)
    subprocess.run(["losetup", "--detach", str(device)], check=True)


@pytest.fixture(params=[(), ("--cache", "none"), ("--engine", "threads")], ids=" ".join)
def disk(loop: Loop, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    with Disk(tmp_path, loop.device, *request.param) as served:
        yield served
        served.server.check_alive()


def test_reads_writes_and_flushes(loop: Loop, disk: Disk) -> None:
    with disk.client() as client:
        assert client.config().capacity == SIZE // SECTOR
        assert client.read(0, SIZE // 4) == loop.content[: SIZE // 4]
        client.write(PAGE // SECTOR, b"\5" * PAGE)
        client.flush()
        assert client.read(0, 3 * PAGE) == (
            loop.content[:PAGE] + b"\5" * PAGE + loop.content[2 * PAGE : 3 * PAGE]
        )
        assert client.request(T_IN, SIZE // SECTOR, room=SECTOR).status == S_IOERR
    assert loop.backing.read_bytes()[PAGE : 2 * PAGE] == b"\5" * PAGE


def test_discard_reaches_what_is_behind_the_device(loop: Loop, disk: Disk) -> None:
    before = allocated(loop.backing)
    with disk.client() as client:
        client.discard(MIB // SECTOR, 2 * MIB // SECTOR)
        client.flush()
        assert allocated(loop.backing) < before
        assert client.read(0, PAGE) == loop.content[:PAGE]


@pytest.mark.parametrize("unmap", [False, True], ids=["keep", "unmap"])
def test_write_zeroes(loop: Loop, disk: Disk, unmap: bool) -> None:
    with disk.client() as client:
        client.write_zeroes(MIB // SECTOR, MIB // SECTOR, unmap=unmap)
        client.flush()
        assert client.read(MIB // SECTOR, MIB) == bytes(MIB)
        assert client.read(MIB // SECTOR - 1, SECTOR) == loop.content[MIB - SECTOR : MIB]
        assert client.read(2 * MIB // SECTOR, SECTOR) == loop.content[2 * MIB : 2 * MIB + SECTOR]


def test_b61_the_disk_itself_fails(loop: Loop, tmp_path: Path) -> None:
    """What is behind the device is gone, so the kernel answers EIO; the rest goes on."""
    with Disk(tmp_path, loop.device, "--cache", "none") as disk, disk.client() as client:
        os.truncate(loop.backing, SIZE // 2)
        assert client.request(T_IN, SIZE // 2 // SECTOR, room=PAGE).status == S_IOERR
        assert client.read(0, PAGE) == loop.content[:PAGE]
        client.write(0, b"\1" * PAGE)
        assert client.read(0, PAGE) == b"\1" * PAGE


def _shrink(disk: Disk, image: Path, size: int) -> None:
    os.truncate(image, size)
    subprocess.run(
        [sys.executable, "-m", "vdev", "resize", str(disk.server.pid), "blk0"], check=True
    )


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_b61_resize_below_what_is_in_flight(tmp_path: Path, cache: str) -> None:
    """Requests that were accepted end one way or the other; later ones meet the new end."""
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    half = SIZE // 2
    with Disk(tmp_path, image, "--cache", cache) as disk, disk.client() as client:
        pending = [
            client.submit(header(T_IN, sector), PAGE + 1, kick=False)
            for sector in range(half // SECTOR, half // SECTOR + 16 * 8, 8)
        ]
        client.ring.kick()
        _shrink(disk, image, half)
        assert {client.finish(one).status for one in pending} <= {S_OK, S_IOERR}
        assert client.config().capacity == half // SECTOR
        assert client.request(T_IN, half // SECTOR, room=PAGE).status == S_IOERR
        assert client.request(T_OUT, half // SECTOR, bytes(PAGE)).status == S_IOERR
        assert image.stat().st_size == half, "a write past the end grew the image"
        client.write(0, b"\7" * PAGE)
        assert client.read(0, PAGE) == b"\7" * PAGE
