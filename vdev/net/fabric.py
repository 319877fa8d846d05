"""The native switch, and its ports: cards of guests, and taps as uplinks.

All queues of a switch run on one iothread, which alone knows the table of stations and the settings
of the ports.  What is asked of it here reaches it as messages.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from vdev._native import ffi, lib
from vdev.errors import UserError
from vdev.iothread import IOThread, settle
from vdev.net import tap as taps
from vdev.net.card import Card, parse_mac
from vdev.net.tap import Tap

VLAN_MAX = 4094
_COUNTERS: dict[str, int] = {
    name.removeprefix("VHOST_SWITCH_").lower(): value
    for value, name in sorted(ffi.typeof("enum vhost_switch_counter").elements.items())
    if name != "VHOST_SWITCH_COUNTERS"
}
_FLAGS = {
    "bound": lib.VHOST_SWITCH_BOUND,
    "private": lib.VHOST_SWITCH_PRIVATE,
    "uplink": lib.VHOST_SWITCH_UPLINK,
    "mirror": lib.VHOST_SWITCH_MIRROR,
    "mirrored": lib.VHOST_SWITCH_MIRRORED,
}
_TAP_OFFLOADS = taps.OFFLOAD_CSUM | taps.OFFLOAD_TSO4 | taps.OFFLOAD_TSO6 | taps.OFFLOAD_TSO_ECN


@dataclass(frozen=True, kw_only=True)
class PortSettings:
    """What a switch does with the frames of a port.

    vlan: of its untagged frames, both ways; 0 = there are none.  trunk: VLANs whose frames are
    tagged, like "10,20-29" or "all".  mac: of the card.  bound: only `mac` may send here, and it at
    no other port.  private: reaches uplinks alone, and is reached from them alone.  mirror: gets a
    copy of what crosses the `mirrored` ports, and nothing else.
    rate: bytes a second that it may send, 0 = any number; burst: bytes beyond that after a silence.
    storm: frames a second that it may send to more than one port, 0 = any number.
    stations: most that are learned at the port.
    """

    vlan: int = 1
    trunk: str = ""
    mac: str | None = None
    bound: bool = False
    private: bool = False
    uplink: bool = False
    mirror: bool = False
    mirrored: bool = False
    rate: int = field(default=0, metadata={"size": True})
    burst: int = field(default=0, metadata={"size": True})
    storm: int = 0
    stations: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.vlan <= VLAN_MAX:
            raise UserError(f"vlan {self.vlan}: 1 to {VLAN_MAX}, or 0 for none")
        parse_vlans(self.trunk)
        if self.mac is not None:
            parse_mac(self.mac)
        elif self.bound:
            raise UserError("a bound port needs the mac that it is bound to")
        for name in ("rate", "burst", "storm", "stations"):
            if not 0 <= (value := getattr(self, name)) < 1 << 62:
                raise UserError(f"{name} {value}: 0 or more")
        if self.stations > lib.VHOST_SWITCH_STATIONS:
            raise UserError(f"stations {self.stations}: at most {lib.VHOST_SWITCH_STATIONS}")

    def native(self, *, up: bool = True) -> Any:
        """The `struct vhost_switch_port_settings *`."""
        out = ffi.new("struct vhost_switch_port_settings *")
        out.flags = sum(flag for name, flag in _FLAGS.items() if getattr(self, name))
        out.flags |= 0 if up else lib.VHOST_SWITCH_DOWN
        out.stations, out.vlan = self.stations, self.vlan
        out.rate, out.burst, out.storm = self.rate, self.burst or self.rate, self.storm
        if self.mac is not None:
            out.mac = parse_mac(self.mac)
        for vlan in parse_vlans(self.trunk):
            out.trunk[vlan // 64] |= 1 << vlan % 64
        return out


def parse_vlans(text: str) -> set[int]:
    """Those of "10,20-29", or "all". Raises UserError."""
    if text == "all":
        return set(range(1, VLAN_MAX + 1))
    vlans: set[int] = set()
    for part in text.replace(" ", "").split(",") if text else ():
        first, dash, last = part.partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdecimal() for end in ends):
            raise UserError(f"trunk {text!r}: VLANs like 10,20-29, or all")
        low, high = (int(end) for end in ends)
        if not 1 <= low <= high <= VLAN_MAX:
            raise UserError(f"trunk {text!r}: {part} is no range within 1 to {VLAN_MAX}")
        vlans.update(range(low, high + 1))
    return vlans


@dataclass(frozen=True)
class Station:
    """Where the switch has heard of an address. age: seconds ago; bound: it stays there."""

    mac: str
    vlan: int
    port: int
    age: int
    bound: bool


class Fabric:
    """A switch on a running iothread; `close` it when no port is left.

    stations: room of its table.  age: seconds after which a station is forgotten that was silent.
    Raises UserError for a table that cannot be.
    """

    def __init__(self, iothread: IOThread, *, stations: int = 8192, age: int = 300) -> None:
        if not 1 <= stations <= lib.VHOST_SWITCH_STATIONS:
            raise UserError(f"stations {stations}: 1 to {lib.VHOST_SWITCH_STATIONS}")
        if not 1 <= age < 1 << 31:
            raise UserError(f"age {age}: 1 second or more")
        self.iothread = iothread
        self.room, self.age = stations, age
        config = ffi.new("struct vhost_switch_config *", {"stations": stations, "age_s": age})
        out = ffi.new("struct vhost_switch **")
        _check(lib.vhost_switch_new(config, iothread.native, out), "switch")
        self.native = out[0]

    async def stations(self) -> list[Station]:
        """All that are known now."""
        # The table's room is rounded up.
        most = max(4, 2 * self.room)
        out = ffi.new("struct vhost_switch_station[]", most)
        count = await self.iothread.call(lib.vhost_switch_read_stations, self.native, out, most)
        return [
            Station(bytes(s.mac).hex(":"), s.vlan, s.port, s.age_s, s.bound) for s in out[0:count]
        ]

    def close(self) -> None:
        """Raises OSError (EBUSY) while it has ports."""
        if self.native:
            _check(lib.vhost_switch_free(self.native), "switch")
            self.native = ffi.NULL


class _Port:
    """What a card's and a tap's port have in common; `native`: the `struct vhost_device *`."""

    fabric: Fabric
    settings: PortSettings
    native: Any

    @property
    def number(self) -> int:
        """By which stations name it."""
        return int(lib.vhost_switch_port_number(self.native))

    def counters(self) -> dict[str, int]:
        """What the switch counted of the port, by name (enum vhost_switch_counter)."""
        out = ffi.new("uint64_t[]", lib.VHOST_SWITCH_COUNTERS)
        lib.vhost_switch_read_counters(self.native, out)
        return {name: out[at] for name, at in _COUNTERS.items()}

    async def plug(self) -> None:
        """Frames come and go from the answer on."""
        await self.fabric.iothread.call(lib.vhost_switch_plug, self.native)

    async def unplug(self) -> None:
        """The other way round: after this it may be closed, however the waiter ended."""
        call = self.fabric.iothread.call(lib.vhost_switch_unplug, self.native)
        await settle(asyncio.ensure_future(call))

    async def change(self, settings: PortSettings) -> None:
        """Other settings from the answer on; what was learned at the port is forgotten."""
        await self._tell(settings)
        self.settings = settings

    async def _tell(self, settings: PortSettings, *, up: bool = True) -> None:
        call = self.fabric.iothread.call
        await call(lib.vhost_switch_set, self.native, settings.native(up=up))


class CardPort(_Port, Card):
    """A virtio-net card whose network is a switch.

    mac: its address, 6 bytes.
    """

    def __init__(
        self,
        fabric: Fabric,
        settings: PortSettings,
        *,
        name: str,
        mac: bytes,
        pairs: int = 1,
        mtu: int | None = None,
    ) -> None:
        if not 1 <= pairs <= taps.QUEUES_MAX:
            raise UserError(f"{pairs} queue pairs: a network device has 1 to {taps.QUEUES_MAX}")
        Card.__init__(
            self,
            iothreads=[fabric.iothread],
            name=name,
            mac=mac,
            mtu=mtu,
            pairs=pairs,
        )
        self.fabric, self.settings = fabric, settings
        self._telling: set[asyncio.Task[None]] = set()
        out = ffi.new("struct vhost_device **")
        made = lib.vhost_switch_card_new(fabric.native, pairs, settings.native(), out)
        _check(made, f"port {name} of the switch")
        self.native = out[0]

    async def change(self, settings: PortSettings) -> None:
        await self._tell(settings, up=self.link_up)
        self.settings = settings

    def announce(self, mac: bytes) -> None:
        """Says in the network, in the guest's name, that it is here now."""
        self._post(lib.vhost_switch_announce, mac)

    def describe(self) -> dict[str, Any]:
        """The settings of the port, and what it counted."""
        return {
            "kind": "net",
            "link_up": self.link_up,
            "settings": asdict(self.settings),
            "counters": self.counters(),
        }

    def _apply_link(self, up: bool) -> None:
        self._post(lib.vhost_switch_set, self.settings.native(up=up))

    def _post(self, function: Any, argument: Any) -> None:
        """Messages take effect in the order in which they were posted."""

        async def tell() -> None:
            await self.fabric.iothread.call(function, self.native, argument)

        task = asyncio.ensure_future(tell())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def unplug(self) -> None:
        if self._telling:
            await asyncio.wait(self._telling)
        await super().unplug()


class TapPort(_Port):
    """A tap as a port: the switch's way to the host and beyond. The tap stays the caller's."""

    def __init__(self, fabric: Fabric, settings: PortSettings, tap: Tap, *, name: str) -> None:
        self.fabric, self.settings = fabric, settings
        self.name, self.tap = name, tap
        tap.set_header(ffi.sizeof("struct virtio_net_hdr"), little_endian=True)
        tap.set_offloads(_TAP_OFFLOADS)
        out = ffi.new("struct vhost_device **")
        made = lib.vhost_switch_tap_new(fabric.native, tap.fds[0], settings.native(), out)
        _check(made, f"port {name} of the switch")
        self.native = out[0]

    def describe(self) -> dict[str, Any]:
        """As of a card's port."""
        return {
            "kind": "tap",
            "tap": self.tap.name,
            "settings": asdict(self.settings),
            "counters": self.counters(),
        }

    def close(self) -> None:
        """Frees it, when it is unplugged."""
        if self.native:
            lib.vhost_device_free(self.native)
            self.native = ffi.NULL


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result), what)
