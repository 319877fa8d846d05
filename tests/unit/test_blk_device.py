"""The block device around its engine: features, config space, cache mode, resize."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vdev._native import ffi, lib
from vdev.blk.device import BlkDevice, serial_bytes
from vdev.blk.image import open_image
from vdev.errors import PeerError, UserError

SIZE = 1 << 20
FLUSH = 1 << lib.VIRTIO_BLK_F_FLUSH
CONFIG_WCE = 1 << lib.VIRTIO_BLK_F_CONFIG_WCE
WRITEBACK_AT = 32


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., BlkDevice]]:
    devices: list[BlkDevice] = []

    def make(*, read_only: bool = False, cache: str = "writeback", **options: Any) -> BlkDevice:
        file = tmp_path / f"{len(devices)}.img"
        file.write_bytes(bytes(SIZE))
        image = open_image(str(file), read_only=read_only, cache=cache)
        devices.append(BlkDevice(image, iothreads=(), cache=cache, **options))
        return devices[-1]

    yield make
    for device in devices:
        device.close()


def space(device: BlkDevice) -> Any:
    return ffi.from_buffer("struct virtio_blk_config *", device.config())


def has(device: BlkDevice, *names: str) -> bool:
    return all(device.features >> getattr(lib, f"VIRTIO_BLK_F_{name}") & 1 for name in names)


def test_features(make: Callable[..., BlkDevice]) -> None:
    device = make()
    assert has(
        device, "SEG_MAX", "BLK_SIZE", "TOPOLOGY", "FLUSH", "CONFIG_WCE", "DISCARD", "WRITE_ZEROES"
    )
    for absent in ("RO", "MQ", "SIZE_MAX", "LIFETIME", "SECURE_ERASE", "ZONED"):
        assert not has(device, absent)
    assert not device.features & (1 << 7 | 1 << 0)  # SCSI and BARRIER of the legacy device
    for bit in ("ANY_LAYOUT", "INDIRECT_DESC", "EVENT_IDX", "VERSION_1"):
        assert device.features >> getattr(lib, f"VIRTIO_F_{bit}") & 1
    assert has(make(num_queues=2), "MQ")


def test_a_read_only_device_offers_nothing_that_writes(make: Callable[..., BlkDevice]) -> None:
    device = make(read_only=True)
    assert has(device, "RO")
    assert not has(device, "DISCARD")
    assert not has(device, "WRITE_ZEROES")
    assert space(device).max_discard_sectors == 0
    assert space(device).max_write_zeroes_sectors == 0


def test_the_config_space_is_laid_out_as_the_specification_says(
    make: Callable[..., BlkDevice],
) -> None:
    data = make(num_queues=3).config()
    capacity, size_max, seg_max = struct.unpack_from("<QII", data, 0)
    assert (capacity, size_max, seg_max) == (SIZE // 512, 0, 126)
    assert struct.unpack_from("<I", data, 20) == (512,)  # blk_size
    assert data[WRITEBACK_AT] == 1
    assert struct.unpack_from("<H", data, 34) == (3,)  # num_queues
    sectors, segments, alignment = struct.unpack_from("<III", data, 36)
    assert sectors > 0
    assert segments > 1
    assert alignment >= 1
    assert data[56] == 1  # write_zeroes_may_unmap


def test_the_cache_mode_may_be_written_by_a_driver_that_negotiated_it(
    make: Callable[..., BlkDevice],
) -> None:
    device = make()
    with pytest.raises(PeerError, match="CONFIG_WCE"):
        device.write_config(WRITEBACK_AT, b"\0")
    device.negotiate(FLUSH | CONFIG_WCE)
    device.write_config(WRITEBACK_AT, b"\0")
    assert not device.writeback
    assert device.config()[WRITEBACK_AT] == 0
    device.write_config(WRITEBACK_AT, b"\1")
    assert device.writeback
    device.write_config(WRITEBACK_AT, b"\0")
    device.reset()
    assert not device.writeback  # a pause, as far as anyone can tell: durability is not taken away
    device.release()
    assert device.writeback


@pytest.mark.parametrize(
    ("offset", "data"),
    [(0, bytes(8)), (31, b"\0\0"), (32, b"\0\0"), (33, b"\0"), (32, b"\2"), (32, b""), (20, b"\0")],
)
def test_everything_else_is_read_only(
    make: Callable[..., BlkDevice], offset: int, data: bytes
) -> None:
    device = make()
    device.negotiate(FLUSH | CONFIG_WCE)
    before = device.config()
    with pytest.raises(PeerError):
        device.write_config(offset, data)
    assert device.config() == before


@pytest.mark.parametrize(
    ("cache", "features", "writeback"),
    [
        ("writeback", FLUSH | CONFIG_WCE, True),
        ("writeback", FLUSH, True),
        ("writeback", CONFIG_WCE, True),
        ("writeback", 0, False),
        ("none", FLUSH, True),
        ("none", 0, False),
        ("writethrough", FLUSH | CONFIG_WCE, False),
        ("writethrough", 0, False),
        ("unsafe", 0, True),
    ],
)
def test_who_cannot_flush_is_served_write_through(
    make: Callable[..., BlkDevice],
    monkeypatch: pytest.MonkeyPatch,
    cache: str,
    features: int,
    writeback: bool,
) -> None:
    device = make(cache=cache)
    modes: list[bool] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def vhost_blk_set_writeback(self, native: object, on: bool) -> None:
            modes.append(on)

    monkeypatch.setattr("vdev.blk.device.lib", Recorder())
    device.negotiate(features)
    assert modes == [writeback]


def test_resize_tells_the_driver_once(make: Callable[..., BlkDevice]) -> None:
    device = make()
    told: list[int] = []
    device.config_changed.append(lambda: told.append(space(device).capacity))
    assert device.resize(2 * SIZE) == 2 * SIZE
    assert device.resize() == 2 * SIZE
    assert told == [2 * SIZE // 512]


def test_serials() -> None:
    assert serial_bytes(None) == bytes(20)
    assert serial_bytes("root") == b"root" + bytes(16)
    assert serial_bytes("x" * 20) == b"x" * 20
    for wrong in ("x" * 21, "ä", "a\nb", "\0"):
        with pytest.raises(UserError, match="serial"):
            serial_bytes(wrong)


@pytest.mark.parametrize("options", [{"num_queues": 0}, {"num_queues": 257}, {"engine": "aio"}])
def test_options_that_do_not_exist(make: Callable[..., BlkDevice], options: Any) -> None:
    with pytest.raises(UserError):
        make(**options)


def test_counters_start_at_nothing(make: Callable[..., BlkDevice]) -> None:
    stats = make(num_queues=2).stats()
    assert len(stats["queues"]) == 2
    assert stats["total"]["requests"] == 0
    assert stats["total"]["latency"]["count"] == 0
