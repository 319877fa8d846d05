"""Which VMM runs a machine."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

from vdev.errors import UserError
from vdev.vmm.api import VirtualMachine
from vdev.vmm.config import MachineConfig
from vdev.vmm.host import check_host, kvm_usable

if TYPE_CHECKING:
    from vdev.vmm.snapshot import Snapshot

_log = logging.getLogger("vdev.machine")

_HOMES = {
    "kvm": "vdev.vmm.machine:Machine",
    "qemu": "vdev.machines.qemu:QemuMachine",
    "cloud-hypervisor": "vdev.machines.cloud_hypervisor:CloudHypervisorMachine",
}


def choose_vmm(config: MachineConfig) -> tuple[str, str | None]:
    """``kvm``, ``qemu`` or ``cloud-hypervisor``, and what keeps ``auto`` from KVM.

    Raises UserError where the one that was asked for cannot run here.
    """
    if config.vmm == "qemu":
        return "qemu", None
    reason = kvm_usable()
    if reason is None:
        return config.vmm if config.vmm != "auto" else "kvm", None
    if config.vmm != "auto":
        raise UserError(f"vmm {config.vmm}: {reason}")
    return "qemu", reason


def new_machine(config: MachineConfig, snapshot: Snapshot | None = None) -> VirtualMachine:
    """The machine, not entered yet; nothing was touched. snapshot: where it goes on from, with
    `config` made of it. Raises UserError.
    """
    vmm, reason = choose_vmm(config)
    check_host(config)
    if snapshot is not None:
        if vmm != "kvm":
            raise UserError(f"{snapshot.directory}: the VMM {vmm} cannot go on from a snapshot")
        from vdev.vmm.machine import Machine

        return Machine(config, snapshot)
    if reason is not None:
        _log.info("machine %s runs on QEMU: %s", config.name, reason)
    module, _, name = _HOMES[vmm].partition(":")
    machine: VirtualMachine = getattr(importlib.import_module(module), name)(config)
    return machine
