"""When a write is durable: FLUSH, CONFIG_WCE, and drivers that know neither (virtio 1.3, 5.2.6.2).

Durability is observed from outside: with delayed allocation, data that only the page cache holds
has no blocks yet, and the file system says so.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.frontend.blk import (
    F_CONFIG_WCE,
    F_FLUSH,
    FEATURES,
    WRITEBACK_OFFSET,
    BlkClient,
)
from tests.frontend.session import Refused

from .serving import Disk, is_unallocated_dirty, make_image

SIZE = 64 << 20
DATA = os.urandom(65536)

ENGINES = pytest.mark.parametrize("engine", ["auto", "threads"])


@pytest.fixture
def image(disk_directory: Path) -> Path:
    return make_image(disk_directory / "disk.img", SIZE)


def write_is_durable(client: BlkClient, image: Path, sector: int) -> bool:
    """Write to a hole; whether it is on the disk when the request has completed."""
    client.write(sector, DATA)
    return not is_unallocated_dirty(image)


@ENGINES
def test_writeback_until_flush(disk_directory: Path, image: Path, engine: str) -> None:
    with Disk(disk_directory, image, "--engine", engine) as disk, disk.client() as client:
        assert client.config().writeback == 1
        assert not write_is_durable(client, image, 0)
        client.flush()
        assert not is_unallocated_dirty(image)


@ENGINES
def test_write_through_without_flush_and_wce(
    disk_directory: Path, image: Path, engine: str
) -> None:
    """FLUSH offered, but a driver that negotiated neither: every write is durable."""
    with Disk(disk_directory, image, "--engine", engine) as disk:
        features = FEATURES & ~(F_FLUSH | F_CONFIG_WCE)
        with disk.client(features=features) as client:
            assert write_is_durable(client, image, 0)
        # And the next driver, which knows FLUSH, is not slowed down by it.
        with disk.client() as client:
            assert not write_is_durable(client, image, 4096)


@ENGINES
def test_flush_without_wce_is_writeback(disk_directory: Path, image: Path, engine: str) -> None:
    with (
        Disk(disk_directory, image, "--engine", engine) as disk,
        disk.client(features=FEATURES & ~F_CONFIG_WCE) as client,
    ):
        assert not write_is_durable(client, image, 0)
        client.flush()
        assert not is_unallocated_dirty(image)


@ENGINES
def test_config_wce_both_ways(disk_directory: Path, image: Path, engine: str) -> None:
    with Disk(disk_directory, image, "--engine", engine) as disk, disk.client() as client:
        client.set_config(WRITEBACK_OFFSET, b"\0")
        assert client.config().writeback == 0
        assert write_is_durable(client, image, 0)
        client.set_config(WRITEBACK_OFFSET, b"\1")
        assert client.config().writeback == 1
        assert not write_is_durable(client, image, 4096)
        client.flush()
        client.set_config(WRITEBACK_OFFSET, b"\0")
        assert write_is_durable(client, image, 8192)


def test_config_wce_with_requests_in_flight(disk_directory: Path, image: Path) -> None:
    with Disk(disk_directory, image) as disk, disk.client(size=128) as client:
        for n in range(50):
            pending = [
                client.submit(b"\1" + bytes(15) + DATA[:4096], 1, kick=False) for _ in range(8)
            ]
            client.ring.kick()
            client.set_config(WRITEBACK_OFFSET, bytes([n % 2]))
            for request in pending:
                assert client.finish(request).status == 0
        assert client.config().writeback == 1


def test_config_wce_ends_with_the_driver(disk_directory: Path, image: Path) -> None:
    with Disk(disk_directory, image) as disk:
        with disk.client() as client:
            client.set_config(WRITEBACK_OFFSET, b"\0")
        with disk.client() as client:
            assert client.config().writeback == 1
            assert not write_is_durable(client, image, 0)


@pytest.mark.parametrize("value", [2, 0x80, 0xFF], ids="writeback-{}".format)
def test_writeback_is_0_or_1(shared: Disk, value: int) -> None:
    with shared.client() as client:
        with pytest.raises(Refused):
            client.set_config(WRITEBACK_OFFSET, bytes([value]))
        assert client.config().writeback == 1


@ENGINES
def test_cache_writethrough(disk_directory: Path, image: Path, engine: str) -> None:
    options = ("--cache", "writethrough", "--engine", engine)
    with Disk(disk_directory, image, *options) as disk, disk.client() as client:
        assert client.config().writeback == 0
        assert write_is_durable(client, image, 0)
        # The driver may ask for the cache.
        client.set_config(WRITEBACK_OFFSET, b"\1")
        assert not write_is_durable(client, image, 4096)


@ENGINES
def test_cache_unsafe_flushes_nothing(disk_directory: Path, image: Path, engine: str) -> None:
    options = ("--cache", "unsafe", "--engine", engine)
    with Disk(disk_directory, image, *options) as disk, disk.client() as client:
        assert not write_is_durable(client, image, 0)
        client.flush()
        assert is_unallocated_dirty(image)


@ENGINES
def test_cache_none_keeps_nothing_in_the_page_cache(
    disk_directory: Path, image: Path, engine: str
) -> None:
    options = ("--cache", "none", "--engine", engine)
    with Disk(disk_directory, image, *options) as disk, disk.client() as client:
        assert write_is_durable(client, image, 0)
        assert client.read(0, len(DATA)) == DATA


@ENGINES
@pytest.mark.parametrize("kind", ["discard", "zeroes", "zeroes-unmap"])
def test_write_zeroes_is_durable_in_write_through(
    disk_directory: Path, image: Path, engine: str, kind: str
) -> None:
    """In write-through mode no zeroes stay behind in the page cache.  (That the change of extents
    is in the journal as well cannot be seen from outside.)"""
    image.write_bytes(DATA)
    os.truncate(image, SIZE)
    fd = os.open(image, os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    options = ("--cache", "writethrough", "--engine", engine)
    with Disk(disk_directory, image, *options) as disk, disk.client() as client:
        if kind == "discard":
            client.discard(0, 64)
        else:
            client.write_zeroes(0, 64, unmap=kind == "zeroes-unmap")
        assert not is_unallocated_dirty(image)
        assert client.read(0, 64 * 512) == bytes(64 * 512)
