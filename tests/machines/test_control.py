"""The control socket of a machine: its verbs, and requests that are none."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from vdev.errors import UserError
from vdev.machines.control import MachineControl, check_name_free
from vdev.server import control
from vdev.server.control import find_machine, open_stream, request
from vdev.vmm.api import End, Outcome
from vdev.vmm.config import DiskConfig

from .fake import FakeMachine


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(control, "runtime_dir", lambda: tmp_path)
    return tmp_path


@pytest_asyncio.fixture
async def machine(place: Path) -> AsyncIterator[FakeMachine]:
    async with FakeMachine() as machine, MachineControl(machine).serving():
        await machine.start()
        yield machine


async def ask(command: str, **arguments: Any) -> Any:
    path = find_machine("fake")
    assert path is not None
    return await asyncio.to_thread(request, path, command, **arguments)


async def test_verbs(machine: FakeMachine) -> None:
    for command in ("pause", "resume", "reset"):
        assert await ask(command) is None
    assert await ask("add-disk", disk={"path": "d", "queues": 2}) == {"id": "disk1"}
    assert await ask("balloon", size="64M") == {"size": 64 << 20}
    assert await ask("balloon", size=0) == {"size": 0}
    assert await ask("window", columns=100, rows=30) is None
    assert machine.size == (100, 30)
    assert machine.asked == ["pause", "resume", "reset", DiskConfig("d", queues=2), 64 << 20, 0]
    assert (await ask("info"))["state"] == "running"
    status = await ask("status")
    assert status["machine"] == {"name": "fake", "state": "running"}
    assert status["devices"][0]["stats"] is None


@pytest.mark.parametrize(
    ("request_line", "complaint"),
    [
        ({"command": "add-disk"}, "disk: must be a table"),
        ({"command": "add-disk", "disk": ["d"]}, "disk: must be a table"),
        ({"command": "add-disk", "disk": {"path": 7}}, "disk: path = 7: must be text"),
        ({"command": "add-disk", "disk": {"path": "d", "evil": 1}}, "unknown key 'evil'"),
        ({"command": "add-disk", "disk": {"path": "d\0"}}, "is no path"),
        ({"command": "add-nic", "nic": {}}, "needs a bridge, a tap"),
        ({"command": "add-nic", "nic": {"tap": "t"}}, "cannot plug a network card in"),
        ({"command": "remove"}, "device None: must be text"),
        ({"command": "remove", "device": {}}, "device {}: must be text"),
        ({"command": "remove", "device": "disk0"}, "the VMM fake cannot unplug"),
        ({"command": "link", "device": "nic0"}, "up None: true or false"),
        ({"command": "link", "up": True}, "device None: must be text"),
        ({"command": "link", "device": "nic0", "up": False}, "cannot plug or pull a cable"),
        ({"command": "balloon"}, "size None: a whole number"),
        ({"command": "balloon", "size": -1}, "size -1: a whole number"),
        ({"command": "balloon", "size": True}, "size True: a whole number"),
        ({"command": "balloon", "size": "all"}, "size 'all' is not a number of bytes"),
        ({"command": "window", "columns": "80", "rows": 24}, "columns '80': a whole number"),
        ({"command": "snapshot", "directory": 1}, "directory 1: must be text"),
        ({"command": "snapshot", "directory": "d"}, "cannot write a snapshot"),
        ({"command": "explode"}, "command 'explode' does not exist: add-disk, add-nic, balloon"),
    ],
)
async def test_what_is_refused(
    machine: FakeMachine, request_line: dict[str, Any], complaint: str
) -> None:
    path = find_machine("fake")
    assert path is not None
    reader, writer = await asyncio.open_unix_connection(path)
    for line in (request_line, {"command": "resume"}):
        writer.write(json.dumps(line).encode() + b"\n")
    refused, went_on = [json.loads(await reader.readline()) for _ in range(2)]
    writer.close()
    assert refused["ok"] is False
    assert complaint in refused["error"]
    assert went_on["ok"] is True


async def test_the_console(machine: FakeMachine) -> None:
    machine.console.feed(b"before ")
    path = find_machine("fake")
    assert path is not None
    sock = await asyncio.to_thread(open_stream, path, "console")
    reader, writer = await asyncio.open_unix_connection(sock=sock)
    writer.write(b"typed")
    assert await reader.readexactly(12) == b"before TYPED"
    writer.close()
    # Whoever left is forgotten; the next one sees the history or not, as it likes.
    while machine.console._watchers:  # noqa: ASYNC110  (the server's side of a hang-up)
        await asyncio.sleep(0)
    sock = await asyncio.to_thread(open_stream, path, "console", history=False)
    reader, writer = await asyncio.open_unix_connection(sock=sock)
    writer.write(b"again")
    assert await reader.readexactly(5) == b"AGAIN"
    await machine.stop()
    assert await reader.read() == b""
    writer.close()


async def test_stop_lasts_until_the_end(machine: FakeMachine) -> None:
    path = find_machine("fake")
    assert path is not None

    def stop() -> bytes:
        with open_stream(path, "stop") as sock:
            return sock.recv(1)

    assert await asyncio.to_thread(stop) == b""
    assert await machine.wait() == Outcome(End.STOPPED)
    with pytest.raises(UserError, match="it is ended"):
        await ask("pause")


async def test_a_name_that_is_taken(machine: FakeMachine, place: Path) -> None:
    with pytest.raises(UserError, match="one of that name runs already"):
        check_name_free("fake")
    check_name_free("fak")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place / "dead.4194305.sock"))
    check_name_free("dead")


async def test_the_first_outcome_counts() -> None:
    async with FakeMachine() as machine:
        waiting = [asyncio.ensure_future(machine.wait()) for _ in range(2)]
        await machine.power_button()
        await machine.stop()
        assert await asyncio.gather(*waiting) == [Outcome(End.SHUTDOWN)] * 2


def test_exit_codes() -> None:
    codes = {end.name: Outcome(end).exit_code for end in End}
    assert codes == {
        "SHUTDOWN": 0,
        "STOPPED": 0,
        "RESET_REFUSED": 10,
        "PANIC": 11,
        "CRASHED": 12,
        "KILLED": 13,
    }
    assert str(Outcome(End.RESET_REFUSED, "why")) == "reset-refused: why"
