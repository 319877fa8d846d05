"""The QEMU that emulates the KVM lab's CPU: not every version that Debian has emulates SVM well.

With 7.2+dfsg-7+deb12u18 a guest's exit now and then leaves the state of the host in the guest's
save area (its instruction pointer is that behind the host's VMRUN), and the guest never gets
anywhere again. An older version of the same release, which Debian's security archive still has, is
unpacked into the cache, not installed, and used here. Where it cannot be had the installed one is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import cache
from .kernel import download
from .process import ProcessError, run

WANTED = "1:7.2+dfsg-7+deb12u15"
_PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data")
_FIRMWARE = "/usr/share/seabios"
PROGRAM = "qemu-system-x86_64"


@dataclass(frozen=True)
class Emulator:
    """A QEMU. version: Debian's, or None for whatever is installed."""

    command: tuple[str, ...]
    version: str | None


async def fetch() -> Emulator:
    """The one that is wanted, or where it cannot be had the installed one."""
    try:
        place = await cache.entry(f"qemu-{WANTED.replace(':', '_')}", _unpack)
    except ProcessError:
        return Emulator((PROGRAM,), None)
    # It finds its modules and data beside itself; the firmware is another package's.
    return Emulator((str(place / "usr/bin" / PROGRAM), "-L", _FIRMWARE), WANTED)


async def _unpack(into: Path) -> None:
    for package in _PACKAGES:
        await download(package, WANTED, into)
    script = 'for file in *.deb; do dpkg-deb -x "$file" . && rm "$file"; done; rm -rf usr/share/doc'
    await run("sh", "-ec", f'cd "$1"; {script}', "sh", into)
