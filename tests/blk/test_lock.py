"""An image has one writer, or readers only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.frontend.blk import check_healthy
from tests.frontend.server import Server
from tests.frontend.session import Refused

from .serving import Disk, make_image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "disk.img", 1 << 20)


def serve_again(image: Path, socket: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Start a second server, which is expected to fail."""
    command = ("blk", "serve", "--socket-path", socket, "--blk-file", image, *options)
    return subprocess.run(
        [sys.executable, "-m", "vdev", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def check_refused(done: subprocess.CompletedProcess[str], image: Path, socket: Path) -> None:
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert str(image) in done.stderr
    assert "in use" in done.stderr
    assert not socket.exists()


@pytest.mark.parametrize("first", ["writer", "reader"])
@pytest.mark.parametrize("second", ["writer", "reader"])
def test_two_servers(tmp_path: Path, image: Path, first: str, second: str) -> None:
    other = tmp_path / "other.sock"
    options = {"writer": (), "reader": ("--read-only",)}
    with Disk(tmp_path, image, *options[first]) as disk:
        if (first, second) == ("reader", "reader"):
            command = ("blk", "serve", "--socket-path", other, "--blk-file", image)
            with Server.vdev(*command, "--read-only"):
                pass
        else:
            check_refused(serve_again(image, other, *options[second]), image, other)
        with disk.client() as client:
            assert client.read(0, 512) == bytes(512)


def test_by_another_name(tmp_path: Path, image: Path) -> None:
    """The lock is on the file, not on its name."""
    other = tmp_path / "other.img"
    os.link(image, other)
    with Disk(tmp_path, image):
        check_refused(serve_again(other, tmp_path / "o.sock"), other, tmp_path / "o.sock")


def test_twice_in_one_process(tmp_path: Path, image: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        f'[[blk]]\nsocket = "a.sock"\nimage = "{image}"\n'
        f'[[blk]]\nsocket = "b.sock"\nimage = "{image}"\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "vdev", "serve", str(config)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a.sock").exists()
    assert not (tmp_path / "b.sock").exists()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_lock_ends_with_the_server(tmp_path: Path, image: Path, end: str) -> None:
    with Disk(tmp_path, image) as disk:
        if end == "stop":
            assert disk.server.stop() == 0
        else:
            disk.server.process.kill()
            disk.server.process.wait()
    # A killed server leaves its socket behind; the next one takes its place.
    with Disk(tmp_path, image) as disk:
        check_healthy(disk.socket)


def test_lock_holds_while_a_client_is_served(tmp_path: Path, image: Path) -> None:
    other = tmp_path / "other.sock"
    with Disk(tmp_path, image) as disk, disk.client() as client:
        client.write(0, b"\1" * 512)
        check_refused(serve_again(image, other), image, other)
        assert client.read(0, 512) == b"\1" * 512


def test_servers_take_turns(tmp_path: Path, image: Path) -> None:
    """Both ends of a migration serve one image, and only the one whose guest runs has it."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    with (
        Disk(tmp_path / "here", image, "--lock", "running") as here,
        Disk(tmp_path / "there", image, "--lock", "running", "--num-queues", "2") as there,
    ):
        with here.client() as client:
            client.write(0, b"a" * 512)
            with pytest.raises(Refused), there.client():
                pass
            check_refused(serve_again(image, tmp_path / "o.sock"), image, tmp_path / "o.sock")
            client.write(8, b"b" * 512)
            client.get_vring_base(0)
            with there.client(queues=2) as other:
                assert other.read(0, 512) == b"a" * 512
                assert other.read(8, 512) == b"b" * 512
                # One of its two queues is enough to hold it.
                other.get_vring_base(0)
                check_refused(serve_again(image, tmp_path / "o.sock"), image, tmp_path / "o.sock")
                other.get_vring_base(1)
                with Disk(tmp_path, image):
                    pass
        with here.client() as client:
            assert client.read(8, 512) == b"b" * 512
    with Disk(tmp_path, image):
        pass
