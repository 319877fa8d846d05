"""Frames between the cards of a switch: where they go, and that they come as they were sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.frontend.net import F_MRG_RXBUF, FEATURES, Header, NetClient
from tests.frontend.ring import Desc, Used
from tests.frontend.session import F_EVENT_IDX, F_IN_ORDER, F_RING_PACKED, PROTOCOL_WANTED
from tests.frontend.wire import Protocol, Request
from vdev.errors import UserError
from vdev.server.switch import Switch

from .frames import frame
from .namespace import Namespace
from .switched import EVERYONE, Plug, Switched, mac, nothing_for, text, to

LAYOUTS = pytest.mark.parametrize(
    "features",
    [
        FEATURES,
        FEATURES & ~F_EVENT_IDX,
        FEATURES | F_IN_ORDER,
        FEATURES | F_RING_PACKED,
    ],
    ids=["split", "flags", "in-order", "packed"],
)


@LAYOUTS
def test_a_frame_goes_everywhere_until_its_station_is_known(
    sw: Switched, plug: Plug, features: int
) -> None:
    a, b, c = (plug(port, features=features) for port in "abc")
    sent = to(1, 2)
    a.send(sent)
    assert b.recv().frame == c.recv().frame == sent
    answer = to(2, 1)
    b.send(answer)
    assert a.recv().frame == answer
    again = to(1, 2)
    a.send(again)
    assert b.recv().frame == again
    nothing_for(sw, c)
    assert sw.table() == {(text(mac(1)), 1): "a", (text(mac(2)), 1): "b"}
    assert sw.count("a", "flooded") == 1
    assert sw.count("a", "in_frames") == sw.count("b", "out_frames") == 2
    assert sw.count("a", "in_bytes") == len(sent) + len(again)


@pytest.mark.parametrize("target", [EVERYONE, bytes.fromhex("01005e000001")], ids=["all", "group"])
def test_a_groups_frame_goes_to_all_but_its_sender(sw: Switched, plug: Plug, target: bytes) -> None:
    a, b, c = (plug(port) for port in "abc")
    sent = to(1, target)
    a.send(sent)
    assert b.recv().frame == c.recv().frame == sent
    nothing_for(sw, a)


@LAYOUTS
@pytest.mark.parametrize("size", [12, 64, 100, 1526])
def test_a_frame_over_merged_buffers(sw: Switched, plug: Plug, features: int, size: int) -> None:
    a, b = plug("a", features=features), plug("b", buffers=0, features=features)
    frames = [to(1, 2, payload) for payload in (200, 1, 300, 86)]
    b.post(62, size)
    for sent in frames:
        a.send(sent)
    for sent in frames:
        packet = b.recv()
        assert packet.frame == sent
        assert packet.header.num_buffers == -(-(12 + len(sent)) // size)


@LAYOUTS
@pytest.mark.parametrize("sizes", [[1] * 40, [12], [11, 1, 2], [12, 14], [26], [20, 20]], ids=str)
def test_a_frame_in_pieces_into_a_buffer_in_pieces(
    sw: Switched, plug: Plug, features: int, sizes: list[int]
) -> None:
    a, b = plug("a", features=features), plug("b", buffers=0, features=features)
    sent = to(1, 2, 500)
    for cut in (None, [*sizes, 12 + len(sent) - sum(sizes)]):
        b.post(1, 2048, sizes=[*sizes[::-1], 2048 - sum(sizes)])
        a.send(sent, sizes=cut)
        packet = b.recv()
        assert packet.frame == sent
        assert packet.header.num_buffers == 1


def test_a_frame_in_more_pieces_than_are_kept(sw: Switched, plug: Plug) -> None:
    """It is made one piece; those around it come whole and in their order."""
    with NetClient(sw.path("a"), size=256) as a:
        b = plug("b", buffers=9)
        frames = [to(1, 2, 300 + number) for number in range(9)]
        for number, sent in enumerate(frames):
            whole = 12 + len(sent)
            pieces = [1] * 200 if number % 3 == 1 else [12] if number % 3 else [whole - 1]
            a.submit(Header().pack() + sent, sizes=[*pieces, whole - sum(pieces)], indirect=True)
        for sent in frames:
            assert b.recv().frame == sent
        for _ in frames:
            a.reap()


def test_without_merging_a_frame_has_one_buffer(sw: Switched, plug: Plug) -> None:
    a, b = plug("a"), plug("b", buffers=0, features=FEATURES & ~F_MRG_RXBUF)
    b.post(1, 500)
    a.send(to(1, 2, 1000))
    assert sw.count("b", "drop_no_room") == 1
    nothing_for(sw, b)
    sent = to(1, 2, 400)
    a.send(sent)
    assert b.recv().frame == sent


@LAYOUTS
def test_who_has_no_buffers_loses_frames_and_nobody_else_does(
    sw: Switched, plug: Plug, features: int
) -> None:
    a, b, c = plug("a"), plug("b", buffers=0, features=features), plug("c")
    b.post(2, 100)
    sent = to(1, EVERYONE, 400)
    a.send(sent)
    assert c.recv().frame == sent
    assert sw.count("b", "drop_no_buffer") == 1
    nothing_for(sw, b)
    b.post(3, 200)  # with the two, which stayed as they were
    a.send(sent)
    packet = b.recv()
    assert packet.frame == c.recv().frame == sent
    assert packet.header.num_buffers == 4


@pytest.mark.parametrize("features", [FEATURES, FEATURES & ~F_MRG_RXBUF], ids=["merge", "single"])
@pytest.mark.parametrize("size", [1, 11])
def test_a_buffer_without_room_for_a_header_comes_back_empty(
    sw: Switched, plug: Plug, features: int, size: int
) -> None:
    a, b = plug("a"), plug("b", buffers=0, features=features)
    b.post(1, size)
    b.post(1)
    sent = to(1, 2)
    a.send(sent)
    assert b.recv_raw() == b""
    assert b.recv().frame == sent


@pytest.mark.parametrize("features", [FEATURES, FEATURES | F_RING_PACKED], ids=["split", "packed"])
def test_useless_buffers_among_good_ones_do_not_part_a_frame(
    sw: Switched, plug: Plug, features: int
) -> None:
    a, b = plug("a"), plug("b", buffers=0, features=features)
    for size in (100, 5, 100, 5, 100):
        b.post(1, size)
    sent = to(1, 2, 240)
    a.send(sent)
    assert [b.recv_raw() for _ in range(2)] == [b"", b""]
    packet = b.recv()
    assert packet.frame == sent
    assert packet.header.num_buffers == 3


def test_useless_buffers_before_the_end_of_all(sw: Switched, plug: Plug) -> None:
    """Then the good ones cannot stay in their places: they come back empty."""
    a, b = plug("a"), plug("b", buffers=0)
    for size in (100, 5, 100):
        b.post(1, size)
    a.send(to(1, 2, 1000))
    assert [b.recv_raw() for _ in range(3)] == [b"", b"", b""]
    assert sw.count("b", "drop_no_buffer") == 1
    b.post(1)
    sent = to(1, 2)
    a.send(sent)
    assert b.recv().frame == sent


def test_a_readable_receive_buffer_comes_back_empty(sw: Switched, plug: Plug) -> None:
    a, b = plug("a"), plug("b", buffers=0)
    head = b.rx().submit([Desc(b.memory.alloc(2000, 2), 2000)])
    b.post(1)
    sent = to(1, 2)
    a.send(sent)
    assert b.rx().wait() == Used(head, 0)
    assert b.recv().frame == sent


def test_runts_and_giants_go_nowhere(sw: Switched, plug: Plug) -> None:
    a, b = plug("a"), plug("b")
    for size, counter in ((0, "short"), (12, "short"), (25, "short"), (12 + 70_000, "long")):
        before = sw.count("a", f"drop_{counter}")
        if size:
            a.submit(bytes(size))
            a.reap()
            assert sw.count("a", f"drop_{counter}") == before + 1
    tagged = EVERYONE + mac(1) + b"\x81\x00\x00"
    a.send(tagged)
    assert sw.count("a", "drop_short") == 3
    nothing_for(sw, b)


def test_a_writable_buffer_in_what_is_sent(sw: Switched, plug: Plug) -> None:
    a, b = plug("a"), plug("b")
    address = a.memory.alloc(200, 2)
    head = a.tx().submit([Desc(address, 100), Desc(address + 100, 100, write=True)])
    assert a.tx().wait() == Used(head, 0)
    assert sw.count("a", "drop_bad_header") == 1
    nothing_for(sw, b)


@pytest.mark.parametrize("source", [EVERYONE, bytes(6), bytes.fromhex("010000000001")], ids=text)
def test_no_group_is_a_sender(sw: Switched, plug: Plug, source: bytes) -> None:
    a, b = plug("a"), plug("b")
    a.send(frame(source=source, to=mac(2)))
    assert sw.count("a", "drop_bad_source") == 1
    assert sw.table() == {}
    nothing_for(sw, b)


def test_what_is_for_bridges_goes_no_further(sw: Switched, plug: Plug) -> None:
    a, b = plug("a"), plug("b")
    for last in (0x00, 0x0E, 0x0F):
        a.send(to(1, bytes([0x01, 0x80, 0xC2, 0, 0, last])))
    assert sw.count("a", "drop_filtered") == 3
    nothing_for(sw, b)
    beyond = to(1, bytes([0x01, 0x80, 0xC2, 0, 0, 0x10]))
    a.send(beyond)
    assert b.recv().frame == beyond


def test_what_is_for_its_own_port_stays_there(sw: Switched, plug: Plug) -> None:
    a, b = plug("a"), plug("b")
    a.send(to(3, 3))
    assert sw.count("a", "drop_filtered") == 1
    nothing_for(sw, a, b)


def test_a_station_moves_with_its_frames(sw: Switched, plug: Plug) -> None:
    a, b, c = (plug(port) for port in "abc")
    a.send(to(1, EVERYONE))
    b.send(to(1, EVERYONE))
    c.recv(), c.recv(), a.recv(), b.recv()
    assert sw.table() == {(text(mac(1)), 1): "b"}
    sent = to(3, 1)
    c.send(sent)
    assert b.recv().frame == sent
    nothing_for(sw, a)


def test_ever_new_senders_fill_no_more_than_their_ports_share(tmp_path: Path) -> None:
    with (
        Switched(tmp_path, "a", "b", settings={"a": {"stations": 10}}) as sw,
        NetClient(tmp_path / "a") as a,
        NetClient(tmp_path / "b") as b,
    ):
        b.post(60)
        b.send(to(1000, EVERYONE))
        for number in range(50):
            a.send(to(number + 1, 1000))
        for number in range(50):
            assert b.recv().frame[6:12] == mac(number + 1)
        table = sw.table()
        assert len(table) == 11
        assert table[text(mac(1000)), 1] == "b"
        assert sw.count("a", "unlearned") == 40


def test_a_port_that_is_taken_out_is_forgotten(sw: Switched, plug: Plug) -> None:
    a, b = plug("a"), plug("b")
    a.send(to(1, 2))
    b.send(to(2, 1))
    assert a.recv()
    sw.run(lambda switch: switch.remove_port("b"))
    assert sw.table() == {(text(mac(1)), 1): "a"}
    b.wire.wait_closed()
    a.send(to(1, 2))
    sw.run(lambda switch: switch.add_port("b", socket=sw.path("b")))
    b2 = plug("b")
    sent = to(1, 2)
    a.send(sent)
    assert b2.recv().frame == sent


def test_ports_have_names_of_their_own(sw: Switched) -> None:
    with pytest.raises(UserError, match="one of that name"):
        sw.run(lambda switch: switch.add_port("a", socket=sw.path("d")))
    with pytest.raises(UserError, match="does not exist: a, b, c"):
        sw.run(lambda switch: switch.remove_port("d"))
    with pytest.raises(UserError, match="another process listens"):
        sw.run(lambda switch: switch.add_port("d", socket=sw.path("a")))
    assert set(sw.switch.counters()) == {"a", "b", "c"}


def test_a_card_whose_cable_is_pulled_neither_hears_nor_speaks(sw: Switched, plug: Plug) -> None:
    a, b = plug("a"), plug("b")

    async def pull(up: bool) -> None:
        sw.switch.set_link("b", up)

    sw.run(lambda _: pull(False))
    a.send(to(1, 2))
    b.send(to(2, 1))
    assert sw.count("b", "drop_no_driver") == 1
    assert sw.count("b", "drop_down") == 1
    assert b.config().status == 0
    nothing_for(sw, a, b)
    sw.run(lambda _: pull(True))
    sent = to(1, 2)
    a.send(sent)
    assert b.recv().frame == sent


def test_front_ends_at_the_switchs_own_socket_have_a_port_each(tmp_path: Path) -> None:
    path = os.fspath(tmp_path / "sw")
    with Switched(tmp_path, socket_path=path) as sw:
        with NetClient(path) as a, NetClient(path) as b:
            for card in (a, b):
                card.post(8)
            sent = to(1, 2)
            a.send(sent)
            assert b.recv().frame == sent
            assert sw.table() == {(text(mac(1)), 1): "guest0"}
            assert {port["name"] for port in sw.switch.ports()} == {"guest0", "guest1"}
        with NetClient(path) as c:
            c.post(8)
            c.send(to(3, 1))
            assert text(mac(3)) in {address for address, _ in sw.table()}


def test_a_new_driver_at_a_port(sw: Switched, plug: Plug) -> None:
    """Also one of other features, as after a reboot of the guest."""
    a = plug("a")
    for features in (FEATURES, FEATURES | F_RING_PACKED, FEATURES & ~F_MRG_RXBUF):
        with NetClient(sw.path("b"), features=features) as b:
            b.post(4)
            sent = to(1, 2)
            a.send(sent)
            assert b.recv().frame == sent


def test_a_ring_that_stops_keeps_its_place(sw: Switched, plug: Plug) -> None:
    a, b = plug("a"), plug("b", buffers=10)
    for count in range(1, 6):
        sent = to(1, 2)
        a.send(sent)
        assert b.recv().frame == sent
        assert b.get_vring_base(0) == count
        a.send(to(1, 2))
        b.start_ring(0, b.rx(), base=count)
        b.barrier()
    assert sw.count("b", "drop_no_driver") == 5


def test_a_broken_ring_is_its_guests_alone(sw: Switched, plug: Plug) -> None:
    a, b, c = (plug(port) for port in "abc")
    b.rx().submit([Desc(1 << 60, 2000, write=True)])
    for _ in range(9):
        sent = to(1, EVERYONE)
        a.send(sent)
        assert c.recv().frame == sent
        c.post(1)
    b.rx().wait_broken()
    sent = to(3, 1)
    c.send(sent)
    assert a.recv().frame == sent


def test_several_queue_pairs(tmp_path: Path) -> None:
    """What is sent on a pair comes on the same one, or on the first where it is not used."""
    settings = {"a": {"queues": 2}, "b": {"queues": 2}}
    with (
        Switched(tmp_path, "a", "b", settings=settings),
        NetClient(tmp_path / "a", pairs=2) as a,
        NetClient(tmp_path / "b", pairs=2) as b,
    ):
        assert a.config().max_pairs == 2
        for pair in (0, 1):
            b.post(4, pair=pair)
            sent = to(1, 2)
            a.send(sent, pair=pair)
            assert b.recv(pair=pair).frame == sent
        b.enable(2, False)
        sent = to(1, 2)
        a.send(sent, pair=1)
        assert b.recv(pair=0).frame == sent


def test_a_tap_as_uplink(ns: Namespace, tmp_path: Path) -> None:
    async def wire(switch: Switch) -> None:
        await switch.add_port("up", tap="tap0")

    with (
        Switched(tmp_path, "a", "b", namespace=ns) as sw,
        NetClient(tmp_path / "a") as a,
        NetClient(tmp_path / "b") as b,
    ):
        sw.run(wire)
        for card in (a, b):
            card.post(8)
        with ns.port("tap0") as host:
            sent = to(1, 9)
            a.send(sent)
            assert host.recv() == b.recv().frame == sent
            answer = to(9, 1)
            host.send(answer)
            assert a.recv().frame == answer
            again = to(1, 9, 1500)
            a.send(again)
            assert host.recv() == again
            nothing_for(sw, b)
            assert sw.table() == {(text(mac(1)), 1): "a", (text(mac(9)), 1): "up"}
        sw.run(lambda switch: switch.remove_port("up"))
        assert "tap0" not in ns.names()


def test_a_tap_that_is_deleted_under_its_switch(ns: Namespace, tmp_path: Path) -> None:
    """Its port is dead, and costs nothing."""

    async def wire(switch: Switch) -> None:
        await switch.add_port("up", tap="tap0")

    with (
        Switched(tmp_path, "a", "b", namespace=ns, poll_us=0) as sw,
        NetClient(tmp_path / "a") as a,
        NetClient(tmp_path / "b") as b,
    ):
        sw.run(wire)
        ns.ip("link del tap0")
        b.post(1)
        sent = to(1, EVERYONE)
        a.send(sent)
        assert b.recv().frame == sent
        assert sw.count("up", "drop_no_buffer") == 1
        before = sw.switch.iothread.stats()["wakeups"]
        for _ in range(50):
            sw.table()
        # Of each message one, and not one for each time that the kernel says that the tap is gone.
        assert sw.switch.iothread.stats()["wakeups"] - before <= 110


def test_a_guest_that_has_moved_here_is_announced(sw: Switched, plug: Plug) -> None:
    b = plug("b")
    with NetClient(sw.path("a"), protocol=PROTOCOL_WANTED | Protocol.RARP) as a:
        a.do(Request.SEND_RARP, mac(7) + bytes(2))
        rarp = b.recv().frame
        assert rarp[:14] == EVERYONE + mac(7) + b"\x80\x35"
        assert len(rarp) == 60
        assert sw.table() == {(text(mac(7)), 1): "a"}
