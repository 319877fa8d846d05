"""RAM out of an image: read when it is touched, copied when it is written, never written back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vdev.vmm.ram
from tests.vmm.rig import held
from vdev.errors import UserError
from vdev.vmm.layout import HIGH_RAM_BASE, LOW_RAM_MAX, MIB, PAGE
from vdev.vmm.ram import Ram

SIZE = 64 * MIB
DATA_AT = 32 * MIB
_CAP_SYS_ADMIN = 21
DATA = bytes(range(256)) * (8 * MIB // 256)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    """A hole, data, a hole."""
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, DATA, DATA_AT)
    yield fd
    os.close(fd)


def mapped(fd: int, field: str) -> int:
    """Bytes of all mappings of a file, as /proc/self/smaps counts them."""
    status, found, ours = os.fstat(fd), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *words = line.split()
        if not name.endswith(":"):
            ours = words[3] == str(status.st_ino) and words[2] == (
                f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
            )
        elif ours and name == f"{field}:":
            found += int(words[0]) << 10
    return found


def test_new_ram_has_only_holes() -> None:
    ram = Ram(SIZE)
    assert list(ram.extents()) == []
    assert ram.resident() == 0
    ram.write(DATA_AT, b"data")
    ((start, end),) = ram.extents()
    assert start <= DATA_AT < end <= DATA_AT + 2 * MIB
    assert b"".join(bytes(view) for _, view in ram.blocks(2 * MIB)) == (
        bytes(DATA_AT) + b"data".ljust(SIZE - DATA_AT, b"\0")
    )
    ram.close()


def transparent_huge() -> bool:
    """Whether this process may have such pages, and the host has them."""
    path = Path("/sys/kernel/mm/transparent_hugepage")
    capabilities = re.findall(r"CapEff:\s+(\w+)", Path("/proc/self/status").read_text())
    return (
        bool(int(capabilities[0], 16) >> _CAP_SYS_ADMIN & 1)
        and path.exists()
        and "[never]" not in (path / "enabled").read_text()
        and "[deny]" not in (path / "shmem_enabled").read_text()
    )


@pytest.mark.skipif(not transparent_huge(), reason="transparent huge pages are not to be had")
def test_pages_are_huge() -> None:
    """Touched once each, by 2 MiB: guests then leave for 512 pages at once."""
    ram = Ram(SIZE)
    assert mapped(ram.fd, "Size") == SIZE
    for at in range(0, SIZE, 4 * MIB):
        ram.write(at + 5 * PAGE, b"touched")
    assert mapped(ram.fd, "ShmemPmdMapped") == ram.resident() == SIZE // 2
    # What is nothing but zeroes in them is no part of a snapshot.
    assert sum(end - start for start, end in ram.extents()) == SIZE // (4 * MIB) * (64 << 10)
    ram.discard(0, 2 * MIB)
    assert ram.resident() == SIZE // 2 - 2 * MIB
    ram.close()


@pytest.mark.parametrize("refusal", ["always madvise [never]", None])
def test_where_huge_pages_are_not_to_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str | None
) -> None:
    """The administrator says so, or the kernel knows nothing of them."""
    enabled = tmp_path / "enabled"
    if refusal:
        enabled.write_text(refusal)
    monkeypatch.setattr(vdev.vmm.ram, "_TRANSPARENT", str(enabled))
    ram = Ram(SIZE)
    ram.write(DATA_AT, b"data")
    assert os.readlink(f"/proc/self/fd/{ram.fd}").startswith("/memfd:guest-ram")
    assert bytes(ram.view(DATA_AT, 5)) == b"data\0"
    ram.close()


def test_who_may_mount_nothing_has_ram_all_the_same() -> None:
    program = """
