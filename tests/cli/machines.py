"""Machines under test: a guest that is a shell on its console, and programs that run it."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.lab import initrd, kernel

from .conftest import VDEV

# A guard against a hang, far above what any step needs.
TIMEOUT = 60.0

_MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon", "virtio_console"),
    *("button", "evdev", "pvpanic-mmio"),
)
_APPLETS = (
    *("cat", "dd", "echo", "grep", "insmod", "mount", "poweroff", "reboot", "setsid", "sh", "sync"),
    "cttyhack",
)
_INIT = """\
#!/bin/busybox sh
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do
    insmod "/modules/$module"
done </modules/order
for event in /dev/input/event*; do
    (dd if=$event of=/dev/null bs=24 count=1 2>/dev/null; poweroff -f) &
done
case $(cat /proc/cmdline) in
    *do=poweroff*) poweroff -f ;;
    *do=reboot*) reboot -f ;;
    *do=flood*) echo flooding; while :; do echo flood; done ;;
    *do=panic*) echo c >/proc/sysrq-trigger ;;
esac
export PS1='guest> '
exec setsid cttyhack sh
"""
PROMPT = "guest> "


class Guest:
    """The kernel and initrd of the shell; `options(...)` are those of ``vdev run``."""

    def __init__(self) -> None:
        async def make() -> tuple[Path, Path]:
            found = await kernel.fetch()
            return found.image, await initrd.build(found, _MODULES, _INIT, _APPLETS)

        self.kernel, self.initrd = asyncio.run(make())

    def options(self, *more: str, append: str = "", console: str = "ttyS0") -> list[str]:
        words = f"console={console} loglevel=1 panic=-1 {append}".strip()
        return [
            *("run", "--vmm", "qemu", "--kernel", str(self.kernel), "--initrd", str(self.initrd)),
            *("--append", words, "--memory", "256M", *more),
        ]


class Reader:
    """Collects what a file descriptor gives."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.text = ""
        self._at = 0

    def expect(self, text: str) -> str:
        """Waits for `text` after what was expected before; returns what came up to its end."""
        deadline = time.monotonic() + TIMEOUT
        while (found := self.text.find(text, self._at)) < 0:
            left = deadline - time.monotonic()
            assert left > 0, f"no {text!r} within {TIMEOUT} s after:\n{self.text[self._at :]}"
            if select.select([self.fd], [], [], left)[0] and not self._read():
                raise AssertionError(f"no {text!r}, but the end after:\n{self.text}")
        start, self._at = self._at, found + len(text)
        return self.text[start : self._at]

    def rest(self) -> str:
        """Everything up to its end."""
        while self._read():
            pass
        return self.text

    def _read(self) -> bool:
        try:
            data = os.read(self.fd, 1 << 16)
        except OSError:  # a terminal whose program has ended
            data = b""
        self.text += data.decode(errors="replace")
        return bool(data)


class OnTerminal:
    """A program whose standard streams are a terminal that is its own."""

    def __init__(self, arguments: Sequence[str], program: Sequence[str] = VDEV) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, b"\x1e\0\x64\0\0\0\0\0")  # 30 rows, 100 columns
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *program, *arguments],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
        )
        self.screen = Reader(self.master)

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.hang_up()
        os.close(self.slave)

    def hang_up(self) -> None:
        """Takes the terminal away."""
        if self.master >= 0:
            os.close(self.master)
            self.master = -1

    @property
    def settings(self) -> list[Any]:
        """The terminal's settings now."""
        return termios.tcgetattr(self.slave)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def run(self, command: str) -> str:
        """A command in the guest's shell: what it wrote."""
        self.type(f"{command}\n")
        self.screen.expect(command)
        return self.screen.expect(PROMPT).removesuffix(PROMPT).strip()

    def wait(self) -> int:
        """Its exit code; what it writes is read on the way, else it could wait for us."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            while pidfd not in (ready := select.select([pidfd, self.master], [], [], TIMEOUT)[0]):
                assert ready, f"did not end within {TIMEOUT} s:\n{self.screen.text}"
                self.screen._read()
        finally:
            os.close(pidfd)
        return self.process.wait()


def children_of(pid: int) -> list[int]:
    """The processes whose parent is `pid`."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_end(pid: int) -> None:
    """Returns when the process is gone, whoever's child it is."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], TIMEOUT)[0], f"{pid} did not end in {TIMEOUT} s"
    finally:
        os.close(pidfd)


def stopped(process: subprocess.Popen[bytes]) -> None:
    """Returns when the process was stopped by a signal."""
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), status
    assert os.WSTOPSIG(status) == signal.SIGSTOP
