"""The control socket: answers, refusals, who may ask, and what killed servers leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from vdev.errors import UserError
from vdev.runtime import runtime_dir
from vdev.server import control, lines
from vdev.server.control import (
    ControlServer,
    Request,
    Stream,
    find_machine,
    find_servers,
    open_stream,
    request,
)
from vdev.server.lines import MAX_FDS, MAX_LINE


async def echo(request: dict[str, Any]) -> Any:
    return request


async def fail(request: dict[str, Any]) -> Any:
    raise UserError("no such disk")


async def read(request: Request) -> dict[str, str]:
    """Of each descriptor what can be read from it."""
    return {name: os.pread(fd, 100, 0).decode() for name, fd in request.fds.items()}


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[ControlServer]:
    server = ControlServer(path, {"echo": echo, "fail": fail, "read": read})
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def test_who_asks_without_end_is_held(tmp_path: Path) -> None:
    """Everybody becomes idle, and nothing that was asked is lost."""
    async with serving(tmp_path / "s") as server:
        reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
        try:
            asked = b'{"command": "echo"}\n'
            writer.write(asked)
            await reader.readline()
            with server.held():
                writer.write(3 * asked)
                more, second = await asyncio.open_unix_connection(tmp_path / "s")
                second.write(asked)
                for connection in (reader, more):
                    with pytest.raises(TimeoutError):
                        await asyncio.wait_for(connection.readline(), 0.05)
                assert all(peer.idle for peer in server._connections.values())
            for connection in (reader, reader, reader, more):
                assert json.loads(await connection.readline())["ok"]
            second.close()
        finally:
            writer.close()


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
        with pytest.raises(UserError, match="'quit' does not exist: echo, fail, read"):
            await asyncio.to_thread(request, server.path, "quit")


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"status\n",
        b'[["command", "echo"]]\n',
        b'{"command": "echo", "fds": ["a"]}\n',
        b"[]\n",
        b"{}\n",
        b"null\n",
        b'"x"\n',
        b"\xff\n",
        b'{"command": []}\n',
    ],
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
    monkeypatch.setattr(control, "runtime_dir", lambda: directory)
    assert control.default_path() == directory / f"{os.getpid()}.sock"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    leave_socket(directory / "4194305.sock")
    control.default_path()
    assert list(directory.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a directory to another user needs root")
def test_a_default_directory_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "runtime_dir", lambda: tmp_path)
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
    assert runtime_dir() == Path("/run/vdev")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert runtime_dir() == Path("/run/user/1000/vdev")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime_dir() == Path("/tmp/vdev-1000")


async def test_a_command_that_becomes_a_stream(tmp_path: Path) -> None:
    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\nhello\n")
        while data := await reader.read(64):
            writer.write(data.upper())

    async def stream(request: dict[str, Any]) -> Any:
        return Stream(shout)

    def converse() -> bytes:
        with open_stream(tmp_path / "c.sock", "stream") as sock:
            sock.sendall(b"louder")
            sock.shutdown(socket.SHUT_WR)
            with sock.makefile("rb") as answer:
                return answer.read()

    server = ControlServer(tmp_path / "c.sock", {"stream": stream, "fail": fail})
    await server.start()
    try:
        # The answer's line belongs to the protocol, not a byte more.
        assert await asyncio.to_thread(converse) == b"\nhello\nLOUDER"
        with pytest.raises(UserError, match="no such disk"):
            await asyncio.to_thread(open_stream, server.path, "fail")
    finally:
        await server.close()


async def test_machines_are_found_by_name_and_by_process(tmp_path: Path) -> None:
    async with serving(tmp_path / "vm-a.17.sock") as server, serving(tmp_path / "18.sock"):
        for name in ("vm-a", "17"):
            assert await asyncio.to_thread(find_machine, name, tmp_path) == server.path
        for name in ("vm", "18", "sock", "../vm-a", "*"):
            assert await asyncio.to_thread(find_machine, name, tmp_path) is None
    leave_socket(tmp_path / "vm-b.4194305.sock")
    assert find_machine("vm-b", tmp_path) is None
    assert find_servers(tmp_path) == []


def test_a_zombie_is_a_dead_server(tmp_path: Path) -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        leave_socket(tmp_path / f"{child}.sock")
        assert find_servers(tmp_path) == []
    finally:
        os.waitpid(child, 0)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[dict[str, int]]:
    opened = {}
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"in {name}")
        opened[name] = os.open(tmp_path / name, os.O_RDONLY)
    yield opened
    for fd in opened.values():
        os.close(fd)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def all_gone(server: ControlServer) -> None:
    await asyncio.gather(*server._connections, return_exceptions=True)


async def talk(path: Path, *pieces: tuple[bytes, list[int]]) -> list[dict[str, Any]]:
    """Sends pieces with descriptors, each on its own; all the answers until the end."""

    def converse() -> list[dict[str, Any]]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            with contextlib.suppress(BrokenPipeError):
                for data, fds in pieces:
                    assert socket.send_fds(sock, [data], fds) == len(data)
                sock.shutdown(socket.SHUT_WR)
            answers = b""
            with contextlib.suppress(ConnectionResetError):
                while more := sock.recv(1 << 16):
                    answers += more
            return [json.loads(line) for line in answers.splitlines()]

    return await asyncio.to_thread(converse)


async def test_descriptors_go_along_by_name(tmp_path: Path, files: dict[str, int]) -> None:
    async with serving(tmp_path / "c.sock") as server:
        before = open_fds()
        for _ in range(3):
            answer = await asyncio.to_thread(request, server.path, "read", fds=files)
            assert answer == {"a": "in a", "b": "in b"}
        # The caller's stay open, and those that came are closed, also where nobody looked at them.
        assert await asyncio.to_thread(request, server.path, "echo", fds=files)
        with pytest.raises(UserError, match="no such disk"):
            await asyncio.to_thread(request, server.path, "fail", fds=files)
        with pytest.raises(UserError, match="does not exist"):
            await asyncio.to_thread(request, server.path, "quit", fds=files)
        await all_gone(server)
        assert open_fds() == before


async def test_descriptors_with_any_byte_of_the_line(tmp_path: Path, files: dict[str, int]) -> None:
    line = b'{"command": "read", "fds": ["a", "b"]}\n'
    a, b = files.values()
    async with serving(tmp_path / "c.sock") as server:
        for cut in (1, 20, len(line) - 1):
            (answer,) = await talk(server.path, (line[:cut], [a]), (line[cut:], [b]))
            assert answer == {"ok": True, "result": {"a": "in a", "b": "in b"}}
        one_by_one = [(line[at : at + 1], [b] if at == 7 else []) for at in range(len(line))]
        one_by_one[3] = (one_by_one[3][0], [a])
        (answer,) = await talk(server.path, *one_by_one)
        assert answer["ok"] is True


@pytest.mark.parametrize(
    "line",
    [
        b'{"command": "read"}\n',
        b'{"command": "read", "fds": []}\n',
        b'{"command": "read", "fds": ["a"]}\n',
        b'{"command": "read", "fds": ["a", "a"]}\n',
        b'{"command": "read", "fds": ["a", "b", "c"]}\n',
        b'{"command": "read", "fds": ["a", 1]}\n',
        b'{"command": "read", "fds": "ab"}\n',
        b'{"command": "read", "fds": null}\n',
        b'{"command": "read", "fds": {"a": 0, "b": 1}}\n',
        b"\n",
    ],
)
async def test_descriptors_that_are_not_named_right(
    tmp_path: Path, files: dict[str, int], line: bytes
) -> None:
    async with serving(tmp_path / "c.sock") as server:
        before = open_fds()
        right = b'{"command": "read", "fds": ["a", "b"]}\n'
        # As one write each, or the second's would come with the first one's line.
        refused, answer = await talk(
            server.path, (line, list(files.values())), (right, list(files.values()))
        )
        assert refused["ok"] is False
        assert "not a request" in refused["error"]
        assert answer["ok"] is True
        await all_gone(server)
        assert open_fds() == before


async def test_more_descriptors_than_a_line_may_have(tmp_path: Path, files: dict[str, int]) -> None:
    many = [files["a"]] * MAX_FDS
    names = json.dumps([f"fd{number}" for number in range(MAX_FDS)]).encode()
    line = b'{"command": "read", "fds": ' + names + b"}\n"
    async with serving(tmp_path / "c.sock") as server:
        before = open_fds()
        (answer,) = await talk(server.path, (line, many))
        assert answer["result"] == dict.fromkeys(json.loads(names), "in a")
        (refused,) = await talk(server.path, (b"{", many), (b"}", [files["b"]]))
        assert f"more than {MAX_FDS} descriptors" in refused["error"]
        with pytest.raises(UserError, match="254 descriptors, but 253 go"):
            request(server.path, "read", fds={str(n): files["a"] for n in range(MAX_FDS + 1)})
        await all_gone(server)
        assert open_fds() == before


async def test_descriptors_of_those_who_vanish_or_stall(
    tmp_path: Path, files: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "STALL", 0.05)
    async with serving(tmp_path / "c.sock") as server:
        before = open_fds()
        assert await talk(server.path, (b'{"command"', list(files.values()))) == []

        def stall() -> bytes:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(server.path))
                socket.send_fds(sock, [b"{"], list(files.values()))
                return sock.recv(1 << 16) + sock.recv(1)

        assert "inside a line" in json.loads(await asyncio.to_thread(stall))["error"]
        await all_gone(server)
        assert open_fds() == before


async def test_what_a_stream_was_sent_with_its_request_is_not_lost(tmp_path: Path) -> None:
    async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readexactly(10)).upper())

    async def stream(request: Request) -> Stream:
        return Stream(shout)

    server = ControlServer(tmp_path / "c.sock", {"stream": stream})
    await server.start()
    try:
        reader, writer = await asyncio.open_unix_connection(server.path)
        writer.write(b'{"command": "stream"}\nearly')
        assert json.loads(await reader.readline())["ok"]
        writer.write(b"-late")
        assert await reader.read() == b"EARLY-LATE"
        writer.close()
    finally:
        await server.close()


async def test_a_process_without_descriptors_left_goes_on_later(
    tmp_path: Path, files: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = asyncio.Event()

    async def noticed(server: ControlServer) -> None:
        refused.set()
        await asyncio.sleep(0)

    monkeypatch.setattr(ControlServer, "_rest", noticed)
    async with serving(tmp_path / "c.sock") as server:
        asking = socket.socket(socket.AF_UNIX)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            asking.connect(str(server.path))
            await refused.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        with asking:
            assert await asyncio.to_thread(request, server.path, "read", fds=files)
