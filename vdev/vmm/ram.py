"""The machine's RAM: one file, mapped where the guest has it, for KVM and all who serve devices."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator

from vdev._native import ffi, lib
from vdev.errors import UserError
from vdev.memory import GuestMemory, Region
from vdev.vmm.layout import MIB, PAGE, RamRange, ram_ranges

_COPY = 8 * MIB
_ZEROES = 64 << 10
_TRANSPARENT = "/sys/kernel/mm/transparent_hugepage/enabled"


class Ram:
    """`size` bytes of RAM; `memory` is what queues and KVM use.

    hugepages: of 2 MiB each, reserved now; without it the host gives such pages where it has them
    and this process may have them (CAP_SYS_ADMIN).  image: a file of `size` bytes with what the RAM
    holds at first, which must not change as long as this lives: pages are read when they are
    needed, and copied when they are written.  shared: others can have it too (a back-end in another
    process); an image is then copied at once.  Raises UserError where the host lacks huge pages,
    `size` is none that a machine can have, or not the image's; OSError where that cannot be read.
    """

    def __init__(
        self,
        size: int,
        *,
        hugepages: bool = False,
        image: int | None = None,
        shared: bool = True,
    ) -> None:
        self.size = size
        self.page = 2 * MIB if hugepages else PAGE
        self.ranges: tuple[RamRange, ...] = ram_ranges(size)
        if image is not None and (held := os.fstat(image).st_size) != size:
            raise UserError(f"an image of {held} bytes for {size} bytes of RAM")
        self._is_copy = image is not None and not shared
        self.fd = os.dup(image) if image is not None and self._is_copy else _new(size, hugepages)
        try:
            if image is not None and not self._is_copy:
                _fill(self.fd, image, size)
            self.memory = GuestMemory(self._map(range_) for range_ in self.ranges)
        except BaseException:
            os.close(self.fd)
            raise

    def _map(self, range_: RamRange) -> Region:
        return Region.map(
            self.fd,
            guest_addr=range_.base,
            size=range_.size,
            user_addr=range_.base,
            offset=range_.offset,
            shared=not self._is_copy,
            copy=self._is_copy,
        )

    def view(self, guest_addr: int, size: int) -> memoryview:
        """RAM as bytes that can be written. Raises ValueError where it is not all RAM."""
        at = lib.vhost_memory_translate(self.memory.native, guest_addr, size)
        if at == ffi.NULL or size <= 0:
            raise ValueError(f"{size} bytes at {guest_addr:#x} are not RAM")
        return memoryview(ffi.buffer(at, size)).cast("B")

    def write(self, guest_addr: int, data: bytes | memoryview) -> None:
        """Raises ValueError where it is not all RAM."""
        if len(data):
            self.view(guest_addr, len(data))[:] = data

    def fill(self, guest_addr: int, size: int, file: int, offset: int) -> int:
        """Copies at most `size` bytes from `offset` of a file; returns how many, 0 at its end.

        Raises ValueError where it is not all RAM, OSError where that cannot be read.
        """
        view = self.view(guest_addr, size)
        if self._is_copy or self.page > PAGE:
            return os.preadv(file, [view], offset)
        # A page that is written as part of a file is not filled with zeroes before.
        size = min(size, os.fstat(file).st_size - offset)
        if size <= 0:
            return 0
        skip = offset % mmap.ALLOCATIONGRANULARITY
        with (
            mmap.mmap(file, skip + size, access=mmap.ACCESS_READ, offset=offset - skip) as source,
            memoryview(source) as whole,
            whole[skip:] as data,
        ):
            return os.pwrite(self.fd, data, self._offset(guest_addr))

    def _offset(self, guest_addr: int) -> int:
        """Where in the file that is."""
        return next(
            range_.offset + guest_addr - range_.base
            for range_ in self.ranges
            if range_.base <= guest_addr < range_.base + range_.size
        )

    def discard(self, guest_addr: int, size: int) -> None:
        """Gives whole pages back to the host. Raises OSError where that is not all RAM."""
        result = lib.vhost_memory_discard(self.memory.native, guest_addr, size)
        if result < 0:
            raise OSError(-result, os.strerror(-result), f"{size} bytes at {guest_addr:#x}")

    @property
    def is_shared(self) -> bool:
        """Whether others can have it too."""
        return not self._is_copy

    def resident(self) -> int | None:
        """Bytes that the host holds for it; None where that is not known."""
        return None if self._is_copy else os.fstat(self.fd).st_blocks * 512

    def blocks(self, size: int) -> Iterator[tuple[int, memoryview]]:
        """All of it, as offsets in a file and bytes, in pieces of at most `size`."""
        for range_ in self.ranges:
            for start in range(0, range_.size, size):
                length = min(size, range_.size - start)
                yield range_.offset + start, self.view(range_.base + start, length)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Offsets and ends of what was ever written, but for pieces of 64 KiB that are all zero:
        most of a huge page may never have been, and of a copy it is not known."""
        begin = end = 0
        for start, stop in self._not_zero():
            if start != end:
                if begin < end:
                    yield begin, end
                begin = start
            end = stop
        if begin < end:
            yield begin, end

    def _not_zero(self) -> Iterator[tuple[int, int]]:
        written = [(0, self.size)] if self._is_copy else data_extents(self.fd, self.size)
        zeroes = bytes(_ZEROES)
        for start, end in written:
            for range_ in self.ranges:
                at, last = max(start, range_.offset), min(end, range_.offset + range_.size)
                while at < last:
                    stop = min(at - at % _ZEROES + _ZEROES, last)
                    view = self.view(range_.base + at - range_.offset, stop - at)
                    if bytes(view) != zeroes[: stop - at]:
                        yield at, stop
                    at = stop

    def close(self) -> None:
        """What queues and KVM have mapped stays so until their end."""
        os.close(self.fd)


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Offsets and ends of the parts of a file that are no holes."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        if start < at:
            yield start, at


def _new(size: int, hugepages: bool) -> int:
    fd = -1 if hugepages else _transparent_huge()
    if fd < 0:
        flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB | os.MFD_HUGE_2MB if hugepages else 0)
        fd = os.memfd_create("guest-ram", flags)
    try:
        os.ftruncate(fd, size)
        if hugepages:
            # As long as the file is there they are its own, where it was mapped once.
            mmap.mmap(fd, size).close()
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError) and error.errno == errno.ENOMEM and hugepages:
            raise UserError(
                f"{size // (2 * MIB)} huge pages of 2 MiB: the host has not so many free; "
                "vm.nr_hugepages says how many there are"
            ) from None
        raise
    return fd


def _transparent_huge() -> int:
    """A new file of such pages, or less than 0 where the host has none or this process may not."""
    try:
        with open(_TRANSPARENT) as file:
            allowed = "[never]" not in file.read()
    except OSError:
        return -1
    return int(lib.vmm_ram_file()) if allowed else -1


def _fill(fd: int, image: int, size: int) -> None:
    buffer = bytearray(_COPY)
    for start, end in data_extents(image, size):
        for at in range(start, end, _COPY):
            part = memoryview(buffer)[: min(_COPY, end - at)]
            if os.preadv(image, [part], at) != len(part):
                raise OSError(errno.EIO, "the image became shorter meanwhile")
            os.pwrite(fd, part, at)
