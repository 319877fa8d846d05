"""Snapshots as directories: what is written is read, and nothing else is taken for it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.vmm.snapshots import (
    DATA,
    SIZE,
    STATE,
    contents,
    kept,
    machine_in,
    mutate,
    rewrite_manifest,
    rewrite_state,
    save,
    written,
)
from vdev.errors import UserError
from vdev.vmm.config import NicConfig
from vdev.vmm.layout import MIB
from vdev.vmm.ram import Ram
from vdev.vmm.snapshot import config_of, read

FILES = ["manifest.json", "state.json", "memory", "disks/disk0"]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return written(tmp_path)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For many examples, each of which leaves it as it was."""
    return written(tmp_path_factory.mktemp("snapshot"))


def refused(directory: Path) -> str:
    """Why a snapshot is not taken: one line that names it, and nothing was done."""
    before = contents(directory.parent)
    with pytest.raises(UserError) as raised:
        read(str(directory))
    assert contents(directory.parent) == before
    (line,) = str(raised.value).splitlines()
    assert line.startswith(str(directory))
    assert len(line) < len(str(directory)) + 250
    return line.removeprefix(str(directory)).lstrip("/: ")


def test_what_is_written_is_read(directory: Path) -> None:
    found = read(str(directory))
    assert found.config == machine_in(directory.parent)
    assert found.state == STATE
    assert found.disks == {"disk0": directory / "disks/disk0"}
    assert found.disks["disk0"].read_bytes() == (directory.parent / "disk").read_bytes()
    assert found.memory.stat().st_size == SIZE
    assert found.memory.stat().st_blocks * 512 < MIB
    expected = bytearray(SIZE)
    for address, data in DATA.items():
        expected[address : address + len(data)] = data
    assert found.memory.read_bytes() == expected
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_exists_is_left_alone(directory: Path) -> None:
    config, ram = machine_in(directory.parent), Ram(SIZE)
    before = contents(directory.parent)
    with pytest.raises(UserError, match="it exists"):
        save(directory, config, STATE, ram)
    ram.close()
    assert contents(directory.parent) == before


def test_a_snapshot_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ram = machine_in(tmp_path), Ram(SIZE)
    before = sorted(tmp_path.rglob("*"))

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ram.write(0, b"data")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match="No space left on device"):
        save(tmp_path / "snapshot", config, STATE, ram)
    with pytest.raises(UserError, match="No such file or directory"):
        save(tmp_path / "no/snapshot", config, STATE, ram)
    ram.close()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("at", [0.0, 0.4, 1.0])
def test_a_byte_that_changed_is_noticed(directory: Path, name: str, at: float) -> None:
    path = directory / name
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    said = refused(directory)
    assert said.startswith(name)
    if name != "manifest.json":
        assert said.endswith("it was changed: its checksum is another")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1, -(1 << 30)])
def test_a_file_that_is_shorter_or_longer_is_noticed(
    directory: Path, name: str, change: int
) -> None:
    path = directory / name
    size = max(0, path.stat().st_size + change)
    os.truncate(path, size)
    said = refused(directory)
    assert said.startswith(name)
    if name != "manifest.json":
        assert f": {size} bytes, but the snapshot has " in said


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_none_are_refused(directory: Path, name: str) -> None:
    path = directory / name
    moved = path.rename(directory.parent / "moved")
    assert refused(directory) == f"{name}: No such file or directory"
    path.symlink_to(moved)
    assert refused(directory) == f"{name}: a link, where a snapshot has a file"
    path.unlink()
    path.mkdir()
    assert refused(directory) == f"{name}: a snapshot has a file there"
    path.rmdir()
    os.mkfifo(path)
    assert refused(directory) == f"{name}: a snapshot has a file there"
    path.unlink()
    moved.rename(path)
    read(str(directory))


def test_where_only_times_changed_the_contents_decide(directory: Path) -> None:
    for name in FILES:
        os.utime(directory / name, (1, 1))
    assert read(str(directory)).state == STATE
    shutil.copytree(directory, copy := directory.with_name("copy"), copy_function=shutil.copyfile)
    assert read(str(copy)).state == STATE
    # A copy without holes has the same checksum.
    (copy / "memory").write_bytes((directory / "memory").read_bytes())
    assert read(str(copy)).state == STATE


