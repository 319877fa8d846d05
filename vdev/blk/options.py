"""The names that block devices' options can have."""

from __future__ import annotations

CACHE_MODES = ("none", "writeback", "writethrough", "unsafe")
ENGINES = ("auto", "io_uring", "threads")
