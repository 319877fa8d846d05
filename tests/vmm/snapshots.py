"""Snapshots to be tampered with, and machines without KVM that go on from them."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import strategies as st

from tests.vmm.boot_images import bzimage
from tests.vmm.rig import FakeVm
from vdev.vmm.config import DiskConfig, MachineConfig
from vdev.vmm.layout import MIB
from vdev.vmm.ram import Ram
from vdev.vmm.snapshot_writer import Folder, Writer

SIZE = 32 * MIB
STATE = {"devices": {}, "vcpus": ["AA=="], "text": "ä", "number": 1 << 63}
DATA = {0: b"first", 5 * MIB - 2: b"across", SIZE - 4: b"last"}


class Vcpu:
    """Its state is one that it takes back."""

    def enter(self, entry: object) -> None:
        """Begins anywhere."""

    def save(self) -> bytes:
        return b"a vCPU"

    def load(self, state: bytes) -> None:
        if state != self.save():
            raise OSError(22, "KVM takes no such vCPU")

    def stats(self) -> dict[str, int]:
        return {}


class Vm(FakeVm):
    """A `FakeVm` for a whole machine: its vCPUs do nothing."""

    def __init__(self, *_arguments: object) -> None:
        super().__init__()
        self.vcpus: list[Vcpu] = []
        self.runs = False

    def add_vcpu(self, *_arguments: object) -> None:
        self.vcpus.append(Vcpu())

    def save(self) -> bytes:
        return b"a VM"

    def load(self, state: bytes) -> None:
        if state != self.save():
            raise OSError(22, "KVM takes no such VM")

    def log_dirty(self, on: bool) -> None:
        """Nothing but devices writes."""

    def take_dirty(self, _slot: int, pages: int) -> bytearray:
        return bytearray(-(-pages // 64) * 8)

    def start(self) -> None:
        """No threads."""

    def resume(self) -> None:
        self.runs = True

    async def pause(self) -> None:
        self.runs = False

    async def close(self) -> None:
        self.runs = False


@contextlib.contextmanager
def without_kvm() -> Iterator[None]:
    """Machines have a `Vm` instead of KVM, and sockets in a directory of their own."""
    board = "vdev.vmm.board."
    with (
        tempfile.TemporaryDirectory() as sockets,
        mock.patch("vdev.vmm.machine.runtime_dir", return_value=Path(sockets)),
        mock.patch(board + "VM", Vm),
        mock.patch(board + "open_kvm", side_effect=lambda: os.open("/dev/null", os.O_RDWR)),
        mock.patch(board + "cpuid.supported", return_value=[]),
    ):
        yield


def machine_in(place: Path, **fields: Any) -> MachineConfig:
    """A machine whose kernel and disks (one of them only for reading) are files in `place`."""
    (place / "kernel").write_bytes(bzimage())
    (place / "disk").write_bytes(b"as it was".ljust(MIB, b"."))
    (place / "others").write_bytes(b"not ours".ljust(MIB, b"."))
    return MachineConfig(
        **{
            "name": "source",
            "kernel": str(place / "kernel"),
            "memory": SIZE,
            "cpus": 2,
            "balloon": True,
            "disks": (
                DiskConfig(str(place / "disk"), engine="threads"),
                DiskConfig(str(place / "others"), read_only=True, engine="threads"),
            ),
            **fields,
        }
    )


def save(directory: Path, config: MachineConfig, state: Mapping[str, Any], ram: Ram) -> None:
    """Writes the snapshot of a machine that stands still."""
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(Folder(str(directory)))
        disks = {
            disk.id: stack.enter_context(open(disk.path, "rb")).fileno()
            for disk in config.disks
            if not disk.read_only and os.path.isfile(disk.path)
        }
        writer = Writer(sink, ram)
        writer.copy_ram()
        writer.finish(config, state, disks)


def written(place: Path, **fields: Any) -> Path:
    """A snapshot of a machine in `place`."""
    place.mkdir(exist_ok=True)
    config = machine_in(place, **fields)
    ram = Ram(config.memory)
    for address, data in DATA.items():
        ram.write(address, data)
    save(place / "snapshot", config, STATE, ram)
    ram.close()
    return place / "snapshot"


def rewrite_manifest(directory: Path, change: Callable[[Any], Any]) -> None:
    """Changes the manifest as somebody who knows about its checksum."""
    manifest = json.loads((directory / "manifest.json").read_bytes())
    manifest.pop("checksum")
    manifest = change(manifest)
    if isinstance(manifest, dict):
        text = json.dumps(manifest, sort_keys=True).encode()
        manifest["checksum"] = zlib.crc32(text)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def rewrite_state(directory: Path, change: Callable[[Any], Any]) -> None:
    """The same for the state."""
    state = change(json.loads((directory / "state.json").read_bytes()))
    text = json.dumps(state).encode()
    (directory / "state.json").write_bytes(text)

    def record(manifest: Any) -> Any:
        described = {"size": len(text), "crc32": zlib.crc32(text)}
        manifest["files"]["state.json"] = described
        return manifest

    rewrite_manifest(directory, record)


@contextlib.contextmanager
def kept(directory: Path) -> Iterator[None]:
    """Manifest and state are again what they were."""
    texts = {name: (directory / name).read_bytes() for name in ("manifest.json", "state.json")}
    try:
        yield
    finally:
        for name, text in texts.items():
            (directory / name).write_bytes(text)


def contents(place: Path) -> dict[str, tuple[int, ...]]:
    """All that is below `place` but manifests and states; who writes to any of it is noticed."""
    return {
        str(path.relative_to(place)): (status.st_ino, status.st_size, status.st_ctime_ns)
        for path in place.rglob("*")
        if path.suffix != ".json" and not stat.S_ISDIR((status := path.lstat()).st_mode)
    }


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([1 << 31, 1 << 32, (1 << 64) - 1, 1 << 64, -(1 << 63), 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["../../etc/passwd", "/", ".", "disks/..", "a\0b", "\ud800", "\udc80", "disk0"]
    ),
)
VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def mutate(data: st.DataObject, tree: Any) -> Any:
    """Changes a JSON value at a place or two: there, away, twice, or something else."""
    for _ in range(data.draw(st.integers(1, 2), "changes")):
        tree = _mutated(data, tree)
    return tree


def _mutated(data: st.DataObject, tree: Any) -> Any:
    """The deeper, the likelier: what lies at the surface is soon known."""
    inner = (dict, list)
    if not isinstance(tree, inner) or not tree or data.draw(st.integers(0, 7)) == 0:
        if type(tree) is int and data.draw(st.booleans()):
            return tree ^ 1 << data.draw(st.integers(0, 66))
        return data.draw(VALUES, "value")
    keys = sorted(tree) if isinstance(tree, dict) else range(len(tree))
    key: Any = data.draw(st.sampled_from(keys), "key")
    action = data.draw(st.sampled_from(["within"] * 6 + ["away", "twice"]), "action")
    if action == "within":
        tree[key] = _mutated(data, tree[key])
    elif action == "away":
        del tree[key]
    elif isinstance(tree, list):
        tree.append(tree[key])
    else:
        tree[data.draw(st.sampled_from([f"{key}2", "x", "0", "-1", "99"]), "new key")] = tree[key]
    return tree
