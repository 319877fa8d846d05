"""`vdev serve` with the patience of a test: a worker that was killed is always started at once.

python -m tests.frontend.supervised CONFIG.toml
"""

from __future__ import annotations

import sys

from vdev.cli.serve import PROGRAM, run_on_loop
from vdev.config import load_config
from vdev.server.devices import device_specs
from vdev.server.supervisor import Patience, Supervisor


async def supervise(path: str) -> None:
    devices = device_specs(load_config(path))
    await Supervisor(devices, PROGRAM, patience=Patience(lasting=0)).run()


if __name__ == "__main__":
    sys.exit(run_on_loop("asyncio", lambda: supervise(sys.argv[1])))
