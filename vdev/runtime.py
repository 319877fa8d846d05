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


def switch_socket(switch: str) -> Path:
    """Where front-ends find a switch: by its name, or by a path, which has a slash."""
    return Path(switch) if "/" in switch else runtime_dir() / f"{switch}.switch"
