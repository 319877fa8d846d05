"""Faults of the host's disk: catalogue, block 61.  The guest gets IOERR, the server goes on."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend.blk import (
    S_IOERR,
    S_OK,
    SECTOR,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    header,
    segment,
)
from tests.frontend.ring import Desc

from .serving import Disk, make_image

SIZE = 4 << 20

ENGINES = {
    "auto": (),
    "threads": ("--engine", "threads"),
    "direct": ("--cache", "none"),
    "writethrough": ("--cache", "writethrough"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_b61_short_read(any_directory: Path, engine: str) -> None:
    """The image was truncated behind the server's back: there is nothing to read."""
    image = any_directory / "disk.img"
    content = os.urandom(SIZE)
    image.write_bytes(content)
    with Disk(any_directory, image, *ENGINES[engine]) as disk, disk.client() as client:
        os.truncate(image, SIZE // 2)
        done = client.request(T_IN, SIZE // 2 // SECTOR, room=4096)
        assert done.status == S_IOERR
        # Half of it is there: still an error, for the request is one.
        done = client.request(T_IN, SIZE // 2 // SECTOR - 4, room=8 * SECTOR)
        assert done.status == S_IOERR
        assert client.read(0, 4096) == content[:4096]


@pytest.mark.parametrize("engine", ENGINES)
def test_b61_write_refused_by_the_host(disk_directory: Path, engine: str) -> None:
    """A limit on the file size stands for every error that a write can meet (EFBIG)."""
    image = make_image(disk_directory / "disk.img", SIZE)
    with Disk(disk_directory, image, *ENGINES[engine]) as disk, disk.client() as client:
        limit = 1 << 20
        resource.prlimit(disk.server.pid, resource.RLIMIT_FSIZE, (limit, limit))
        done = client.request(T_OUT, limit // SECTOR, os.urandom(4096))
        assert done.status == S_IOERR
        client.write(0, b"\1" * 4096)
        assert client.read(0, 4096) == b"\1" * 4096
        disk.server.check_alive()


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    directory = tmp_path / "tiny"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "vdev-test", str(directory)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs (root only)")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_b61_no_space(tiny: Path, tmp_path: Path, engine: str) -> None:
    image = make_image(tiny / "disk.img", SIZE)
    with Disk(tmp_path, image, *ENGINES[engine]) as disk, disk.client() as client:
        outcomes = [
            client.request(T_OUT, n * 128, os.urandom(65536)).status for n in range(SIZE // 65536)
        ]
        assert set(outcomes) == {S_OK, S_IOERR}
        assert outcomes == sorted(outcomes), "a write after the disk was full succeeded"
        # Zeroes that keep their room need room; given back, there is room again.
        full = outcomes.index(S_IOERR)
        done = client.request(T_WRITE_ZEROES, 0, segment((SIZE - 65536) // SECTOR, 128))
        assert done.status == S_IOERR
        client.discard(0, full * 128)
        client.write(0, b"\1" * 65536)
        assert client.read(0, 65536) == b"\1" * 65536


@pytest.mark.parametrize("engine", ENGINES)
def test_b61_reset_during_io(disk_directory: Path, engine: str) -> None:
    """Every request of before the reset has ended when the reset is answered."""
    image = disk_directory / "disk.img"
    image.write_bytes(os.urandom(SIZE))
    with Disk(disk_directory, image, *ENGINES[engine]) as disk, disk.client(size=128) as client:
        for _ in range(10):
            pending = [
                client.submit(bytes(8) + (n * 16).to_bytes(8, "little"), 8193, kick=False)
                for n in range(30)
            ]
            client.ring.kick()
            client.set_status(0)
            used = client.ring.used_idx
            client.barrier()
            assert client.ring.used_idx == used
            for request in pending:
                client.release(request)
            client.set_features(client.features)
            client.share(client.memory)
            client.ring.reset()
            client.start_ring(0, client.ring)
            client.driver_ok()
            assert len(client.read(0, 4096)) == 4096


def peak_memory(pid: int) -> int:
    """VmHWM in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


@pytest.mark.parametrize("kind", [T_IN, T_OUT], ids=["read", "write"])
def test_unaligned_giant_needs_no_giant_buffer(disk_directory: Path, kind: int) -> None:
    """O_DIRECT makes the server copy unaligned data.  A guest can name the same few pages in all
    segments of a request, so a copy as large as the request would be the guest's lever."""
    segments, size = 120, 2 << 20
    image = make_image(disk_directory / "disk.img", segments * size)
    with (
        Disk(disk_directory, image, "--cache", "none") as disk,
        disk.client(size=128) as client,
    ):
        memory = client.memory
        request, status = memory.alloc(16, 16), memory.alloc(1)
        buffer = memory.alloc(size + 1, 4096, region=memory.regions[1]) + 1
        memory.write(request, header(kind))
        memory.write(buffer, b"\5" * size)
        data = [Desc(buffer, size, write=kind == T_IN)] * segments
        before = peak_memory(disk.server.pid)
        head = client.ring.submit([Desc(request, 16), *data, Desc(status, 1, write=True)])
        assert client.ring.wait().id == head
        assert memory.read(status, 1) == bytes([S_OK])
        if kind == T_IN:
            assert memory.read(buffer, size) == bytes(size)
        else:
            assert client.read((segments - 1) * size // SECTOR, 4096) == b"\5" * 4096
        # The guest's own memory counts once it is touched.
        assert peak_memory(disk.server.pid) - before < (16 << 20) + size
