"""Fixtures of the block tests: directories on different file systems, and a shared disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend.blk import BlkClient

from .serving import Disk, delays_allocation

SHM = Path("/dev/shm")


@pytest.fixture(scope="module")
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blk")


@pytest.fixture
def tmpfs_directory() -> Iterator[Path]:
    if not SHM.is_dir():
        pytest.skip("this host has no /dev/shm (tmpfs)")
    directory = Path(tempfile.mkdtemp(prefix="vdev-test-", dir=SHM))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def disk_directory(tmp_path: Path) -> Path:
    """A directory on a file system with delayed allocation, where durability can be observed."""
    if not delays_allocation(tmp_path):
        pytest.skip("the temporary directory is on no file system with delayed allocation (ext4)")
    return tmp_path


@pytest.fixture(params=["tmpfs", "disk"])
def any_directory(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(
        "tmpfs_directory" if request.param == "tmpfs" else "disk_directory"
    )
    return directory


@pytest.fixture(scope="module")
def shared(shared_directory: Path) -> Iterator[Disk]:
    """A disk of 8 MiB with 4 queues, all zeroes at first, for a module's tests together."""
    image = shared_directory / "disk.img"
    image.write_bytes(bytes(8 << 20))
    with Disk(shared_directory, image, "--num-queues", "4", "--serial", "vdev-0123456789abcd") as d:
        yield d
        d.server.check_alive()


@pytest.fixture
def client(shared: Disk) -> Iterator[BlkClient]:
    with shared.client(queues=4) as connected:
        yield connected
