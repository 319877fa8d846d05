"""What cloud-hypervisor is told: its command line, a machine's configuration as its VmConfig.

Source: cloud-hypervisor v53, vmm/src/api/openapi/cloud-hypervisor.yaml.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vdev.vmm.config import MachineConfig

PROGRAM = "cloud-hypervisor"
SLOTS = tuple(f"slot{number}" for number in range(24))
"""For devices of ours; its bus has 32, and own devices in some."""
_HUGE_PAGE = 2 << 20
_FS_QUEUE_SIZE = 1024

Table = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A device for cloud-hypervisor: in which list of its configuration, and its table there."""

    where: str
    table: Table
    socket_key: str = "vhost_socket"

    def at(self, address: str) -> Table:
        """The table, with its back-end's socket."""
        return {**self.table, self.socket_key: address}


class CloudHypervisorParts:
    """Devices for cloud-hypervisor."""

    def disk(self, device: str, queues: int) -> Part:
        """A vhost-user disk."""
        return Part("disks", {"id": device, "vhost_user": True, "num_queues": queues})

    def nic(self, device: str, mac: str, queues: int, mtu: int | None) -> Part:
        """A vhost-user network card; its queues are counted one by one."""
        table = {"id": device, "vhost_user": True, "mac": mac, "num_queues": 2 * queues}
        return Part("net", table if mtu is None else {**table, "mtu": mtu})

    def fs(self, device: str, tag: str) -> Part:
        """A vhost-user shared folder."""
        table = {"id": device, "tag": tag, "num_queues": 1, "queue_size": _FS_QUEUE_SIZE}
        return Part("fs", table, "socket")


def program_command(config: MachineConfig, *, api_fd: int, events_fd: int) -> list[str]:
    """The command line; the machine itself comes by the API."""
    command = [
        # The console's terminal is its own, else the child that watches the terminal's size makes
        # it hang up on a reset.
        *("setsid", "--ctty"),
        # It ends when we do, whatever ends us.
        *("setpriv", "--pdeathsig=KILL", PROGRAM),
        *("--api-socket", f"fd={api_fd}"),
        *("--event-monitor", f"fd={events_fd}"),
    ]
    if not config.sandbox.seccomp:
        command += ["--seccomp", "false"]
    return command


def vm_config(config: MachineConfig, devices: Iterable[tuple[Part, str]]) -> Table:
    """The body of ``vm.create``; devices: each with its back-end's socket."""
    payload = {"kernel": config.kernel, "cmdline": config.cmdline}
    if config.initrd is not None:
        payload["initramfs"] = config.initrd
    memory: Table = {"size": config.memory, "shared": True}
    if config.hugepages:
        memory |= {"hugepages": True, "hugepage_size": _HUGE_PAGE, "prefault": True}
    serial = config.console == "serial"
    table: Table = {
        "cpus": {"boot_vcpus": config.cpus, "max_vcpus": config.cpus},
        "memory": memory,
        "payload": payload,
        "rng": {"src": "/dev/urandom"},
        "serial": {"mode": "Tty" if serial else "Off"},
        "console": {"mode": "Off" if serial else "Tty"},
        "pvpanic": True,
    }
    if config.balloon:
        table["balloon"] = {"size": 0, "deflate_on_oom": True, "free_page_reporting": True}
    for part, address in devices:
        table.setdefault(part.where, []).append(part.at(address))
    return table
