"""The servers under test: vdev and its peer, each pinned, each measurable from outside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from perf import installed
from perf.frontend import time_to_features

PACKAGES = {
    "qemu-storage-daemon": "qemu-system-common",
    "taskset": "util-linux",
}
START_TIMEOUT = 20.0


class ToolMissing(Exception):
    """A program that the measurement needs is not installed; says which Debian package has it."""


def find_tool(name: str) -> str:
    """The path of a program. Raises ToolMissing."""
    path = shutil.which(name)
    if path is None:
        raise ToolMissing(
            f"{name} is not installed: it is in the Debian package {PACKAGES[name]} "
            f"(apt install {PACKAGES[name]})"
        )
    return path


@dataclass(frozen=True)
class Image:
    """A disk to serve: a file, or without one a null image of `size` bytes."""

    size: int
    file: Path | None = None


@dataclass(frozen=True)
class Kind:
    """A server and its settings, by the name that the table shows."""

    name: str
    program: str  # "vdev" or "qemu-storage-daemon"
    aio: str = "io_uring"
    iothread: bool = False

    def command(self, image: Image, path: str) -> list[str]:
        """The command line that serves `image` at the socket `path`."""
        if self.program == "vdev":
            source = str(image.file) if image.file else f"null:{image.size}"
            return [
                *installed.find().command,
                *("blk", "serve", "--socket-path", path, "--blk-file", source),
            ]
        if image.file:
            node = f"driver=raw,node-name=d0,file.driver=file,file.filename={image.file}"
            node += f",file.aio={self.aio}"
        else:
            node = f"driver=null-co,node-name=d0,size={image.size},read-zeroes=on"
        export = f"type=vhost-user-blk,id=e0,node-name=d0,addr.type=unix,addr.path={path}"
        export += ",writable=on,num-queues=1"
        thread = ["--object", "iothread,id=iot0"] if self.iothread else []
        export += ",iothread=iot0" if self.iothread else ""
        return [find_tool(self.program), *thread, "--blockdev", node, "--export", export]


VDEV = Kind("vdev", "vdev")


class Server:
    """A running server that listens at `path`; a context manager that ends it."""

    def __init__(self, kind: Kind, image: Image, *, cpu: int | None) -> None:
        self.kind = kind
        self._directory = tempfile.TemporaryDirectory(prefix="perf-")
        self.path = os.path.join(self._directory.name, "s")
        pin = [] if cpu is None else [find_tool("taskset"), "-c", str(cpu)]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the server)
        command = [*pin, *kind.command(image, self.path)]
        started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=installed.find().environment,
        )
        try:
            self.start_seconds = time_to_features(self.path, started + START_TIMEOUT) - started
        except BaseException as error:
            self.close()
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"{kind.name} does not answer:\n{self._said}") from None
            raise
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far, user and system, also of those that ended.

        This is utime + stime of /proc/PID/stat before it is rounded to ticks: the process's CPU
        clock (clock_getcpuclockid(3): the complement of the id, shifted, scheduler's clock).
        """
        return time.clock_gettime((~self.pid << 3) | 2)

    def stop(self) -> None:
        """Stops it where it is, so that it does not disturb while others are measured."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.go_on()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.seek(0)
        self._said = self._log.read().decode(errors="replace")
        self._log.close()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
