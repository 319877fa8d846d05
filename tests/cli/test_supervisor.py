"""`vdev serve`: workers that are killed are started again, and whose fault ends what."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.frontend.blk import SECTOR, BlkClient, check_healthy
from tests.frontend.server import Server
from tests.frontend.session import Session
from tests.frontend.wire import TIMEOUT, Closed
from tests.protocol.fake import until
from vdev.server.control import request
from vdev.server.devices import DeviceSpec
from vdev.server.supervisor import Patience, Supervisor, WorkerFailed

from .conftest import Run, Start, control_socket

Refused = Callable[..., str]


def status(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = request(control_socket(server.pid), "status")
    return found


def workers(server: Server) -> list[int]:
    return [worker["pid"] for worker in status(server)["workers"]]


def kill(pid: int) -> None:
    """Returns when it is gone."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        wait_for_end(pidfd)
    finally:
        os.close(pidfd)


def wait_for_end(pidfd: int) -> None:
    assert select.select([pidfd], [], [], TIMEOUT)[0], "the process has not ended"


@pytest.fixture
def two(disk: str) -> str:
    """A file with two disks, the second read-only."""
    Path("ro.img").write_bytes(b"\7" * 65536)
    Path("two.toml").write_text(
        f'[[blk]]\nsocket = "a"\nimage = "{disk}"\n'
        '[[blk]]\nname = "sealed"\nsocket = "b"\nimage = "ro.img"\nread_only = true\n'
    )
    return "two.toml"


def test_a_killed_worker_is_followed_by_another(start: Start, two: str) -> None:
    server = start("serve", two)
    (first,) = workers(server)
    assert first != server.pid
    os.chmod("a", 0o660)
    before = os.stat("a")
    with Session("a") as session:
        assert session.get_features()
        kill(first)
        session.wire.wait_closed()
    # The socket is the same, so whoever connects meanwhile waits in its backlog.
    check_healthy("a")
    with BlkClient("b") as sealed:
        assert sealed.read(0, SECTOR) == b"\7" * SECTOR
    assert (os.stat("a").st_ino, os.stat("a").st_mode) == (before.st_ino, before.st_mode)
    (worker,) = status(server)["workers"]
    assert worker["restarts"] == 1
    assert worker["pid"] not in (first, server.pid)
    assert server.output == (
        "vdev: the worker of blk0, sealed was ended by SIGKILL: it is started again\n"
    )
    assert server.stop() == 0
    assert not Path("a").exists()


def test_isolated_devices_do_not_fall_together(start: Start, two: str) -> None:
    server = start("serve", "--isolate", two)
    first, second = workers(server)
    with BlkClient("b") as sealed:
        kill(first)
        check_healthy("a")
        assert sealed.read(0, SECTOR) == b"\7" * SECTOR
    again, same = workers(server)
    assert same == second
    assert again not in (first, second)
    assert [w["devices"] for w in status(server)["workers"]] == [["blk0"], ["sealed"]]
    assert [d["name"] for d in status(server)["devices"]] == ["blk0", "sealed"]
    assert server.stop() == 0


def test_commands_reach_the_worker(start: Start, vdev: Run, two: str, disk: str) -> None:
    server = start("serve", "--isolate", two)
    assert vdev("resize", server.pid, "blk0", "2M").stdout == "blk0: 2097152 bytes\n"
    assert os.stat(disk).st_size == 2 << 20
    for name, complaint in (("sealed", "read-only"), ("card", "no block device")):
        refused = vdev("resize", server.pid, name, "2M")
        assert refused.returncode == 2
        assert complaint in refused.stderr
    assert "sealed" in vdev("status", server.pid).stdout
    assert vdev("stop", server.pid).returncode == 0
    assert server.process.wait(TIMEOUT) == 0
    assert not Path("a").exists()


def test_workers_end_with_a_supervisor_that_is_killed(start: Start, two: str, disk: str) -> None:
    server = start("serve", "--isolate", two)
    pidfds = [os.pidfd_open(pid) for pid in workers(server)]
    server.process.kill()
    for pidfd in pidfds:
        wait_for_end(pidfd)
        os.close(pidfd)
    # All that is left is the sockets' names, and those the next one replaces.
    again = start("serve", two)
    check_healthy("a")
    assert again.stop() == 0


