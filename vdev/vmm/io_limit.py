"""What each disk of a machine may do a second, for those that are plugged in while it runs.

Its process may open nothing by then, neither its group's files nor sysfs.  So the file that takes
limits is open before, and which partitions lie on which disks is known, since the kernel limits
whole disks only.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from vdev.errors import UserError


class IoLimit:
    """`limit` bytes a second, each way, of each disk, in a cgroup that has the controller io.

    `close` it at the end.  Raises OSError where the group has no such file.
    """

    def __init__(self, group: Path, limit: int) -> None:
        self._words = f"rbps={limit} wbps={limit}"
        self._disks = {
            (path.parent / "dev").read_text().strip(): (path.parents[1] / "dev").read_text().strip()
            for path in map(Path.resolve, Path("/sys/class/block").glob("*/partition"))
        }
        self._fd = os.open(group / "io.max", os.O_WRONLY | os.O_CLOEXEC)

    def apply(self, path: str, fd: int) -> None:
        """To the disk that the open image is, or lies on; `path` is what to call it.

        Raises UserError where there is none that can be limited.
        """
        status = os.fstat(fd)
        number = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
        name = f"{os.major(number)}:{os.minor(number)}"
        try:
            os.write(self._fd, f"{self._disks.get(name, name)} {self._words}".encode())
        except OSError as error:
            nowhere = error.errno == errno.ENODEV
            why = "it lies on no block device that is known" if nowhere else error.strerror
            raise UserError(f"I/O limit of {path}: {why}") from None

    def close(self) -> None:
        """The limits stay."""
        os.close(self._fd)
