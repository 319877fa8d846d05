"""The dialer: a child that connects anew to the back-ends of a machine's devices.

A confined process reaches no socket by its path, but a back-end that was killed and started again
listens on a new one.  So a child is forked before, which keeps the rights and the paths; it is
asked by a path's number, connects, and passes the connection on.  Whoever takes the process over
can have connections to the machine's own back-ends, which it had already, and nothing else.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Sequence

from vdev.machines.keeper import fork_aside

_SECONDS = 2.0
"""How long a connection may take: of a socket whose queue is full."""
_ASKED, _ANSWERED = struct.Struct("=H"), struct.Struct("=i")


class Dialer:
    """Forks, for these paths.  It ends with this process, or with `close`."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = [os.path.abspath(path) for path in paths]
        self._lock = threading.Lock()
        self._child, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fork_aside({theirs.fileno()}, lambda: _answer(theirs, self._paths))

    def connect(self, path: str) -> socket.socket:
        """A connection to the socket at `path`, one of those that it was made for; of any thread.

        Raises OSError as connect(2) does, or where the child is gone.
        """
        number = self._paths.index(os.path.abspath(path))
        with self._lock:
            self._child.send(_ASKED.pack(number))
            answer, fds, _, _ = socket.recv_fds(self._child, _ANSWERED.size, 1)
        if not answer:
            raise ConnectionResetError(errno.ECONNRESET, "the dialer is gone")
        (error,) = _ANSWERED.unpack(answer)
        if error:
            raise OSError(error, os.strerror(error), path)
        return socket.socket(fileno=fds[0])

    def close(self) -> None:
        """Ends the child."""
        self._child.close()


def _answer(asked: socket.socket, paths: Sequence[str]) -> None:
    while question := asked.recv(_ASKED.size):
        (number,) = _ASKED.unpack(question)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_SECONDS)
            try:
                sock.connect(paths[number])
            except OSError as error:
                asked.send(_ANSWERED.pack(error.errno or errno.ETIMEDOUT))
            else:
                sock.settimeout(None)
                socket.send_fds(asked, [_ANSWERED.pack(0)], [sock.fileno()])
