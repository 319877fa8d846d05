"""The control socket: answers, refusals, who may ask, and what killed servers leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from vdev.errors import UserError
from vdev.server import control
from vdev.server.control import MAX_LINE, ControlServer, find_servers, request


async def echo(request: dict[str, Any]) -> Any:
    return request


async def fail(request: dict[str, Any]) -> Any:
    raise UserError("no such disk")


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[ControlServer]:
    server = ControlServer(path, {"echo": echo, "fail": fail})
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def exchange(path: Path, *lines: bytes) -> list[bytes]:
    reader, writer = await asyncio.open_unix_connection(path, limit=1 << 20)
    try:
        answers = []
        for line in lines:
            writer.write(line)
            await writer.drain()
            answers.append(await reader.readline())
        return answers
    finally:
        writer.close()


async def test_a_command_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    async with serving(path):
        answer = await asyncio.to_thread(request, path, "echo", device="blk0")
    assert answer == {"command": "echo", "device": "blk0"}
    assert not path.exists()


async def test_several_commands_on_one_connection(tmp_path: Path) -> None:
    async with serving(tmp_path / "c.sock") as server:
        answers = await exchange(server.path, *[b'{"command": "echo"}\n'] * 3)
    assert [json.loads(answer)["ok"] for answer in answers] == [True] * 3


async def test_a_refusal_is_one_line_for_the_user(tmp_path: Path) -> None:
    async with serving(tmp_path / "c.sock") as server:
        with pytest.raises(UserError, match=r"^no such disk$"):
            await asyncio.to_thread(request, server.path, "fail")
        with pytest.raises(UserError, match="'quit' does not exist: echo, fail"):
            await asyncio.to_thread(request, server.path, "quit")


@pytest.mark.parametrize(
    "line",
    [b"\n", b"status\n", b"[]\n", b"{}\n", b"null\n", b'"x"\n', b"\xff\n", b'{"command": []}\n'],
)
async def test_what_is_no_command_gets_an_error_and_the_server_goes_on(
    tmp_path: Path, line: bytes
) -> None:
    async with serving(tmp_path / "c.sock") as server:
        wrong, right = await exchange(server.path, line, b'{"command": "echo"}\n')
    assert json.loads(wrong)["ok"] is False
    assert json.loads(right)["ok"] is True


async def test_a_line_without_an_end_ends_the_connection(tmp_path: Path) -> None:
    async with serving(tmp_path / "c.sock") as server:
        reader, writer = await asyncio.open_unix_connection(server.path)
        writer.write(b"x" * (2 * MAX_LINE))
        assert json.loads(await reader.readline())["ok"] is False
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        assert await asyncio.to_thread(request, server.path, "echo")


async def test_clients_that_vanish_and_clients_that_say_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path / "c.sock") as server:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as vanishing:
                vanishing.connect(str(server.path))
                vanishing.send(b'{"command": "ec')
        silent, _ = await asyncio.open_unix_connection(server.path)
        assert await asyncio.to_thread(request, server.path, "echo")
    # Closing the server does not wait for the silent one.
    assert await silent.read() == b""


async def test_only_the_owner_may_reach_it(tmp_path: Path) -> None:
    async with serving(tmp_path / "c.sock") as server:
        assert stat.S_IMODE(os.stat(server.path).st_mode) == 0o600


def test_the_default_directory_is_the_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run" / "vdev"
    monkeypatch.setattr(control, "control_dir", lambda: directory)
    assert control.default_path() == directory / f"{os.getpid()}.sock"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    leave_socket(directory / "4194305.sock")
    control.default_path()
    assert list(directory.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a directory to another user needs root")
def test_a_default_directory_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "control_dir", lambda: tmp_path)
    os.chown(tmp_path, 65534, -1)
    with pytest.raises(UserError, match="belongs to user 65534"):
        control.default_path()


async def test_sockets_beside_one_of_ones_own_choice_are_left_alone(tmp_path: Path) -> None:
    leave_socket(tmp_path / "disk.sock")
    async with serving(tmp_path / "c.sock"):
        assert (tmp_path / "disk.sock").is_socket()


async def test_others_are_not_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_peer_uid", lambda writer: os.geteuid() + 1)
    async with serving(tmp_path / "c.sock") as server:
        with pytest.raises(ConnectionError):
            await asyncio.to_thread(request, server.path, "echo")


def leave_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


async def test_what_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    leave_socket(path)
    async with serving(path):
        assert await asyncio.to_thread(request, path, "echo")


async def test_a_path_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    async with serving(path):
        with pytest.raises(UserError, match=r"c\.sock: Address already in use"):
            await ControlServer(path, {}).start()
        assert await asyncio.to_thread(request, path, "echo")


async def test_a_file_is_not_taken_for_a_socket(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(UserError, match="notes: Address already in use"):
        await ControlServer(tmp_path / "notes", {}).start()
    assert (tmp_path / "notes").read_text() == "precious"


@pytest.mark.parametrize("name", ["x" * 120, "file/c.sock", "none/c.sock"])
async def test_a_path_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="control socket"):
        await ControlServer(tmp_path / name, {}).start()


async def test_dead_servers_are_forgotten_and_live_ones_found(tmp_path: Path) -> None:
    leave_socket(tmp_path / "4194305.sock")  # above the largest pid there is
    leave_socket(tmp_path / f"{os.getppid()}.sock")  # bound by a live process, not listening yet
    path = tmp_path / "1.sock"
    async with serving(path):
        found = await asyncio.to_thread(find_servers, tmp_path)
    assert found == sorted([path, tmp_path / f"{os.getppid()}.sock"])
    assert find_servers(tmp_path / "none") == []


def test_where_the_sockets_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert control.control_dir() == Path("/run/vdev")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert control.control_dir() == Path("/run/user/1000/vdev")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert control.control_dir() == Path("/tmp/vdev-1000")
