"""Debian's kernel package: downloaded and unpacked into the cache, not installed.

The generic flavour is taken, since it has 9p, kvm and everything else that the cloud flavour
leaves out. Its image is xz-compressed; unpacking that inside an emulated CPU takes longer than
the rest of the boot, so the ELF kernel is taken out here and booted through its PVH entry.
"""

from __future__ import annotations

import lzma
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from . import cache
from .process import ProcessError, run

_META = "linux-image-amd64"


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package."""

    release: str
    image: Path
    """The ELF kernel."""
    root: Path
    """The directory that holds ``lib/modules``."""

    async def modules(self, *names: str) -> list[Path]:
        """The files of these modules and all they need, in the order in which to load them."""
        found: dict[Path, None] = {}
        for name in names:
            listing = await run(
                "modprobe", "-d", self.root, "-S", self.release, "--show-depends", name
            )
            for line in listing.decode().splitlines():
                verb, _, path = line.strip().partition(" ")
                if verb == "insmod":
                    found[Path(path.split()[0])] = None
        return list(found)


async def fetch() -> Kernel:
    """The kernel that Debian's ``linux-image-amd64`` stands for at present."""
    package, version = await _candidate()
    place = await cache.entry(
        f"kernel-{package.removeprefix('linux-image-')}-{version}",
        lambda into: _unpack(package, version, into),
    )
    return Kernel(release=_release(place), image=place / "boot/vmlinux", root=place)


async def _candidate() -> tuple[str, str]:
    """The concrete package that the meta package depends on, and its version."""
    shown = (await run("apt-cache", "show", "--no-all-versions", _META)).decode()
    found = re.search(r"^Depends:.*?(linux-image-\S+) \(= (\S+)\)", shown, re.MULTILINE)
    if not found:
        raise ProcessError(f"apt-cache show {_META}: no concrete kernel package in:\n{shown}")
    return found[1], found[2]


async def _unpack(package: str, version: str, into: Path) -> None:
    try:
        await _download(package, version, into)
    except ProcessError:
        if os.geteuid() != 0:
            raise
        # Lists older than the mirror name files that are gone.
        await run("apt-get", "-qq", "update")
        package, version = await _candidate()
        await _download(package, version, into)
    script = 'dpkg-deb -x "$1"/*.deb "$1" && rm -rf "$1"/*.deb "$1/usr"'
    await run("sh", "-c", script, "sh", into)
    await run("depmod", "-b", into, _release(into))
    _extract(into / "boot")


async def _download(package: str, version: str, into: Path) -> None:
    # apt-get download has no option for the target directory, nor may its sandbox user write here.
    script = 'cd "$1" && exec apt-get -qq -o APT::Sandbox::User=root download "$2"'
    await run("sh", "-c", script, "sh", into, f"{package}={version}")


def _release(root: Path) -> str:
    (modules,) = (root / "lib/modules").iterdir()
    return modules.name


def _extract(boot: Path) -> None:
    (bzimage,) = boot.glob("vmlinuz-*")
    (boot / "vmlinux").write_bytes(_elf(bzimage.read_bytes()))


def _elf(bzimage: bytes) -> bytes:
    """The ELF kernel inside a bzImage (boot protocol 2.08, payload_offset and payload_length)."""
    sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if not payload.startswith(b"\xfd7zXZ"):
        raise ProcessError(f"the kernel's payload is not xz but starts with {payload[:6].hex()}")
    return lzma.LZMADecompressor().decompress(payload)
