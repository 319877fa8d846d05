"""Disks and cards come and go while the guest runs, which notices by itself."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.lab.innermost import Material
from tests.vmm.kvm.guest import MIB, Guest, booted, config_of, within
from vdev.errors import UserError
from vdev.vmm.config import DiskConfig, NicConfig

_PATTERN = bytes(range(256)) * 4096


async def test_disks_and_cards_come_and_go(material: Material, tmp_path: Path) -> None:
    image = tmp_path / "plugged.img"
    config = config_of(material.generic, cpus=2, disks=(DiskConfig("null:32M"),))
    async with booted(config) as guest:
        machine = guest.machine
        await guest.sh("modprobe virtio_net")
        for _ in range(3):
            image.write_bytes(_PATTERN)
            assert await machine.add_disk(DiskConfig(str(image), serial="new")) == "disk1"
            assert await machine.add_nic(NicConfig(tap="plugged0")) == "nic0"
            await _comes(guest, "/sys/block/vdb")
            await _comes(guest, "/sys/class/net/eth0")
            assert await guest.sh("cat /sys/block/vdb/serial") == "new"
            await guest.sh("ip link set eth0 up")
            await guest.sh(
                "dd if=/dev/vdb bs=64k count=8 skip=1 iflag=direct of=/run/copy &&"
                "dd if=/run/copy of=/dev/vdb bs=64k oflag=direct conv=notrunc"
            )
            with pytest.raises(UserError, match="disk1"):
                await machine.add_disk(DiskConfig("null:1M", id="disk1"))

            removed = asyncio.gather(machine.remove("disk1"), machine.remove("nic0"))
            await within(removed, "the guest does not let go")
            await guest.sh("! test -e /sys/block/vdb && ! test -e /sys/class/net/eth0")
            assert [device["id"] for device in machine.info()["devices"]] == ["disk0", "rng"]
            with pytest.raises(UserError, match="disk1"):
                await machine.remove("disk1")
            assert _content(image) == _PATTERN[65536 : 9 * 65536] + _PATTERN[8 * 65536 :]
            assert "plugged0" not in os.listdir("/sys/class/net")
        errors = await guest.sh("dmesg -r | grep -E '^<[0-3]>.*(pci|virtio)' || true")
        assert not errors


@pytest.mark.long
async def test_many_disks_at_once_fill_the_slots(material: Material) -> None:
    """31 slots: each device gets one, the next is refused, and one that is freed is used again."""
    async with booted(config_of(material.cloud, disks=(DiskConfig("null:1M"),))) as guest:
        machine = guest.machine
        added = [await machine.add_disk(DiskConfig("null:2M")) for _ in range(29)]
        with pytest.raises(UserError, match="slot"):
            await machine.add_disk(DiskConfig("null:2M"))
        await guest.sh("until [ $(ls -d /sys/block/vd* | wc -l) = 30 ]; do sleep 0.1; done")
        await within(machine.remove(added[7]), "the guest does not let go")
        assert await machine.add_disk(DiskConfig("null:3M")) == added[7]
        await guest.sh("until [ $(ls -d /sys/block/vd* | wc -l) = 30 ]; do sleep 0.1; done")
        assert await guest.sh(
            "cat /sys/block/vd*/size | sort -n | uniq -c | awk '{print $1,$2}'"
        ) == ("1 2048\n28 4096\n1 6144\n")
        await guest.reset()
        assert await guest.sh("ls -d /sys/block/vd* | wc -l") == "30\n"


@pytest.mark.long
async def test_a_disk_that_goes_under_load_takes_nothing_along(
    material: Material, tmp_path: Path
) -> None:
    kept, going = tmp_path / "kept.img", tmp_path / "going.img"
    for image in (kept, going):
        image.write_bytes(bytes(64 * MIB))
    config = config_of(material.cloud, cpus=2, disks=(DiskConfig(str(kept)),))
    load = (
        "(set -e; for n in 1 2 3 4; do dd if=/run/data of={0} bs=64k oflag=direct conv=notrunc;"
        " dd if={0} of=/run/back{1} bs=64k count=256 iflag=direct;"
        " cmp /run/data /run/back{1}; done) >/run/log{1} 2>&1 & job{1}=$!"
    )
    async with booted(config) as guest:
        machine = guest.machine
        await guest.sh("head -c 16777216 /dev/urandom >/run/data")
        await machine.add_disk(DiskConfig(str(going), id="going"))
        await _comes(guest, "/sys/block/vdb")
        await guest.sh(load.format("/dev/vda", 1) + "; " + load.format("/dev/vdb", 2))
        await within(machine.remove("going"), "the guest does not let go")
        await guest.sh("wait $job1 || { cat /run/log1; exit 1; }")
        await guest.sh("wait $job2; ! test -e /sys/block/vdb")
        digest = (await guest.sh("sha256sum </run/data")).split()[0]
        assert (await guest.sh("head -c 16777216 /dev/vda | sha256sum")).split()[0] == digest
        assert await machine.add_disk(DiskConfig(str(going), id="going")) == "going"
        await _comes(guest, "/sys/block/vdb")
        await guest.sh("dd if=/dev/vdb of=/dev/null bs=1M count=4")


@pytest.mark.long
async def test_with_mmio_nothing_can_be_plugged(material: Material) -> None:
    async with booted(config_of(material.cloud, transport="mmio")) as guest:
        with pytest.raises(UserError, match="MMIO"):
            await guest.machine.add_disk(DiskConfig("null:1M"))
        with pytest.raises(UserError, match="MMIO"):
            await guest.machine.remove("rng")


async def _comes(guest: Guest, path: str) -> None:
    await guest.sh(f"until [ -e {path} ]; do sleep 0.05; done")


def _content(path: Path) -> bytes:
    return path.read_bytes()
