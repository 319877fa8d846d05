"""Servers that are killed while requests are in flight, and lose none."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.frontend import iommu
from tests.frontend.blk import LAYOUTS, SECTOR
from tests.frontend.server import Server
from tests.frontend.session import F_IN_ORDER
from tests.frontend.survivor import Survivor
from tests.frontend.writer import AREA, DEPTH, Writer
from vdev.runtime import runtime_dir
from vdev.server.control import request


@pytest.fixture
def server(disk_directory: Path, cache: str) -> Iterator[Server]:
    with open(disk_directory / "disk.img", "wb") as image:
        image.truncate(AREA * SECTOR)
    config = disk_directory / "config.toml"
    config.write_text(f'[[blk]]\nsocket = "s"\nimage = "disk.img"\nqueues = 2\ncache = "{cache}"\n')
    with Server([sys.executable, "-m", "tests.frontend.supervised", str(config)]) as server:
        yield server
        assert "Traceback" not in server.output


def worker(server: Server) -> int:
    status = request(runtime_dir() / f"{server.pid}.sock", "status")
    pid: int = status["workers"][0]["pid"]
    return pid


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("cache", "kills", "in_order"),
    [
        ("writeback", 20, False),
        pytest.param("writeback", 100, False, marks=pytest.mark.long),
        ("none", 10, False),
        ("writeback", 10, True),
    ],
)
def test_kills_in_a_row(
    server: Server, disk_directory: Path, kills: int, layout: str, in_order: bool
) -> None:
    features = LAYOUTS[layout] | (F_IN_ORDER if in_order else 0)
    with Survivor(disk_directory / "s", queues=2, features=features) as disk:
        assert disk.features & F_IN_ORDER == features & F_IN_ORDER
        writer = Writer(disk, seed=1)
        pids = set()
        for _ in range(kills):
            writer.fill()
            writer.take(writer.random.randrange(DEPTH))
            pid = worker(server)
            writer.fill()
            writer.read()
            pids.add(pid)
            os.kill(pid, signal.SIGKILL)
            disk.wire.wait_closed()
            disk.reconnect()
        writer.finish()
        assert len(pids) == kills
        assert writer.done > kills
        assert bool(writer.overtaken) != in_order
        writer.check()
    assert server.stop() == 0
    assert (disk_directory / "disk.img").read_bytes() == writer.content
    assert server.output.count("was ended by SIGKILL: it is started again") == kills


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cache", ["writeback"])
def test_kills_behind_an_iommu(server: Server, disk_directory: Path, layout: str) -> None:
    """What is to be done once more lies at addresses that the next server has to ask for."""
    features = iommu.LAYOUTS[layout]
    with iommu.IommuSurvivor(disk_directory / "s", queues=2, features=features) as disk:
        writer = Writer(disk, seed=2)
        for _ in range(20):
            writer.fill()
            disk.iommu.invalidate(0, iommu.EVERYTHING)
            writer.take(writer.random.randrange(DEPTH))
            writer.fill()
            os.kill(worker(server), signal.SIGKILL)
            disk.wire.wait_closed()
            disk.reconnect()
        writer.finish()
        writer.check()
    assert server.stop() == 0
    assert (disk_directory / "disk.img").read_bytes() == writer.content
