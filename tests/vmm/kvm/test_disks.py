"""Disks: file systems and checked I/O in a guest, and what the host finds in the image."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from tests.lab.innermost import Material
from tests.lab.process import run
from tests.vmm.kvm.guest import MIB, booted, config_of, eventually, started, within
from vdev.vmm.api import End, Outcome, State
from vdev.vmm.config import DiskConfig
from vdev.vmm.machine import Machine

_FIO = (
    "fio --name=checked --ioengine=libaio --direct=1 --bsrange=512-64k --blockalign=512 "
    "--rw=randwrite --iodepth=16 --verify=crc32c --verify_fatal=1 --do_verify=1 "
    "--randrepeat=0 --verify_state_save=0 --output-format=terse"
)


@pytest.fixture
async def image(tmp_path: Path) -> Path:
    """A disk of 128 MiB with an ext4 on it."""
    path = tmp_path / "data.img"
    await run("mkfs.ext4", "-q", "-L", "data", path, "128M")
    return path


@pytest.mark.parametrize("transport", ["pci", pytest.param("mmio", marks=pytest.mark.long)])
async def test_a_disk_keeps_what_the_guest_writes(
    material: Material, tools: Path, image: Path, transport: str
) -> None:
    config = config_of(
        material.generic,
        transport=transport,
        cpus=2,
        disks=(
            DiskConfig(str(image), serial="data-0001", queues=2, id="data"),
            DiskConfig(str(tools), read_only=True),
        ),
    )
    async with booted(config) as guest:
        sh = guest.sh
        assert await sh("cat /sys/block/vda/serial") == "data-0001"
        assert len((await sh("ls -d /sys/block/vda/mq/*")).split()) == 2
        assert await sh("blockdev --getsize64 /dev/vda") == f"{128 * MIB}\n"

        assert await sh("blockdev --getro /dev/vdb") == "1\n"
        await sh("dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=notrunc", code=1)

        await sh("mkdir -p /data /tools && mount -t ext4 /dev/vda /data")
        await sh("mount -t ext4 -o ro,noload /dev/vdb /tools")
        await sh("for d in dev proc sys; do mount --bind /$d /tools/$d; done")
        await sh("mount --bind /data /tools/mnt")
        digest = (await sh("head -c 9000001 /dev/urandom | tee /data/file | sha256sum")).split()[0]
        assert (await sh(f"chroot /tools {_FIO} --filename=/mnt/fio --size=12M")).startswith("3;")

        before = guest.machine.counters()["devices"]["data"]
        await sh("sync; echo 3 >/proc/sys/vm/drop_caches")
        assert (await sh("sha256sum /data/file")).split()[0] == digest
        counters = guest.machine.counters()["devices"]["data"]
        assert counters["total"]["errors"] == 0, counters
        assert counters["total"]["requests"] > before["total"]["requests"]
        assert all(queue["requests"] for queue in counters["queues"]), counters

        await sh("dd if=/dev/zero of=/data/fill bs=1M count=32; sync")
        allocated = _allocated(image)
        await sh("rm /data/fill; sync; fstrim /data")
        assert _allocated(image) < allocated - 24 * MIB

        await sh("umount /tools/mnt /data")
        assert await guest.power_off() == Outcome(End.SHUTDOWN)
    await run("e2fsck", "-fn", image)
    content = await run("debugfs", "-R", "cat /file", image)
    assert hashlib.sha256(content).hexdigest() == digest


@pytest.mark.long
async def test_debian_runs_from_our_disk(material: Material, tools: Path) -> None:
    """Its root is a disk of ours; on it glibc, a service manager's tools, and a login shell."""
    config = config_of(
        material.cloud,
        disks=(DiskConfig(str(tools), read_only=True),),
        script="mkdir /root; mount -t ext4 -o ro,noload /dev/vda /root\n"
        "for d in dev proc sys run; do mount --move /$d /root/$d; done\n"
        "exec chroot /root /bin/bash -lc '. /etc/os-release; echo ON $VERSION_CODENAME; "
        "findmnt -no SOURCE,FSTYPE /'",
    )
    async with started(config) as guest:
        said = await guest.until(re.compile(rb"GUEST EXIT \d+"))
        assert b"ON bookworm" in said, said
        assert re.search(rb"/dev/vda +ext4", said), said
        assert said.endswith(b"GUEST EXIT 0")


async def test_io_survives_pauses(material: Material, tools: Path, tmp_path: Path) -> None:
    """Nothing moves while the machine stands, and nothing is lost."""
    image = tmp_path / "data.img"
    image.write_bytes(bytes(4 * MIB))
    config = config_of(
        material.cloud,
        cpus=2,
        disks=(DiskConfig(str(image), queues=2, id="data"), DiskConfig(str(tools), read_only=True)),
    )
    async with booted(config) as guest:
        machine = guest.machine
        await guest.sh("mkdir /tools && mount -t ext4 -o ro,noload /dev/vdb /tools")
        await guest.sh("for d in dev proc sys; do mount --bind /$d /tools/$d; done")
        await guest.sh(f"chroot /tools {_FIO} --filename=/dev/vda --loops=8 >/run/out &")
        await eventually(lambda: _requests(machine) > 20, "fio does not begin")
        moved = []
        for _ in range(5):
            await within(machine.pause(), "it does not stand still")
            await machine.pause()
            assert machine.state is State.PAUSED
            first = _moves(machine)
            content = _digest(image)
            assert _moves(machine) == first
            assert _digest(image) == content
            moved.append(_requests(machine))
            await machine.resume()
            await guest.sh("sleep 0.3")
        assert moved == sorted(moved)
        assert moved[0] < moved[-1], moved
        await guest.sh("wait; cut -d ';' -f 1-5 /run/out | grep '^3;.*;0$' || cat /run/out")
        assert (await guest.sh("cut -d ';' -f 5 /run/out")).strip() == "0"
        info = machine.info()
        assert {d["id"]: d["kind"] for d in info["devices"]} == {
            "data": "blk",
            "disk0": "blk",
            "rng": "rng",
        }
        # Set-up alone is answered by the event loop, some twenty accesses a device: no request is.
        told = sum(vcpu["told"] for vcpu in machine.counters()["vcpus"])
        assert 0 < told < 40 * len(info["devices"]), machine.counters()["vcpus"]
        assert _requests(machine) > 10 * told


def _moves(machine: Machine) -> tuple[object, list[int]]:
    """What cannot change while a machine stands."""
    counters = machine.counters()
    return counters["devices"], [vcpu["exits"] for vcpu in counters["vcpus"]]


def _requests(machine: Machine) -> int:
    requests: int = machine.counters()["devices"]["data"]["total"]["requests"]
    return requests


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
