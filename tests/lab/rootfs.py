"""The guest's root file system: a Debian userland made by mmdebstrap, as an ext4 image.

It holds the tools that the tests run and no init system: process 1 is ``guest_init.sh``, or, as
``/sbin/login-init``, ``guest_login.sh``. Its modules are all in the initrd, so that it does not
depend on the kernel.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from . import cache
from .process import ProcessError, run

PACKAGES = (
    "e2fsprogs",
    "ethtool",
    "fio",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "socat",
    "util-linux",
)
PASSWORD = "open sesame"
"""Of root."""
_SUITE = "bookworm"
_SIZE = "1G"
_LEFT_OUT = ("doc", "info", "locale", "man")
_SOURCE = "$(ORIGIN)\t$(RELEASE)\t$(REPO_URI)\t$(COMPONENT)"


async def build() -> Path:
    """The image, made when not in the cache. It is a template: every guest gets a copy."""
    here = Path(__file__).parent
    inits = {
        "sbin/init": (here / "guest_init.sh").read_bytes(),
        "sbin/login-init": (here / "guest_login.sh").read_bytes(),
    }
    options = _mmdebstrap_options()
    name = cache.digest(_SUITE, _SIZE, *options, *inits.values())

    async def make(into: Path) -> None:
        tree = into / "tree"
        sources = await _sources()
        await run(
            # In root mode mmdebstrap mounts the host's /dev, /sys and /proc into the tree. In
            # namespaces of its own these mounts end with it however it ends, so that a tree left
            # half made can be removed without removing what was mounted there.
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("mmdebstrap", "--mode=root"),
            *options,
            *await _proxy_options(),
            _SUITE,
            tree,
            *sources,
            env={"SOURCE_DATE_EPOCH": "0"},
        )
        for path, content in inits.items():
            (tree / path).unlink(missing_ok=True)
            (tree / path).write_bytes(content)
            (tree / path).chmod(0o755)
        image = into / "root.img"
        await run("truncate", "-s", _SIZE, image)
        await run("mkfs.ext4", "-q", "-F", "-L", "vdev-root", "-d", tree, image)
        shutil.rmtree(tree)

    return await cache.entry(f"rootfs-{name}", make) / "root.img"


def _mmdebstrap_options() -> list[str]:
    return [
        "--quiet",
        "--variant=minbase",
        f"--include={','.join(PACKAGES)}",
        *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _LEFT_OUT),
        f"--customize-hook=echo 'root:{PASSWORD}' | chroot \"$1\" chpasswd",
    ]


async def _sources() -> list[str]:
    """The host's own apt sources for Debian, as mmdebstrap takes them.

    Asking apt (rather than reading its files) covers both formats and every place they may be
    in; whatever mirror this machine is set up for is the one that works here.
    """
    listing = await run("apt-get", "indextargets", "--format", _SOURCE, "Created-By: Packages")
    lines: dict[str, None] = {}
    for line in listing.decode().splitlines():
        origin, release, uri, component = line.split("\t")
        if origin == "Debian" and release.split("-")[0] == _SUITE:
            lines[f"deb {uri} {release} {component}"] = None
    if not lines:
        raise ProcessError(
            f"apt knows no Debian {_SUITE} source to make the guest's root file system from; "
            "it knows:\n" + listing.decode()
        )
    return list(lines)


async def _proxy_options() -> list[str]:
    """The host's proxy settings for apt, which mmdebstrap's own apt would not see."""
    dump = (await run("apt-config", "dump", "--format", "%F %v%n", "Acquire")).decode()
    settings = (line.partition(" ") for line in dump.splitlines())
    return [
        f'--aptopt={name} "{value}"'
        for name, _, value in settings
        if "::Proxy" in name and value and not name.endswith("-Auto-Detect")
    ]
