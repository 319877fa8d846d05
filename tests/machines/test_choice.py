"""Which VMM runs a machine, on hosts with and without a KVM that can."""

from __future__ import annotations

from pathlib import Path

import pytest

from vdev.errors import UserError
from vdev.machines import choice
from vdev.machines.choice import choose_vmm, new_machine
from vdev.vmm.api import NotSupported
from vdev.vmm.config import (
    DiskConfig,
    LimitsConfig,
    MachineConfig,
    SandboxConfig,
    ShareConfig,
    VsockConfig,
)


def config(vmm: str) -> MachineConfig:
    return MachineConfig(name="m", kernel="missing", vmm=vmm)


@pytest.mark.parametrize(
    ("reason", "vmm", "chosen"),
    [
        (None, "auto", ("kvm", None)),
        (None, "kvm", ("kvm", None)),
        (None, "qemu", ("qemu", None)),
        (None, "cloud-hypervisor", ("cloud-hypervisor", None)),
        ("no KVM", "auto", ("qemu", "no KVM")),
        ("no KVM", "qemu", ("qemu", None)),
    ],
)
def test_the_choice(
    monkeypatch: pytest.MonkeyPatch, reason: str | None, vmm: str, chosen: tuple[str, str | None]
) -> None:
    monkeypatch.setattr(choice, "kvm_usable", lambda: reason)
    assert choose_vmm(config(vmm)) == chosen


def test_a_kvm_that_was_asked_for_and_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "kvm_usable", lambda: "no KVM")
    with pytest.raises(UserError, match=r"^vmm kvm: no KVM$"):
        new_machine(config("kvm"))


def test_the_host_is_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for reason in (None, "no KVM"):
        monkeypatch.setattr(choice, "kvm_usable", lambda reason=reason: reason)
        with pytest.raises(UserError, match="kernel missing: No such file"):
            new_machine(config("auto"))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"vsock": VsockConfig(3)}, "vsock"),
        ({"limits": LimitsConfig(cpu=1)}, "limits"),
        ({"sandbox": SandboxConfig(user="nobody")}, "sandbox user"),
        ({"transport": "mmio"}, "transport mmio"),
        ({"shares": (ShareConfig("/"),)}, "shares"),
        ({"disks": (DiskConfig("null:1M"),) * 21}, "takes 20"),
    ],
)
def test_what_qemu_does_not_do_is_refused_and_not_ignored(
    tmp_path: Path, settings: dict[str, object], what: str
) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"\x7fELF\x02\x01" + bytes(12) + b"\x3e\0")
    with pytest.raises(NotSupported, match=what):
        new_machine(
            MachineConfig(name="m", kernel=str(kernel), vmm="qemu", **settings)  # type: ignore[arg-type]
        )
