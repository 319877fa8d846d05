"""``python -m vdev`` is ``vdev``."""

from __future__ import annotations

import sys

from vdev.cli import main

if __name__ == "__main__":
    sys.exit(main())
