"""What a block device stands on: a raw file, a host block device, or ``null:SIZE``.

Two writers on one image destroy it, so an image is locked while it is open, or, where two servers
take turns (the two ends of a migration), while a guest's ring runs; by locks of the open file
description (they live exactly as long as the descriptors that the native engine holds too,
and die with the process).  The bytes are chosen so that QEMU sees our locks and we see QEMU's
(its block/file-posix.c): a permission in use is a read lock at 100 + its bit, a permission that
others must not have is a read lock at 200 + its bit.  A writer of ours locks the whole file for
itself, which is in the way of each of them; a reader of ours locks "nobody may write, nobody may
resize" and then looks whether somebody already does.

A server that was killed may have requests under way in the kernel, which end when they end: behind
the back of the next server, a write could undo a later one, and a read land in memory that the
guest has put to another use.  Each of them holds the open file, and so its locks.  So servers that
follow one another have a byte of their own, far behind the end of any file; each locks it for
reading, and waits before until the last one's lock is gone, and with it all that was under way.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import time
from dataclasses import dataclass

from vdev._native import lib
from vdev.blk import holder
from vdev.blk.options import CACHE_MODES, LOCKS
from vdev.errors import UserError
from vdev.units import format_size, parse_size

SECTOR = 512

_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B
_BLKROGET = 0x125E
_BLKDISCARD = 0x1277

_FLOCK = struct.Struct("hhqqi4x")
_PERM_WRITE, _PERM_RESIZE = 1, 3  # BLK_PERM_WRITE and BLK_PERM_RESIZE, as bit numbers
_PERM_IN_USE, _PERM_REFUSED = 100, 200

_NO_LOCKS = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP)
_SUCCESSION_FIRST = 1 << 61
_RETRY_SECONDS = 0.002


@dataclass(eq=False, repr=False)
class Image:
    """An open image.  Sizes in bytes; ``fd`` is -1 for a null image; the holder closes it."""

    path: str
    fd: int
    size: int
    read_only: bool = False
    direct: bool = False
    is_block_device: bool = False
    block_size: int = SECTOR
    physical_block_size: int = SECTOR
    can_discard: bool = False
    discard_granularity: int = 0
    lock: str = "open"

    @property
    def is_null(self) -> bool:
        return self.fd < 0

    @property
    def kind(self) -> str:
        """``null``, ``device`` or ``file``."""
        if self.is_null:
            return "null"
        return "device" if self.is_block_device else "file"

    def resize(self, size: int | None) -> int:
        """Make the image ``size`` bytes, or look how large it is by now; the new size.

        A file grows by a hole at its end.  Nothing is ever cut off, and a block device is resized
        by whoever made it: both are refused with a UserError.
        """
        if self.is_null:
            self.size = _whole_blocks(self.path, self.size if size is None else size, SECTOR)
            return self.size
        actual = _size_of(self.fd, self.is_block_device)
        if size is not None and _round_down(size, self.block_size) != _round_down(
            actual, self.block_size
        ):
            self._grow(size, actual)
            actual = size
        self.size = _whole_blocks(self.path, actual, self.block_size)
        return self.size

    def _grow(self, size: int, actual: int) -> None:
        if self.is_block_device:
            raise UserError(
                f"resize of {self.path}: it is a block device of {actual} bytes: resize the device "
                "itself, then ask without a size"
            )
        if self.read_only:
            raise UserError(f"resize of {self.path}: it is served read-only")
        if size < actual:
            raise UserError(
                f"resize of {self.path} to {size} bytes would cut off data: it has {actual} bytes "
                "(shrink the file itself, then ask without a size)"
            )
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            raise UserError(f"resize of {self.path} to {size} bytes: {error.strerror}") from None

    def take(self) -> None:
        """A ring is about to run. Raises UserError where another process has the image."""
        if self.lock == "running" and not self.is_null:
            _lock(self.path, self.fd, self.read_only)

    def flush(self) -> None:
        """Make what was written durable. Raises OSError."""
        if not self.is_null and not self.read_only:
            os.fdatasync(self.fd)

    def give_back(self) -> None:
        """No ring runs any more."""
        if self.lock == "running" and not self.is_null:
            _unlock(self.fd)

    def close(self) -> None:
        """Give the image and its locks back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_image(
    path: str,
    *,
    read_only: bool = False,
    cache: str = "writeback",
    lock: str = "open",
    fd: int | None = None,
    succession: int | None = None,
    patience: float = 0.0,
) -> Image:
    """Open and lock ``path``: a raw file, a block device, or ``null:SIZE``.

    ``cache="none"`` goes around the page cache (O_DIRECT) where the file system can; ``direct``
    of the result says whether it does.  Sizes are rounded down to whole logical blocks.
    ``lock="running"`` leaves locking to `Image.take`.

    ``fd``: it is open already, in a process that may open it, and ``path`` is what to call it.  It
    stays the caller's; flags and locks are those of the open file that both have.

    ``succession``: a number below 2^61 that servers have which follow one another on this image,
    and no others.  ``patience``: seconds to wait for what the last one has under way.

    Raises UserError: no such image, not one, no permission, in use, empty.
    """
    if cache not in CACHE_MODES:
        raise UserError(f"cache mode {cache!r} does not exist: {', '.join(CACHE_MODES)}")
    if lock not in LOCKS:
        raise UserError(f"lock {lock!r} does not exist: {', '.join(LOCKS)}")
    if path.startswith("null:"):
        try:
            size = parse_size(path.removeprefix("null:"))
        except UserError as error:
            raise UserError(f"image {path}: {error} (null:SIZE)") from None
        size = _whole_blocks(path, size, SECTOR)
        return Image(path, -1, size, read_only, can_discard=not read_only)

    deadline = time.monotonic() + patience
    if fd is None:
        is_block_device = _check_kind(path)
        # Refused by the kernel while the device is mounted or part of another: such a device has
        # a writer already. Where servers take turns, both have it open.
        exclusive = is_block_device and not read_only and lock == "open"
        fd = _open(path, read_only, os.O_EXCL if exclusive else 0, deadline)
    else:
        fd, is_block_device = _take(path, fd, read_only)
    image = Image(path, fd, 0, read_only, is_block_device=is_block_device, lock=lock)
    try:
        if is_block_device and not read_only and _ioctl_int(fd, _BLKROGET):
            raise UserError(f"image {path}: a read-only block device: serve it --read-only")
        if succession is not None:
            _succeed(path, fd, _SUCCESSION_FIRST + succession, deadline)
        if lock == "open":
            _lock(path, fd, read_only)
        image.direct = _set_direct(fd, cache == "none")
        if is_block_device:
            _read_block_device(image)
        else:
            _read_file(image)
        image.size = _whole_blocks(path, _size_of(fd, is_block_device), image.block_size)
    except BaseException:
        image.close()
        raise
    return image


