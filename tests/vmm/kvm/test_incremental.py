"""Snapshots that start from the one before: they hold what a whole one holds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.lab.innermost import Material
from tests.vmm.kvm.guest import MIB, booted, config_of
from vdev.errors import UserError
from vdev.vmm import snapshot as snapshots
from vdev.vmm.config import DiskConfig, NicConfig
from vdev.vmm.machine import Machine

_BLOCK = 4096


def differences(one: Path, other: Path) -> list[int]:
    """Offsets of the pages in which two memory files differ."""
    with open(one, "rb") as a, open(other, "rb") as b:
        assert os.fstat(a.fileno()).st_size == os.fstat(b.fileno()).st_size
        pages = range(0, os.fstat(a.fileno()).st_size, _BLOCK)
        return [at for at in pages if a.read(_BLOCK) != b.read(_BLOCK)]


@pytest.mark.long
async def test_nothing_that_was_written_is_missing(material: Material, tmp_path: Path) -> None:
    """vCPUs and devices write between two snapshots; the second, read from the log of what was
    written, is compared with all of RAM, byte for byte, and goes on."""
    disk = tmp_path / "disk.img"
    with disk.open("wb") as file:
        file.write(os.urandom(16 * MIB))
    config = config_of(
        material.generic,
        cpus=2,
        disks=(DiskConfig(str(disk), id="d"),),
        nics=(NicConfig(tap="vdevinc0", address="10.77.0.1/24"),),
    )
    first, second, whole = (str(tmp_path / name) for name in ("first", "second", "whole"))
    async with booted(config) as guest:
        machine = guest.machine
        await guest.sh("ip addr add 10.77.0.2/24 dev eth0; ip link set eth0 up")
        await machine.snapshot(first, track=True)
        before = int((await guest.sh("md5sum /dev/vda >/run/sum; wc -c </run/sum")).strip())
        assert before
        await guest.sh("ping -c 3 10.77.0.1; head -c 5000000 /dev/urandom >/run/noise")
        await machine.pause()
        taken = list(machine._board.tracker.take())
        assert taken, "nothing was written?"
        # Taken out: handed back by writing the pages once more into the next copy.
        machine._board.tracker.take = lambda: iter(taken)  # type: ignore[method-assign]
        await machine.snapshot(second, base=first)
        await machine.snapshot(whole)
        assert differences(Path(second, "memory"), Path(whole, "memory")) == []
        changed = differences(Path(first, "memory"), Path(whole, "memory"))
        assert changed
        size = sum(end - start for start, end in taken)
        assert len(changed) * _BLOCK <= size < config.memory // 2
        with pytest.raises(UserError, match="not the last snapshot"):
            await machine.snapshot(str(tmp_path / "third"), base=first)
        with pytest.raises(UserError, match="it exists"):
            await machine.snapshot(whole)
        await machine.resume()
        assert await guest.sh("echo goes on") == "goes on\n"
    read = snapshots.read(second)
    async with Machine(snapshots.config_of(read, disks=str(tmp_path / "disks")), read) as machine:
        await machine.start()
        await machine.console.write(b"cat /run/sum; echo 'CHECK 'ED\n")
        seen = b""
        async for data in machine.console.attach(history=False):
            seen += data
            if b"CHECK ED" in seen:
                break
        assert b"/dev/vda" in seen
