"""qemu-storage-daemon: QEMU's block layer behind vhost-user-blk.

With an iothread it polls for up to 32 µs before it sleeps; without, its main loop serves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.model import Disk, Launch
from perf.program import Program


@dataclass
class Qsd(Program):
    """`aio`: "io_uring", "threads" or "native"; `poll_ns`: the iothread's longest polling."""

    program = "qemu-storage-daemon"
    aio: str = "io_uring"
    iothread: bool = True
    poll_ns: int | None = None

    def blk(self, disks: Sequence[Disk], directory: Path) -> Launch:
        command = self.start()
        if self.iothread:
            poll = "" if self.poll_ns is None else f",poll-max-ns={self.poll_ns}"
            command += ["--object", f"iothread,id=iothread0{poll}"]
        for index, disk in enumerate(disks):
            command += ["--blockdev", self._node(index, disk)]
            command += ["--export", self._export(index, disk)]
        return Launch(command)

    def _node(self, index: int, disk: Disk) -> str:
        if disk.file is None:
            return f"driver=null-co,node-name=disk{index},size={disk.size},read-zeroes=on"
        direct = "on" if disk.direct else "off"
        return (
            f"driver=raw,node-name=disk{index},file.driver=file,file.filename={disk.file},"
            f"file.aio={self.aio},file.cache.direct={direct}"
        )

    def _export(self, index: int, disk: Disk) -> str:
        thread = ",iothread=iothread0" if self.iothread else ""
        return (
            f"type=vhost-user-blk,id=export{index},node-name=disk{index},writable=on,"
            f"addr.type=unix,addr.path={disk.socket},num-queues={disk.queues}{thread}"
        )


SERVERS = [
    Qsd("qsd"),
    Qsd("qsd-main-loop", iothread=False),
    Qsd("qsd-threads", aio="threads"),
    Qsd("qsd-no-poll", poll_ns=0),
]
