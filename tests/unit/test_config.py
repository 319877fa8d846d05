"""The configuration file: what is right is read, what is wrong is named in one line."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from vdev.blk.options import CACHE_MODES, ENGINES
from vdev.config import BlkConfig, Config, load_config
from vdev.errors import UserError

BLK = '[[blk]]\nsocket = "b.sock"\nimage = "null:1G"\n'
NET = '[[net]]\nsocket = "n.sock"\nbridge = "br0"\n'


@pytest.fixture
def load(tmp_path: Path):  # type: ignore[no-untyped-def]
    def load(text: str) -> Config:
        file = tmp_path / "vm.toml"
        file.write_text(text)
        return load_config(str(file))

    return load


def test_a_whole_file(load, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = load(
        """
        [server]
        poll_us = 0
        iothreads = 2
        control = "vm.ctl"

        [[blk]]
        socket = "root.sock"
        image = "/images/root.img"
        read_only = true
        queues = 4
        serial = "root"
        cache = "none"
        engine = "threads"

        [[blk]]
        name = "scratch"
        socket = "/run/scratch.sock"
        image = "null:64MiB"

        [[net]]
        socket = "net.sock"
        bridge = "br0"
        queues = 2
        mac = "52:54:00:AB:cd:01"
        mtu = 9000
        address = "10.0.0.1/24"
        """
    )
    assert config.server.iothreads == 2
    assert config.server.control == f"{tmp_path}/vm.ctl"
    root, scratch = config.blk
    assert (root.name, root.socket, root.image) == (
        "blk0",
        f"{tmp_path}/root.sock",
        "/images/root.img",
    )
    assert (root.queues, root.cache, root.engine, root.read_only) == (4, "none", "threads", True)
    assert (scratch.name, scratch.image) == ("scratch", "null:64MiB")
    assert config.net[0].mac == "52:54:00:ab:cd:01"
    assert config.net[0].name == "net0"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "has no device: add a [[blk]] or a [[net]] table"),
        ("[server]\npoll = 1\n" + BLK, "[server]: unknown key 'poll': did you mean poll_us?"),
        (BLK + "read-only = true", "[[blk]] number 1: unknown key 'read-only': did you mean read"),
        (BLK + "qqqq = 1", "unknown key 'qqqq': socket, image, name, read_only, queues, serial"),
        (BLK + "[disk]", "unknown key 'disk'"),
        ('[[blk]]\nsocket = "s"', "[[blk]] number 1: image is missing"),
        (BLK + BLK.replace("b.", "c.") + "queues = 0", "number 2: queues = 0: must be at least 1"),
        (BLK + "queues = 257", "queues = 257: must be at most 256"),
        (BLK + 'queues = "2"', 'queues = "2": must be a whole number'),
        (BLK + "queues = true", "queues = true: must be a whole number"),
        (BLK + "read_only = 1", "read_only = 1: must be true or false"),
        (BLK + 'cache = "wb"', "must be 'none', 'writeback', 'writethrough' or 'unsafe'"),
        (BLK + 'serial = "123456789012345678901"', "must be at most 20 printable ASCII"),
        (BLK + 'name = "a b"', "may have letters, digits"),
        ('[[blk]]\nsocket = ""\nimage = "i"', 'socket = "": must not be empty'),
        ('[[blk]]\nsocket = "s"\nimage = 7', "image = 7: must be text in quotes"),
        ('[[blk]]\nsocket = "s"\nimage = "null:many"', 'image = "null:many": is not null:SIZE'),
        ('[[net]]\nsocket = "s"', "[[net]] number 1: needs a tap, a bridge, or both"),
        (NET + 'mac = "52:54"', "must be six bytes like 52:54:00:12:34:56"),
        (NET + 'mac = "01:00:5e:00:00:01"', "is a multicast address"),
        (NET + 'address = "10.0.0.256/8"', "must be an address with its prefix length"),
        (NET + "mtu = 67", "mtu = 67: must be at least 68"),
        (BLK + BLK, "[[blk]] number 2: socket = "),
        (BLK + 'name = "net0"\n' + NET, "[[net]] number 1: name = 'net0': [[blk]] number 1 has it"),
        ('[blk]\nsocket = "s"', "blk must be written [[blk]]: one table a device"),
        ("[[server]]\n" + BLK, "server must be a table: [server]"),
        ("blk = [1]", "[[blk]] number 1: must be a table"),
        ("[server]\ncontrol = 3\n" + BLK, "control = 3: must be text in quotes"),
        ("[[blk]\n", "not TOML: "),
    ],
)
def test_a_mistake_is_named_in_one_line(load, text: str, complaint: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError) as caught:
        load(text)
    (line,) = str(caught.value).splitlines()
    assert "vm.toml: " in line
    assert complaint in line


def test_every_mistake_has_a_line(load) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError) as caught:
        load(BLK + "queues = 0\ncahce = 1\n" + NET + "mtu = 1\n")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_file_that_cannot_be_read(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "vm.toml")
    with pytest.raises(UserError, match=r"vm\.toml: "):
        load_config(str(tmp_path / "vm.toml"))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "vm.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(str(tmp_path / "vm.toml"))


def test_the_choices_are_the_devices_own() -> None:
    assert get_args(BlkConfig.model_fields["cache"].annotation) == CACHE_MODES
    assert get_args(BlkConfig.model_fields["engine"].annotation) == ENGINES
