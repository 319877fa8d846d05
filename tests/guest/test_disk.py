"""A guest's disks: its root, a data disk of two queues, and one that must not be written."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.lab import fio, image
from tests.lab.lab import Lab
from tests.lab.process import run
from tests.lab.qemu import Guest
from tests.lab.server import BlkDevice, Server

pytestmark = pytest.mark.asyncio(loop_scope="session")

_SIZE = 256 << 20
_MARK = b"not to be written"


@dataclass(frozen=True)
class Disks:
    """The booted guest and what its disks are made of."""

    server: Server
    guest: Guest
    data: BlkDevice
    readonly: BlkDevice


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def disks(lab: Lab) -> AsyncIterator[Disks]:
    root = lab.blk("disk-root", await lab.root_image())
    data = lab.blk("disk-data", lab.blank("disk-data", _SIZE), queues=2, serial="data-0123456789")
    sealed = lab.blank("disk-readonly", 16 << 20)
    _write(sealed, _MARK)
    readonly = lab.blk("disk-readonly", sealed, read_only=True)
    async with (
        lab.serving(root, data, readonly) as server,
        lab.boot([root, data, readonly]) as guest,
    ):
        yield Disks(server, guest, data, readonly)


def _write(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)


def _read(path: Path, length: int) -> bytes:
    with path.open("rb") as file:
        return file.read(length)


async def test_the_root_file_system_is_on_the_served_disk(disks: Disks, lab: Lab) -> None:
    found = await disks.guest.run("findmnt -no SOURCE,FSTYPE /; uname -r")
    assert found.output.split() == ["/dev/vda", "ext4", lab.kernel_release]


async def test_size_and_serial_are_those_of_the_configuration(disks: Disks) -> None:
    seen = await disks.guest.run("blockdev --getsize64 /dev/vdb; cat /sys/block/vdb/serial")
    assert seen.output.split() == [str(_SIZE), disks.data.serial]


async def test_every_queue_of_a_disk_is_used(disks: Disks) -> None:
    assert (await disks.guest.run("ls /sys/block/vdb/mq")).output.split() == ["0", "1"]
    # One writer on each of the two CPUs, and so on each queue.
    written = await disks.guest.run(
        "for cpu in 0 1; do"
        "  taskset -c $cpu dd if=/dev/urandom of=/tmp/part$cpu bs=1M count=4 status=none;"
        "  taskset -c $cpu dd if=/tmp/part$cpu of=/dev/vdb bs=64k seek=$((cpu * 64))"
        "    oflag=direct status=none &"
        " done; wait; cat /tmp/part0 /tmp/part1 | sha256sum;"
        " dd if=/dev/vdb bs=1M count=8 iflag=direct status=none | sha256sum; rm /tmp/part?"
    )
    sent, stored = written.output.split("\n")[:2]
    assert sent == stored
    for queue in await disks.server.queue_stats(disks.data.socket):
        assert queue["bytes_written"] >= 4 << 20


async def test_a_file_system_keeps_what_was_written(disks: Disks) -> None:
    guest = disks.guest
    before = await guest.run(
        "mkfs.ext4 -q -F /dev/vdb && mount /dev/vdb /mnt"
        " && dd if=/dev/urandom of=/mnt/file bs=1M count=32 status=none"
        " && mkdir -p /mnt/many"
        " && for n in $(seq 200); do echo $n >/mnt/many/$n; done"
        " && sha256sum /mnt/file && umount /mnt"
    )
    after = await guest.run(
        "fsck.ext4 -fn /dev/vdb >&2 && mount -o ro /dev/vdb /mnt"
        " && sha256sum /mnt/file && test $(ls /mnt/many | wc -l) = 200; umount /mnt"
    )
    assert before.output.split("\n")[0] in after.output
    # The host sees the very same file system in the image.
    await run("fsck.ext4", "-fn", disks.data.image)


async def test_fio_verifies_every_block(disks: Disks) -> None:
    result = await fio.verify(disks.guest, "/dev/vdb", 64, bs="512-128k")
    assert result.errors == 0
    assert result.read_bytes == result.written_bytes == 64 << 20
    assert image.allocated(disks.data.image) >= 64 << 20


async def test_discard_makes_holes_in_the_image(disks: Disks) -> None:
    guest = disks.guest
    await guest.run("dd if=/dev/urandom of=/dev/vdb bs=1M count=64 oflag=direct status=none")
    full = image.allocated(disks.data.image)
    await guest.run("blkdiscard --offset 0 --length 64M /dev/vdb")
    assert image.allocated(disks.data.image) <= full - (64 << 20)
    assert _read(disks.data.image, 64 << 20).count(0) == 64 << 20


async def test_fstrim_gives_deleted_files_back(disks: Disks) -> None:
    guest = disks.guest
    await guest.run(
        "mkfs.ext4 -q -F /dev/vdb && mount /dev/vdb /mnt"
        " && dd if=/dev/urandom of=/mnt/file bs=1M count=64 status=none && sync"
    )
    full = image.allocated(disks.data.image)
    await guest.run("rm /mnt/file && sync && fstrim /mnt && umount /mnt")
    assert image.allocated(disks.data.image) <= full - (60 << 20)


async def test_write_zeroes_clears_data(disks: Disks) -> None:
    guest = disks.guest
    await guest.run("dd if=/dev/urandom of=/dev/vdb bs=1M count=8 oflag=direct status=none")
    await guest.run("blkdiscard --zeroout --offset 1M --length 4M /dev/vdb")
    await guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    content = _read(disks.data.image, 8 << 20)
    assert content[1 << 20 : 5 << 20].count(0) == 4 << 20
    assert content[: 1 << 20].count(0) < 1 << 19
    compared = await guest.run(
        "dd if=/dev/vdb bs=1M skip=1 count=4 iflag=direct status=none | tr -d '\\000' | wc -c"
    )
    assert compared.output.strip() == "0"


async def test_a_read_only_disk_refuses_writes(disks: Disks) -> None:
    guest = disks.guest
    assert (await guest.run("blockdev --getro /dev/vdc")).output.strip() == "1"
    refused = await guest.run(
        "blockdev --setrw /dev/vdc; dd if=/dev/zero of=/dev/vdc bs=4k count=1 oflag=direct",
        check=False,
    )
    assert refused.code != 0
    assert re.search(r"not permitted|Read-only|error", refused.output, re.IGNORECASE)
    assert _read(disks.readonly.image, len(_MARK)) == _MARK
    seen = await guest.run(f"head -c {len(_MARK)} /dev/vdc")
    assert seen.output.encode() == _MARK


async def test_the_kernel_saw_no_disk_errors(disks: Disks) -> None:
    log = await disks.guest.run("dmesg | grep -E 'I/O error|EXT4-fs error|blk_update' || true")
    lines = [line for line in log.output.splitlines() if "vdc" not in line]
    assert lines == []
