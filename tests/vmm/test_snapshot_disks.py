"""Disks of a snapshot come back whole, or what was there stays."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vmm.snapshots import SIZE, STATE, machine_in, save, written
from vdev.errors import UserError
from vdev.vmm.config import MachineConfig
from vdev.vmm.layout import MIB
from vdev.vmm.ram import Ram
from vdev.vmm.snapshot import Snapshot, config_of, read
from vdev.vmm.snapshot_disks import DiskCopies


def put_disks(snapshot: Snapshot, config: MachineConfig) -> None:
    with DiskCopies(snapshot, config) as disks:
        assert all(os.pread(fd, 1, 0) for fd in disks.opened.values()) or not disks.opened
        disks.put()


@pytest.fixture
def found(tmp_path: Path) -> Snapshot:
    directory = written(tmp_path)
    (directory.parent / "disk").write_bytes(b"later")
    return read(str(directory))


def test_disks_are_put_back_over_what_is_there(found: Snapshot, tmp_path: Path) -> None:
    disk, held = tmp_path / "disk", os.open(tmp_path / "disk", os.O_RDONLY)
    disk.chmod(0o640)
    (tmp_path / "others").write_bytes(b"goes on")
    put_disks(found, found.config)
    assert disk.read_bytes() == found.disks["disk0"].read_bytes()
    assert disk.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "others").read_bytes() == b"goes on"
    # Who has the old one open keeps it.
    assert os.pread(held, 10, 0) == b"later"
    os.close(held)
    assert found.disks["disk0"].stat().st_ino != disk.stat().st_ino


def test_a_link_to_a_disk_stays_one(found: Snapshot, tmp_path: Path) -> None:
    (tmp_path / "disk").rename(tmp_path / "real")
    (tmp_path / "disk").symlink_to("real")
    put_disks(found, found.config)
    assert (tmp_path / "disk").is_symlink()
    assert (tmp_path / "real").read_bytes() == found.disks["disk0"].read_bytes()


def test_a_directory_for_disks_is_made(found: Snapshot, tmp_path: Path) -> None:
    put_disks(found, config_of(found, disks=str(tmp_path / "new/for/it")))
    (disk,) = (tmp_path / "new/for/it").iterdir()
    assert disk.name == "disk0"
    assert disk.read_bytes() == found.disks["disk0"].read_bytes()
    assert disk.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "disk").read_bytes() == b"later"


def test_holes_stay_holes(tmp_path: Path) -> None:
    config = machine_in(tmp_path)
    with open(tmp_path / "disk", "r+b") as file:
        file.truncate(0)
        file.truncate(1 << 30)
        file.seek(1 << 29)
        file.write(b"data")
    ram = Ram(SIZE)
    save(tmp_path / "snapshot", config, STATE, ram)
    ram.close()
    put_disks(found := read(str(tmp_path / "snapshot")), config)
    for path in (found.disks["disk0"], tmp_path / "disk"):
        assert path.stat().st_size == 1 << 30
        assert path.stat().st_blocks * 512 < MIB
        with open(path, "rb") as file:
            file.seek(1 << 29)
            assert file.read(5) == b"data\0"


def test_what_a_killed_copy_left_is_in_nobodys_way(found: Snapshot, tmp_path: Path) -> None:
    (tmp_path / f".disk.{os.getpid()}").write_bytes(b"half")
    put_disks(found, found.config)
    assert not list(tmp_path.glob(".disk*"))
    assert (tmp_path / "disk").read_bytes() == found.disks["disk0"].read_bytes()


@contextlib.contextmanager
def files_of(most: int) -> Iterator[None]:
    """No file can become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_copy_without_room_leaves_what_was_there(found: Snapshot, tmp_path: Path) -> None:
    with (
        files_of(64 << 10),
        pytest.raises(UserError, match=r"disk disk0: .*File too large"),
    ):
        put_disks(found, found.config)
    assert (tmp_path / "disk").read_bytes() == b"later"
    assert not list(tmp_path.glob(".disk*"))


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_copy_that_is_cut_off_leaves_what_was_there(
    found: Snapshot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
) -> None:
    def cut(*_arguments: object) -> int:
        raise error

    monkeypatch.setattr(os, "fsync", cut)
    with pytest.raises(raised):
        put_disks(found, found.config)
    assert (tmp_path / "disk").read_bytes() == b"later"
    assert not list(tmp_path.glob(".disk*"))


def test_disks_that_cannot_be_put(found: Snapshot, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"disk disk0: .*(Not a directory|File exists)"):
        put_disks(found, config_of(found, disks=str(tmp_path / "file")))
    (tmp_path / "mine/disk0").mkdir(parents=True)
    with pytest.raises(UserError, match="something else than a disk's file"):
        put_disks(found, config_of(found, disks=str(tmp_path / "mine")))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["disk0"]
