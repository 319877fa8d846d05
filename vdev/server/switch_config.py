"""What a switch is made of: frozen dataclasses, checked when they are made, as a machine's are."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields

from vdev._native import lib
from vdev.errors import UserError
from vdev.net.fabric import PortSettings
from vdev.net.tap import QUEUES_MAX
from vdev.runtime import switch_socket

PATH = {"path": True}
_NAME = re.compile(r"[A-Za-z_][\w-]{0,47}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class PortConfig(PortSettings):
    """A port by name: of a card, with a socket, or of a tap, which may be in a bridge.

    queues: most pairs that the card may have.  mtu: told to it.  tap, bridge, address: see
    `vdev.net.serve`; such a port is an uplink.
    """

    name: str
    socket: str | None = field(default=None, metadata=PATH)
    tap: str | None = None
    bridge: str | None = None
    address: str | None = None
    queues: int = 1
    mtu: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("port", self.name)
        wired = self.tap is not None or self.bridge is not None
        if wired == (self.socket is not None):
            raise UserError(f"port {self.name}: needs a socket, or a tap or bridge, and not both")
        if self.address is not None and not wired:
            raise UserError(f"port {self.name}: an address goes with a tap or bridge")
        if not 1 <= self.queues <= (1 if wired else QUEUES_MAX):
            raise UserError(f"port {self.name}: queues {self.queues}: 1 to {QUEUES_MAX}; a tap's 1")
        if self.mtu is not None and not lib.VIRTIO_NET_MTU_MIN <= self.mtu <= 65535:
            raise UserError(f"port {self.name}: mtu {self.mtu}: 68 to 65535")

    @property
    def settings(self) -> PortSettings:
        """What the switch does with its frames."""
        mine = {spec.name: getattr(self, spec.name) for spec in fields(PortSettings)}
        if self.socket is None:
            mine["uplink"] = True
        return PortSettings(**mine)


@dataclass(frozen=True, kw_only=True)
class GuestConfig(PortSettings):
    """What ports are like that come with front-ends at the switch's own socket."""

    queues: int = 1
    mtu: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mac is not None or self.bound:
            raise UserError("guests cannot share one mac: name a port with a socket of its own")

    @property
    def settings(self) -> PortSettings:
        """As of `PortConfig`."""
        return PortSettings(**{s.name: getattr(self, s.name) for s in fields(PortSettings)})


def check_name(what: str, name: str) -> None:
    """Raises UserError for a name that a switch, or a port, cannot have."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{what} {name!r}: a letter, then at most 47 letters, digits, '_' and '-'")


@dataclass(frozen=True, kw_only=True)
class SwitchConfig:
    """A whole switch, as `vdev switch serve` runs it.

    socket: where guests come; None = where their VMMs find it by the switch's name.
    stations, age, poll_us: see `Switch`.  control: path of the control socket; None = where `vdev
    status` looks.
    """

    name: str
    socket: str | None = field(default=None, metadata=PATH)
    stations: int = 8192
    age: int = 300
    poll_us: int = 32
    control: str | None = field(default=None, metadata=PATH)
    guests: GuestConfig = GuestConfig()
    ports: tuple[PortConfig, ...] = field(default=(), metadata={"table": "port"})

    def __post_init__(self) -> None:
        check_name("switch", self.name)
        if not 0 <= self.poll_us <= 1_000_000:
            raise UserError(f"poll_us {self.poll_us}: 0 to 1000000")

    @property
    def socket_path(self) -> str:
        """Where guests come."""
        return self.socket if self.socket is not None else str(switch_socket(self.name))
