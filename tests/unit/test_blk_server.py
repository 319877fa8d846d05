"""`vdev.blk.serve`, the Python API: it serves while its block runs, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

import vdev
from tests.frontend.session import Session
from vdev.blk.image import open_image
from vdev.errors import UserError
from vdev.iothread import IOThread


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with open("disk.img", "wb") as file:
        file.truncate(1 << 20)
    return tmp_path


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def features(path: str) -> int:
    def ask() -> int:
        with Session(path) as session:
            return session.get_features()

    return await asyncio.to_thread(ask)


async def test_it_serves_while_the_block_runs(folder: Path) -> None:
    await asyncio.to_thread(int)  # the loop's own threads and fds are there before we count
    before = fds()
    async with vdev.blk.serve("s", image="disk.img", num_queues=2, iothreads=2) as server:
        for _ in range(2):
            assert await features("s") & server.device.features == server.device.features
        assert server.status()["socket"] == os.path.join(os.getcwd(), "s")
        with pytest.raises(UserError, match="in use by this process"):
            open_image("disk.img")
    assert fds() == before
    assert os.listdir(folder) == ["disk.img"]
    open_image("disk.img").close()


async def test_an_exception_in_the_block_takes_it_down_too(folder: Path) -> None:
    before = fds()
    with pytest.raises(RuntimeError):
        async with vdev.blk.serve("s", "disk.img"):
            raise RuntimeError
    assert fds() == before
    assert os.listdir(folder) == ["disk.img"]


async def test_iothreads_can_be_shared(folder: Path) -> None:
    thread = IOThread(poll_us=0)
    thread.start()
    async with (
        vdev.blk.serve("a", "disk.img", iothreads=[thread]) as first,
        vdev.blk.serve("b", "null:1M", iothreads=[thread]) as second,
    ):
        assert first.device.iothreads == second.device.iothreads == [thread]
        assert await features("a")
        assert await features("b")
    await thread.close()


@pytest.mark.parametrize(
    "options",
    [
        {"socket_path": "no/s"},
        {"socket_path": "x" * 200},
        {"image": "missing.img"},
        {"num_queues": 0},
        {"serial": "x" * 21},
        {"cache": "fast"},
        {"engine": "fast"},
        {"iothreads": 0},
        {"poll_us": -1},
    ],
)
async def test_what_cannot_be_served_leaves_nothing(folder: Path, options: dict[str, Any]) -> None:
    before = fds()
    with pytest.raises(UserError):
        async with vdev.blk.serve(**{"socket_path": "s", "image": "disk.img", **options}):
            pass
    assert fds() == before
    assert os.listdir(folder) == ["disk.img"]
    open_image("disk.img").close()


@pytest.mark.parametrize("read_only", [False, True])
async def test_two_servers_of_one_image(folder: Path, read_only: bool) -> None:
    def serve(path: str) -> Any:
        return vdev.blk.serve(path, "disk.img", read_only=read_only)

    async with serve("a"):
        if read_only:
            async with serve("b"):
                assert await features("b")
        else:
            with pytest.raises(UserError, match="in use by this process"):
                async with serve("b"):
                    pass


def test_the_names_of_the_package() -> None:
    assert callable(vdev.blk.serve)
    assert vdev.blk.open_image is open_image
    with pytest.raises(AttributeError, match="sevre"):
        getattr(vdev.blk, "sevre")  # noqa: B009
