"""``python -m tests.soak [--seconds N] [--seed N]``: ten minutes of attacks and kills."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.soak import Soak, SoakError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    tap = f"soak{os.getpid() % 100_000}" if os.geteuid() == 0 else None
    print(f"soak: {options.seconds} s, seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="vdev-soak-") as directory:
        try:
            report = Soak(Path(directory), options.seed, tap=tap).run(options.seconds)
        except (SoakError, AssertionError) as error:
            print(f"soak: {error}")
            return 1
    print(f"soak: {report}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
