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


def _busybox() -> bytes:
    return Path(shutil.which("busybox") or "/bin/busybox").read_bytes()


async def build(kernel: Kernel, modules: tuple[str, ...] = MODULES) -> Path:
    """The initrd for this kernel with these modules, made when not in the cache.

    It is not compressed: unpacking would cost an emulated CPU more than reading does.
    """
    busybox = _busybox()
    name = cache.digest(kernel.image.parent.parent.name, *modules, _INIT, busybox)

    async def make(into: Path) -> None:
        tree = into / "tree"
        for directory in ("bin", "dev", "modules", "proc", "root"):
            (tree / directory).mkdir(parents=True)
        (tree / "bin/busybox").write_bytes(busybox)
        (tree / "bin/busybox").chmod(0o755)
        for applet in ("cat", "insmod", "mount", "poweroff", "sh", "switch_root"):
            (tree / "bin" / applet).symlink_to("busybox")
        (tree / "init").write_text(_INIT)
        (tree / "init").chmod(0o755)
        files = await kernel.modules(*modules)
        for file in files:
            shutil.copy(file, tree / "modules" / file.name)
        (tree / "modules/order").write_text("".join(f"{file.name}\n" for file in files))
        script = 'cd "$1" && find . | cpio --quiet -o -H newc -R 0:0 >"$2"'
        await run("sh", "-c", script, "sh", tree, into / "initrd")
        shutil.rmtree(tree)
        os.chmod(into / "initrd", 0o644)

    return await cache.entry(f"initrd-{name}", make) / "initrd"
