"""cloud-hypervisor's back-ends, by path: ``--tool vhost_user_block=…``. Built from source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.model import Disk, Launch, Unsupported
from perf.program import Program


@dataclass
class VhostUserBlock(Program):
    """`poll`: poll the queue for a while before sleeping."""

    program = "vhost_user_block"
    poll: bool = True

    def blk(self, disks: Sequence[Disk], directory: Path) -> Launch:
        program = self.start()
        if len(disks) != 1 or disks[0].file is None:
            raise Unsupported(f"{self.name} serves one file a process")
        disk = disks[0]
        direct, poll = str(disk.direct).lower(), str(self.poll).lower()
        backend = (
            f"path={disk.file},socket={disk.socket},num_queues={disk.queues},queue_size=1024,"
            f"direct={direct},poll_queue={poll}"
        )
        return Launch([*program, "--block-backend", backend], one_connection=True)


SERVERS = [VhostUserBlock("ch-block"), VhostUserBlock("ch-block-no-poll", poll=False)]
