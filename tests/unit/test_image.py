"""Images: what can be served, sizes, locks against a second writer, resize."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vdev.blk.image import Image, open_image
from vdev.errors import UserError

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "disk.img"
    file.write_bytes(b"")
    os.truncate(file, SIZE)
    return str(file)


@pytest.fixture
def opened() -> Iterator[Callable[..., Image]]:
    with contextlib.ExitStack() as stack:

        def opened(*args: str, **options: object) -> Image:
            image = open_image(*args, **options)  # type: ignore[arg-type]
            stack.callback(image.close)
            return image

        yield opened


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_raw_file(path: str, opened: Callable[..., Image]) -> None:
    image = opened(path)
    assert (image.size, image.kind, image.block_size) == (SIZE, "file", 512)
    assert not image.direct


def test_a_null_image(opened: Callable[..., Image]) -> None:
    image = opened("null:64MiB")
    assert (image.size, image.kind, image.fd) == (64 << 20, "null", -1)


@pytest.mark.parametrize(("size", "served"), [(512, 512), (513, 512), (1500, 1024)])
def test_sizes_are_rounded_down_to_blocks(
    path: str, size: int, served: int, opened: Callable[..., Image]
) -> None:
    os.truncate(path, size)
    assert opened(path).size == served


def test_cache_none_goes_around_the_page_cache_where_it_can(
    path: str, opened: Callable[..., Image]
) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        can = True
    except OSError:
        can = False
    image = opened(path, cache="none")
    assert image.direct is can
    assert image.size == SIZE


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("missing", "no such file (make one with: truncate"),
        ("directory", "not a regular file nor a block device"),
        ("character device", "not a regular file nor a block device"),
        ("fifo", "not a regular file nor a block device"),
        ("empty", "0 bytes are too few"),
        ("null without a size", "is not a number of bytes"),
        ("null too small", "511 bytes are too few"),
        ("nul in the name", "null byte"),
        ("name too long", "File name too long"),
    ],
)
def test_what_cannot_be_served(tmp_path: Path, what: str, complaint: str) -> None:
    name = tmp_path / "disk.img"
    target = str(name)
    match what:
        case "directory":
            name.mkdir()
        case "character device":
            target = "/dev/null"
        case "fifo":
            os.mkfifo(name)
        case "empty":
            name.touch()
        case "null without a size":
            target = "null:"
        case "null too small":
            target = "null:511"
        case "nul in the name":
            target = "a\0b"
        case "name too long":
            target = "x" * 300
    before = fds()
    with pytest.raises(UserError) as caught:
        open_image(target)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert fds() == before


def test_one_writer(path: str, opened: Callable[..., Image]) -> None:
    opened(path)
    before = fds()
    for read_only in (False, True):
        with pytest.raises(UserError, match="in use by this process"):
            open_image(path, read_only=read_only)
    assert fds() == before


def test_many_readers_and_no_writer(path: str, opened: Callable[..., Image]) -> None:
    opened(path, read_only=True)
    opened(path, read_only=True)
    with pytest.raises(UserError, match="in use by this process"):
        open_image(path)


def test_the_lock_goes_with_the_image(path: str) -> None:
    open_image(path).close()
    open_image(path, read_only=True).close()
    open_image(path).close()


def test_the_holder_is_named(path: str) -> None:
    hold = (
        "import sys; from vdev.blk.image import open_image; image = open_image(sys.argv[1]); "
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"\(pid {other.pid}\)"):
            open_image(path)


@pytest.mark.skipif(not shutil.which("qemu-io"), reason="qemu-io (qemu-utils) is not installed")
def test_qemu_and_we_see_each_others_locks(path: str, opened: Callable[..., Image]) -> None:
    def qemu_opens(*options: str) -> bool:
        command = ["qemu-io", "-f", "raw", *options, "-c", "read 0 512", path]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    image = opened(path)
    assert not qemu_opens()
    assert not qemu_opens("-r")
    image.close()
    image = opened(path, read_only=True)
    assert not qemu_opens()
    assert qemu_opens("-r")
    image.close()

    with subprocess.Popen(
        ["qemu-io", "-f", "raw", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        # Its answer to a command comes after it opened the image.
        qemu.stdin.write(b"length\n")
        qemu.stdin.flush()
        assert b"MiB" in qemu.stdout.readline()
        for read_only in (False, True):
            with pytest.raises(UserError, match="in use by qemu-io"):
                open_image(path, read_only=read_only)


def test_a_file_grows(path: str, opened: Callable[..., Image]) -> None:
    image = opened(path)
    assert image.resize(2 * SIZE) == 2 * SIZE == os.stat(path).st_size
    os.truncate(path, 3 * SIZE)
    assert image.resize(None) == 3 * SIZE
    assert image.resize(3 * SIZE + 100) == 3 * SIZE


def test_resize_never_cuts_off(path: str, opened: Callable[..., Image]) -> None:
    image = opened(path)
    with pytest.raises(UserError, match="would cut off data"):
        image.resize(SIZE // 2)
    assert image.size == os.stat(path).st_size == SIZE


def test_a_read_only_image_does_not_grow(path: str, opened: Callable[..., Image]) -> None:
    image = opened(path, read_only=True)
    with pytest.raises(UserError, match="served read-only"):
        image.resize(2 * SIZE)


def test_a_null_image_has_any_size(opened: Callable[..., Image]) -> None:
    image = opened("null:1M")
    assert image.resize(512) == 512
    assert image.resize(None) == 512


@pytest.fixture
def loop_device(path: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """A block device on the file ``path``; its parameter is losetup's options."""
    options = getattr(request, "param", ())
    made = subprocess.run(
        ["losetup", "--find", "--show", *options, path],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no loop device here: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


@pytest.mark.parametrize("loop_device", [["--sector-size=4096"]], indirect=True)
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_a_block_device(loop_device: str, cache: str, opened: Callable[..., Image]) -> None:
    image = opened(loop_device, cache=cache)
    assert (image.kind, image.size, image.block_size) == ("device", SIZE, 4096)
    assert image.direct is (cache == "none")


def test_a_block_device_has_one_writer(loop_device: str, opened: Callable[..., Image]) -> None:
    opened(loop_device)
    for read_only in (False, True):
        with pytest.raises(UserError, match="in use by this process"):
            open_image(loop_device, read_only=read_only)


def test_a_block_device_is_resized_by_its_maker(
    loop_device: str, path: str, opened: Callable[..., Image]
) -> None:
    image = opened(loop_device)
    with pytest.raises(UserError, match="resize the device itself"):
        image.resize(2 * SIZE)
    os.truncate(path, 2 * SIZE)
    subprocess.run(["losetup", "--set-capacity", loop_device], check=True)
    assert image.resize(None) == 2 * SIZE


@pytest.mark.parametrize("loop_device", [["--read-only"]], indirect=True)
def test_a_read_only_block_device(loop_device: str, opened: Callable[..., Image]) -> None:
    before = fds()
    with pytest.raises(UserError, match="--read-only"):
        open_image(loop_device)
    assert fds() == before
    assert opened(loop_device, read_only=True).size == SIZE


def test_an_image_that_is_open_already(path: str, opened: Callable[..., Image]) -> None:
    os.truncate(path, SIZE + 5)
    fd = os.open(path, os.O_RDWR)
    # What it is called needs not be there.
    image = opened("/elsewhere/disk", fd=fd)
    assert (image.path, image.size, image.kind) == ("/elsewhere/disk", SIZE, "file")
    assert image.can_discard is opened_alike(path)
    os.close(fd)
    with pytest.raises(UserError, match="in use by this process"):
        opened(path)
    assert os.pwrite(image.fd, b"x", 7) == 1
    image.close()
    opened(path)


def opened_alike(path: str) -> bool:
    """Whether the file system punches holes, asked of a copy."""
    shutil.copy(path, f"{path}.copy")
    image = open_image(f"{path}.copy")
    image.close()
    return image.can_discard


def test_the_cache_mode_decides_about_direct_not_whoever_opened_it(
    path: str, opened: Callable[..., Image]
) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    assert not opened(path, fd=fd).direct
    assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    assert opened(path, fd=fd, cache="none").direct
    os.close(fd)


@pytest.mark.parametrize(
    ("flags", "read_only", "complaint"),
    [
        (os.O_RDONLY, False, "for reading and writing"),
        (os.O_WRONLY, False, "for reading and writing"),
        (os.O_WRONLY, True, "must be open for reading"),
        (os.O_RDWR | os.O_APPEND, False, "must be open"),
        (os.O_PATH, True, "must be open"),
        (os.O_RDONLY, True, None),
        (os.O_RDWR, True, None),
    ],
)
def test_how_it_must_be_open(path: str, flags: int, read_only: bool, complaint: str | None) -> None:
    fd = os.open(path, flags)
    try:
        before = fds()
        if complaint is None:
            open_image(path, read_only=read_only, fd=fd).close()
        else:
            with pytest.raises(UserError, match=complaint):
                open_image(path, read_only=read_only, fd=fd)
        assert fds() == before
    finally:
        os.close(fd)


def test_what_is_open_and_no_image(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    reading, writing = os.pipe()
    empty = os.open(tmp_path / "empty", os.O_RDWR | os.O_CREAT)
    try:
        before = fds()
        for fd in (folder, reading, writing):
            with pytest.raises(UserError, match="not a regular file nor a block device"):
                open_image("it", fd=fd)
        with pytest.raises(UserError, match="0 bytes are too few"):
            open_image("it", fd=empty)
        assert fds() == before
    finally:
        for fd in (folder, reading, writing, empty):
            os.close(fd)
