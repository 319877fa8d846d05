"""Machines that are large, or whose memory is of another kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.innermost import Material
from tests.vmm.kvm import guest as guests
from tests.vmm.kvm.guest import MIB, booted, config_of, started
from vdev.errors import UserError
from vdev.vmm.api import End, Outcome
from vdev.vmm.config import DiskConfig

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_PAGES = 64
CPUS = 16

pytestmark = pytest.mark.timeout(900)


def _free() -> int:
    """Neither used nor reserved."""
    free, reserved = (int((_POOL / f"{n}_hugepages").read_text()) for n in ("free", "resv"))
    return free - reserved


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """So many huge pages that are free."""
    before = (_POOL / "nr_hugepages").read_text()
    (_POOL / "nr_hugepages").write_text(str(_PAGES))
    assert _free() == _PAGES
    yield _PAGES
    (_POOL / "nr_hugepages").write_text(before)


@pytest.mark.long
async def test_memory_of_huge_pages(material: Material, huge_pages: int, tmp_path: Path) -> None:
    """They are the guest's while it lives, are all it has, and a disk's requests go to them."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(16 * MIB))
    memory = huge_pages * 2 * MIB
    config = config_of(
        material.cloud,
        hugepages=True,
        memory=memory,
        disks=(DiskConfig(str(disk)),),
    )
    async with booted(config) as guest:
        assert _free() == 0
        await guest.sh("head -c 16777216 /dev/urandom >/run/data")
        await guest.sh("dd if=/run/data of=/dev/vda bs=64k oflag=direct")
        await guest.sh("dd if=/dev/vda bs=64k iflag=direct | cmp - /run/data")
        with pytest.raises(UserError, match="64 huge pages of 2 MiB: the host has not so many"):
            async with started(config):
                pass
        await guest.reset()
        await guest.sh("dd if=/dev/vda of=/dev/null bs=64k iflag=direct")
        assert await guest.power_off() == Outcome(End.SHUTDOWN)


@pytest.mark.long
async def test_sixteen_processors_work(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two of the host's: each is there, runs what is put on it, and is interrupted."""
    # Which takes its time, most of it to boot.
    monkeypatch.setattr(guests, "GUARD", 600.0)
    config = config_of(
        material.cloud,
        cpus=CPUS,
        words="mitigations=off lab.modules=virtio_pci,virtio_blk",
        rng=False,
        disks=(DiskConfig("null:64M", queues=CPUS),),
    )
    async with booted(config) as guest:
        assert await guest.sh("nproc") == f"{CPUS}\n"
        for cpu in range(CPUS):
            read = "dd if=/dev/vda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null"
            await guest.sh(f"taskset {1 << cpu:x} {read}")
        interrupts = await guest.sh("grep 'req\\.' /proc/interrupts")
        counts = [list(map(int, line.split()[1 : CPUS + 1])) for line in interrupts.splitlines()]
        assert len(counts) == CPUS
        assert all(any(count) for count in counts), interrupts
        queues = guest.machine.counters()["devices"]["disk0"]["queues"]
        assert all(queue["requests"] for queue in queues), queues
        assert await guest.power_off() == Outcome(End.SHUTDOWN)
