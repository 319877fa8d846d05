"""Where this user's programs keep what lives as long as they run: sockets, journals."""

from __future__ import annotations

import os
from pathlib import Path


def runtime_dir() -> Path:
    """The directory, which may not exist yet."""
    uid = os.geteuid()
    if uid == 0:
        return Path("/run/vdev")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "vdev" if runtime else Path(f"/tmp/vdev-{uid}")
