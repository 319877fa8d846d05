"""What one net device needs of the host's network, from its start to its end.

`up` first undoes what dead servers left behind, then makes and records; `down` undoes what is
recorded, newest first.  After a crash the next `up` reads the same records and takes the same
steps, so there is one way to undo a thing, not two.
"""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdev.descriptors import Descriptors
from vdev.errors import UserError
from vdev.net import bridge as bridges
from vdev.net import tap as taps
from vdev.net.links import Links, on_links
from vdev.net.rtnetlink import Link, find_link, set_link
from vdev.net.state import Journal, Record, exclusively
from vdev.net.tap import QUEUES_MAX, Tap, TapState, check_name

if TYPE_CHECKING:
    from vdev.net.links import Interface

_log = logging.getLogger("vdev.net")
_MTU_MIN = 68  # IPv4's least, and virtio's (virtio 1.3, section 5.1.4.1)
_MADE_NAME = "vdev%d"


class Wiring:
    """A tap, plugged into a bridge if one is named; see `vdev.server.net.serve`."""

    def __init__(
        self,
        *,
        tap: str | None = None,
        bridge: str | None = None,
        queues: int = 1,
        mtu: int | None = None,
        address: str | None = None,
        state_dir: Path | None = None,
    ) -> None:
        if tap is None and bridge is None:
            raise UserError("a network device needs a tap or a bridge: give one of them")
        if not 1 <= queues <= QUEUES_MAX:
            raise UserError(f"{queues} queue pairs: a network device has 1 to {QUEUES_MAX}")
        if mtu is not None and not _MTU_MIN <= mtu <= taps.MTU_MAX:
            raise UserError(f"MTU {mtu}: {_MTU_MIN} to {taps.MTU_MAX} bytes")
        self._tap_name = check_name(tap) if tap is not None else None
        self._bridge_name = check_name(bridge) if bridge is not None else None
        self._queues = queues
        self._mtu = mtu
        self._address = _parse_address(address) if address is not None else None
        self._state_dir = state_dir
        self._journal = Journal(state_dir)
        self._tap: Tap | None = None

    @property
    def tap(self) -> Tap:
        """The open tap, between `up` and `down`."""
        if self._tap is None:
            raise RuntimeError("this wiring is not up")
        return self._tap

    @property
    def mtu(self) -> int | None:
        """The MTU in bytes if it is another than Ethernet's usual one, or was asked for."""
        return self._mtu

    def opened(self) -> dict[str, int]:
        """The descriptors by which another process has all this, which goes on when we `let_go`:
        `queue0`, … of the tap, and `journal`, whose lock keeps what was made from being undone, if
        anything was."""
        fds = {f"queue{number}": fd for number, fd in enumerate(self.tap.fds)}
        if (journal := self._journal.fileno()) is not None:
            fds["journal"] = journal
        return fds

    def save(self, fds: Descriptors) -> dict[str, Any]:
        """All this, for `inherit` in another process; nothing is undone here then."""
        journal = self._journal.fileno()
        return {
            "tap": self.tap.save(fds),
            "mtu": self._mtu,
            "journal": fds.put(journal if journal is not None else -1),
        }

    def inherit(self, state: dict[str, Any], fds: Descriptors) -> None:
        """What `save` gave, in place of `up`.

        Raises ValueError, KeyError or TypeError where it did not.
        """
        self._tap = Tap.restore(state["tap"], fds)
        self._mtu = None if state["mtu"] is None else int(state["mtu"])
        if state["journal"] is not None:
            self._journal = Journal.inherited(fds.take(state["journal"]))

    async def up(self) -> None:
        """Makes what is missing. Raises UserError; `down` is due in any case."""
        await on_links(self._up)

    async def down(self) -> None:
        """Closes the tap and undoes what was made; what others use by now is left to them."""
        if self._tap is not None:
            self._tap.close()
            self._tap = None
        await on_links(self._down)

    def let_go(self) -> None:
        """Closes the tap and leaves what was made to the next `sweep`: for a process that has no
        rights any more, or that has passed on what is `opened`."""
        if self._tap is not None:
            self._tap.close()
            self._tap = None
        self._journal.close()

    async def _up(self, links: Links) -> None:
        with exclusively(self._state_dir):
            await _sweep(links, self._state_dir)
            await self._wire(links)

    async def _wire(self, links: Links) -> None:
        bridge = None
        if self._bridge_name is not None:
            bridge = await bridges.ensure_bridge(links, self._journal, self._bridge_name, self._mtu)
        link = self._open_tap()
        assert self._tap is not None
        if self._mtu is None:
            # A port of a smaller MTU would pull the whole bridge down to it.
            wanted = bridge.mtu if bridge is not None and self._tap.created else link.mtu
            self._mtu = wanted if wanted != taps.MTU_USUAL else None
        try:
            if self._mtu is not None and link.mtu != self._mtu:
                set_link(link.index, mtu=self._mtu)
            if bridge is not None:
                bridges.plug(self._journal, link, bridge, ours=self._tap.created)
            if not link.up:
                set_link(link.index, up=True)
        except OSError as error:
            raise UserError(f"tap {link.name}: {bridges.reason(error)}") from error
        if self._address is not None:
            await bridges.add_address(links, self._journal, bridge or link, self._address)

    def _open_tap(self) -> Link:
        name = self._tap_name
        link = find_link(name=name) if name is not None else None
        if link is None:
            self._tap = Tap.create(name or _MADE_NAME, self._queues)
            link = find_link(name=self._tap.name)
            if link is None:
                raise UserError(f"tap {self._tap.name}: it vanished as soon as it was made")
            return link
        if link.tun is None or not link.tun.is_tap:
            raise UserError(
                f"tap {name}: this interface exists and is no tap "
                f"({link.kind or 'a network card'}): give another name, or --bridge"
            )
        self._tap = Tap.attach(link.name, self._queues, multi_queue=link.tun.multi_queue)
        state = TapState(
            name=link.name,
            packet_info=link.tun.packet_info,
            vnet_header=link.tun.vnet_header,
            multi_queue=link.tun.multi_queue,
            header_len=self._tap.header_len,
            little_endian=self._tap.little_endian,
        )
        record: Record = {"undo": "restore tap", "name": link.name, "index": link.index}
        link_state = {"mtu": link.mtu, "up": link.up}
        self._journal.add(record | {"state": state._asdict()} | link_state)
        return link

    async def _down(self, links: Links) -> None:
        with exclusively(self._state_dir):
            await _undo_all(links, self._journal)
            self._journal.close()
            # A bridge that outlived its maker, since we used it, goes with us.
            await _sweep(links, self._state_dir)


