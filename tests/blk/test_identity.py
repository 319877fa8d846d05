"""What a driver is told about a disk: features, config space, serial."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frontend.blk import (
    CONFIG_SIZE,
    F_BLK_SIZE,
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_SEG_MAX,
    F_SIZE_MAX,
    F_TOPOLOGY,
    F_WRITE_ZEROES,
    S_IOERR,
    S_UNSET,
    T_GET_ID,
    T_IN,
    T_OUT,
    BlkClient,
)
from tests.frontend.session import (
    F_ANY_LAYOUT,
    F_EVENT_IDX,
    F_INDIRECT,
    F_PROTOCOL_FEATURES,
    F_VERSION_1,
    Session,
)
from tests.frontend.wire import Protocol

from .serving import Disk, make_image

RING = F_ANY_LAYOUT | F_INDIRECT | F_EVENT_IDX | F_PROTOCOL_FEATURES | F_VERSION_1
DISK = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH | F_CONFIG_WCE


def offered(disk: Disk) -> int:
    with Session(disk.socket) as session:
        return session.get_features()


def test_features(shared: Disk) -> None:
    features = offered(shared)
    assert features & (RING | DISK) == RING | DISK
    assert features & F_MQ
    assert features & F_DISCARD
    assert features & F_WRITE_ZEROES
    # SCSI (7) and BARRIER (0) never; SIZE_MAX never, since some drivers refuse small values.
    assert not features & (F_RO | F_SIZE_MAX | 1 << 7 | 1 << 0)


def test_protocol_features(shared: Disk) -> None:
    with Session(shared.socket) as session:
        protocol = session.get_protocol_features()
    wanted = (
        Protocol.MQ
        | Protocol.REPLY_ACK
        | Protocol.BACKEND_REQ
        | Protocol.CONFIG
        | Protocol.RESET_DEVICE
        | Protocol.CONFIGURE_MEM_SLOTS
        | Protocol.STATUS
    )
    assert protocol & wanted == wanted
    assert not protocol & (Protocol.MTU | Protocol.RARP | Protocol.XEN_MMAP)


def test_config_space(client: BlkClient) -> None:
    config = client.config()
    assert config.capacity == (8 << 20) // 512
    assert config.seg_max == 126
    assert config.size_max == 0
    assert config.blk_size in (512, 4096)
    assert config.writeback == 1
    assert config.num_queues == 4
    assert config.max_discard_sectors > 0
    assert config.max_discard_seg > 0
    assert config.discard_sector_alignment > 0
    assert config.max_write_zeroes_sectors > 0
    assert config.max_write_zeroes_seg > 0
    assert config.write_zeroes_may_unmap == 1
    assert client.get_queue_num() == 4


def test_config_space_in_pieces(client: BlkClient) -> None:
    whole = client.get_config(0, CONFIG_SIZE)
    assert b"".join(client.get_config(n, 1) for n in range(CONFIG_SIZE)) == whole
    assert client.get_config(20, 4) == whole[20:24]


def test_serial(client: BlkClient) -> None:
    assert client.get_id() == b"vdev-0123456789abcd\0"


def test_serial_is_written_once(client: BlkClient) -> None:
    done = client.request(T_GET_ID, room=20)
    assert (done.status, done.used) == (0, 21)
    assert S_UNSET not in done.data


@pytest.mark.parametrize("serial", ["", "x", "twenty-characters-ab"])
def test_serial_lengths(tmp_path: Path, serial: str) -> None:
    image = make_image(tmp_path / "disk.img", 1 << 20)
    with Disk(tmp_path, image, "--serial", serial) as disk, disk.client() as client:
        assert client.get_id() == serial.encode().ljust(20, b"\0")


def test_one_queue_is_no_multiqueue(tmp_path: Path) -> None:
    image = make_image(tmp_path / "disk.img", 1 << 20)
    with Disk(tmp_path, image) as disk:
        assert not offered(disk) & F_MQ
        with disk.client() as client:
            assert client.get_queue_num() == 1
            assert client.config().num_queues in (0, 1)


def test_read_only(tmp_path: Path) -> None:
    image = make_image(tmp_path / "disk.img", 1 << 20)
    with Disk(tmp_path, image, "--read-only") as disk:
        features = offered(disk)
        assert features & F_RO
        assert not features & (F_DISCARD | F_WRITE_ZEROES)


def test_size_is_rounded_down(tmp_path: Path) -> None:
    image = make_image(tmp_path / "disk.img", (1 << 20) + 511)
    with Disk(tmp_path, image) as disk, disk.client() as client:
        assert client.config().capacity == (1 << 20) // 512


def test_null_disk(tmp_path: Path) -> None:
    with Disk(tmp_path, "null:1G") as disk, disk.client() as client:
        assert client.config().capacity == (1 << 30) // 512
        for size in (4096, 1 << 20):  # at once, and by a worker
            client.write(100, b"\xff" * size)
            assert client.read(100, size) == bytes(size)
        client.flush()
        client.discard(0, 8)
        client.write_zeroes(0, 8)


@pytest.mark.parametrize("sector", [(1 << 30) // 512, 1 << 55, (1 << 64) - 1])
def test_null_disk_has_an_end(tmp_path: Path, sector: int) -> None:
    """No kernel stands behind it that would refuse what our own checks let through."""
    with Disk(tmp_path, "null:1G") as disk, disk.client() as client:
        assert client.request(T_IN, sector, room=1024).status == S_IOERR
        assert client.request(T_OUT, sector, bytes(1024)).status == S_IOERR


def test_null_disk_read_only(tmp_path: Path) -> None:
    with Disk(tmp_path, "null:1G", "--read-only") as disk, disk.client() as client:
        assert client.request(T_OUT, 0, bytes(512)).status == S_IOERR
        assert client.read(0, 512) == bytes(512)