def test_no_snapshot_at_all(tmp_path: Path) -> None:
    assert refused(tmp_path) == "manifest.json: No such file or directory"
    assert refused(tmp_path / "none") == "manifest.json: No such file or directory"
    (tmp_path / "manifest.json").write_text('{"format": "another"}')
    assert refused(tmp_path) == "not a snapshot of vdev"


@pytest.mark.parametrize("version", [0, 1, 3, "2", None, True, 2.0, [2], 10**400])
def test_another_version_is_named(directory: Path, version: object) -> None:
    rewrite_manifest(directory, lambda manifest: {**manifest, "version": version})
    assert "a snapshot of version" in refused(directory)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"9" * 5000,
        b"[]",
        b'"vdev snapshot"',
        b'{"format": "vdev snapshot", "version": 1',
        b"\0" * 100,
    ],
)
def test_texts_that_are_no_manifest(directory: Path, text: bytes) -> None:
    (directory / "manifest.json").write_bytes(text)
    refused(directory)


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_texts_have_a_largest_size(directory: Path, name: str) -> None:
    os.truncate(directory / name, 1 << 40)
    assert refused(directory) == f"{name}: more than the 64 MiB that it can have"


@pytest.mark.parametrize(
    "state", ["deep", [], {}, {"devices": []}, None, 1, "x", {"devices": None}]
)
def test_states_that_are_none(directory: Path, state: object) -> None:
    if state == "deep":
        for _ in range(700):
            state = [state]
    rewrite_state(directory, lambda _: state)
    assert refused(directory).startswith("state.json: not ")


@pytest.mark.parametrize(
    "name",
    [
        *("../../etc/passwd", "/etc/passwd", "disks/../../secret", "disks/", "disks/disk0/"),
        *("disks/disk1", "disks/disk9", "disk0", "manifest.json", ".", "", "memory\n", "a\0b"),
    ],
)
def test_files_that_the_machine_does_not_have(directory: Path, name: str) -> None:
    """The disk that is for reading only has no copy in it either."""

    def add(manifest: Any) -> Any:
        manifest["files"][name] = manifest["files"]["disks/disk0"]
        return manifest

    rewrite_manifest(directory, add)
    assert "a snapshot of this machine has no file" in refused(directory)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].pop("state.json"),
        lambda m: m["files"].pop("memory"),
        lambda m: m["files"]["state.json"].pop("crc32"),
        lambda m: m["files"]["state.json"].update(crc32="x"),
        lambda m: m["files"]["memory"].pop("mtime_ns"),
        lambda m: m["files"]["memory"].update(mtime_ns=0, crc32=None),
        lambda m: m["files"]["memory"].update(size=SIZE + 1),
        lambda m: m["files"].update(memory=[]),
        lambda m: m["config"].update(memory=64 * MIB),
        lambda m: m["config"].update(memory=1 << 80),
        lambda m: m["config"].update(kernel="\ud800"),
        lambda m: m["config"].update(name="../up"),
        lambda m: m["config"].pop("name"),
        lambda m: m["config"]["disk"].append({"path": "x", "id": "disk0"}),
        lambda m: m["config"]["disk"][0].update(id="../../etc"),
        lambda m: m["config"].update(disk={}),
        lambda m: m.update(files=["memory"]),
        lambda m: m.pop("config"),
    ],
)
def test_manifests_that_make_no_sense(directory: Path, change: Callable[[Any], object]) -> None:
    def changed(manifest: Any) -> Any:
        change(manifest)
        return manifest

    rewrite_manifest(directory, changed)
    refused(directory)


@given(data=st.data())
def test_any_manifest_is_read_or_refused(lasting: Path, data: st.DataObject) -> None:
    before = contents(lasting.parent)
    with kept(lasting):
        rewrite_manifest(lasting, lambda manifest: mutate(data, manifest))
        with contextlib.suppress(UserError):
            found = read(str(lasting))
            assert all(path.parent == lasting / "disks" for path in found.disks.values())
            config_of(found, name="clone", disks=str(lasting.parent / "clone"), clone=True)
    assert contents(lasting.parent) == before