def test_workers_that_are_told_to_end_end_it(start: Start, two: str) -> None:
    server = start("serve", "--isolate", two)
    for pid in workers(server):
        os.kill(pid, signal.SIGTERM)
    assert server.process.wait(TIMEOUT) == 0
    assert server.output == ""


def test_what_never_served_is_a_mistake(refused: Refused, disk: str) -> None:
    Path("vm.toml").write_text(
        f'[[blk]]\nsocket = "a"\nimage = "{disk}"\n[[blk]]\nsocket = "b"\nimage = "gone.img"\n'
    )
    for isolate in ((), ("--isolate",)):
        assert refused("serve", *isolate, "vm.toml").startswith("vdev: image ")


def test_a_mistake_after_a_crash_is_tried_again(start: Start, two: str) -> None:
    server = start("serve", two)
    os.rename("ro.img", "away.img")
    kill(*workers(server))
    wait_for_output(server, "ended with 2: it is started again in 0.1 s, as it does not last")
    os.rename("away.img", "ro.img")
    # Turned away until then.
    while True:
        try:
            check_healthy("a")
            break
        except (Closed, ConnectionError):
            continue
    assert server.stop() == 0


def test_a_crash_loop_backs_off(start: Start, two: str) -> None:
    server = start("serve", two)
    for _ in range(4):
        wait_for(lambda: status(server)["workers"][0]["pid"])
        wait_for(lambda: status(server)["devices"][0]["stats"])
        kill(*workers(server))
    wait_for_output(server, "again in 0.4 s")
    waits = re.findall(r"it is started again(?: in (\S+) s, as it does not last)?\n", server.output)
    assert waits == ["", "0.1", "0.2", "0.4"]
    assert status(server)["devices"][0]["state"] in ("restarting", "waiting")
    assert server.stop() == 0


def test_the_delays() -> None:
    patience = Patience(lasting=10, first=0.1, most=1)
    delay: float | None = None
    delays = []
    for lasted in (3, 3, 3, 3, 3, 3, 3, 10, 3, 3):
        delay = patience.next(delay, lasted)
        delays.append(delay)
    assert delays == [0, 0.1, 0.2, 0.4, 0.8, 1, 1, 0, 0.1, 0.2]


@pytest.mark.parametrize("code", [1, 2, 3])
async def test_a_worker_that_fails_at_once(folder: Path, code: int) -> None:
    failing = (sys.executable, "-c", f"raise SystemExit({code})")
    devices = [DeviceSpec("blk", name, name, {}) for name in "ab"]
    for isolate in (False, True):
        with pytest.raises(WorkerFailed) as failed:
            await Supervisor(devices, failing, isolate=isolate, control=False).run()
        assert failed.value.code == code
    assert os.listdir() == []


async def test_stopped_while_it_waits(folder: Path) -> None:
    """A worker that serves and crashes at once: there is an end to it at any time."""
    crashing = (
        "import os, socket, sys\n"
        "from vdev.server.worker import Orders\n"
        "sock = socket.socket(fileno=Orders.read(int(sys.argv[2])).channel)\n"
        "sock.recv(100)\n"
        'sock.sendall(b\'{"ok": true, "result": null}\\n\')\n'
        "os.abort()\n"
    )
    devices = [DeviceSpec("blk", "a", "a", {})]
    supervisor = Supervisor(
        devices,
        (sys.executable, "-c", crashing),
        control=False,
        patience=Patience(first=3600, most=3600),
    )
    running = asyncio.ensure_future(supervisor.run())
    # Turned away: it is in its long wait.
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(TIMEOUT):
        await until(lambda: os.path.exists("a"))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect("a")
            sock.setblocking(False)
            assert await loop.sock_recv(sock, 1) == b""
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, TIMEOUT)
    assert os.listdir() == []


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline


def wait_for_output(server: Server, text: str) -> None:
    wait_for(lambda: text in server.output)
