"""The control socket of a running server: one JSON object a line, each answered by one.

    {"command": "status"}                          → {"ok": true, "result": {...}}
    {"command": "resize", "device": "blk0", ...}   → {"ok": false, "error": "one clear line"}

Sockets stand in one directory as PID.sock, machines' and switches' as NAME.PID.sock, so that
`vdev status` finds everything of its user.
The directory is the owner's (0700), the socket too (0600), and the kernel's word on the peer
(SO_PEERCRED) is asked besides: only the owner and root are answered.

A handler may answer with a `Stream`: behind the answer's line the connection is then its own.

A request may bring open descriptors along (SCM_RIGHTS): "fds" names them, in their order.  So a
client opens with its own rights what a server may not, or no longer, open.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from vdev.descriptors import Descriptors
from vdev.errors import PeerError, UserError, VdevError
from vdev.runtime import runtime_dir
from vdev.server.lines import MAX_FDS, MAX_LINE, LineSocket, close_fds, readable

_UCRED = struct.Struct("iII")
_ACCEPT_AGAIN = 1.0
"""Seconds until connections are accepted again, where this process has no descriptor left."""


class Request(dict[str, Any]):
    """What was asked.

    fds: the descriptors that came along, by name.  They are closed when the handler returns, who
    duplicates what it keeps.
    peer: who asked.
    """

    fds: Mapping[str, int]
    peer: LineSocket


Handler = Callable[[Request], Awaitable[Any]]


class Stream(NamedTuple):
    """Takes the connection over, once the answer is written; it is closed when this returns.

    result: the answer's.
    """

    run: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
    result: Any = None


def default_path(name: str | None = None) -> Path:
    """Where this process has its control socket; its directory is made, and tidied.

    `name`: of the machine, or the switch, that it runs.

    Raises UserError where there can be none.
    """
    directory = runtime_dir()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = directory.lstat().st_uid
    except OSError as error:
        raise UserError(f"control sockets in {directory}: {error.strerror}") from None
    if owner != os.geteuid():
        # In a directory that is anyone's (/tmp), the name may have been taken to lie to us.
        raise UserError(f"control sockets in {directory}: it belongs to user {owner}")
    remove_stale(directory)
    return directory / f"{name}.{os.getpid()}.sock" if name else directory / f"{os.getpid()}.sock"


class ControlSocket(NamedTuple):
    """A control socket that another program has made. by_pid: it is named after that process.

    connections: who is connected to it, each with the answer that it waits for, if it does.
    """

    path: Path
    by_pid: bool
    sock: socket.socket
    connections: Sequence[tuple[LineSocket, dict[str, Any] | None]] = ()

    @classmethod
    def restore(cls, state: dict[str, Any], fds: Descriptors) -> Self:
        """What `ControlServer.save` gave, with what `save_connections` gave as "connections"."""
        sock = socket.socket(fileno=fds.take(state["socket"]))
        connections = [
            (LineSocket.restore(one, fds), one["answer"]) for one in state.get("connections", ())
        ]
        return cls(Path(state["path"]), bool(state["by_pid"]), sock, connections)

    def server(self, handlers: Mapping[str, Handler]) -> ControlServer:
        """Answers there instead, named after this process."""
        path = self.path
        if self.by_pid:
            path = path.with_name(f"{os.getpid()}.sock")
            with contextlib.suppress(OSError):
                self.path.rename(path)
        return ControlServer(path, handlers, self.sock, self.connections)


class ControlServer:
    """Answers commands on a control socket; ``handlers`` has a coroutine function a command.

    A handler gets the whole request and returns what JSON can carry; a VdevError of its becomes
    the error line.  ``sock``: listens at ``path`` already, ``connections`` are those to it; the
    server's from now on.
    """

    def __init__(
        self,
        path: Path,
        handlers: Mapping[str, Handler],
        sock: socket.socket | None = None,
        connections: Sequence[tuple[LineSocket, dict[str, Any] | None]] = (),
    ) -> None:
        self.path = path
        self._handlers = handlers
        self._sock = sock
        self._listener: asyncio.Task[None] | None = None
        self._inherited = connections
        self._connections: dict[asyncio.Task[None], LineSocket] = {}
        self._gate = asyncio.Event()
        self._gate.set()

    async def start(self) -> None:
        """Bind and listen.  Raises UserError where the socket cannot be made."""
        if self._sock is None:
            try:
                if _is_dead(self.path):
                    self.path.unlink(missing_ok=True)
                self._sock = _bind_private(self.path)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"control socket {self.path}: {reason}") from None
            self._sock.listen()
        self._sock.setblocking(False)
        for peer, answer in self._inherited:
            self._connect(peer, answer)
        self._listener = asyncio.ensure_future(self._listen(self._sock))

    def save(self, fds: Descriptors) -> dict[str, Any]:
        """The socket, for `ControlSocket.restore` in another process."""
        assert self._sock is not None
        by_pid = self.path.name == f"{os.getpid()}.sock"
        return {"path": str(self.path), "by_pid": by_pid, "socket": fds.put(self._sock.fileno())}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Begin with no request until the block ends: those that come wait."""
        self._gate.clear()
        try:
            yield
        finally:
            self._gate.set()

    def is_idle(self, peer: LineSocket) -> bool:
        """Whether nobody but `peer` is being answered."""
        return all(other.idle for other in self._connections.values() if other is not peer)

    def save_connections(
        self, fds: Descriptors, peer: LineSocket, result: Any
    ) -> list[dict[str, Any]]:
        """The connections that are idle, and that of `peer`, who is owed that result."""
        answer = {"ok": True, "result": result}
        return [
            {**other.save(fds), "answer": answer if other is peer else None}
            for other in self._connections.values()
            if other.idle or other is peer
        ]

    async def let_go(self) -> None:
        """Take no more connections: those that come are another process's."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)

    async def close(self) -> None:
        """Stop answering and remove the socket."""
        if self._listener is None:
            return
        await self.let_go()
        self._listener = None
        # A machine's process has given up the right to; then its keeper does it.
        with contextlib.suppress(OSError):
            self.path.unlink()
        current = asyncio.current_task()
        waiting = [task for task in self._connections if task is not current]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def _listen(self, listener: socket.socket) -> None:
        with listener:
            while True:
                await readable(listener)
                try:
                    sock, _ = listener.accept()
                except (BlockingIOError, ConnectionError):
                    continue
                except OSError:
                    await self._rest()
                    continue
                self._connect(LineSocket(sock))

    def _connect(self, peer: LineSocket, answer: dict[str, Any] | None = None) -> None:
        peer.idle = answer is None
        peer.gate = self._gate
        task = asyncio.ensure_future(self._serve(peer, answer))
        self._connections[task] = peer
        task.add_done_callback(self._connections.pop)

    async def _rest(self) -> None:
        await asyncio.sleep(_ACCEPT_AGAIN)

    async def _serve(self, peer: LineSocket, answer: dict[str, Any] | None) -> None:
        try:
            if answer is not None:
                await _send(peer, answer)
            if _peer_uid(peer.sock) in (os.geteuid(), 0):
                await answer_requests(peer, self._handlers)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            await peer.close()


async def answer_requests(peer: LineSocket, handlers: Mapping[str, Handler]) -> None:
    """Answers what `peer` asks until it ends, or is taken over. Raises OSError where it fails."""
    while True:
        try:
            received = await peer.line()
        except PeerError as error:
            await _send(peer, _not_a_request(str(error)))
            return
        if received is None:
            return
        line, fds = received
        try:
            answer = await _answer(handlers, peer, line, fds)
        finally:
            close_fds(fds)
        stream = answer["result"] if isinstance(answer.get("result"), Stream) else None
        await _send(peer, answer if stream is None else {"ok": True, "result": stream.result})
        if stream is not None:
            await stream.run(*await peer.stream())
            return


async def _answer(
    handlers: Mapping[str, Handler], peer: LineSocket, line: bytes, fds: list[int]
) -> dict[str, Any]:
    try:
        asked = json.loads(line)
        command = asked["command"]
        request = Request(asked)
        names = request.pop("fds", [])
    except (ValueError, TypeError, KeyError, RecursionError):
        return _not_a_request("it has no command")
    if not _are_names(names) or len(names) != len(fds):
        return _not_a_request(f"{len(fds)} descriptors came along, named {names!r:.80}")
    request.fds = dict(zip(names, fds, strict=True))
    request.peer = peer
    handler = handlers.get(command) if isinstance(command, str) else None
    if handler is None:
        known = ", ".join(sorted(handlers))
        return {"ok": False, "error": f"command {command!r} does not exist: {known}"}
    try:
        return {"ok": True, "result": await handler(request)}
    except VdevError as error:
        return {"ok": False, "error": str(error)}


async def _send(peer: LineSocket, answer: dict[str, Any]) -> None:
    await peer.send(json.dumps(answer).encode() + b"\n")


def _not_a_request(why: str) -> dict[str, Any]:
    wanted = f'one line of at most {MAX_LINE} bytes: {{"command": "status"}}'
    return {"ok": False, "error": f"not a request: {why}: send {wanted}"}


def _are_names(names: object) -> bool:
    return (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names)
    )


def request(
    path: Path,
    command: str,
    *,
    patience: float | None = 10,
    fds: Mapping[str, int] | None = None,
    **arguments: Any,
) -> Any:
    """Ask the server behind ``path``; blocking, for programs without an event loop.

    `patience`: seconds to wait for the answer, None = as long as it takes.  `fds`: descriptors that
    go along, by the names that the command knows them by; they stay the caller's.

    Raises OSError where nobody answers and UserError where the server refuses.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(patience)
        return _converse(sock, path, command, arguments, fds or {})


