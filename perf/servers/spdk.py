"""SPDK's vhost target, by path: ``--tool vhost=…/build/bin/vhost``. It always polls.

Null disks are its null bdev (which touches no data); files are its AIO or uring bdev, past the page
cache. On tmpfs io_uring hands requests to kernel threads, which wait there for the core that SPDK
spins on; AIO has none. It is built from source (no Debian package), and wants hugepages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.images import TMPFS
from perf.model import Disk, Launch, Unsupported
from perf.program import Program

BLOCK_SIZE = 512
MEMORY_MIB = 512


@dataclass
class Spdk(Program):
    """`bdev`: what serves files: "aio" or "uring"; or "malloc", memory of its own instead."""

    program = "vhost"
    bdev: str = "aio"

    def blk(self, disks: Sequence[Disk], directory: Path) -> Launch:
        if len({disk.socket.parent for disk in disks}) > 1:
            raise Unsupported(f"{self.name}: its controllers lie in one directory")
        if self.bdev != "malloc" and any(_cached(disk) for disk in disks):
            raise Unsupported(f"{self.name} reads and writes files past the page cache")
        command = self.start()
        methods: list[Mapping[str, Any]] = []
        controllers = []
        for index, disk in enumerate(disks):
            methods.append(self._bdev(f"disk{index}", disk))
            controllers.append(
                {
                    "method": "vhost_create_blk_controller",
                    "params": {"ctrlr": disk.socket.name, "dev_name": f"disk{index}"},
                }
            )
        held = [disk.size for disk in disks if disk.file and self.bdev == "malloc"]
        memory = MEMORY_MIB + sum(size >> 20 for size in held)
        config = directory / "spdk.json"
        subsystems = [
            {"subsystem": "bdev", "config": methods},
            {"subsystem": "vhost_blk", "config": controllers},
        ]
        config.write_text(json.dumps({"subsystems": subsystems}))
        command += ["-S", str(disks[0].socket.parent), "-c", str(config)]
        command += ["-r", str(directory / "spdk.rpc"), "-s", str(memory), "--no-pci"]
        # Where no hugetlbfs is mounted, DPDK's memory has to be of memfds. With one file there is
        # nothing to unlink, which newer DPDK refuses beside memfds.
        command += ["--env-context", "--in-memory", "--single-file-segments"]
        # It pins itself to the cores of its mask. Another SPDK may rest on the same core, which
        # its lock files would not allow.
        command += ["-m", "[{cpu}]", "--disable-cpumask-locks"]
        return Launch(command, hugepages=memory // 2)

    def _bdev(self, name: str, disk: Disk) -> Mapping[str, Any]:
        blocks = {"block_size": BLOCK_SIZE, "num_blocks": disk.size // BLOCK_SIZE, "name": name}
        if disk.file is None:
            return {"method": "bdev_null_create", "params": blocks}
        if self.bdev == "malloc":
            return {"method": "bdev_malloc_create", "params": blocks}
        params = {"filename": str(disk.file), "block_size": BLOCK_SIZE, "name": name}
        return {"method": f"bdev_{self.bdev}_create", "params": params}


def _cached(disk: Disk) -> bool:
    return disk.file is not None and not disk.direct and TMPFS not in disk.file.parents


SERVERS = [Spdk("spdk"), Spdk("spdk-uring", "uring"), Spdk("spdk-malloc", "malloc")]
