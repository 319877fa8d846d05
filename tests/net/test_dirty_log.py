"""The dirty log under random frames: every page that changed is in it, and few others."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.frontend.log import DirtyLog, changes, pages, snapshot
from tests.frontend.memory import PAGE
from tests.frontend.net import NetClient
from tests.frontend.session import PROTOCOL_WANTED
from tests.frontend.wire import Protocol

from .frames import GUEST, HOST, frame
from .namespace import Namespace
from .served import Served


def test_every_page_that_changed_is_logged(ns: Namespace, tmp_path: Path) -> None:
    protocol = PROTOCOL_WANTED | Protocol.LOG_SHMFD
    with (
        Served(ns, tmp_path / "s", tap="tap0") as card,
        ns.port("tap0") as wire,
        NetClient(card.path, protocol=protocol) as nic,
        DirtyLog(nic.memory) as log,
    ):
        nic.start_logging(log, nic.rings)
        ring = nic.rx()
        used, sent_used = (pages(ring.used, 6 + 8 * ring.size) for ring in nic.rings)
        ours = pages(ring.avail, 6 + 2 * ring.size)
        nic.memory.alloc(2 * PAGE)  # so that no buffer shares a page with a ring

        @settings(suppress_health_check=[HealthCheck.differing_executors])
        @given(
            payloads=st.lists(st.integers(1, 1500), min_size=1, max_size=4),
            size=st.sampled_from([100, 600, 1526, 5000]),
        )
        def check(payloads: list[int], size: int) -> None:
            frames = [frame(payload, source=HOST, to=GUEST) for payload in payloads]
            for sent in frames:
                nic.post(-(-(12 + len(sent)) // size), size)
            nic.set_features(nic.features)
            log.take()
            before = snapshot(nic.memory)
            for sent in frames:
                wire.send(sent)
                assert nic.recv().frame == sent
            nic.set_features(nic.features)
            after = snapshot(nic.memory)
            found = log.take()
            assert changes(before, after) - ours <= found
            assert used <= found
            # When it wants to be kicked the device may say at any time, of either ring.
            written = found - used - sent_used
            assert 0 < len(written) <= sum((12 + len(f)) // PAGE + 2 for f in frames)

        check()
        log.take()
        nic.send(frame(100, source=GUEST, to=HOST))
        nic.set_features(nic.features)
        assert sent_used <= log.take() <= sent_used | used
