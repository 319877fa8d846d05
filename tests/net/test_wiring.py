"""Taps and bridges in a namespace: made, used, put back, and what users get wrong."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vdev.errors import UserError
from vdev.net.tap import Tap
from vdev.net.wiring import Wiring, sweep

from .namespace import Namespace
from .served import LOOPS


class Wired:
    """A wiring that is up within the block, in its namespace, on either kind of event loop."""

    def __init__(self, ns: Namespace, state_dir: Path, loop: str, **options: Any) -> None:
        self._ns = ns
        self._loop = LOOPS[loop]
        self.wiring = Wiring(state_dir=state_dir, **options)

    def _run(self, operation: Callable[[], Any]) -> None:
        def run() -> None:
            with asyncio.Runner(debug=True, loop_factory=self._loop) as runner:
                runner.run(operation())

        self._ns.run(run)

    def __enter__(self) -> Wiring:
        try:
            self._run(self.wiring.up)
        except BaseException:
            self._run(self.wiring.down)
            raise
        return self.wiring

    def __exit__(self, *exc: object) -> None:
        self._run(self.wiring.down)


Wire = Callable[..., Wired]


@pytest.fixture(params=LOOPS)
def wired(ns: Namespace, tmp_path: Path, request: pytest.FixtureRequest) -> Wire:
    return lambda **options: Wired(ns, tmp_path / "run", request.param, **options)


def journals(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "run").glob("*"))


# ---- taps ----


def test_a_missing_tap_is_made_and_removed(ns: Namespace, tmp_path: Path, wired: Wire) -> None:
    with wired(tap="tap7", mtu=1400, address="10.1.0.1/24"):
        link = ns.link("tap7")
        assert link is not None
        assert link["linkinfo"]["info_data"]["vnet_hdr"]
        assert not link["linkinfo"]["info_data"]["persist"]
        assert "UP" in link["flags"]
        assert link["mtu"] == 1400
        assert ns.addresses("tap7") == ["10.1.0.1/24"]
    assert ns.names() == set()
    assert journals(tmp_path) == []


MAKE = {
    "plain": "tuntap add dev tap7 mode tap",
    "queues": "tuntap add dev tap7 mode tap multi_queue",
    "pi": "tuntap add dev tap7 mode tap pi",
    "vnet_hdr": "tuntap add dev tap7 mode tap vnet_hdr",
}


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("set_up", [False, True])
def test_an_existing_tap_is_left_as_it_was(
    ns: Namespace, tmp_path: Path, wired: Wire, make: str, set_up: bool
) -> None:
    ns.ip(MAKE[make])
    ns.ip("link set tap7 mtu 1300" + (" up" if set_up else ""))
    before = settled(ns.link("tap7"))
    queues = 2 if make == "queues" else 1
    with wired(tap="tap7", queues=queues, mtu=9000, address="10.1.0.1/24") as wiring:
        tap = wiring.tap
        tap.set_header(12, little_endian=True)
        tap.set_offloads(15)
        link = ns.link("tap7")
        assert link is not None
        assert link["mtu"] == 9000
        assert "UP" in link["flags"]
    assert ns.addresses("tap7") == []
    assert settled(ns.link("tap7")) == before
    header = ns.run(lambda: header_of("tap7", multi_queue=make == "queues"))
    assert header == (10, False)
    assert journals(tmp_path) == []


def settled(link: dict[str, Any] | None) -> dict[str, Any]:
    """A link without the queueing discipline that the kernel gives it when it is first up."""
    assert link is not None
    return {**link, "qdisc": ""}


def header_of(name: str, *, multi_queue: bool) -> tuple[int, bool]:
    tap = Tap.attach(name, multi_queue=multi_queue)
    try:
        return tap.header_len, tap.little_endian
    finally:
        tap.close()


def test_an_existing_tap_is_used_as_it_is(ns: Namespace, wired: Wire) -> None:
    ns.ip(MAKE["queues"])
    ns.ip("link set tap7 mtu 2000 up")
    with wired(tap="tap7") as wiring:
        link = ns.link("tap7")
        assert link is not None
        assert link["mtu"] == wiring.mtu == 2000


def test_a_tap_in_use_is_refused(ns: Namespace, wired: Wire) -> None:
    with wired(tap="tap7"), pytest.raises(UserError, match=r"tap7.*another process"):
        wired(tap="tap7").__enter__()
    assert ns.names() == set()


@pytest.mark.parametrize(
    "make", ["link add x0 type bridge", "link set lo name x0", "tuntap add dev x0 mode tun"]
)
def test_what_is_no_tap_is_refused(ns: Namespace, wired: Wire, make: str) -> None:
    ns.ip(make)
    before = ns.link("x0")
    with pytest.raises(UserError, match=r"tap x0: this interface exists and is no tap"):
        wired(tap="x0").__enter__()
    assert ns.link("x0") == before


def test_queues_need_a_tap_made_for_them(ns: Namespace, wired: Wire) -> None:
    ns.ip(MAKE["plain"])
    with pytest.raises(UserError, match="multi_queue"):
        wired(tap="tap7", queues=2).__enter__()


def test_queues_beyond_the_first_start_detached(ns: Namespace, wired: Wire) -> None:
    with wired(tap="tap7", queues=3):
        link = ns.link("tap7")
        assert link is not None
        data = link["linkinfo"]["info_data"]
        assert data["multi_queue"]
        assert (data["numqueues"], data["numdisabled"]) == (1, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give one of them"),
        ({"tap": "a-name-of-16-chr"}, "at most 15"),
        ({"bridge": "a-name-of-16-chr"}, "at most 15"),
        ({"tap": ""}, "empty"),
        ({"tap": "a b"}, "no spaces"),
        ({"tap": "a/b"}, "'/'"),
        ({"tap": "tap%d"}, "'%'"),
        ({"tap": "t", "queues": 0}, "1 to 128"),
        ({"tap": "t", "queues": 129}, "1 to 128"),
        ({"tap": "t", "mtu": 67}, "68 to 65521"),
        ({"tap": "t", "mtu": 65522}, "68 to 65521"),
        ({"tap": "t", "address": "10.0.0.1"}, "prefix length"),
        ({"tap": "t", "address": "10.0.0.1/33"}, "prefix length"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Wiring(**options)


# ---- bridges ----


def test_a_missing_bridge_is_made_and_removed(ns: Namespace, tmp_path: Path, wired: Wire) -> None:
    with wired(bridge="br7", address="10.1.0.1/24", mtu=1400) as wiring:
        tap, bridge = ns.link(wiring.tap.name), ns.link("br7")
        assert tap is not None
        assert bridge is not None
        assert tap["master"] == "br7"
        assert bridge["linkinfo"]["info_kind"] == "bridge"
        assert "UP" in bridge["flags"]
        assert "UP" in tap["flags"]
        assert bridge["mtu"] == tap["mtu"] == 1400
        assert ns.addresses("br7") == ["10.1.0.1/24"]
        assert tap["linkinfo"]["info_slave_data"]["state"] == "forwarding"
        assert bridge["address"] != tap["address"]
        assert len(journals(tmp_path)) == 1
    assert ns.names() == set()
    assert journals(tmp_path) == []


@pytest.mark.parametrize("set_up", [False, True])
def test_an_existing_bridge_is_left_as_it_was(ns: Namespace, wired: Wire, set_up: bool) -> None:
    ns.ip("link add br7 address 02:00:00:00:00:07 type bridge")
    ns.ip("link set br7 mtu 1300" + (" up" if set_up else ""))
    ns.ip("addr add 10.1.0.2/24 dev br7")
    before = ns.link("br7")
    with wired(bridge="br7", address="10.1.0.1/24") as wiring:
        link = ns.link(wiring.tap.name)
        assert link is not None
        assert link["mtu"] == wiring.mtu == 1300
        assert set(ns.addresses("br7")) == {"10.1.0.1/24", "10.1.0.2/24"}
    assert ns.addresses("br7") == ["10.1.0.2/24"]
    assert stable(ns.link("br7")) == stable(before)


def stable(link: dict[str, Any] | None) -> dict[str, Any]:
    """A bridge without what its clocks, its first start and its ports change in it."""
    data = settled(link)["linkinfo"]["info_data"]
    passing = {key for key in data if key.endswith("timer") or "topology" in key}
    kept = {key: value for key, value in data.items() if key not in passing}
    link = settled(link) | {"operstate": "", "linkinfo": kept}
    return {k: v for k, v in link.items() if not k.startswith(("tso_", "flags"))} | {
        "up": "UP" in link["flags"]
    }


def test_an_address_that_was_there_stays(ns: Namespace, wired: Wire) -> None:
    ns.ip("link add br7 type bridge")
    ns.ip("addr add 10.1.0.1/24 dev br7")
    with wired(bridge="br7", address="10.1.0.1/24"):
        pass
    assert ns.addresses("br7") == ["10.1.0.1/24"]


def test_an_existing_tap_is_plugged_and_unplugged(ns: Namespace, wired: Wire) -> None:
    ns.ip(MAKE["plain"])
    before = settled(ns.link("tap7"))
    with wired(tap="tap7", bridge="br7"):
        link = ns.link("tap7")
        assert link is not None
        assert link["master"] == "br7"
    assert settled(ns.link("tap7")) == before
    assert ns.names() == {"tap7"}


def test_a_tap_of_another_bridge_is_refused(ns: Namespace, tmp_path: Path, wired: Wire) -> None:
    ns.ip(MAKE["plain"])
    ns.ip("link add br8 type bridge")
    ns.ip("link set tap7 master br8")
    before = ns.links()
    with pytest.raises(UserError, match=r"already plugged into br8, not br7"):
        wired(tap="tap7", bridge="br7").__enter__()
    assert set(ns.links()) == set(before)
    link = ns.link("tap7")
    assert link is not None
    assert link["master"] == "br8"
    assert journals(tmp_path) == []


def test_a_bridge_that_is_none_is_refused(ns: Namespace, wired: Wire) -> None:
    ns.ip("tuntap add dev x0 mode tap")
    before = ns.link("x0")
    with pytest.raises(UserError, match=r"bridge x0: this interface exists and is no bridge"):
        wired(bridge="x0").__enter__()
    assert ns.names() == {"x0"}
    assert ns.link("x0") == before


def test_a_shared_bridge_goes_with_its_last_user(
    ns: Namespace, tmp_path: Path, wired: Wire
) -> None:
    first = wired(bridge="br7", address="10.1.0.1/24")
    first.__enter__()
    with wired(bridge="br7", address="10.1.0.1/24"):
        first.__exit__()
        assert "br7" in ns.names()
        assert ns.addresses("br7") == ["10.1.0.1/24"]
    assert ns.names() == set()
    assert journals(tmp_path) == []


def test_the_same_bridge_has_the_same_address_again(ns: Namespace, wired: Wire) -> None:
    seen = set()
    for _ in range(2):
        with wired(bridge="br7"):
            link = ns.link("br7")
            assert link is not None
            seen.add(link["address"])
    assert len(seen) == 1


def test_names_are_found_for_many_taps(ns: Namespace, wired: Wire) -> None:
    with wired(bridge="br7") as one, wired(bridge="br7") as two:
        assert one.tap.name != two.tap.name
        assert ns.names() == {"br7", one.tap.name, two.tap.name}
    assert ns.names() == set()


# ---- another process ----


def sweep_in(ns: Namespace, state_dir: Path) -> None:
    ns.run(lambda: asyncio.run(sweep(state_dir)))


def test_what_was_passed_on_is_in_use_until_it_is_closed(
    ns: Namespace, tmp_path: Path, wired: Wire
) -> None:
    holder = wired(bridge="br7", tap="tap7", queues=2, address="10.1.0.1/24")
    with holder as wiring:
        opened = {name: os.dup(fd) for name, fd in wiring.opened().items()}
        wiring.let_go()
        # Leaving the block has nothing to undo any more, as if this process had ended.
        holder.wiring = Wiring(tap="tap8", state_dir=tmp_path / "run")
    assert set(opened) == {"queue0", "queue1", "journal"}
    tap = Tap.adopt([opened["queue0"], opened["queue1"]])
    sweep_in(ns, tmp_path / "run")
    assert ns.addresses("br7") == ["10.1.0.1/24"]
    assert tap.name == "tap7"
    ns.run(lambda: tap.attach_queue(1, True))
    tap.set_header(12, little_endian=True)
    assert tap.header_len == 12
    tap.close()
    # The passed descriptors are still the caller's.
    assert ns.link("tap7") is not None
    for fd in opened.values():
        os.close(fd)
    assert ns.link("tap7") is None
    sweep_in(ns, tmp_path / "run")
    assert ns.names() == set()
    assert journals(tmp_path) == []


def test_nothing_made_is_nothing_to_keep(ns: Namespace, wired: Wire) -> None:
    with wired(tap="tap7") as wiring:
        assert set(wiring.opened()) == {"queue0"}


def test_what_is_no_tap_is_not_adopted(ns: Namespace, tmp_path: Path, wired: Wire) -> None:
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    idle = os.open("/dev/net/tun", os.O_RDWR)
    try:
        with (
            wired(tap="tap7", queues=2) as first,
            wired(tap="tap8", queues=2) as second,
        ):
            before = len(os.listdir("/proc/self/fd"))
            own, other = first.tap.fds, second.tap.fds
            for fds in ([file], [idle], [own[0], file], [own[0], idle], [own[0], own[0]]):
                with pytest.raises(UserError, match="no open queue of a tap"):
                    Tap.adopt(fds)
            with pytest.raises(UserError, match="tap tap7: queue 1 is one of tap8"):
                Tap.adopt([own[0], other[1]])
            assert len(os.listdir("/proc/self/fd")) == before
            Tap.adopt(own).close()
    finally:
        os.close(file)
        os.close(idle)


def test_a_tap_without_a_header_is_not_adopted(ns: Namespace, wired: Wire) -> None:
    def opened() -> int:
        fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"tap7", 0x1002))  # TUNSETIFF
        return fd

    fd = ns.run(opened)
    try:
        with pytest.raises(UserError, match="tap tap7: opened with the flags 0x1002"):
            Tap.adopt([fd])
    finally:
        os.close(fd)
