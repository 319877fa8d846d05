"""What the user's process opens for a machine that opens nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from vdev.blk.image import Image, open_image
from vdev.errors import UserError
from vdev.machines.client import MachineClient
from vdev.machines.control import MachineControl
from vdev.server import control
from vdev.vmm.api import Opened
from vdev.vmm.config import DiskConfig, NicConfig
from vdev.vmm.ram import Ram
from vdev.vmm.sandbox import SandboxReport
from vdev.vmm.snapshot import read
from vdev.vmm.snapshot_writer import Given, Writer, is_saved

from .fake import FakeMachine

REPORT = SandboxReport("1:1", (), False, 0, True, (), (), ())


class ConfinedMachine(FakeMachine):
    """Uses what it is given, and opens nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.config = dataclasses.replace(self.config, memory=32 << 20)
        self.sandbox = REPORT
        self.images: dict[str, Image] = {}
        self.fails = False

    async def __aexit__(self, *_: object) -> None:
        for image in self.images.values():
            image.close()
        await super().__aexit__()

    def info(self) -> dict[str, Any]:
        disks = [
            {"id": id, "image": {"kind": image.kind, "read_only": image.read_only}}
            for id, image in self.images.items()
        ]
        return {**super().info(), **self._confinement(), "devices": disks}

    async def add_disk(self, disk: DiskConfig, opened: Opened | None = None) -> str:
        assert (set(opened or ()) == {"image"}) != disk.path.startswith("null:")
        fd = opened["image"] if opened else None
        id = f"disk{len(self.images)}"
        self.images[id] = open_image(disk.path, read_only=disk.read_only, cache=disk.cache, fd=fd)
        return id

    async def add_nic(self, nic: NicConfig, opened: Opened | None = None) -> str:
        assert nic.socket is not None
        assert opened is not None
        with socket.socket(fileno=os.dup(opened["socket"])) as sock:
            sock.sendall(b"from the machine")
        return "nic0"

    async def snapshot(
        self,
        directory: str,
        *,
        files: Opened | None = None,
        base: str | None = None,
        track: bool = False,
    ) -> None:
        assert files is not None
        disks = {id: image.fd for id, image in self.images.items() if is_saved(image)}
        ram = Ram(self.config.memory)
        try:
            ram.write(4096, b"remembered")
            with Given(files, disks, has_base=base is not None) as sink:
                if self.fails:
                    raise UserError("no more")
                writer = Writer(sink, ram)
                if base is not None:
                    writer.copy_base(Path(base, "memory"))
                    writer.copy_pages([(4096, 8192)])
                else:
                    writer.copy_ram()
                config = dataclasses.replace(
                    self.config,
                    disks=tuple(DiskConfig(self.images[id].path, id=id) for id in disks),
                )
                writer.finish(config, {"devices": {}}, disks)
        finally:
            ram.close()


