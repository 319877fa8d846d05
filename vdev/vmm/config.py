"""What a machine is made of: plain frozen records, checked when they are made.

Each check raises UserError with one line: thing, value, what would be right.  Identifiers that were
left out are given by the machine (``disk0``, ``nic0``, …), since hot-plug needs a name for each.
The field metadata say what `vdev.tables` has to know: the name of a table in a file, and which
texts are sizes or paths.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import field
from pathlib import Path

from vdev.blk.options import CACHE_MODES, ENGINES
from vdev.errors import UserError
from vdev.record import Record
from vdev.runtime import switch_socket
from vdev.vmm.layout import CPUS_MAX, ram_ranges

VMMS = ("auto", "kvm", "qemu", "cloud-hypervisor")
CONSOLES = ("serial", "virtio")
TRANSPORTS = ("pci", "mmio")
VHOST_USER_KINDS = ("blk", "net", "fs")
CMDLINE_MAX = 2047
"""Bytes; the kernel's own limit on x86 (COMMAND_LINE_SIZE less the NUL)."""
TAG_MAX = 36
"""Bytes of a shared folder's tag (virtio 1.3, section 5.11.4)."""

_ID = re.compile(r"[A-Za-z][\w-]{0,31}", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][\w-]{0,47}", re.ASCII)
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")

PATH = {"path": True}
SIZE = {"size": True}


class DiskConfig(Record):
    """A disk: an image (raw file, block device or ``null:SIZE``), as `vdev.blk.serve` takes it."""

    path: str = field(metadata=PATH)
    read_only: bool = False
    serial: str | None = None
    cache: str = "writeback"
    engine: str = "auto"
    queues: int = 1
    id: str = ""

    def __post_init__(self) -> None:
        _not_empty("disk", "path", self.path)
        _one_of("cache", self.cache, CACHE_MODES)
        _one_of("engine", self.engine, ENGINES)
        _between("queues", self.queues, 1, 256)
        serial = self.serial
        if serial is not None and (
            len(serial) > 20 or not serial.isascii() or not serial.isprintable()
        ):
            raise UserError(f"serial {serial!r}: at most 20 printable ASCII characters")
        _check_id(self.id)


class NicConfig(Record):
    """A network card on a tap, on a bridge (by a tap of its own), or on a vhost-user socket, which
    may be a switch's: by its name, or its path.

    mac: made from the machine's name and the card's id where there is none, so that it stays.
    queues: receive and transmit pairs.  address: of the host's end, like "10.0.0.1/24".
    """

    bridge: str | None = None
    tap: str | None = None
    switch: str | None = None
    socket: str | None = field(default=None, metadata=PATH)
    mac: str | None = None
    queues: int = 1
    mtu: int | None = None
    address: str | None = None
    id: str = ""

    def __post_init__(self) -> None:
        if self.switch is not None:
            if self.socket is not None:
                raise UserError("a network card has a switch or a socket, not both")
            _not_empty("network card", "switch", self.switch)
            object.__setattr__(self, "socket", str(switch_socket(self.switch)))
            object.__setattr__(self, "switch", None)
        if self.socket is None and self.tap is None and self.bridge is None:
            raise UserError("a network card needs a bridge, a tap, a switch or a vhost-user socket")
        if self.socket is not None:
            _not_empty("network card", "socket", self.socket)
            for name in ("tap", "bridge", "address"):
                if getattr(self, name) is not None:
                    raise UserError(f"a network card has a socket or a {name}, not both")
        _between("queues", self.queues, 1, 128)
        if self.mtu is not None:
            _between("mtu", self.mtu, 68, 65535)
        if self.mac is not None:
            if not _MAC.fullmatch(self.mac):
                raise UserError(f"mac {self.mac!r}: six bytes like 52:54:00:12:34:56")
            if int(self.mac[:2], 16) & 1:
                raise UserError(f"mac {self.mac}: a multicast address; a card has a unicast one")
        _check_id(self.id)


class ShareConfig(Record):
    """A folder of the host's, which the guest mounts by its tag (virtiofs)."""

    directory: str = field(metadata=PATH)
    tag: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        _not_empty("share", "directory", self.directory)
        if len(self.tag.encode()) > TAG_MAX:
            raise UserError(f"tag {self.tag!r}: at most {TAG_MAX} bytes")
        _check_id(self.id)


class VhostUserConfig(Record):
    """A device that another process serves on a vhost-user socket; tag: of a shared folder."""

    socket: str = field(metadata=PATH)
    kind: str
    queues: int = 1
    tag: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        _not_empty("vhost-user device", "socket", self.socket)
        _one_of("kind", self.kind, VHOST_USER_KINDS)
        _between("queues", self.queues, 1, 256)
        if (self.kind == "fs") != bool(self.tag):
            raise UserError(f"tag {self.tag!r}: a device of kind fs has one, others have none")
        _check_id(self.id)


class VsockConfig(Record):
    """The guest's vsock: its context id, and the host's Unix socket for connections into it."""

    cid: int
    path: str | None = field(default=None, metadata=PATH)

    def __post_init__(self) -> None:
        _between("vsock cid", self.cid, 3, 0xFFFFFFFE)


