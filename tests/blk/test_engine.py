"""Engines: io_uring where the kernel allows it, threads where it does not.

io_uring is refused to one process by a seccomp filter, as container runtimes do it.  The sysctl
kernel.io_uring_disabled would refuse it to the whole host, the tests beside this one included, and
no resource limit has that effect on present kernels.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.frontend.blk import BlkClient, check_healthy
from tests.frontend.server import Server

from .serving import make_image

# seccomp(2): deny io_uring_setup (425 on every architecture since Linux 5.1) with EPERM.
WRAPPER = """
import ctypes, os, struct, sys
LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, EPERM = 0x7FFF0000, 0x00050001
code = b"".join(
    struct.pack("=HBBI", *step)
    for step in ((LOAD, 0, 0, 0), (JUMP_EQUAL, 0, 1, 425), (RETURN, 0, 0, EPERM),
                 (RETURN, 0, 0, ALLOW))
)
buffer = ctypes.create_string_buffer(code, len(code))
program = struct.pack("@HP", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert libc.prctl(22, 2, program, 0, 0) == 0, "PR_SET_SECCOMP"
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def io_uring_allowed() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    params = ctypes.create_string_buffer(120)
    fd = libc.syscall(425, 1, params)
    if fd >= 0:
        os.close(fd)
    return bool(fd >= 0)


def refused(*args: str | os.PathLike[str]) -> Sequence[str]:
    """The command line of `vdev` in a process that may not use io_uring."""
    return [sys.executable, "-c", WRAPPER, "-m", "vdev", *(os.fspath(arg) for arg in args)]


def arguments(directory: Path, engine: str) -> list[str]:
    """On asyncio: uvloop has an io_uring of its own, which says nothing about our engine."""
    image = make_image(directory / "disk.img", 1 << 20)
    socket = directory / "disk.sock"
    return [
        *("blk", "serve", "--socket-path", str(socket)),
        *("--blk-file", str(image), "--engine", engine, "--loop", "asyncio"),
    ]


def has_uring(server: Server) -> bool:
    return server.fds()["anon_inode:[io_uring]"] > 0


def test_the_wrapper_refuses_io_uring() -> None:
    probe = "import ctypes; p = ctypes.create_string_buffer(120); "
    probe += "assert ctypes.CDLL(None).syscall(425, 1, p) < 0"
    subprocess.run([sys.executable, "-c", WRAPPER, "-c", probe], check=True)


def test_auto_without_io_uring(tmp_path: Path) -> None:
    with Server(refused(*arguments(tmp_path, "auto"))) as server:
        assert not has_uring(server)
        check_healthy(tmp_path / "disk.sock")
        with BlkClient(tmp_path / "disk.sock") as client:
            client.flush()
            client.discard(0, 8)


def test_threads_without_io_uring(tmp_path: Path) -> None:
    with Server(refused(*arguments(tmp_path, "threads"))) as server:
        assert not has_uring(server)
        check_healthy(tmp_path / "disk.sock")


def test_io_uring_without_io_uring(tmp_path: Path) -> None:
    """Asked for by name and refused by the kernel: one clear line, exit code 2, nothing left."""
    done = subprocess.run(
        refused(*arguments(tmp_path, "io_uring")), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "io_uring" in done.stderr
    assert not (tmp_path / "disk.sock").exists()


@pytest.mark.parametrize("engine", ["auto", "io_uring"])
def test_io_uring_is_used(tmp_path: Path, engine: str) -> None:
    if not io_uring_allowed():
        pytest.skip("this kernel refuses io_uring (sysctl kernel.io_uring_disabled, or seccomp)")
    with Server.vdev(*arguments(tmp_path, engine)) as server:
        assert has_uring(server)
        check_healthy(tmp_path / "disk.sock")


def test_threads_use_no_io_uring(tmp_path: Path) -> None:
    with Server.vdev(*arguments(tmp_path, "threads")) as server:
        assert not has_uring(server)
        check_healthy(tmp_path / "disk.sock")
