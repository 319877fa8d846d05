"""Each mistake of a user's is answered by one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import VDEV, VDEV_BLK, VDEV_NET, Start

Refused = Callable[..., str]

WITHOUT_IO_URING = (
    sys.executable,
    str(Path(__file__).with_name("without_io_uring.py")),
    *VDEV,
)
BLK = ("blk", "serve", "--socket-path", "s", "--blk-file")
NET = ("net", "serve", "--socket-path", "s")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "arguments are required: COMMAND"),
        (["bulk"], "invalid choice: 'bulk'"),
        (["blk"], "arguments are required: COMMAND"),
        (["blk", "serve", "--blk-file", "null:1M"], "--socket-path --fd is required"),
        (["blk", "serve", "--socket-path", "s"], "arguments are required: --blk-file"),
        ([*BLK, "null:1M", "--fd", "3"], "not allowed with argument --socket-path"),
        ([*BLK, "null:1M", "--no-such-option"], "unrecognized arguments: --no-such-option"),
        ([*BLK, "null:1M", "--cache", "wb"], "invalid choice: 'wb'"),
        ([*BLK, "null:1M", "--engine", "aio"], "invalid choice: 'aio'"),
        ([*BLK, "null:1M", "--num-queues", "0"], "0 queues: a block device has 1 to 256"),
        ([*BLK, "null:1M", "--num-queues", "-1"], "--num-queues"),
        ([*BLK, "null:1M", "--iothreads", "0"], "0 iothreads"),
        ([*BLK, "null:1M", "--poll-us", "1.5"], "'1.5' is not a whole number"),
        ([*BLK, "null:1M", "--serial", "x" * 21], "at most 20"),
        ([*BLK, "null:many"], "image null:many: size 'many'"),
        ([*BLK, "missing.img"], "image missing.img: no such file (make one with: truncate"),
        ([*BLK, "."], "image .: not a regular file"),
        ([*NET], "needs a tap or a bridge"),
        ([*NET, "--bridge", "b" * 16], "b" * 16),
        ([*NET, "--tap", "lo"], "lo"),
        ([*NET, "--tap", "vdev-t0", "--mac", "52:54"], "52:54"),
        ([*NET, "--tap", "vdev-t0", "--mtu", "10"], "MTU 10"),
        ([*NET, "--tap", "vdev-t0", "--queues", "0"], "0 queue pairs"),
        ([*NET, "--tap", "vdev-t0", "--address", "10.0.0"], "10.0.0"),
        (["serve"], "arguments are required: CONFIG.toml"),
        (["serve", "missing.toml"], "missing.toml: No such file or directory"),
        (["status", "--watch", "0"], "is not a number of seconds above 0"),
        (["status", "4194305"], "no server answers there"),
        (["stop", "missing.sock"], "missing.sock: no server answers there"),
    ],
)
def test_arguments(refused: Refused, arguments: list[str], complaint: str) -> None:
    line = refused(*arguments)
    assert line.startswith("vdev: ")
    assert complaint in line


@pytest.mark.parametrize("program", [VDEV_BLK, VDEV_NET])
def test_programs_complain_in_their_own_name(refused: Refused, program: tuple[str, ...]) -> None:
    name = "vdev-blk" if program is VDEV_BLK else "vdev-net"
    assert refused("--no-such-option", program=program).startswith(f"{name}: ")


@pytest.mark.parametrize("read_only", [False, True])
def test_a_busy_image(refused: Refused, start: Start, disk: str, read_only: bool) -> None:
    server = start("blk", "serve", "--socket-path", "first", "--blk-file", disk)
    line = refused(*BLK, disk, *(["--read-only"] if read_only else []))
    assert f"image {disk}: in use by " in line
    assert f"(pid {server.pid})" in line


def test_an_image_that_may_not_be_written(refused: Refused, disk: str) -> None:
    os.chmod(disk, 0o400)
    # Root may write everything, as long as it has this capability.
    launch = () if os.geteuid() else ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-all")
    line = refused(*BLK, disk, program=(*launch, *VDEV))
    assert "may not be written" in line
    assert "--read-only" in line


class TestSocketPaths:
    def test_in_use(self, refused: Refused, start: Start) -> None:
        start(*BLK, "null:1M")
        assert "socket path s: another process listens on it" in refused(*BLK, "null:1M")

    def test_in_use_by_another_program(self, refused: Refused) -> None:
        with socket.socket(socket.AF_UNIX) as other:
            other.bind("s")
            other.listen()
            assert "another process listens on it" in refused(*BLK, "null:1M")

    def test_too_long(self, refused: Refused) -> None:
        path = "x" * 108
        line = refused("blk", "serve", "--socket-path", path, "--blk-file", "null:1M")
        assert "108 bytes, but at most 107" in line

    def test_in_no_folder(self, refused: Refused) -> None:
        line = refused("blk", "serve", "--socket-path", "no/s", "--blk-file", "null:1M")
        assert "there is no folder no" in line

    def test_taken_by_a_file(self, refused: Refused, folder: Path) -> None:
        (folder / "s").write_text("precious")
        assert "a file that is no socket is there" in refused(*BLK, "null:1M")
        assert (folder / "s").read_text() == "precious"

    def test_of_a_control_socket_in_use(self, refused: Refused, start: Start) -> None:
        start(*BLK, "null:1M", "--control", "c")
        line = refused(
            *("blk", "serve", "--socket-path", "s2", "--blk-file", "null:1M", "--control", "c")
        )
        assert "control socket c: Address already in use" in line

    @pytest.mark.parametrize(("fd", "complaint"), [(99, "not a socket"), (0, "not a socket")])
    def test_an_fd_that_is_none(self, refused: Refused, fd: int, complaint: str) -> None:
        assert complaint in refused("blk", "serve", "--fd", fd, "--blk-file", "null:1M")

    def test_connect_without_a_path(self, refused: Refused) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            line = refused(
                *("blk", "serve", "--fd", sock.fileno(), "--connect", "--blk-file", "null:1M"),
                pass_fds=[sock.fileno()],
            )
        assert "--connect needs --socket-path" in line


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            '[[blk]]\nsocket = "s"\nimage = "null:1M"\nreadonly = true',
            "vm.toml: [[blk]] number 1: unknown key 'readonly': did you mean read_only?",
        ),
        ("[[blk]]\nsocket = 's'\nimage = 'missing.img'", "missing.img: no such file"),
        ("[[blk]]\nsocket = 's'\n", "vm.toml: [[blk]] number 1: image is missing"),
        ("", "vm.toml: has no device"),
        (
            "[[blk]]\nsocket = 'a'\nimage = 'null:1M'\n[[blk]]\nsocket = 'no/b'\nimage = 'null:1M'",
            "there is no folder",
        ),
        ("[[blk]]\nsocket = 'a'\nimage = 'null:1M'\n[[net]]\nsocket = 'b'\ntap = 'lo'", "lo"),
    ],
)
def test_configuration_files(refused: Refused, folder: Path, text: str, complaint: str) -> None:
    (folder / "vm.toml").write_text(text)
    assert complaint in refused("serve", "vm.toml")


class TestWhatTheHostLacks:
    def test_io_uring_that_was_asked_for(self, refused: Refused) -> None:
        line = refused(*BLK, "null:1M", "--engine", "io_uring", program=WITHOUT_IO_URING)
        assert "engine io_uring: this kernel refuses io_uring" in line

    def test_io_uring_that_was_not_asked_for(self, start: Start) -> None:
        server = start(*BLK, "null:1M", program=WITHOUT_IO_URING)
        assert server.stop() == 0

    def test_the_right_to_make_a_bridge(self, refused: Refused) -> None:
        launch = () if os.geteuid() else ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-all")
        assert "CAP_NET_ADMIN" in refused(*NET, "--bridge", "vdev-0", program=(*launch, *VDEV))


def test_a_reader_that_left_is_no_mistake(folder: Path) -> None:
    for arguments in (["--help"], ["doctor", "--json"]):
        reading, writing = os.pipe()
        os.close(reading)
        result = subprocess.run(
            [*VDEV, *arguments], stdout=writing, stderr=subprocess.PIPE, check=False
        )
        os.close(writing)
        assert (result.returncode, result.stderr) == (0, b"")