import os
from vdev.vmm.ram import Ram
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)
ram = Ram(64 << 20)
ram.write(0, b"data")
print(os.readlink(f"/proc/self/fd/{ram.fd}"))
"""
    said = subprocess.run(
        [sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert said.startswith("/memfd:guest-ram")


def test_extents_join_what_lies_together() -> None:
    ram = Ram(SIZE)
    ram.write(MIB - 5, b"x" * 10)
    ram.write(SIZE - 1, b"x")
    ram.write(0, bytes(PAGE))
    (low, high), (last, end) = ram.extents()
    piece = 64 << 10
    assert MIB - piece <= low <= MIB - PAGE
    assert MIB + PAGE <= high <= MIB + piece
    assert SIZE - piece <= last <= SIZE - PAGE
    assert end == SIZE
    ram.close()


def test_an_image_is_read_when_it_is_touched(image: int) -> None:
    ram = Ram(SIZE, image=image, shared=False)
    assert mapped(image, "Size") == SIZE
    assert mapped(image, "Rss") == 0
    assert bytes(ram.view(DATA_AT + 5 * MIB, 256)) == DATA[:256]
    assert 0 < mapped(image, "Rss") < len(DATA)
    assert mapped(image, "Anonymous") == 0
    ram.close()


def test_what_is_written_is_copied(image: int) -> None:
    ram = Ram(SIZE, image=image, shared=False)
    ram.write(DATA_AT + PAGE, b"written")
    assert mapped(image, "Anonymous") == PAGE
    assert os.pread(image, len(DATA), DATA_AT) == DATA
    assert bytes(ram.view(DATA_AT, len(DATA))) == (
        DATA[:PAGE] + b"written" + DATA[PAGE + len(b"written") :]
    )
    ram.close()


def test_an_image_that_cannot_be_written_will_do(tmp_path: Path, image: int) -> None:
    del image
    fd = os.open(tmp_path / "image", os.O_RDONLY)
    ram = Ram(SIZE, image=fd, shared=False)
    os.close(fd)
    ram.write(DATA_AT, b"written")
    assert bytes(ram.view(DATA_AT, 8)) == b"written\x07"
    ram.close()


def test_what_a_copy_holds_is_known_but_for_zeroes(image: int) -> None:
    ram = Ram(SIZE, image=image, shared=False)
    ram.write(SIZE - 1, b"x")
    ram.write(0, bytes(PAGE))
    held = bytearray(SIZE)
    for start, end in ram.extents():
        held[start:end] = b"x" * (end - start)
    assert held.count(b"x") == len(DATA) + (64 << 10)
    assert held.strip(b"\0") == held[DATA_AT:]
    assert held[SIZE - 1] == ord("x")
    ram.close()


def test_two_have_nothing_in_common_but_the_image(image: int) -> None:
    one, other = (Ram(SIZE, image=image, shared=False) for _ in range(2))
    one.write(0, b"one")
    other.write(DATA_AT, b"other")
    assert bytes(one.view(DATA_AT, 5)) == DATA[:5]
    assert bytes(other.view(0, 3)) == bytes(3)
    one.close()
    assert bytes(other.view(DATA_AT, 5)) == b"other"
    other.close()


def test_discarded_pages_lose_what_was_written_and_the_image_does_not(image: int) -> None:
    ram = Ram(SIZE, image=image, shared=False)
    ram.write(DATA_AT, b"x" * MIB)
    assert mapped(image, "Anonymous") == MIB
    ram.discard(DATA_AT + PAGE, MIB - PAGE)
    assert mapped(image, "Anonymous") == PAGE
    assert bytes(ram.view(DATA_AT, PAGE)) == b"x" * PAGE
    assert os.pread(image, len(DATA), DATA_AT) == DATA
    ram.write(DATA_AT + PAGE, b"again")
    assert bytes(ram.view(DATA_AT + PAGE, 5)) == b"again"
    ram.close()


def test_others_see_a_copy(image: int) -> None:
    ram = Ram(SIZE, image=image)
    assert mapped(image, "Size") == 0
    os.pwrite(image, b"later", DATA_AT)
    assert bytes(ram.view(DATA_AT, len(DATA))) == DATA
    (region,) = ram.memory.regions
    assert region.fd is not None
    os.pwrite(region.fd, b"others", DATA_AT)
    assert bytes(ram.view(DATA_AT, 6)) == b"others"
    ram.write(DATA_AT, b"machine")
    assert os.pread(region.fd, 7, DATA_AT) == b"machine"
    resident = ram.resident()
    assert resident is not None
    assert len(DATA) <= resident < len(DATA) + 4 * MIB
    assert os.pread(image, 5, DATA_AT) == b"later"
    ram.close()


def test_an_image_around_the_hole(tmp_path: Path) -> None:
    size = LOW_RAM_MAX + 2 * MIB
    with open(tmp_path / "image", "w+b") as file:
        file.truncate(size)
        os.pwrite(file.fileno(), b"below", LOW_RAM_MAX - 5)
        os.pwrite(file.fileno(), b"above", LOW_RAM_MAX)
        for shared in (False, True):
            ram = Ram(size, image=file.fileno(), shared=shared)
            assert bytes(ram.view(LOW_RAM_MAX - 5, 5)) == b"below"
            assert bytes(ram.view(HIGH_RAM_BASE, 5)) == b"above"
            with pytest.raises(ValueError, match="are not RAM"):
                ram.view(LOW_RAM_MAX - 5, 6)
            ram.close()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1, SIZE - 2 * MIB])
def test_an_image_of_another_size_is_refused(image: int, shared: bool, size: int) -> None:
    """A shorter one would kill whoever touches what it lacks."""
    os.ftruncate(image, size)
    before = held()
    with pytest.raises(UserError, match=f"an image of {size} bytes for {SIZE} bytes of RAM"):
        Ram(SIZE, image=image, shared=shared)
    assert held() == before


def test_an_image_that_becomes_shorter_meanwhile(
    image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, pread = held(), os.preadv

    def shrinking(fd: int, buffers: list[memoryview], at: int) -> int:
        os.ftruncate(fd, at + 5)
        return pread(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(OSError, match="became shorter"):
        Ram(SIZE, image=image)
    assert held() == before
