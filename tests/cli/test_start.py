"""What is on a machine's way from exec to its guest: what takes long to import is not.

On this host's KVM, with a guest of a few instructions, which any kind of KVM runs.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import host
from tests.vmm.boot_images import elf
from vdev.vmm.layout import KERNEL_BASE, POWER_PORT, POWER_RESET, RESET_VALUE

from .conftest import VDEV
from .machines import TIMEOUT

NEEDED_BY_FEW = {
    *("ctypes", "hashlib", "hypothesis", "pydantic", "pyroute2", "pytest", "qemu"),
    *("random", "rich", "shutil", "ssl", "tempfile", "tomllib", "uvloop"),
    *("vdev.machines.dialer", "vdev.net.links", "vdev.server.listener", "vdev.virtio.vhost_user"),
    *(
        "vdev.vmm.cgroup",
        "vdev.vmm.devices.balloon",
        "vdev.vmm.io_limit",
        "vdev.vmm.snapshot_files",
    ),
}
# The two that change while they live; others are `vdev.record.Record`s.
GENERATED = ["vdev.blk.image.Image", "vdev.vmm.plugs.Plugged"]
_RESET_PORT = (POWER_PORT + POWER_RESET).to_bytes(2, "little")
# mov dx, 0x3f8; mov al, 'K'; out dx, al; mov dx, reset port; mov al, value; out dx, al; hlt
_GUEST = bytes.fromhex("66baf803 b04b ee 66ba") + bytes(
    (*_RESET_PORT, 0xB0, RESET_VALUE, 0xEE, 0xF4)
)
_RESET_REFUSED = 10
_VDEV = """
import dataclasses, json, sys
before = set(sys.modules)
import vdev.vmm.host
vdev.vmm.host.kvm_usable = lambda: None
from vdev.cli import main
code = main()
loaded = set(sys.modules) - before
classes = {
    f"{value.__module__}.{value.__qualname__}"
    for name in loaded if name.startswith("vdev")
    for value in vars(sys.modules[name]).values()
    if isinstance(value, type) and dataclasses.is_dataclass(value) and "__init__" in vars(value)
}
print(json.dumps({"code": code, "loaded": sorted(loaded), "classes": sorted(classes)}))
"""


@pytest.fixture
def kernel(folder: Path) -> str:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        pytest.skip(f"no usable KVM here: /dev/kvm: {error.strerror}")
    Path("kernel").write_bytes(elf([(KERNEL_BASE, _GUEST.ljust(0x400, b"\0"), 4096)]))
    return "kernel"


@pytest.fixture
def tap() -> Iterator[str]:
    if lacks := host.lacks_network():
        pytest.skip(lacks)
    name = f"vdev-{os.getpid() % 1_000_000}-s"
    subprocess.run(f"ip tuntap add dev {name} mode tap vnet_hdr".split(), check=True)
    yield name
    subprocess.run(f"ip link delete {name}".split(), check=True)


def start(kernel: str, *options: str) -> dict[str, Any]:
    """What was loaded by the end of a machine whose guest has said something."""
    words = ("run", "--vmm", "kvm", "--memory", "64M", "--kernel", kernel, "--no-reboot", *options)
    done = subprocess.run(
        [VDEV[0], "-c", _VDEV, *words],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=TIMEOUT,
    )
    said, _, found = done.stdout.partition("{")
    result: dict[str, Any] = json.loads("{" + found)
    assert (said, result["code"]) == ("K", _RESET_REFUSED)
    return result


def test_a_machine_loads_what_it_needs(kernel: str, disk: str) -> None:
    found = start(kernel, "--disk", disk)
    assert NEEDED_BY_FEW & set(found["loaded"]) == set()
    assert "vdev.net" not in found["loaded"]
    assert found["classes"] == GENERATED


def test_a_card_on_a_tap_that_is_there_needs_no_more(kernel: str, disk: str, tap: str) -> None:
    found = start(kernel, "--disk", disk, "--net", f"tap={tap}")
    assert NEEDED_BY_FEW & set(found["loaded"]) <= {"vdev.net.links"}
    assert "vdev.net.rtnetlink" in found["loaded"]
    assert found["classes"] == GENERATED
