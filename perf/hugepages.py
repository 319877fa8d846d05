"""Reserving 2 MiB pages for a while, and putting the machine back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from perf.model import Unsupported

COUNT = Path("/proc/sys/vm/nr_hugepages")


def _total() -> int:
    return int(COUNT.read_text())


@contextlib.contextmanager
def reserved(pages: int) -> Iterator[None]:
    """`pages` more than before. Raises Unsupported when the kernel has not so many."""
    if not pages:
        yield
        return
    try:
        before = _total()
        COUNT.write_text(f"{before + pages}\n")
    except OSError as error:
        raise Unsupported(f"no hugepages can be reserved here: {error.strerror}") from None
    try:
        missing = before + pages - _total()
        if missing > 0:
            raise Unsupported(f"{missing} of {pages} hugepages of 2 MiB could not be reserved")
        yield
    finally:
        # Others may have reserved or given back some meanwhile.
        COUNT.write_text(f"{max(0, _total() - pages)}\n")
