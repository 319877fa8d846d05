"""A card whose driver is behind an IOMMU."""

from __future__ import annotations

import random

import pytest

from tests.frontend.iommu import EVERYTHING, F_ACCESS_PLATFORM, IommuCard
from tests.frontend.memory import PAGE
from tests.frontend.net import FEATURES
from tests.frontend.session import F_RING_PACKED

from .frames import GUEST, HOST, frame
from .namespace import PacketPort
from .served import Served

LAYOUTS = {"split": 0, "packed": F_RING_PACKED}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frames_go_both_ways(card: Served, wire: PacketPort, layout: str) -> None:
    """Receive buffers are looked at ahead, and given back when their translations are taken back;
    rings stop when theirs are, and go on."""
    features = FEATURES | F_ACCESS_PLATFORM | LAYOUTS[layout]
    rng = random.Random(1)
    with IommuCard(card.path, features=features) as nic:
        nic.post(32)
        rings = [at & -PAGE for ring in nic.rings for at in (ring.desc, ring.avail, ring.used)]
        for turn in range(60):
            sent = frame(rng.randrange(50, 1400))
            nic.send(sent)
            assert wire.recv() == sent
            match turn % 3:
                case 0:
                    nic.iommu.invalidate(0, EVERYTHING)
                case 1:
                    nic.iommu.invalidate(rng.choice(rings), PAGE)
                case 2:
                    free = nic.iommu.memory.free_pages()
                    nic.iommu.swap(*rng.sample(free, 2))
            came = frame(rng.randrange(50, 1400), source=HOST, to=GUEST)
            wire.send(came)
            assert nic.recv().frame == came
            nic.post(1)


def test_a_burst_while_nothing_is_translated(card: Served, wire: PacketPort) -> None:
    """Frames wait in the tap until the server knows where to put them."""
    with IommuCard(card.path) as nic:
        nic.post(40)
        nic.iommu.denied.update(nic.iommu.memory.pages)
        nic.iommu.invalidate(0, EVERYTHING)
        came = [frame(source=HOST, to=GUEST) for _ in range(30)]
        for each in came:
            wire.send(each)
        nic.iommu.denied.clear()
        for page in nic.iommu.memory.pages:
            nic.iommu.update(page, PAGE)
        assert [nic.recv().frame for _ in came] == came
