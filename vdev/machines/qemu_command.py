"""What QEMU is told: a machine's configuration as its command line and its device tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vdev.vmm.config import MachineConfig

PROGRAM = "qemu-system-x86_64"
SPARE_PORTS = 4
"""Slots for devices that are plugged in later."""
PORTS_MAX = 24

Table = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A device for QEMU: its back-end's network table, if it is a card, and its own."""

    netdev: Table | None
    device: Table

    @property
    def chardev(self) -> str:
        """The name of the socket to its back-end."""
        return f"{self.device['id']}-socket"


@dataclass(frozen=True)
class QemuParts:
    """Devices for QEMU, on KVM or without."""

    kvm: bool

    def disk(self, device: str, queues: int) -> Part:
        """A vhost-user disk."""
        table = {
            "driver": "vhost-user-blk-pci",
            "id": device,
            "chardev": f"{device}-socket",
            "num-queues": queues,
        }
        return Part(None, table)

    def nic(self, device: str, mac: str, queues: int, mtu: int | None) -> Part:
        """A vhost-user network card."""
        netdev = {
            "type": "vhost-user",
            "id": f"{device}-net",
            "chardev": f"{device}-socket",
            "queues": queues,
        }
        table: Table = {
            "driver": "virtio-net-pci",
            "id": device,
            "netdev": f"{device}-net",
            "mac": mac,
            "romfile": "",
        }
        if queues > 1:
            table["mq"] = True
        if mtu is not None:
            table["host_mtu"] = mtu
        if not self.kvm:
            # QEMU 7.2's TCG crashes when a vhost-user network card with MSI-X starts.
            table["vectors"] = 0
        return Part(netdev, table)

    def fs(self, device: str, tag: str) -> Part:
        """A vhost-user shared folder."""
        table = {
            "driver": "vhost-user-fs-pci",
            "id": device,
            "chardev": f"{device}-socket",
            "tag": tag,
        }
        return Part(None, table)


def plugged(part: Part, port: str) -> Table:
    """Its device table, in a slot."""
    return {**part.device, "bus": port}


def machine_command(
    config: MachineConfig, *, kvm: bool, console_fd: int, monitor_fd: int, ports: Sequence[str]
) -> list[str]:
    """The command line up to the devices that others serve; the CPUs wait to be started."""
    hugepages = ",hugetlb=on,prealloc=on" if config.hugepages else ""
    command = [
        # It ends when we do, whatever ends us.
        *("setpriv", "--pdeathsig=KILL", PROGRAM),
        *("-nodefaults", "-no-user-config", "-display", "none", "-S"),
        *("-name", config.name),
        *("-machine", "q35,memory-backend=ram,usb=off,smbus=off,sata=off,hpet=off"),
        *("-accel", "kvm" if kvm else "tcg,thread=multi"),
        *("-cpu", "host" if kvm else "max"),
        # For a machine that can only have one CPU TCG leaves out memory barriers, and such a
        # guest and the thread that serves its device miss each other's notifications.
        *("-smp", f"{config.cpus},maxcpus={max(config.cpus, 2)}"),
        *("-m", f"{config.memory}B"),
        "-object",
        f"memory-backend-memfd,id=ram,size={config.memory}B,share=on{hugepages}",
        *("-kernel", _plain(config.kernel)),
        *("-append", config.cmdline),
        *("-action", f"panic=shutdown,reboot={'reset' if config.reboot else 'shutdown'}"),
        *("-device", "pvpanic"),
        *("-chardev", f"socket,id=monitor,fd={monitor_fd}"),
        *("-mon", "chardev=monitor,mode=control"),
        *("-chardev", f"socket,id=console,fd={console_fd}"),
    ]
    if config.initrd is not None:
        command += ["-initrd", _plain(config.initrd)]
    if config.console == "serial":
        command += ["-serial", "chardev:console"]
    else:
        command += ["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=console"]
    if config.rng:
        command += ["-device", "virtio-rng-pci"]
    if config.balloon:
        command += [
            "-device",
            "virtio-balloon-pci,id=balloon0,deflate-on-oom=on,free-page-reporting=on",
        ]
    if config.sandbox.seccomp:
        denied = ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")
        command += ["-sandbox", ",".join(["on", *(f"{what}=deny" for what in denied)])]
    for number, port in enumerate(ports, 1):
        command += ["-device", f"pcie-root-port,id={port},chassis={number},slot={number}"]
    return command


def part_arguments(part: Part, port: str, address: str) -> list[str]:
    """A device that is there from the beginning; `address`: its back-end's socket."""
    path = address.replace(",", ",,")
    arguments = ["-chardev", f"socket,id={part.chardev},path={path}"]
    if part.netdev is not None:
        arguments += ["-netdev", json.dumps(part.netdev)]
    return [*arguments, "-device", json.dumps(plugged(part, port))]


def _plain(path: str) -> str:
    # A path that begins with a dash would be an option.
    return path if not path.startswith("-") else f"./{path}"
