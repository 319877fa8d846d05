"""A guest with these devices: one virtual CPU, little memory, a read-only root file system."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from perf.guest.steps import Steps
from perf.guest.vmm import Vmm
from perf.model import Place, Unsupported
from perf.tools import find_tool
from tests.lab import host, initrd, kernel, rootfs
from tests.lab.devices import Device, OwnDisk
from tests.lab.process import ProcessError
from tests.lab.qemu import Guest, GuestError, Machine, booted

QEMU = "qemu-system-x86_64"
MEMORY_MIB = 256
# The watchdog that would put another clock in the place of the fast one knows nothing of pauses.
_CMDLINE = "ro tsc=reliable"


@dataclass(frozen=True)
class _Parts:
    kernel: Path
    initrd: Path
    root: Path


@cache
def _parts() -> _Parts:
    return asyncio.run(_make_parts())


async def _make_parts() -> _Parts:
    found = await kernel.fetch()
    return _Parts(found.image, await initrd.build(found), await rootfs.build())


def boot(
    steps: Steps,
    place: Place,
    *,
    disks: Sequence[Device] = (),
    nics: Sequence[Device] = (),
    wrapper: Sequence[str] = (),
) -> tuple[Guest, Vmm]:
    """Boots a guest that ends with `steps`; the first of `disks` is its vdb.

    `wrapper`: the command that QEMU is started by. Raises Unsupported, ToolMissing or OSError.
    """
    if lacks := host.lacks_guest():
        raise Unsupported(lacks)
    try:
        parts = _parts()
        machine = Machine(
            kernel=parts.kernel,
            initrd=parts.initrd,
            disks=[OwnDisk(parts.root, read_only=True), *disks],
            nics=nics,
            cpus=1,
            memory_mib=MEMORY_MIB,
            cmdline=_CMDLINE,
            program=[*wrapper, find_tool(QEMU)],
        )
        guest = steps.enter(booted(machine, "guest", place.directory))
        vmm = steps.run(Vmm.of(guest))
    except (GuestError, ProcessError) as error:
        raise OSError(str(error)) from error
    vmm.pin(vcpus=place.client_cpu, others=place.server_cpu)
    return guest, vmm