class LimitsConfig(Record):
    """cgroup v2 limits of the machine's process; None = none.

    cpu: CPUs' worth of time (1.5).  memory: bytes, the guest's and ours.  io: bytes a second, each
    way, of each disk.  pids: threads.
    """

    cpu: float | None = None
    memory: int | None = field(default=None, metadata=SIZE)
    io: int | None = field(default=None, metadata=SIZE)
    pids: int | None = None

    def __post_init__(self) -> None:
        for name in ("cpu", "memory", "io", "pids"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"limit {name} = {value}: above 0")

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return self != LimitsConfig()


class SandboxConfig(Record):
    """What the process of ``vdev run`` gives up once everything is open (vmm kvm).

    enabled: whether anything.  user: whom it becomes if started by root (a name, "UID" or
    "UID:GID"); None = a user that nobody else is.  Who is not root stays who he is.
    """

    enabled: bool = True
    user: str | None = None
    seccomp: bool = True
    landlock: bool = True
    namespaces: bool = True


class MachineConfig(Record):
    """A whole machine.

    memory: bytes, a multiple of 2 MiB.  kernel: bzImage or ELF.  reboot: whether a guest's reset
    starts it again (else it ends the machine).  balloon: whether there is one.  iothreads, poll_us:
    as in `vdev.blk.serve`.

    Raises UserError.
    """

    name: str
    kernel: str = field(metadata=PATH)
    initrd: str | None = field(default=None, metadata=PATH)
    cmdline: str = ""
    cpus: int = 1
    memory: int = field(default=512 << 20, metadata=SIZE)
    hugepages: bool = False
    disks: tuple[DiskConfig, ...] = field(default=(), metadata={"table": "disk"})
    nics: tuple[NicConfig, ...] = field(default=(), metadata={"table": "nic"})
    shares: tuple[ShareConfig, ...] = field(default=(), metadata={"table": "share"})
    vhost_user: tuple[VhostUserConfig, ...] = ()
    vsock: VsockConfig | None = None
    console: str = "serial"
    rng: bool = True
    balloon: bool = False
    transport: str = "pci"
    reboot: bool = True
    iothreads: int = 1
    poll_us: int = 32
    limits: LimitsConfig = LimitsConfig()
    sandbox: SandboxConfig = SandboxConfig()
    vmm: str = "auto"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"name {self.name!r}: at most 48 letters, digits, '_' and '-', no digit first"
            )
        _not_empty("machine", "kernel", self.kernel)
        _between("cpus", self.cpus, 1, CPUS_MAX)
        ram_ranges(self.memory)
        cmdline = self.cmdline.encode()
        if len(cmdline) > CMDLINE_MAX or b"\0" in cmdline or b"\n" in cmdline:
            raise UserError(
                f"cmdline of {len(cmdline)} bytes: one line of at most {CMDLINE_MAX} bytes"
            )
        _one_of("console", self.console, CONSOLES)
        _one_of("transport", self.transport, TRANSPORTS)
        _one_of("vmm", self.vmm, VMMS)
        _between("iothreads", self.iothreads, 1, 256)
        _between("poll_us", self.poll_us, 0, 1_000_000)
        self._name_devices()

    def _name_devices(self) -> None:
        """Fills in what only the whole machine knows: ids, tags, MAC addresses."""
        used = {device.id for device in self.devices() if device.id}
        if len(used) != sum(1 for device in self.devices() if device.id):
            ids = [device.id for device in self.devices()]
            twice = next(i for i in ids if i and ids.count(i) > 1)
            raise UserError(f"id {twice!r}: two devices have it; each needs one of its own")
        for name, stem in _STEMS.items():
            named = tuple(
                dataclasses.replace(d, id=d.id or free_id(stem, used)) for d in getattr(self, name)
            )
            object.__setattr__(self, name, named)
        nics = tuple(dataclasses.replace(nic, mac=self.mac_of(nic)) for nic in self.nics)
        object.__setattr__(self, "nics", nics)
        shares = tuple(dataclasses.replace(s, tag=s.tag or s.id) for s in self.shares)
        object.__setattr__(self, "shares", shares)

    def devices(self) -> Iterator[DiskConfig | NicConfig | ShareConfig | VhostUserConfig]:
        """All that have an id."""
        for name in _STEMS:
            yield from getattr(self, name)

    def mac_of(self, nic: NicConfig) -> str:
        """The address of a card: its own, or one that stays as long as the names do."""
        if nic.mac is not None:
            return nic.mac.lower()
        try:
            host = Path("/etc/machine-id").read_text().strip()
        except OSError:
            host = ""
        number = zlib.crc32(f"{host} machine {self.name} {nic.id}".encode())
        return (b"\x52\x54\x00" + number.to_bytes(4, "big")[1:]).hex(":")


_STEMS = {"disks": "disk", "nics": "nic", "shares": "share", "vhost_user": "vhost"}


def free_id(stem: str, used: set[str]) -> str:
    """The first of ``disk0``, ``disk1``, … that is not in `used`, to which it is added."""
    number = 0
    while f"{stem}{number}" in used:
        number += 1
    used.add(f"{stem}{number}")
    return f"{stem}{number}"


def _check_id(text: str) -> None:
    if text and not _ID.fullmatch(text):
        raise UserError(f"id {text!r}: a letter, then at most 31 letters, digits, '_' and '-'")


def _not_empty(thing: str, what: str, text: str) -> None:
    if not text or "\0" in text:
        raise UserError(f"{thing}: {what} {text!r} is no path")


def _between(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UserError(f"{name} = {value}: {least} to {most}")


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} {value!r} does not exist: {', '.join(choices)}")