async def sweep(state_dir: Path | None = None) -> None:
    """Undoes what dead or confined processes left behind, if there is anything."""

    async def undo(links: Links) -> None:
        with exclusively(state_dir):
            await _sweep(links, state_dir)

    with exclusively(state_dir):
        is_clean = not any(journal.records for journal in Journal.leftovers(state_dir))
    if is_clean:
        return
    await on_links(undo)


async def _sweep(links: Links, state_dir: Path | None) -> None:
    """Undoes what dead servers left behind."""
    for journal in Journal.leftovers(state_dir):
        await _undo_all(links, journal)


async def _undo_all(links: Links, journal: Journal) -> None:
    for record in reversed(journal.records[:]):
        try:
            done = await _undo(links, record)
        except OSError as error:
            done = error.errno == errno.ENODEV
            if not done:
                _log.warning(
                    "%s %s: %s: left for later", record["undo"], record["name"], error.strerror
                )
        if done:
            journal.strike(record)


async def _undo(links: Links, record: Record) -> bool:
    """Undoes one thing; False: not yet, others use it."""
    link = find_link(index=record["index"])
    if link is None or link.name != record["name"]:
        return True  # it is gone
    match record["undo"]:
        case "delete bridge":
            if await links.ports(link.index):
                return False
            await links.delete(link.index)
        case "delete address":
            await links.delete_address(link.index, _parse_address(record["address"]))
        case "unplug":
            set_link(link.index, master=0)
        case "set down":
            if await links.ports(link.index):
                return False
            set_link(link.index, up=False)
        case "restore tap":
            _restore_tap(link, record)
    return True


def _restore_tap(link: Link, record: dict[str, Any]) -> None:
    if link.mtu != record["mtu"]:
        set_link(link.index, mtu=record["mtu"])
    if link.up != record["up"]:
        set_link(link.index, up=record["up"])
    taps.restore(TapState(**record["state"]))


def _parse_address(text: str) -> Interface:
    import ipaddress

    try:
        if "/" in text:
            return ipaddress.ip_interface(text)
    except ValueError:
        pass
    raise UserError(f"address {text!r}: an IP address with its prefix length, like 10.0.0.1/24")
