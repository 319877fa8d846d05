"""The control socket of a running server: one JSON object a line, each answered by one.

    {"command": "status"}                          → {"ok": true, "result": {...}}
    {"command": "resize", "device": "blk0", ...}   → {"ok": false, "error": "one clear line"}

Sockets stand in one directory as PID.sock, so that `vdev status` finds every server of its user.
The directory is the owner's (0700), the socket too (0600), and the kernel's word on the peer
(SO_PEERCRED) is asked besides: only the owner and root are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from vdev.errors import UserError, VdevError

MAX_LINE = 1 << 16
_UCRED = struct.Struct("iII")

Handler = Callable[[dict[str, Any]], Awaitable[Any]]


def control_dir() -> Path:
    """Where this user's servers have their control sockets."""
    uid = os.geteuid()
    if uid == 0:
        return Path("/run/vdev")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "vdev" if runtime else Path(f"/tmp/vdev-{uid}")


def default_path() -> Path:
    """Where this process has its control socket; its directory is made, and tidied.

    Raises UserError where there can be none.
    """
    directory = control_dir()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = directory.lstat().st_uid
    except OSError as error:
        raise UserError(f"control sockets in {directory}: {error.strerror}") from None
    if owner != os.geteuid():
        # In a directory that is anyone's (/tmp), the name may have been taken to lie to us.
        raise UserError(f"control sockets in {directory}: it belongs to user {owner}")
    remove_stale(directory)
    return directory / f"{os.getpid()}.sock"


class ControlServer:
    """Answers commands on a control socket; ``handlers`` has a coroutine function a command.

    A handler gets the whole request and returns what JSON can carry; a VdevError of its becomes
    the error line.
    """

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        self.path = path
        self._handlers = handlers
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Bind and listen.  Raises UserError where the socket cannot be made."""
        try:
            if _is_dead(self.path):
                self.path.unlink(missing_ok=True)
            sock = _bind_private(self.path)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"control socket {self.path}: {reason}") from None
        self._server = await asyncio.start_unix_server(self._accept, sock=sock, limit=MAX_LINE)

    async def close(self) -> None:
        """Stop answering and remove the socket."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self.path.unlink(missing_ok=True)
        current = asyncio.current_task()
        waiting = [task for task in self._connections if task is not current]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if _peer_uid(writer) in (os.geteuid(), 0):
                await self._converse(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                line = await reader.readuntil(b"\n")
            except asyncio.IncompleteReadError:
                return
            except asyncio.LimitOverrunError:
                line = b""
            writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
            await writer.drain()
            if not line:
                return

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            command = request["command"]
        except (ValueError, TypeError, KeyError, RecursionError):
            wanted = f'one line of at most {MAX_LINE} bytes: {{"command": "status"}}'
            return {"ok": False, "error": f"not a request: send {wanted}"}
        handler = self._handlers.get(command) if isinstance(command, str) else None
        if handler is None:
            known = ", ".join(sorted(self._handlers))
            return {"ok": False, "error": f"command {command!r} does not exist: {known}"}
        try:
            return {"ok": True, "result": await handler(request)}
        except VdevError as error:
            return {"ok": False, "error": str(error)}


def request(path: Path, command: str, **arguments: Any) -> Any:
    """Ask the server behind ``path``; blocking, for programs without an event loop.

    Raises OSError where nobody answers and UserError where the server refuses.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
        with sock.makefile("rb") as stream:
            line = stream.readline()
    if not line.endswith(b"\n"):
        raise ConnectionError(f"{path} closed the connection without an answer")
    answer = json.loads(line)
    if not answer["ok"]:
        raise UserError(answer["error"])
    return answer["result"]


def find_servers(directory: Path | None = None) -> list[Path]:
    """The control sockets of this user's servers; those of dead ones are removed on the way."""
    directory = directory or control_dir()
    remove_stale(directory)
    with contextlib.suppress(OSError):
        return sorted(directory.glob("*.sock"))
    return []


def remove_stale(directory: Path) -> None:
    """Remove the sockets that servers which were killed left behind."""
    with contextlib.suppress(OSError):
        for path in directory.glob("*.sock"):
            if _is_dead(path) and not _is_alive(path.stem):
                path.unlink(missing_ok=True)


def _is_dead(path: Path) -> bool:
    """Whether ``path`` is a socket on which nobody listens."""
    try:
        # Connecting to a file that is no socket is refused just as well.
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return False
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _is_alive(pid: str) -> bool:
    # A server that has bound its socket and does not listen yet refuses connections too.
    return pid.isdigit() and int(pid) != os.getpid() and os.path.exists(f"/proc/{pid}")


def _bind_private(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # The mode of the socket file comes from the descriptor's, so nobody can slip in between.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(str(path))
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    sock = writer.get_extra_info("socket")
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)
