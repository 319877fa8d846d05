"""The initial RAM disk: busybox, the few modules that find the root disk, and a short script."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from . import cache
from .kernel import Kernel
from .process import run

# All that a guest of the lab loads: the root file system holds no modules of its own.
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "ext4")

_INIT = """\
#!/bin/busybox sh
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
while read -r module; do
    insmod "/modules/$module" || echo "initrd: $module was not loaded"
done </modules/order
options=rw
for word in $(cat /proc/cmdline); do
    case $word in
        root=*) device=${word#root=} ;;
        ro) options=ro ;;
    esac
done
mount -t ext4 -o "$options,noatime" "$device" /root || {
    echo "initrd: $device cannot be mounted; the disks are:"
    cat /proc/partitions
    poweroff -f
}
mount --move /dev /root/dev
mount --move /proc /root/proc
exec switch_root /root /sbin/init
"""

_APPLETS = ("cat", "insmod", "mount", "poweroff", "sh", "switch_root")


def busybox() -> bytes:
    """The host's busybox, which is linked statically."""
    return Path(shutil.which("busybox") or "/bin/busybox").read_bytes()


async def build(
    kernel: Kernel,
    modules: tuple[str, ...] = MODULES,
    init: str = _INIT,
    applets: tuple[str, ...] = _APPLETS,
) -> Path:
    """The initrd for this kernel with these modules, made when not in the cache.

    It is not compressed: unpacking would cost an emulated CPU more than reading does.
    """
    program = busybox()
    name = cache.digest(kernel.image.parent.parent.name, *modules, init, *applets, program)

    async def make(into: Path) -> None:
        tree = into / "tree"
        for directory in ("bin", "dev", "modules", "proc", "root", "sys"):
            (tree / directory).mkdir(parents=True)
        add_busybox(tree, applets)
        add_script(tree / "init", init)
        files = await kernel.modules(*modules)
        for file in files:
            shutil.copy(file, tree / "modules" / file.name)
        (tree / "modules/order").write_text("".join(f"{file.name}\n" for file in files))
        await pack(tree, into / "initrd")

    return await cache.entry(f"initrd-{name}", make) / "initrd"


def add_busybox(tree: Path, applets: tuple[str, ...]) -> None:
    """Put busybox with these names into the tree's ``bin``."""
    (tree / "bin/busybox").write_bytes(busybox())
    (tree / "bin/busybox").chmod(0o755)
    for applet in applets:
        (tree / "bin" / applet).symlink_to("busybox")


def add_script(path: Path, text: str) -> None:
    """Write a file that can be executed."""
    path.write_text(text)
    path.chmod(0o755)


async def pack(tree: Path, target: Path) -> None:
    """Make the initrd of a tree, and remove the tree."""
    script = 'cd "$1" && find . | cpio --quiet -o -H newc -R 0:0 >"$2"'
    await run("sh", "-c", script, "sh", tree, target)
    shutil.rmtree(tree)
    os.chmod(target, 0o644)
