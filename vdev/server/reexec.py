"""A supervisor is followed by another program in the same process.

Theory of operation.  An exec keeps the process id, the children, signals that are held back, and
the descriptors that are to be kept.  What else the next program must know is a file (a memfd) of
JSON, which names descriptors by their places in a list.

Whatever fails before the exec leaves the supervisor as it is; after it there is nobody to go back
to.  Therefore the next program is tried first, in a process of its own, on the same file and
descriptors: it does all but touch them, and says that it can.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from vdev.descriptors import Descriptors
from vdev.errors import UserError
from vdev.server.child import Child
from vdev.server.handover import leave, refuse
from vdev.server.orders import FORMAT
from vdev.server.passage import Passage, PassageFailed


class Left(NamedTuple):
    """What one program leaves to the next. state: as JSON has it, with places in `fds`."""

    state: dict[str, Any]
    fds: Descriptors


def read(fd: int) -> Left:
    """What the last program has left; the descriptors are the caller's.

    Raises UserError where it is of another version of vdev's.
    """
    with open(fd) as file:
        file.seek(0)
        found = json.load(file)
    if (format := found.get("format")) != FORMAT:
        raise UserError(f"a supervisor of format {format}, but this is vdev with format {FORMAT}")
    for one in found["fds"]:
        os.set_inheritable(one, False)
    return Left(found["state"], Descriptors(found["fds"]))


async def attempt(program: Sequence[str], left: Left, patience: float) -> None:
    """Returns when `program` has said that it can go on with that.

    Raises UserError where it cannot, or says nothing for `patience` seconds.
    """
    ours, theirs = Passage.pair()
    with contextlib.closing(Passage(ours)) as passage:
        with theirs, _written(left) as file:
            child = Child.start(
                [*program, "supervisor", "--attempt", str(theirs.fileno()), str(file)],
                [theirs.fileno(), file, *left.fds.all()],
            )
        try:
            async with asyncio.timeout(patience):
                await passage.receive("fits")
        except (PassageFailed, TimeoutError) as error:
            why = "it takes too long to start" if isinstance(error, TimeoutError) else error
            raise UserError(f"the new program cannot be the supervisor: {why}") from None
        finally:
            child.kill()
            await child.wait()


async def answer_attempt(passage_fd: int, file: int, restore: Callable[[Left], object]) -> NoReturn:
    """The other end of `attempt`: whether `restore` takes what is in `file`."""
    passage = Passage(socket.socket(fileno=passage_fd))
    try:
        restore(read(file))
    except BaseException as error:
        await refuse(passage, error)
    await passage.send("fits")
    leave(0)


def become(program: Sequence[str], left: Left) -> NoReturn:
    """Ends this program, and begins the next, which `read` that.

    Raises UserError where the kernel cannot run it; then nothing has changed.
    """
    with _written(left) as file:
        kept = [file, *left.fds.all()]
        try:
            for fd in kept:
                os.set_inheritable(fd, True)
            sys.stdout.flush()
            os.execv(program[0], [*program, "supervisor", str(file)])
        except OSError as error:
            raise UserError(f"program {program[0]}: {error.strerror}") from None
        finally:
            for fd in kept:
                os.set_inheritable(fd, False)


@contextlib.contextmanager
def _written(left: Left) -> Iterator[int]:
    fd = os.memfd_create("vdev-supervisor", os.MFD_CLOEXEC)
    try:
        with open(fd, "w", closefd=False) as file:
            json.dump({"format": FORMAT, "fds": left.fds.all(), "state": left.state}, file)
        yield fd
    finally:
        os.close(fd)
