"""What is plugged into a machine: devices that another process serves, and QEMU's own.

Each says which options QEMU needs for it. The two of a kind differ in who serves them; their
slots are the same, and names in the guest follow the slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class Device(Protocol):
    """Something that QEMU plugs in."""

    def arguments(self, index: int, *, kvm: bool) -> Sequence[str]:
        """QEMU's options for this as the index-th device of its kind."""
        ...


@dataclass(frozen=True)
class Disk:
    """A vhost-user-blk device; `reconnect`: QEMU looks every second whether its server is back."""

    socket: Path
    queues: int = 1
    options: str = ""
    reconnect: bool = False

    def arguments(self, index: int, *, kvm: bool) -> Sequence[str]:
        again = ",reconnect=1" if self.reconnect else ""
        back_end = ["-chardev", f"socket,id=disk{index},path={self.socket}{again}"]
        return [*back_end, *_disk(index, f"vhost-user-blk-pci,chardev=disk{index}", self)]


@dataclass(frozen=True)
class OwnDisk:
    """QEMU's own virtio-blk on a raw image; `iothread`: in a thread of its own, iothreadN."""

    image: Path
    read_only: bool = False
    direct: bool = False
    aio: str = "threads"
    iothread: bool = False
    queues: int = 1
    options: str = ""

    def arguments(self, index: int, *, kvm: bool) -> Sequence[str]:
        back_end = [
            "-blockdev",
            f"driver=raw,node-name=disk{index},read-only={_on(self.read_only)},"
            f"cache.direct={_on(self.direct)},file.driver=file,file.filename={self.image},"
            f"file.aio={self.aio},file.cache.direct={_on(self.direct)}",
        ]
        device = f"virtio-blk-pci,drive=disk{index}"
        if self.iothread:
            back_end += ["-object", f"iothread,id=iothread{index}"]
            device += f",iothread=iothread{index}"
        return [*back_end, *_disk(index, device, self)]


def _disk(index: int, device: str, disk: Disk | OwnDisk) -> Sequence[str]:
    options = f",{disk.options}" if disk.options else ""
    return [
        "-device",
        # The first disk is vda.
        f"{device},num-queues={disk.queues},addr={0x10 + index:#x}{options}",
    ]


@dataclass(frozen=True)
class Nic:
    """A vhost-user-net device."""

    socket: Path
    mac: str
    queues: int = 1
    mtu: int | None = None
    options: str = ""

    def arguments(self, index: int, *, kvm: bool) -> Sequence[str]:
        return [
            *("-chardev", f"socket,id=nic{index},path={self.socket}"),
            *("-netdev", f"vhost-user,id=net{index},chardev=nic{index},queues={self.queues}"),
            *_nic(index, self, kvm=kvm),
        ]


@dataclass(frozen=True)
class OwnNic:
    """QEMU's own virtio-net on a tap, which it makes unless it is there."""

    tap: str
    mac: str
    queues: int = 1
    mtu: int | None = None
    options: str = ""

    def arguments(self, index: int, *, kvm: bool) -> Sequence[str]:
        return [
            "-netdev",
            f"tap,id=net{index},ifname={self.tap},script=no,downscript=no,vhost=off,"
            f"queues={self.queues}",
            *_nic(index, self, kvm=kvm),
        ]


def _nic(index: int, nic: Nic | OwnNic, *, kvm: bool) -> Sequence[str]:
    options = "" if nic.queues == 1 else ",mq=on"
    if nic.mtu is not None:
        options += f",host_mtu={nic.mtu}"
    if not kvm:
        # QEMU 7.2's TCG crashes when a vhost-user-net device with MSI-X starts.
        options += ",vectors=0"
    if nic.options:
        options += f",{nic.options}"
    return [
        "-device",
        f"virtio-net-pci,netdev=net{index},mac={nic.mac},romfile=,addr={8 + index:#x}{options}",
    ]


def behind_iommu(count: int, options: str = "") -> tuple[list[str], list[str]]:
    """Options of so many devices, each added to its own, and what comes before all of them.

    Only devices behind a port have ATS, and QEMU tells vhost of no more than what is invalidated
    by it.
    """
    arguments = ["-device", "intel-iommu,intremap=off,device-iotlb=on"]
    for port in range(count):
        arguments += ["-device", f"pcie-root-port,id=port{port},chassis={port},addr={port + 1:#x}"]
    each = [
        f"bus=port{port},addr=0,disable-legacy=on,iommu_platform=on,ats=on,{options}".rstrip(",")
        for port in range(count)
    ]
    return each, arguments


def _on(setting: bool) -> str:
    return "on" if setting else "off"
