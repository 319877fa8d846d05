"""SPDK's vhost target, by path: ``--tool vhost=…/build/bin/vhost``. It always polls.

Null disks are its null bdev (which touches no data); files are its AIO or uring bdev. It is built
from source (no Debian package), and wants hugepages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perf.model import Disk, Launch, Server, Unsupported
from perf.tools import find_tool, version_of

PROGRAM = "vhost"
BLOCK_SIZE = 512
MEMORY_MIB = 512


@dataclass
class Spdk(Server):
    """`bdev`: what serves files: "uring" or "aio"; or "malloc", memory of its own instead."""

    name: str
    bdev: str = "uring"
    command: Sequence[str] = ()

    def with_command(self, name: str, command: Sequence[str]) -> Server:
        return Spdk(name, self.bdev, tuple(command))

    def version(self) -> str:
        return "" if self.command else version_of(PROGRAM)

    def blk(self, disks: Sequence[Disk], directory: Path) -> Launch:
        if any(disk.queues > 1 for disk in disks) or len({d.socket.parent for d in disks}) > 1:
            raise Unsupported(f"{self.name}: its controllers lie in one directory")
        command = [*(self.command or [find_tool(PROGRAM)])]
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
        config = directory / "spdk.json"
        subsystems = [
            {"subsystem": "bdev", "config": methods},
            {"subsystem": "vhost_blk", "config": controllers},
        ]
        config.write_text(json.dumps({"subsystems": subsystems}))
        command += ["-S", str(disks[0].socket.parent), "-c", str(config)]
        command += ["-r", str(directory / "spdk.rpc"), "-s", str(MEMORY_MIB), "-m"]
        # It pins itself to the cores of its mask; the mask is of those that it may run on.
        command += ["[{cpu}]"]
        return Launch(command, hugepages=MEMORY_MIB // 2)

    def _bdev(self, name: str, disk: Disk) -> Mapping[str, Any]:
        blocks = {"block_size": BLOCK_SIZE, "num_blocks": disk.size // BLOCK_SIZE, "name": name}
        if disk.file is None:
            return {"method": "bdev_null_create", "params": blocks}
        if self.bdev == "malloc":
            return {"method": "bdev_malloc_create", "params": blocks}
        params = {"filename": str(disk.file), "block_size": BLOCK_SIZE, "name": name}
        return {"method": f"bdev_{self.bdev}_create", "params": params}


SERVERS = [Spdk("spdk"), Spdk("spdk-aio", "aio"), Spdk("spdk-malloc", "malloc")]