def open_stream(path: Path, command: str, **arguments: Any) -> socket.socket:
    """As `request`, for a command that is answered by a `Stream`: the connection is the caller's.

    Raises what `request` raises.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(10)
        _converse(sock, path, command, arguments, {})
    except BaseException:
        sock.close()
        raise
    return sock


def _converse(
    sock: socket.socket,
    path: Path,
    command: str,
    arguments: dict[str, Any],
    fds: Mapping[str, int],
) -> Any:
    if len(fds) > MAX_FDS:
        raise UserError(f"{command}: {len(fds)} descriptors, but {MAX_FDS} go with one request")
    asked = {"command": command, **arguments, **({"fds": list(fds)} if fds else {})}
    data = json.dumps(asked).encode() + b"\n"
    sock.connect(str(path))
    sent = socket.send_fds(sock, [data], list(fds.values())) if fds else 0
    sock.sendall(data[sent:])
    line = bytearray()
    # Not a byte further than the line's end: what follows may be a stream's.
    while not line.endswith(b"\n"):
        if not (more := sock.recv(MAX_LINE, socket.MSG_PEEK)):
            raise ConnectionError(f"{path} closed the connection without an answer")
        line += sock.recv(more.index(b"\n") + 1 if b"\n" in more else len(more))
    answer = json.loads(line)
    if not answer["ok"]:
        raise UserError(answer["error"])
    return answer["result"]


def find_servers(directory: Path | None = None) -> list[Path]:
    """The control sockets of this user's servers; those of dead ones are removed on the way."""
    directory = directory or runtime_dir()
    remove_stale(directory)
    with contextlib.suppress(OSError):
        return sorted(directory.glob("*.sock"))
    return []


def find_machine(name: str, directory: Path | None = None) -> Path | None:
    """The control socket of the running machine `name`, which is a name or a process id."""
    for path in (directory or runtime_dir()).glob("*.*.sock"):
        if name in path.stem.split(".") and not _is_dead(path):
            return path
    return None


def remove_stale(directory: Path) -> None:
    """Remove the sockets that servers which were killed left behind."""
    with contextlib.suppress(OSError):
        for path in directory.glob("*.sock"):
            if _is_dead(path) and not _is_alive(path.stem.rpartition(".")[2]):
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
    # A server that has bound its socket and does not listen yet refuses connections too; one that
    # was killed may wait for its parent, who never asks.
    if not pid.isdigit() or int(pid) == os.getpid():
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


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


def _peer_uid(sock: socket.socket) -> int:
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)
