"""Programs of others that measurements run: where they are, and which package has them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from perf.errors import PerfError

# The Debian package of each program, or where else it is had.
PACKAGES = {
    "qemu-storage-daemon": "qemu-system-common",
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "fio": "fio",
    "iperf3": "iperf3",
    "dpdk-testpmd": "dpdk-dev",
    "valgrind": "valgrind",
    "taskset": "util-linux",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "ip": "iproute2",
    "stdbuf": "coreutils",
}
# System tools of Debian live in /usr/sbin, which an ordinary user's PATH leaves out.
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")

_named: dict[str, str] = {}


class ToolMissing(PerfError):
    """A program that a measurement needs is not there; the message says how to get it."""


def name_path(name: str, path: str) -> None:
    """Uses the program at `path` where `name` is asked for.

    Raises ToolMissing when there is no such program.
    """
    if not os.access(path, os.X_OK) or Path(path).is_dir():
        raise ToolMissing(f"{name}: {path} is no program")
    _named[name] = str(Path(path).absolute())


def find_tool(name: str) -> str:
    """The path of a program. Raises ToolMissing."""
    if name in _named:
        return _named[name]
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN])
    path = shutil.which(name, path=search)
    if path is None:
        package = PACKAGES.get(name)
        if package is None:
            raise ToolMissing(f"{name} is in no Debian package: name it with --tool {name}=PATH")
        raise ToolMissing(
            f"{name} is not installed: it is in the Debian package {package} "
            f"(apt install {package})"
        )
    return path


def said(command: Sequence[str], *options: str) -> str:
    """What a program says to these options and ends, or an empty string without the program.

    A command of one word is looked up by its name.
    """
    try:
        words = [find_tool(command[0])] if len(command) == 1 else [*command]
        done = subprocess.run(
            [*words, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=20,
            check=False,
        )
    except (ToolMissing, OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def first_line(command: Sequence[str], *options: str) -> str:
    """The first line of what a program says, such as its version, or an empty string."""
    lines = [line.strip() for line in said(command, *options).splitlines() if line.strip()]
    return lines[0] if lines else ""
