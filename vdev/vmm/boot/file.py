"""A kernel or an initrd: a regular file, held open, read by ranges."""

from __future__ import annotations

import os
import stat

from vdev.errors import UserError
from vdev.vmm.boot.entry import GuestRam


class BootFile:
    """A file that stays open, so that a reboot loads it again whatever its path now leads to."""

    def __init__(self, what: str, path: str | os.PathLike[str]) -> None:
        """Open `path`. Raises UserError where it cannot be read, is no regular file, or is empty.

        `what` is the word for it in errors: "kernel", "initrd".
        """
        self.name = f"{what} {os.fspath(path)}"
        try:
            # A pipe that nobody writes to must not hold us up here.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except FileNotFoundError:
            raise UserError(f"{self.name}: no such file") from None
        except OSError as error:
            raise UserError(f"{self.name}: {error.strerror}") from None
        except ValueError:
            raise UserError(f"{self.name!r}: no path may have a null character") from None
        status = os.fstat(self._fd)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise UserError(f"{self.name}: {kind}: a file is needed")
        if not self.size:
            self.close()
            raise UserError(f"{self.name}: an empty file")

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; fewer only where the file ends. Raises UserError."""
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            raise UserError(f"{self.name}: {error.strerror}") from None

    def load(self, ram: GuestRam, guest_addr: int, size: int, offset: int) -> None:
        """Fill RAM from `offset` on. Raises UserError where the file has shrunk meanwhile."""
        done = 0
        while done < size:
            try:
                count = ram.fill(guest_addr + done, size - done, self._fd, offset + done)
            except OSError as error:
                raise UserError(f"{self.name}: {error.strerror}") from None
            if not count:
                raise UserError(
                    f"{self.name}: truncated to {offset + done} bytes since it was opened, "
                    f"when it had {self.size}"
                )
            done += count

    def close(self) -> None:
        """Give the file back; more than once does no harm."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