@given(text=st.binary(max_size=200))
@example(b"[]")
@example(b'{"format": "vdev snapshot", "version": 1, "files": {}, "checksum": NaN}')
def test_any_bytes_are_refused(lasting: Path, text: bytes) -> None:
    with kept(lasting):
        (lasting / "manifest.json").write_bytes(text)
        refused(lasting)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda d: (d / "memory").unlink(), "memory: No such file or directory"),
        (lambda d: os.truncate(d / "memory", MIB), "1048576 bytes, but the snapshot has 33554432"),
        (lambda d: (d / "state.json").write_bytes(b"{}"), "state.json: 2 bytes, but"),
        (lambda d: rewrite_manifest(d, lambda m: {**m, "version": 7}), "of version 7"),
        (lambda d: (d / "manifest.json").write_bytes(b"[" * 100_000), "not what a snapshot has"),
    ],
)
def test_the_command_ends_with_2_and_a_line(
    directory: Path, harm: Callable[[Path], object], said: str
) -> None:
    harm(directory)
    before = contents(directory.parent)
    ended = subprocess.run(
        [sys.executable, "-m", "vdev", "run", "--restore", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert said in line
    assert contents(directory.parent) == before


# Whose configuration the new machine has


def test_a_machine_goes_on_as_itself(directory: Path) -> None:
    found = read(str(directory))
    assert config_of(found) == found.config
    assert config_of(found, name="other").name == "other"
    moved = config_of(found, disks=str(directory.parent / "mine"))
    assert [disk.path for disk in moved.disks] == [
        str(directory.parent / "mine/disk0"),
        str(directory.parent / "others"),
    ]


def test_relative_directories_are_of_this_process(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory.parent)
    config = config_of(read(str(directory)), disks="mine")
    assert config.disks[0].path == str(directory.parent / "mine/disk0")


def test_a_clone_is_another_machine(tmp_path: Path) -> None:
    directory = written(tmp_path, nics=(NicConfig(tap="t0"), NicConfig(bridge="b0")))
    found = read(str(directory))
    clone = config_of(found, name="clone", disks=str(tmp_path / "clone"), clone=True)
    macs = [nic.mac for config in (found.config, clone) for nic in config.nics]
    assert len(set(macs)) == 4
    assert None not in macs
    again = config_of(found, name="clone2", disks=str(tmp_path / "clone2"), clone=True)
    assert not {nic.mac for nic in again.nics} & set(macs)
    assert config_of(found, name="renamed").nics == found.config.nics


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs a name of its own"),
        ({"name": "source", "disks": "x"}, "needs a name of its own"),
        ({"name": "clone"}, "needs a directory for disks of its own"),
        ({"name": "-", "disks": "x"}, "name '-'"),
        ({"name": "clone", "disks": "snapshot"}, "that is the snapshot"),
        ({"name": "clone", "disks": "snapshot/disks"}, "that is the snapshot"),
        ({"name": "clone", "disks": "link/disks"}, "that is the snapshot"),
        ({"name": "clone", "disks": "taken"}, "those of source lie there"),
    ],
)
def test_what_a_clone_cannot_be(
    directory: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], said: str
) -> None:
    monkeypatch.chdir(directory.parent)
    Path("link").symlink_to("snapshot")
    Path("taken").mkdir()
    Path("taken/disk0").symlink_to("../disk")
    with pytest.raises(UserError, match=said):
        config_of(read(str(directory)), **options, clone=True)


def test_a_clone_on_mmio_has_no_cards(tmp_path: Path) -> None:
    """Nothing is plugged in anew there, so its driver would keep the source's address."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    found = read(str(written(tmp_path / "a", transport="mmio", nics=(NicConfig(tap="t0"),))))
    with pytest.raises(UserError, match="cannot be plugged in anew"):
        config_of(found, name="clone", disks="x", clone=True)
    assert config_of(found).nics == found.config.nics
    without = read(str(written(tmp_path / "b", transport="mmio")))
    assert config_of(without, name="clone", disks="x", clone=True).name == "clone"


def test_a_manifest_is_text_for_people(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["config"]["name"] == "source"
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
