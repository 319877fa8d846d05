"""A switch and its guests' memory: what changes, goes away, is logged, or lies behind an IOMMU."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from tests.frontend.iommu import EVERYTHING, F_ACCESS_PLATFORM, IommuCard
from tests.frontend.log import DirtyLog, changes, pages, snapshot
from tests.frontend.memory import PAGE, GuestMemory, Region
from tests.frontend.net import (
    F_GUEST_CSUM,
    FEATURES,
    GSO_NONE,
    HDR_F_NEEDS_CSUM,
    Header,
    NetClient,
)
from tests.frontend.ring import Desc, Used
from tests.frontend.session import F_RING_PACKED, PROTOCOL_WANTED
from tests.frontend.wire import Protocol

from .frames import tcp_frame
from .switched import EVERYONE, Plug, Switched, mac, nothing_for, text, to

FAR = 1 << 40
FINISH = Header(HDR_F_NEEDS_CSUM, GSO_NONE, 0, 0, 34, 16).pack()


def test_a_file_is_cut_short_below_a_sender(sw: Switched, plug: Plug) -> None:
    b, c = plug("b"), plug("c")
    memory = GuestMemory.default()
    spare = memory.add(Region(FAR, 1 << 20))
    with NetClient(sw.path("a"), memory=memory) as a:
        spare.truncate(0)
        a.tx().submit([Desc(FAR + 4096, 200)])
        a.tx().wait_broken()
    b.send(to(2, 3))
    assert c.recv()


def test_a_file_is_cut_short_below_a_receiver(sw: Switched, plug: Plug) -> None:
    a, c = plug("a"), plug("c", buffers=60)
    memory = GuestMemory.default()
    spare = memory.add(Region(FAR, 1 << 20))
    with NetClient(sw.path("b"), memory=memory) as b:
        spare.truncate(0)
        b.rx().submit([Desc(FAR + 4096, 2048, write=True)])
        a.send(to(1, EVERYONE))
        b.rx().wait_broken()
        assert c.recv()
    with NetClient(sw.path("b")) as b:
        b.post(1)
        sent = to(1, 2)
        a.send(sent)
        assert b.recv().frame == c.recv().frame == sent


@pytest.mark.parametrize("what", ["virtio-net", "Ethernet"])
def test_headers_that_change_while_they_are_sent(tmp_path: Path, what: str) -> None:
    """What comes out is what was checked: never another sender, nor a header that cannot be."""
    settings = {"a": {"mac": text(mac(1)), "bound": True}}
    sent = EVERYONE + mac(1) + tcp_frame(1400)[12:]
    size = 12 + len(sent)
    with (
        Switched(tmp_path, "a", "b", "c", settings=settings) as sw,
        NetClient(tmp_path / "a") as a,
        NetClient(tmp_path / "b") as b,
        NetClient(tmp_path / "c", features=FEATURES & ~F_GUEST_CSUM) as c,
    ):
        address = a.memory.alloc(size, 2)
        a.memory.write(address, bytes(12) + sent)
        over = threading.Event()

        def rewrite() -> None:
            noise = random.Random(1)
            while not over.is_set():
                if what == "virtio-net":
                    a.memory.write(address, noise.choice((bytes(12), FINISH, noise.randbytes(12))))
                else:
                    a.memory.write(address + 12 + 6, noise.choice((mac(1), mac(2))))
                time.sleep(0)  # or the thread that sends waits 5 ms for its turn, each time

        writer = threading.Thread(target=rewrite)
        writer.start()
        cards, came = {"b": b, "c": c}, dict.fromkeys("bc", 0)
        for card in cards.values():
            card.post(30)
        try:
            while min(came.values()) < 100:
                head = a.tx().submit([Desc(address, size)])
                assert a.tx().wait() == Used(head, 0)
                for name, card in cards.items():
                    for _ in range(sw.count(name, "out_frames") - came[name]):
                        data = card.recv_raw()
                        card.post(1)
                        came[name] += 1
                        assert data[:1] in (b"\0", b"\1") if name == "b" else data[:1] == b"\0"
                        assert data[12:24] == EVERYONE + mac(1)
        finally:
            over.set()
            writer.join()
        drop = "drop_bad_header" if what == "virtio-net" else "drop_spoofed"
        assert sw.count("a", drop) > 0


@pytest.mark.parametrize("size", [100, 600, 1526, 5000])
def test_every_page_that_changed_is_logged(sw: Switched, plug: Plug, size: int) -> None:
    a = plug("a")
    protocol = PROTOCOL_WANTED | Protocol.LOG_SHMFD
    with (
        NetClient(sw.path("b"), protocol=protocol) as b,
        DirtyLog(b.memory) as log,
    ):
        b.start_logging(log, b.rings)
        ring = b.rx()
        used, sent_used = (pages(ring.used, 6 + 8 * ring.size) for ring in b.rings)
        ours = pages(ring.avail, 6 + 2 * ring.size)
        b.memory.alloc(2 * PAGE)  # so that no buffer shares a page with a ring
        for payload in (1, 100, 1400):
            sent = to(1, 2, payload)
            b.post(-(-(12 + len(sent)) // size), size)
            b.set_features(b.features)
            log.take()
            before = snapshot(b.memory)
            a.send(sent)
            assert b.recv().frame == sent
            b.set_features(b.features)
            after = snapshot(b.memory)
            found = log.take()
            assert changes(before, after) - ours <= found
            assert used <= found
            # When it wants to be kicked the device may say at any time, of either ring.
            assert 0 < len(found - used - sent_used) <= (12 + len(sent)) // PAGE + 2


@pytest.mark.parametrize("layout", [0, F_RING_PACKED], ids=["split", "packed"])
def test_behind_an_iommu(sw: Switched, layout: int) -> None:
    """What is sent waits for its translation; what is received while buffers lack theirs is lost,
    and they are asked for by then."""
    features = FEATURES | F_ACCESS_PLATFORM | layout
    with (
        IommuCard(sw.path("a"), features=features) as a,
        IommuCard(sw.path("b"), features=features) as b,
    ):
        b.post(32)
        for turn in range(20):
            sent = to(1, 2, 50 + 60 * turn)
            before = sw.count("b", "out_frames")
            while sw.count("b", "out_frames") == before:
                a.send(sent)
            assert b.recv().frame == sent
            b.post(1)
            for card in (a, b):
                card.iommu.invalidate(0, EVERYTHING)
        nothing_for(sw, b)