def _check_kind(path: str) -> bool:
    """True for a block device, False for a regular file."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UserError(
            f"image {path}: no such file (make one with: truncate -s 10G {path})"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"image {path}: {_why(error)}") from None
    if stat.S_ISBLK(mode):
        return True
    if not stat.S_ISREG(mode):
        raise UserError(
            f"image {path}: not a regular file nor a block device: a raw image is needed"
        )
    return False


def _why(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _open(path: str, read_only: bool, exclusive: int, deadline: float) -> int:
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | exclusive
    try:
        while (fd := _try_open(path, flags | os.O_CLOEXEC, deadline)) < 0:
            time.sleep(_RETRY_SECONDS)
    except OSError as error:
        if error.errno == errno.EBUSY:
            who = holder.find(os.stat(path)) or "this host (mounted, or part of another device)"
            raise UserError(
                f"image {path}: in use by {who}: release it, or serve it --read-only"
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not read_only:
            raise UserError(
                f"image {path}: may not be written ({error.strerror}): "
                "change its permissions, or serve it --read-only"
            ) from None
        raise UserError(f"image {path}: {error.strerror}") from None
    return fd


def _try_open(path: str, flags: int, deadline: float) -> int:
    """A descriptor; -1 where somebody has the device for himself, and there is time left."""
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EBUSY or time.monotonic() >= deadline:
            raise
        return -1


def _take(path: str, fd: int, read_only: bool) -> tuple[int, bool]:
    """A duplicate of a descriptor that is fit for an image, and whether of a block device."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISBLK(mode) and not stat.S_ISREG(mode):
        raise UserError(f"image {path}: not a regular file nor a block device")
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    wanted = (os.O_RDONLY, os.O_RDWR) if read_only else (os.O_RDWR,)
    # Appending, Linux writes at the end wherever it was told to write.
    if flags & os.O_ACCMODE not in wanted or flags & (os.O_PATH | os.O_APPEND):
        raise UserError(
            f"image {path}: opened with the flags {flags:#o}: it must be open for reading"
            + ("" if read_only else " and writing")
        )
    return os.dup(fd), stat.S_ISBLK(mode)


