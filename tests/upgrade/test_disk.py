"""A disk's server is replaced under load, in any state of its session, or fails to be."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.frontend import iommu
from tests.frontend.blk import FEATURES, LAYOUTS, SECTOR, WRITEBACK_OFFSET, BlkClient
from tests.frontend.iommu import IommuDisk
from tests.frontend.log import DirtyLog
from tests.frontend.memory import PAGE
from tests.frontend.replaced import Replaced, Upgrading, failing
from tests.frontend.ring import Desc
from tests.frontend.session import PROTOCOL_WANTED, Session
from tests.frontend.survivor import Survivor
from tests.frontend.wire import (
    NEED_REPLY,
    TIMEOUT,
    VERSION,
    Protocol,
    Request,
    closing_fds,
    message,
    u64,
)
from tests.frontend.writer import AREA, DEPTH, Writer
from vdev.errors import UserError
from vdev.server.control import request

UPGRADES = 20


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(AREA * SECTOR)
    return path


@pytest.fixture
def server(image: Path) -> Iterator[Replaced]:
    with serving() as server:
        yield server


def serving(*options: str) -> Replaced:
    return Replaced.vdev(
        *("blk", "serve", "--socket-path", "s", "--blk-file", "disk.img", "--num-queues", "2"),
        *options,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_under_load(server: Replaced, disk: BlkClient, times: int = UPGRADES) -> None:
    writer = Writer(disk, seed=1)
    upgrading = Upgrading(server, times)
    while upgrading.left and upgrading.is_alive():
        writer.fill()
        writer.read()
        writer.take(writer.random.randrange(DEPTH))
    writer.finish()
    upgrading.check()
    writer.check()
    assert writer.done > times * DEPTH
    disk.barrier()


@pytest.mark.parametrize(
    ("cache", "layout"),
    [
        ("writeback", "split"),
        ("none", "packed"),
        pytest.param("writeback", "packed", marks=pytest.mark.long),
        pytest.param("none", "split", marks=pytest.mark.long),
    ],
)
def test_again_and_again_under_load(image: Path, layout: str, cache: str) -> None:
    with (
        serving("--cache", cache, "--iothreads", "2") as server,
        BlkClient("s", queues=2, features=LAYOUTS[layout]) as disk,
    ):
        server.upgrade()
        before = server.fds(), server.shared_maps()
        check_under_load(server, disk)
        wait_for(lambda: (server.fds(), server.shared_maps()) == before)
        assert server.output == ""
        assert server.terminate_last() == 0
    assert os.listdir() == ["disk.img"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_behind_an_iommu(server: Replaced, layout: str) -> None:
    """Translations pass over, and are asked for on the same channel."""
    with IommuDisk("s", queues=2, features=iommu.LAYOUTS[layout]) as disk:
        disk.write(0, bytes(SECTOR))
        asked = len(disk.iommu.misses)
        server.upgrade()
        disk.write(0, bytes(SECTOR))
        assert len(disk.iommu.misses) == asked
        disk.iommu.denied.update(disk.iommu.memory.pages)
        disk.iommu.invalidate(0, iommu.EVERYTHING)
        server.upgrade()  # while both rings wait to be there
        disk.iommu.denied.clear()
        for page in disk.iommu.memory.pages:
            disk.iommu.update(page, PAGE)
        disk.write(0, bytes(SECTOR), queue=1)
        disk.iommu.invalidate(0, iommu.EVERYTHING)
        check_under_load(server, disk, 5)


def test_what_is_in_flight_is_noted_by_the_next_one(server: Replaced) -> None:
    with Survivor(Path("s"), queues=2) as disk:
        check_under_load(server, disk, 5)


def test_the_memory_of_the_last_is_that_of_the_first(server: Replaced) -> None:
    with BlkClient("s") as disk:
        server.upgrade()
        before = server.rss()
        for _ in range(10):
            server.upgrade()
        assert disk.read(0, SECTOR) == bytes(SECTOR)
        assert server.rss() < 1.2 * before


@pytest.mark.parametrize("slots", [False, True], ids=["table", "slots"])
def test_wherever_the_negotiation_is(server: Replaced, slots: bool) -> None:
    """One upgrade after each step that a front-end makes."""
    with BlkClient("s", start=False, slots=slots) as disk:
        server.upgrade()
        (ring,) = disk.rings
        ring.reset(0)
        disk.configure_ring(0, ring)
        server.upgrade()
        disk.set_vring_kick(0, ring)
        server.upgrade()
        disk.enable(0)
        server.upgrade()
        disk.driver_ok()
        disk.write(0, b"\5" * SECTOR)
        disk.set_config(WRITEBACK_OFFSET, b"\0")
        server.upgrade()
        assert disk.config().writeback == 0
        assert disk.get_status() == 15
        assert disk.read(0, SECTOR) == b"\5" * SECTOR
        base = disk.get_vring_base(0)
        server.upgrade()
        disk.start_ring(0, ring, base=base)
        assert disk.read(0, SECTOR) == b"\5" * SECTOR


def test_before_anything_was_said(server: Replaced) -> None:
    with Session("s") as silent, Session("s") as waiting, Session("s") as first:
        assert first.get_features()
        waiting.wire.send(Request.GET_FEATURES)
        server.upgrade()
        assert first.get_features()
        first.close()
        assert waiting.wire.recv().u64 & FEATURES
        waiting.close()
        assert silent.get_features()


def test_in_the_middle_of_a_message(server: Replaced) -> None:
    """The descriptor of a kick has come, and half of the header; then half of the payload."""
    with BlkClient("s", start=False) as disk:
        (ring,) = disk.rings
        ring.reset(0)
        disk.configure_ring(0, ring)
        sent = message(Request.SET_VRING_KICK, u64(0), flags=VERSION | NEED_REPLY)
        socket.send_fds(disk.wire.sock, [sent[:5]], [ring.kick_fd])
        server.upgrade()
        disk.wire.sock.sendall(sent[5:15])
        server.upgrade()
        disk.wire.sock.sendall(sent[15:])
        assert disk.wire.recv().u64 == 0
        disk.enable(0)
        assert disk.read(0, SECTOR) == bytes(SECTOR)


def test_replies_that_are_not_read(server: Replaced) -> None:
    with Session("s") as deaf:
        deaf.wire.sock.setblocking(False)
        sent = 0
        try:
            while True:
                deaf.wire.sock.send(message(Request.GET_FEATURES))
                sent += 1
        except BlockingIOError:
            pass
        deaf.wire.sock.settimeout(TIMEOUT)
        server.upgrade()
        for _ in range(sent):
            assert deaf.wire.recv().u64 & FEATURES


def test_a_broken_ring_stays_broken(server: Replaced) -> None:
    with BlkClient("s", queues=2) as disk:
        disk.write(0, b"\7" * SECTOR)
        ring = disk.ring
        ring.offer(ring.add([Desc(1 << 60, 16, False)]))
        ring.kick()
        ring.wait_broken()
        server.upgrade()
        assert disk.read(0, SECTOR, queue=1) == b"\7" * SECTOR
        assert disk.get_vring_base(0) == ring.used_idx == 1
        assert "broke" in server.output


def test_not_while_the_device_moves_itself(server: Replaced) -> None:
    """Its state comes through a pipe whose end is in this server."""
    protocol = PROTOCOL_WANTED | Protocol.DEVICE_STATE
    with BlkClient("s", protocol=protocol, start=False) as disk:
        reading, writing = os.pipe()
        with closing_fds([reading, writing]):
            disk.set_device_state_fd(1, reading)
            with pytest.raises(UserError, match=r"on its way.*this server goes on"):
                server.upgrade()
        assert disk.check_device_state() != 0
        server.upgrade()
        disk.barrier()


def test_what_is_written_afterwards_is_logged(server: Replaced) -> None:
    protocol = PROTOCOL_WANTED | Protocol.LOG_SHMFD
    with BlkClient("s", protocol=protocol) as disk, DirtyLog(disk.memory) as log:
        disk.start_logging(log, disk.rings)
        server.upgrade()
        log.take()
        disk.read(0, 8 * SECTOR)
        assert log.take()


def test_a_control_socket_of_a_given_name_stays(image: Path) -> None:
    control = Path("c").absolute()
    with serving("--control", str(control)) as server:
        before = control.stat()
        for _ in range(2):
            server.follow(request(control, "upgrade")["pid"])
            assert request(control, "status")["pid"] == server.pid
        assert control.stat().st_ino == before.st_ino
        server.terminate_last()
    assert os.listdir() == ["disk.img"]


def test_the_lock_goes_along(image: Path) -> None:
    """A lock for running rings only is not given back in between."""
    with serving("--lock", "running") as server, BlkClient("s") as disk:
        for _ in range(5):
            server.upgrade()
        assert disk.read(0, SECTOR) == bytes(SECTOR)
        with pytest.raises(AssertionError, match="in use by"):
            serving_elsewhere()
        server.terminate_last()
    serving_elsewhere()


def serving_elsewhere() -> None:
    Replaced.vdev("blk", "serve", "--socket-path", "t", "--blk-file", "disk.img").close()


@pytest.mark.parametrize(
    ("step", "how"),
    [
        (step, how)
        for step in ("ready", "prepared", "serving")
        for how in ("die", "hang", "raise", "mangle")
        # One that serves and does not say so is none of ours.
        if (step, how) != ("serving", "mangle")
    ],
)
def test_a_successor_that_fails(server: Replaced, tmp_path: Path, step: str, how: str) -> None:
    """The old one goes on as if nothing had been, and the next upgrade succeeds."""
    with BlkClient("s", queues=2) as disk:
        writer = Writer(disk, seed=2)
        writer.fill()
        before = server.fds(), server.shared_maps()
        program = failing(tmp_path, step, how)
        with pytest.raises(UserError, match="this server goes on"):
            server.upgrade(program=program, timeout=1)
        server.check_alive()
        wait_for(lambda: (server.fds(), server.shared_maps()) == before)
        writer.finish()
        writer.fill()
        server.upgrade()
        writer.finish()
        writer.check()
    assert sorted(os.listdir()) == ["disk.img", "failing-vdev", "s"]


def test_a_successor_that_serves_and_does_not_say_so(server: Replaced, tmp_path: Path) -> None:
    """It has ended before the old one goes on."""
    with BlkClient("s") as disk:
        with pytest.raises(UserError, match=r"the other end has gone .*; this server goes on"):
            server.upgrade(program=failing(tmp_path, "serving", "skip"))
        assert disk.read(0, SECTOR) == bytes(SECTOR)
        server.check_alive()


DAMAGE = {
    "a region too few": "value[0]['backend']['memory'].pop()",
    "no such descriptor": "value[0]['backend']['memory'][0] = 999",
    "the wrong descriptor": "value[0]['backend']['memory'][0] = value[0]['backend']['rings'][0][0]",
    "a session without rings": "del value[0]['backend']['session']['rings']",
    "a ring too many": "value[0]['backend']['rings'].append([None] * 3)",
    "features of another device": "value[0]['backend']['session']['features'] |= 1 << 50",
    "an endpoint of another kind": "value[0]['endpoint']['kind'] = 'Endpoint'",
    "half a message that is none": "value[0]['channel']['received'] = 'f' * 24",
    "a device too few": "value.pop()",
    "text in place of numbers": "value[0]['backend']['session']['regions'][0][1] = 'big'",
    "null": "value = None",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_was_said_is_damaged_on_the_way(server: Replaced, tmp_path: Path, damage: str) -> None:
    """The successor refuses it, and says so."""
    program = tmp_path / "damaging"
    program.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "from vdev.server.passage import Passage\n"
        "receive = Passage.receive\n"
        "async def damaged(self, what):\n"
        "    value, fds = await receive(self, what)\n"
        "    if what == 'sessions':\n"
        f"        {damage}\n"
        "    return value, fds\n"
        "Passage.receive = damaged\n"
        "from vdev.cli import main\n"
        "sys.exit(main())\n"
    )
    program.chmod(0o755)
    with BlkClient("s") as disk:
        before = server.fds(), server.shared_maps()
        with pytest.raises(UserError, match=r"does not serve: .*; this server goes on"):
            server.upgrade(program=str(program))
        wait_for(lambda: (server.fds(), server.shared_maps()) == before)
        assert disk.read(0, SECTOR) == bytes(SECTOR)
        server.upgrade()
        assert disk.read(0, SECTOR) == bytes(SECTOR)
