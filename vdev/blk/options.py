"""The names that block devices' options can have."""

from __future__ import annotations

CACHE_MODES = ("none", "writeback", "writethrough", "unsafe")
LOCKS = ("open", "running")
"""When an image is locked: as long as it is open, or while a guest's ring runs."""
ENGINES = ("auto", "io_uring", "threads")
