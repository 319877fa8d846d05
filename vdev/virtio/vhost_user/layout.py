"""Arithmetic of guest memory and rings, on numbers alone.

Source: virtio 1.3, sections 2.7 and 2.8 ("Split" and "Packed Virtqueues"): sizes and alignments of
the three parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from vdev._native import lib
from vdev.dirtylog import LOG_PAGE
from vdev.errors import PeerError
from vdev.inflight import inflight_size
from vdev.memory import ADDRESS_SPACE, MAX_OFFSET, check_range, guest_address
from vdev.virtio.vhost_user.payloads import Inflight, Log, MemoryRegion, VringAddr

F_LOG_USED = 1  # VHOST_VRING_F_LOG, of the flags of ring addresses
MAX_SIZE: int = lib.VIRTQUEUE_MAX_SIZE

_SPLIT = (("descriptor table", 16), ("avail ring", 2), ("used ring", 4))
_PACKED = (("descriptor ring", 16), ("driver's event", 4), ("device's event", 4))
_EVENT_SIZE = 4


class Part(NamedTuple):
    """A part of a ring in guest memory: [start, start + size)."""

    name: str
    start: int
    size: int


class Placement(NamedTuple):
    """Where the three parts of a ring are, in guest addresses or IOVAs."""

    desc: Part
    avail: Part
    used: Part


def check_region(region: MemoryRegion) -> None:
    """Raises PeerError for a region that is empty or wraps, in memory or in its file."""
    check_range(region)
    if region.mmap_offset > MAX_OFFSET - region.size:
        raise PeerError(
            f"memory region at {region.guest_addr:#x}: offset {region.mmap_offset:#x} in its file "
            "is too large"
        )


def check_size(size: int, *, packed: bool) -> None:
    """Raises PeerError where no ring has so many entries."""
    if not 1 <= size <= MAX_SIZE or (not packed and size & (size - 1)):
        kind = "a number" if packed else "a power of 2"
        raise PeerError(f"ring size {size}, expected {kind} up to {MAX_SIZE}")


def place_ring(
    regions: Iterable[MemoryRegion] | None, addresses: VringAddr, size: int, *, packed: bool
) -> Placement:
    """Where a ring of `size` entries lies; in IOVAs, which its addresses are, without `regions`.

    Raises PeerError where a part is misaligned, is not wholly within one region, or overlaps
    another part.
    """
    avail = _EVENT_SIZE if packed else 6 + 2 * size
    sizes = (16 * size, avail, used_size(size, packed=packed))
    users = (addresses.desc, addresses.avail, addresses.used)
    parts = []
    for (name, alignment), user_addr, length in zip(
        _PACKED if packed else _SPLIT, users, sizes, strict=True
    ):
        start = user_addr if regions is None else guest_address(regions, user_addr, length)
        if start + length > ADDRESS_SPACE:
            raise PeerError(f"{name} at {start:#x}: past the end of the address space")
        if start % alignment:
            raise PeerError(f"{name} at {start:#x}: not aligned to {alignment} bytes")
        parts.append(Part(name, start, length))
    placement = Placement(*parts)
    check_parts(placement)
    return placement


def log_used(addresses: VringAddr) -> int | None:
    """The guest address at which the third part is to be logged, if the ring is."""
    return addresses.log if addresses.flags & F_LOG_USED else None


def check_log(log: Log) -> None:
    """Raises PeerError for a log that is empty, or wraps in its file."""
    if log.mmap_size == 0:
        raise PeerError("dirty log of size 0")
    if log.mmap_offset > MAX_OFFSET - log.mmap_size:
        raise PeerError(
            f"dirty log of {log.mmap_size:#x} bytes: offset {log.mmap_offset:#x} in its file is "
            "too large"
        )


def check_logged(
    log: Log,
    regions: Iterable[MemoryRegion],
    rings: Iterable[tuple[VringAddr, int]],
    *,
    packed: bool,
) -> None:
    """Raises PeerError where the log lacks bits for memory, or for used rings: their addresses and
    numbers of entries."""
    ends = [("memory", region.guest_addr + region.size) for region in regions]
    for addresses, size in rings:
        if (start := log_used(addresses)) is not None:
            ends.append((f"the used ring {addresses.ring}", start + used_size(size, packed=packed)))
    for what, end in ends:
        if end > min(8 * LOG_PAGE * log.mmap_size, ADDRESS_SPACE):
            raise PeerError(
                f"dirty log of {log.mmap_size:#x} bytes: too small for {what}, which ends at "
                f"{end:#x}"
            )


def check_inflight_wanted(wanted: Inflight, num_queues: int) -> None:
    """Raises PeerError for a region of queues that a device of `num_queues` cannot have."""
    if not 1 <= wanted.num_queues <= num_queues:
        raise PeerError(
            f"in-flight region for {wanted.num_queues} queues, but the device has {num_queues}"
        )
    if not 1 <= wanted.queue_size <= MAX_SIZE:
        raise PeerError(
            f"in-flight region for queues of {wanted.queue_size} entries, expected 1 to {MAX_SIZE}"
        )


def check_inflight(region: Inflight, num_queues: int, *, packed: bool) -> None:
    """Raises PeerError for such a region, one that its queues do not fit into, or that wraps."""
    check_inflight_wanted(region, num_queues)
    needed = inflight_size(region.num_queues, region.queue_size, packed=packed)
    if region.mmap_size < needed:
        raise PeerError(
            f"in-flight region of {region.mmap_size:#x} bytes: {region.num_queues} queues of "
            f"{region.queue_size} entries take {needed:#x}"
        )
    if region.mmap_offset > MAX_OFFSET - region.mmap_size:
        raise PeerError(
            f"in-flight region of {region.mmap_size:#x} bytes: offset {region.mmap_offset:#x} in "
            "its file is too large"
        )


def used_size(size: int, *, packed: bool) -> int:
    """Bytes of the used ring of `size` entries, or of what a packed ring has in its place."""
    return _EVENT_SIZE if packed else 6 + 8 * size


def check_parts(parts: Iterable[Part]) -> None:
    """Raises PeerError where two parts of rings overlap."""
    ordered = sorted(parts, key=lambda part: part.start)
    for low, high in pairwise(ordered):
        if low.start + low.size > high.start:
            raise PeerError(
                f"{low.name} at {low.start:#x} ({low.size} bytes) reaches into the {high.name} "
                f"at {high.start:#x}"
            )
