"""The virtual machine monitor: machines on KVM, whose devices are those that vhost-user serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vdev.vmm.api import Outcome as Outcome
    from vdev.vmm.api import VirtualMachine as VirtualMachine
    from vdev.vmm.config import DiskConfig as DiskConfig
    from vdev.vmm.config import MachineConfig as MachineConfig
    from vdev.vmm.config import NicConfig as NicConfig
    from vdev.vmm.machine import Machine as Machine

_HOMES = {
    "DiskConfig": "vdev.vmm.config",
    "Machine": "vdev.vmm.machine",
    "MachineConfig": "vdev.vmm.config",
    "NicConfig": "vdev.vmm.config",
    "Outcome": "vdev.vmm.api",
    "VirtualMachine": "vdev.vmm.api",
}


def __getattr__(name: str) -> object:
    """Loads each name from its module at first use: starting stays quick."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'vdev.vmm' has no attribute {name!r}")
