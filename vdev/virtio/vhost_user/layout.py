"""Arithmetic of guest memory and rings, on numbers alone.

Source: virtio 1.3, section 2.7 ("Split Virtqueues"): sizes and alignments of the three parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

from vdev._native import lib
from vdev.errors import PeerError
from vdev.memory import MAX_OFFSET, check_range, guest_address
from vdev.virtio.vhost_user.payloads import MemoryRegion, VringAddr

MAX_SIZE: int = lib.VIRTQUEUE_MAX_SIZE

_ALIGNMENTS = (("descriptor table", 16), ("avail ring", 2), ("used ring", 4))


class Part(NamedTuple):
    """A part of a ring in guest memory: [start, start + size)."""

    name: str
    start: int
    size: int


class Placement(NamedTuple):
    """Where the three parts of a ring are, in guest addresses."""

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


def place_ring(regions: Iterable[MemoryRegion], addresses: VringAddr, size: int) -> Placement:
    """Where a ring of `size` entries lies.

    Raises PeerError where a part is misaligned, is not wholly within one region, or overlaps
    another part.
    """
    sizes = (16 * size, 6 + 2 * size, 6 + 8 * size)
    users = (addresses.desc, addresses.avail, addresses.used)
    parts = []
    for (name, alignment), user_addr, length in zip(_ALIGNMENTS, users, sizes, strict=True):
        start = guest_address(regions, user_addr, length)
        if start % alignment:
            raise PeerError(f"{name} at {start:#x}: not aligned to {alignment} bytes")
        parts.append(Part(name, start, length))
    placement = Placement(*parts)
    check_parts(placement)
    return placement


def check_parts(parts: Iterable[Part]) -> None:
    """Raises PeerError where two parts of rings overlap."""
    ordered = sorted(parts, key=lambda part: part.start)
    for low, high in pairwise(ordered):
        if low.start + low.size > high.start:
            raise PeerError(
                f"{low.name} at {low.start:#x} ({low.size} bytes) reaches into the {high.name} "
                f"at {high.start:#x}"
            )
