"""What the innermost guest boots: Debian's kernels, and a busybox initrd with virtio modules.

Making it needs apt and root; inside the KVM lab, which has neither network nor time, it is
found by the file that ``VDEV_LAB_MATERIAL`` names.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cache, host, kernel
from .initrd import add_busybox, add_script, busybox, pack
from .kernel import Kernel
from .process import run

VARIABLE = "VDEV_LAB_MATERIAL"
MODULES = (
    *("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_console", "virtio-rng"),
    *("virtio_balloon", "vmw_vsock_virtio_transport", "virtiofs", "ext4"),
    *("button", "evdev", "pvpanic_mmio"),
)
_HERE = Path(__file__).parent
_DIRECTORIES = ("bin", "dev", "etc", "mnt", "proc", "run", "sbin", "sys", "tmp")


@dataclass(frozen=True)
class Bootable:
    """One flavour of kernel with its initrd."""

    release: str
    """What ``uname -r`` says."""
    vmlinux: Path
    """The ELF kernel with a PVH entry: the quick one."""
    bzimage: Path
    """The same kernel as distributed, compressed: seconds to unpack in an emulated CPU."""
    initrd: Path
    """Uncompressed; see innermost_init.sh for what it does."""


@dataclass(frozen=True)
class Material:
    """Both flavours of Debian's kernel."""

    generic: Bootable
    cloud: Bootable


def script(text: str, end: str = "poweroff") -> str:
    """The words of a command line that make the guest run a shell script, then power off."""
    encoded = base64.b64encode(text.encode()).decode()
    return f"lab.run={encoded} lab.end={end}"


async def prepare() -> Material:
    """Find everything, or make what is missing in the cache."""
    made = os.environ.get(VARIABLE)
    if made:
        return read(Path(made))
    host.extend_path()
    generic, cloud = await asyncio.gather(_bootable("generic"), _bootable("cloud"))
    return Material(generic, cloud)


def read(path: Path) -> Material:
    """What ``write`` wrote."""
    content: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return Material(
        **{
            flavour: Bootable(
                release=value["release"],
                **{name: Path(value[name]) for name in ("vmlinux", "bzimage", "initrd")},
            )
            for flavour, value in content.items()
        }
    )


def write(material: Material, path: Path) -> None:
    """Note where everything is."""
    content = {
        flavour: {name: str(value) for name, value in vars(bootable).items()}
        for flavour, bootable in vars(material).items()
    }
    path.write_text(json.dumps(content))


async def _bootable(flavour: str) -> Bootable:
    fetched = await kernel.fetch(flavour)
    return Bootable(fetched.release, fetched.image, fetched.bzimage, await _initrd(fetched))


async def _initrd(of: Kernel) -> Path:
    applets = tuple((await run("busybox", "--list")).decode().split())
    init = (_HERE / "innermost_init.sh").read_text()
    coldplug = (_HERE / "innermost_coldplug.sh").read_text()
    recipe = (*MODULES, *applets, *_DIRECTORIES, init, coldplug)
    name = cache.digest(of.root.name, *recipe, busybox())

    async def make(into: Path) -> None:
        tree = into / "tree"
        for directory in _DIRECTORIES:
            (tree / directory).mkdir(parents=True)
        add_busybox(tree, tuple(applet for applet in applets if applet != "busybox"))
        # Where the kernel looks for it when it wants a module.
        (tree / "sbin/modprobe").symlink_to("../bin/busybox")
        add_script(tree / "init", init)
        add_script(tree / "bin/coldplug", coldplug)
        for file in await of.modules(*MODULES):
            target = tree / file.relative_to(of.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        await run("depmod", "-b", tree, of.release)
        await pack(tree, into / "initrd")

    return await cache.entry(f"innermost-{name}", make) / "initrd"