def _lock(path: str, fd: int, read_only: bool) -> None:
    try:
        if not read_only:
            _set_lock(fd, fcntl.F_WRLCK, 0, _SUCCESSION_FIRST)
            return
        for bit in (_PERM_WRITE, _PERM_RESIZE):
            _set_lock(fd, fcntl.F_RDLCK, _PERM_REFUSED + bit, 1)
            if _is_locked(fd, _PERM_IN_USE + bit):
                raise BlockingIOError
    except (BlockingIOError, PermissionError):
        who = holder.find(os.fstat(fd), besides=fd)
        raise UserError(
            f"image {path}: in use by {who or 'another process'}"
            + (", which may write to it" if read_only else "")
            + ": an image has one writer, or readers only"
        ) from None
    except OSError as error:
        # Some network file systems have no locks; QEMU goes on without, as we do.
        if error.errno not in _NO_LOCKS:
            raise UserError(f"image {path}: cannot lock it: {error.strerror}") from None


def _unlock(fd: int) -> None:
    try:
        _set_lock(fd, fcntl.F_UNLCK, 0, _SUCCESSION_FIRST)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _succeed(path: str, fd: int, byte: int, deadline: float) -> None:
    """Waits for the end of the last one. Raises UserError where it does not come in time."""
    try:
        while _is_locked(fd, byte):
            if time.monotonic() >= deadline:
                raise UserError(
                    f"image {path}: a server that was killed has still requests under way"
                )
            time.sleep(_RETRY_SECONDS)
        _set_lock(fd, fcntl.F_RDLCK, byte, 1)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UserError(f"image {path}: cannot lock it: {error.strerror}") from None


def _set_lock(fd: int, kind: int, start: int, length: int) -> None:
    lock = _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)


def _is_locked(fd: int, byte: int) -> bool:
    lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, lock)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _set_direct(fd: int, on: bool) -> bool:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return on


def _size_of(fd: int, is_block_device: bool) -> int:
    if not is_block_device:
        return os.fstat(fd).st_size
    answer = fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8))
    return int.from_bytes(answer, "little")


def _round_down(size: int, block_size: int) -> int:
    return size - size % block_size


def _whole_blocks(path: str, size: int, block_size: int) -> int:
    if size < block_size:
        raise UserError(
            f"image {path}: {size} bytes are too few: a disk has at least one block of {block_size}"
        )
    if size >= 1 << 63:
        raise UserError(f"image {path}: {format_size(size)} are more than a file can have")
    return _round_down(size, block_size)


def _ioctl_int(fd: int, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, request, bytes(4)), "little")


def _read_block_device(image: Image) -> None:
    image.block_size = _ioctl_int(image.fd, _BLKSSZGET)
    image.physical_block_size = max(image.block_size, _ioctl_int(image.fd, _BLKPBSZGET))
    if image.read_only:
        return
    device = os.fstat(image.fd).st_rdev
    folder = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    if not os.path.isdir(f"{folder}/queue"):
        folder = os.path.realpath(folder) + "/.."  # a partition has its disk's queue
    image.can_discard = _takes_discards(image.fd)
    image.discard_granularity = _read_number(f"{folder}/queue/discard_granularity")


def _takes_discards(fd: int) -> bool:
    """Ask by discarding what is no sector: refused for another reason where it can discard."""
    try:
        fcntl.ioctl(fd, _BLKDISCARD, struct.pack("QQ", 1, 1))
    except OSError as error:
        return error.errno == errno.EINVAL
    return True


def _read_number(path: str) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _read_file(image: Image) -> None:
    info = os.fstat(image.fd)
    if image.direct:
        image.block_size = _direct_alignment(image.fd)
    image.physical_block_size = image.block_size
    if not image.read_only:
        image.can_discard = _can_punch_holes(image.fd, info.st_size)
        image.discard_granularity = info.st_blksize


def _direct_alignment(fd: int) -> int:
    """The smallest block that O_DIRECT takes on this file."""
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        for size in (512, 1024, 2048, 4096):
            try:
                os.preadv(fd, [memoryview(page)[:size]], 0)
            except OSError:
                continue
            return size
    return 4096


def _can_punch_holes(fd: int, size: int) -> bool:
    """Ask by punching behind the end of the file, where there is nothing to lose."""
    start = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    return bool(lib.vhost_file_punch(fd, start, mmap.PAGESIZE) == 0)
