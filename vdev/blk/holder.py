"""Who holds a file: for the error message about a busy image, best effort."""

from __future__ import annotations

import os


def find(file: os.stat_result, *, besides: int = -1) -> str | None:
    """The processes that hold locks on ``file``; ``besides`` is a descriptor of ours to leave out.

    The kernel's list in /proc/locks names no process for locks of open file descriptions, so the
    descriptors of every process that we may look into are compared.
    """
    found: list[str] = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        own = int(pid) == os.getpid()
        try:
            numbers = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        if any(_holds(pid, n, file) for n in numbers if not (own and int(n) == besides)):
            found.append("this process" if own else f"{_name(pid)} (pid {pid})")
    return " and ".join(found) or None


def _holds(pid: str, number: str, file: os.stat_result) -> bool:
    try:
        info = os.stat(f"/proc/{pid}/fd/{number}")
        if (info.st_dev, info.st_ino) != (file.st_dev, file.st_ino):
            return False
        with open(f"/proc/{pid}/fdinfo/{number}") as text:
            return "lock:" in text.read()
    except OSError:
        return False


def _name(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm") as text:
            return text.read().strip()
    except OSError:
        return "a process"
