"""Debian's kernel package: downloaded and unpacked into the cache, not installed.

The lab's own guests run the generic flavour, since it has 9p, kvm and everything else that the
cloud flavour leaves out. A package's image is compressed; unpacking that inside an emulated CPU
takes longer than the rest of the boot, so the ELF kernel is taken out here and booted through its
PVH entry.
"""

from __future__ import annotations

import asyncio
import lzma
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from . import cache
from .process import ProcessError, run

# Debian's meta packages, by the name of the flavour.
FLAVOURS = {"generic": "linux-image-amd64", "cloud": "linux-image-cloud-amd64"}
# How the payload of a bzImage begins; Debian compresses the two flavours differently.
_XZ = b"\xfd7zXZ"
_LZ4 = b"\x02\x21\x4c\x18"


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package."""

    release: str
    image: Path
    """The ELF kernel."""
    root: Path
    """The directory that holds ``lib/modules``."""

    @property
    def bzimage(self) -> Path:
        """The compressed image, as the package has it."""
        return self.root / "boot" / f"vmlinuz-{self.release}"

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


async def fetch(flavour: str = "generic") -> Kernel:
    """The kernel that Debian's meta package of this flavour stands for at present."""
    meta = FLAVOURS[flavour]
    package, version = await _candidate(meta)
    place = await cache.entry(
        f"kernel-{package.removeprefix('linux-image-')}-{version}",
        lambda into: _unpack(meta, package, version, into),
    )
    return Kernel(release=_release(place), image=place / "boot/vmlinux", root=place)


async def _candidate(meta: str) -> tuple[str, str]:
    """The concrete package that the meta package depends on, and its version."""
    shown = (await run("apt-cache", "show", "--no-all-versions", meta)).decode()
    found = re.search(r"^Depends:.*?(linux-image-\S+) \(= (\S+)\)", shown, re.MULTILINE)
    if not found:
        raise ProcessError(f"apt-cache show {meta}: no concrete kernel package in:\n{shown}")
    return found[1], found[2]


async def _unpack(meta: str, package: str, version: str, into: Path) -> None:
    try:
        await download(package, version, into)
    except ProcessError:
        if os.geteuid() != 0:
            raise
        # Lists older than the mirror name files that are gone.
        await run("apt-get", "-qq", "update")
        package, version = await _candidate(meta)
        await download(package, version, into)
    script = 'dpkg-deb -x "$1"/*.deb "$1" && rm -rf "$1"/*.deb "$1/usr"'
    await run("sh", "-c", script, "sh", into)
    await run("depmod", "-b", into, _release(into))
    await _extract(into / f"boot/vmlinuz-{_release(into)}")


async def download(package: str, version: str, into: Path) -> None:
    """The file of a package of Debian's, in this directory. Raises ProcessError."""
    # apt-get download has no option for the target directory, nor may its sandbox user write here.
    script = 'cd "$1" && exec apt-get -qq -o APT::Sandbox::User=root download "$2"'
    await run("sh", "-c", script, "sh", into, f"{package}={version}")


def _release(root: Path) -> str:
    (modules,) = (root / "lib/modules").iterdir()
    return modules.name


async def _extract(packed: Path) -> None:
    packed.with_name("vmlinux").write_bytes(await _elf(await asyncio.to_thread(packed.read_bytes)))


async def _elf(bzimage: bytes) -> bytes:
    """The ELF kernel inside a bzImage (boot protocol 2.08, payload_offset and payload_length)."""
    sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if payload.startswith(_XZ):
        return lzma.LZMADecompressor().decompress(payload)
    if payload.startswith(_LZ4):
        # The kernel's build appends the size of the ELF file, which is not part of the stream.
        return await run("lz4", "-d", "-c", stdin=payload[:-4])
    raise ProcessError(f"the kernel's payload is neither xz nor lz4: {payload[:6].hex()}")