@pytest_asyncio.fixture
async def machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[ConfinedMachine]:
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(control, "runtime_dir", lambda: tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    async with ConfinedMachine() as machine, MachineControl(machine).serving():
        await machine.start()
        yield machine


async def client(verb: str, *arguments: Any) -> Any:
    return await asyncio.to_thread(getattr(MachineClient("fake"), verb), *arguments)


def make_image(name: str, content: bytes = b"") -> None:
    with open(name, "wb") as file:
        file.write(content)
        file.truncate(1 << 20)


async def test_a_disk_is_opened_here(machine: ConfinedMachine, tmp_path: Path) -> None:
    make_image("disk.img", b"hello")
    before = len(os.listdir("/proc/self/fd"))
    assert await client("add_disk", DiskConfig("disk.img")) == "disk0"
    image = machine.images["disk0"]
    assert image.path == str(tmp_path / "disk.img")
    assert os.pread(image.fd, 5, 0) == b"hello"
    # The machine's own descriptor, and its end of the connection until that has ended.
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    # Locked, though whoever opened it has closed it.
    with pytest.raises(UserError, match="in use"):
        await client("add_disk", DiskConfig("disk.img"))
    with pytest.raises(UserError, match="no such file"):
        await client("add_disk", DiskConfig("none.img"))
    os.chmod("disk.img", 0o444)
    make_image("other.img")
    assert await client("add_disk", DiskConfig("other.img", read_only=True)) == "disk1"
    assert machine.images["disk1"].read_only
    assert await client("add_disk", DiskConfig("null:1M")) == "disk2"


async def test_a_card_on_a_socket_is_connected_here(machine: ConfinedMachine) -> None:
    with pytest.raises(UserError, match="backend: No such file"):
        await client("add_nic", NicConfig(socket="backend"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("backend")
        listener.listen()
        assert await client("add_nic", NicConfig(socket="backend")) == "nic0"
        with listener.accept()[0] as connection, connection.makefile("rb") as sent:
            assert sent.read() == b"from the machine"


async def test_a_snapshot_appears_whole(machine: ConfinedMachine, tmp_path: Path) -> None:
    make_image("disk.img", b"hello")
    make_image("fixed.img")
    for disk in (DiskConfig("disk.img"), DiskConfig("fixed.img", read_only=True)):
        await client("add_disk", disk)
    await client("add_disk", DiskConfig("null:1M"))
    # What the machine has open is saved, whatever its path means by now.
    os.rename("disk.img", "moved.img")
    make_image("disk.img", b"another")
    await client("snapshot", "snapshots")
    snapshot = read(str(tmp_path / "snapshots"))
    assert set(snapshot.disks) == {"disk0"}
    saved = snapshot.disks["disk0"].read_bytes()
    assert (saved[:7], len(saved)) == (b"hello\0\0", 1 << 20)
    assert snapshot.memory.read_bytes()[4096:].startswith(b"remembered")
    assert snapshot.state == {"devices": {}}
    with pytest.raises(UserError, match="it exists"):
        await client("snapshot", "snapshots")


async def test_a_snapshot_that_fails_leaves_nothing(
    machine: ConfinedMachine, tmp_path: Path
) -> None:
    make_image("disk.img")
    await client("add_disk", DiskConfig("disk.img"))
    machine.fails = True
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match="no more"):
        await client("snapshot", "snapshot")
    with pytest.raises(UserError, match="No such file or directory"):
        await client("snapshot", "none/snapshot")
    assert sorted(os.listdir(tmp_path)) == before


async def test_files_that_are_not_those_of_the_snapshot(tmp_path: Path) -> None:
    full, folder = tmp_path / "full", os.open(tmp_path, os.O_RDONLY)
    full.write_text("full")
    fd = os.open(full, os.O_RDWR)
    try:
        names = ["manifest.json", "state.json", "memory"]
        for given in ([], names[1:], [*names, "disks/disk0"], ["disks/disk0"]):
            with pytest.raises(UserError, match=r"it has the files manifest\.json, .*given: "):
                Given(dict.fromkeys(given, fd), ())
        with pytest.raises(UserError, match="not empty"):
            Given(dict.fromkeys(names, fd), ()).file("memory")
        with pytest.raises(UserError, match="is no file"):
            Given(dict.fromkeys(names, folder), ()).file("memory")
    finally:
        os.close(fd)
        os.close(folder)
    assert full.read_text() == "full"


async def test_a_machine_that_is_not_confined_is_told_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "runtime_dir", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    async with FakeMachine() as machine, MachineControl(machine).serving():
        await machine.start()
        assert await client("add_disk", DiskConfig("none.img")) == "disk1"
        assert machine.asked == [DiskConfig(str(tmp_path / "none.img"))]
        with pytest.raises(UserError, match="cannot write a snapshot"):
            await client("snapshot", "snapshot")
        assert not (tmp_path / "snapshot").exists()
    with pytest.raises(UserError, match="'fake' does not run"):
        MachineClient("fake")
