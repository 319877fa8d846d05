"""IOTLB messages that lie, and translations that do (item 67 of the catalogue)."""

from __future__ import annotations

import pytest

from tests.frontend import wire
from tests.frontend.iommu import (
    ACCESS_FAIL,
    EVERYTHING,
    F_ACCESS_PLATFORM,
    INVALIDATE,
    LAYOUTS,
    MISS,
    READ,
    UPDATE,
    WRITE,
    Iommu,
    IommuDisk,
)
from tests.frontend.memory import PAGE
from tests.frontend.ring import Desc
from tests.frontend.session import PROTOCOL_WANTED, Session
from tests.frontend.wire import Protocol, Request

from .target import Bad, Target, expect_close, expect_refusal

LETTERS = pytest.mark.parametrize("letter", ["ack", "close"])
FREE = 0x60_0000_0000
"""IOVAs that no driver has."""
MOST = 2048
"""Translations that the server keeps."""


def said(iommu: Iommu, **changed: int) -> Bad:
    """An update that would be accepted, but for what is changed."""
    (region, *_) = iommu.memory.regions
    message = {"iova": FREE, "size": PAGE, "user_addr": region.user_addr, "access": 3}
    message |= {"kind": UPDATE} | changed
    return Bad(Request.IOTLB_MSG, wire.iotlb(**message))


@LETTERS
@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"size": 0}, id="cp67-empty"),
        pytest.param({"iova": EVERYTHING - PAGE}, id="cp67-up-to-the-last-address"),
        pytest.param({"iova": EVERYTHING - PAGE, "size": 2 * PAGE}, id="cp67-iova-wraps"),
        pytest.param({"size": EVERYTHING - PAGE}, id="cp67-size-wraps"),
        pytest.param({"user_addr": 0}, id="cp67-outside-memory"),
        pytest.param({"user_addr": EVERYTHING - 1}, id="cp67-user-address-wraps"),
        pytest.param({"size": 1 << 40}, id="cp67-larger-than-its-region"),
        pytest.param({"access": 0}, id="cp67-no-access"),
        pytest.param({"access": 4}, id="cp67-unknown-access"),
        pytest.param({"access": 255}, id="cp67-every-access"),
        pytest.param({"kind": 0}, id="cp67-type-0"),
        pytest.param({"kind": MISS}, id="cp67-a-miss"),
        pytest.param({"kind": ACCESS_FAIL}, id="cp67-a-failure"),
        pytest.param({"kind": 255}, id="cp67-unknown-type"),
        pytest.param({"kind": INVALIDATE, "size": 0}, id="cp67-nothing-invalidated"),
        pytest.param({"kind": INVALIDATE, "size": EVERYTHING - 1}, id="cp67-invalidated-wraps"),
    ],
)
def test_cp67_message(victim: Target, letter: str, changed: dict[str, int]) -> None:
    with IommuDisk(victim.socket) as disk:
        expect_refusal(disk, said(disk.iommu, **changed), letter)


@LETTERS
@pytest.mark.parametrize("size", [0, 25, 33], ids=lambda size: f"cp67-{size}-bytes")
def test_cp67_size(victim: Target, letter: str, size: int) -> None:
    with IommuDisk(victim.socket) as disk:
        whole = said(disk.iommu).payload + bytes(1)
        expect_refusal(disk, Bad(Request.IOTLB_MSG, whole[:size]), letter)


@pytest.mark.parametrize(
    "lacking", [Protocol.BACKEND_REQ, Protocol.REPLY_ACK], ids=lambda bit: f"cp67-no-{bit.name}"
)
def test_cp67_without_a_way_to_ask(victim: Target, lacking: Protocol) -> None:
    """Addresses would be IOVAs that nobody translates."""
    protocol = PROTOCOL_WANTED & ~lacking
    with victim.client(protocol=protocol, start=False) as disk:
        features = wire.u64(disk.features | F_ACCESS_PLATFORM)
        expect_close(disk, Bad(Request.SET_FEATURES, features))


def test_cp67_before_memory(victim: Target) -> None:
    with Session(victim.socket) as session:
        session.negotiate(LAYOUTS["split"])
        message = wire.iotlb(FREE, PAGE, 0, 3, UPDATE)
        assert session.wire.ack_of(Request.IOTLB_MSG, message) != 0
        assert session.get_features() & F_ACCESS_PLATFORM


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"cp67-{layout}")
def test_cp67_a_flood(victim: Target, layout: str) -> None:
    """What the server keeps is bounded, and it goes on with what it needs."""
    with IommuDisk(victim.socket, features=LAYOUTS[layout]) as disk:
        (region, *_) = disk.memory.regions
        disk.write(0, b"f" * 512)
        for n in range(MOST + 100):
            page = FREE + 2 * PAGE * n
            payload = wire.iotlb(page, PAGE, region.user_addr, READ | WRITE, UPDATE)
            disk.wire.send(Request.IOTLB_MSG, payload)
        assert disk.read(0, 512) == b"f" * 512


def test_cp67_translations_that_change_without_a_word(victim: Target) -> None:
    """An update says of pages in use that they are elsewhere, rings included."""
    with IommuDisk(victim.socket) as disk:
        disk.write(0, b"g" * 512)
        memory = disk.iommu.memory
        for page in [at & -PAGE for at in (disk.ring.used, disk.ring.desc)]:
            other, was = memory.free_pages()[-1], memory.pages[page]
            memory.write(other, memory.read(page, PAGE))
            memory.pages[page], memory.pages[other] = memory.pages[other], was
            disk.iommu.update(page, PAGE)
            assert disk.read(0, 512) == b"g" * 512


def test_cp67_a_chain_over_more_than_can_be_kept(victim: Target) -> None:
    """One that never can be translated as a whole, as each answer takes another's place."""
    with IommuDisk(victim.socket, queues=2) as disk:
        base = FREE
        (region, *_) = disk.memory.regions
        disk.rings[0].submit([Desc(base, 1 << 31, True)])
        for n in range(MOST + 100):
            user_addr = region.user_addr + PAGE * (n % 2)
            disk.iommu.say(base + PAGE * n, PAGE, user_addr, 3, UPDATE)
        disk.write(0, b"h" * 512, queue=1)
        assert disk.read(0, 512, queue=1) == b"h" * 512
