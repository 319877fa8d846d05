"""A process in the sandbox, for the tests: enters it as told, acts, and prints what came of it.

usage: python -m tests.vmm.confined OPTIONS ACTION

OPTIONS is JSON: `config` for SandboxOptions, `keep` a list of [path, writable], `path` for the act,
`image` to open before, `dial` a socket to have a dialer for, `pass` paths of files as if somebody
else had opened them, `become` a user to be before, `refuse` a system call and its error, as of a
kernel that lacks it.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import json
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from tests.frontend.blk import (
    S_OK,
    T_DISCARD,
    T_FLUSH,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
    header,
    segment,
)
from tests.frontend.memory import GuestMemory
from tests.frontend.ring import Desc, SplitRing
from tests.frontend.session import F_EVENT_IDX, F_RING_PACKED
from vdev._native import lib
from vdev.blk.device import BlkDevice
from vdev.blk.image import open_image
from vdev.iothread import IOThread
from vdev.machines.dialer import Dialer
from vdev.memory import GuestMemory as ServedMemory
from vdev.memory import Region
from vdev.virtio.queue import QueueConfig, ServedQueue
from vdev.vmm.sandbox import KeptPath, Sandbox, SandboxOptions
from vdev.vmm.snapshot_files import copy_file

SECTORS = 64
_PR_SET_DUMPABLE = 4
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # SCMP_ACT_

libc = ctypes.CDLL(None, use_errno=True)


def syscall(number: int, *arguments: int) -> int:
    result: int = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    return result


def attempt(act: Callable[[], object]) -> str:
    """ "done", or the name of the error."""
    try:
        act()
    except OSError as error:
        return type(error).__name__ if error.errno is None else os.strerror(error.errno)
    return "done"


def opens(options: dict[str, Any]) -> Any:
    path = Path(options["path"])
    return {
        "read inside": attempt((path / "file").read_bytes),
        "write inside": attempt(lambda: (path / "new").write_bytes(b"new")),
        "read outside": attempt(Path("/etc/passwd").read_bytes),
        "write outside": attempt(Path("/var/tmp/vdev-sandbox-test").touch),
        "list /": attempt(lambda: os.listdir("/")),
        "device": attempt(lambda: os.open("/dev/kvm", os.O_RDWR)),
    }


def whole(options: dict[str, Any]) -> Any:
    """Who it is, as the parent can look it up too: it waits for the parent's word."""
    print(json.dumps({"pid": os.getpid(), "ids": [*os.getresuid(), *os.getresgid()]}), flush=True)
    sys.stdin.readline()
    return {
        "groups": os.getgroups(),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    }


async def _event_loop(options: dict[str, Any]) -> Any:
    """A server on a unix socket, a client of it, a worker thread of Python, a timer."""
    path = os.path.join(options["path"], "socket")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(answer, path)
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"hello\n")
    said = await reader.read()
    writer.close()
    server.close()
    await asyncio.sleep(0.001)
    thread = await asyncio.to_thread(threading.get_ident)
    return {"said": said.decode(), "other thread": thread != threading.get_ident()}


def passed(options: dict[str, Any]) -> Any:
    """An image and a file that somebody else has opened, as `vdev vm` passes them."""
    fds = options["passed"]
    image = open_image("/passed", cache="none", fd=fds[0])
    found = {"kind": image.kind, "size": image.size, "discards": image.can_discard}
    copy_file(fds[2], fds[1])
    os.fsync(fds[1])
    return found


def event_loop(options: dict[str, Any]) -> Any:
    return uvloop.run(_event_loop(options))


def plain_event_loop(options: dict[str, Any]) -> Any:
    return asyncio.run(_event_loop(options))


class _Driver:
    """The driver's half of one ring, and the requests of virtio-blk on it."""

    def __init__(self) -> None:
        self.memory = GuestMemory.default()
        self.ring = SplitRing(self.memory)

    def table(self) -> ServedMemory:
        return ServedMemory(
            Region.map(
                r.fd,
                guest_addr=r.guest_addr,
                size=r.size,
                user_addr=r.user_addr,
                offset=r.offset,
            )
            for r in self.memory.regions
        )

    def config(self, features: int) -> QueueConfig:
        ring = self.ring
        return QueueConfig(
            *(
                0,
                ring.size,
                features & ~(F_EVENT_IDX | F_RING_PACKED),
                ring.desc,
                ring.avail,
                ring.used,
            ),
            kick_fd=ring.kick_fd,
            call_fd=ring.call_fd,
        )

    async def request(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> bytes:
        """One request, waited for in a thread; the bytes that the device wrote but the status."""
        out = header(kind, sector) + data
        source, target = self.memory.alloc(len(out), 4096), self.memory.alloc(room + 1, 4096)
        self.memory.write(source, out)
        chain = [Desc(source, 16)]
        if data:
            chain.append(Desc(source + 16, len(data)))
        self.ring.submit([*chain, Desc(target, room + 1, True)])
        await asyncio.to_thread(self.ring.wait)
        written = self.memory.read(target, room + 1)
        if written[-1] != S_OK:
            raise AssertionError(f"request {kind}: status {written[-1]}")
        return written[:-1]


async def _disk(options: dict[str, Any]) -> Any:
    thread, driver = IOThread(), _Driver()
    thread.start()
    engine = options.get("engine", "auto")
    device = BlkDevice(options["opened"], iothreads=[thread], engine=engine)
    device.negotiate(device.features)
    queue = await ServedQueue.start(driver.config(device.features), device, driver.table(), thread)
    data = bytes(range(256)) * 2 * SECTORS
    await driver.request(T_OUT, 8, data)
    await driver.request(T_FLUSH)
    kept = await driver.request(T_IN, 8, room=len(data)) == data
    await driver.request(T_DISCARD, data=segment(8, 8))
    await driver.request(T_WRITE_ZEROES, data=segment(16, 8))
    zeroed = await driver.request(T_IN, 16, room=4096) == bytes(4096)
    io_uring = thread.has_io_uring
    await queue.stop()
    await thread.close()
    device.close()
    return {"kept": kept, "zeroed": zeroed, "io_uring": io_uring}


def disk(options: dict[str, Any]) -> Any:
    """A disk whose image was opened before, its iothread and workers, and a driver that uses it."""
    return uvloop.run(_disk(options))


def _in_thread(act: Callable[[], object]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


def _as_vcpu(act: Callable[[], object]) -> None:
    def run() -> None:
        assert lib.sandbox_enter(lib.SANDBOX_VCPU) == 0
        act()

    _in_thread(run)


def _connect(name: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(name)


def dials(options: dict[str, Any]) -> Any:
    """A socket by its path, and through the dialer that was forked before."""
    path = options["dial"]
    by_path = attempt(lambda: _connect(path))
    with options["dialer"].connect(path) as sock:
        sock.sendall(b"hello\n")
        return {"by path": by_path, "said": sock.recv(16).decode()}


def _import(options: dict[str, Any]) -> str:
    assert "colorsys" not in sys.modules
    return importlib.import_module("colorsys").__name__


def _enter_again(options: dict[str, Any]) -> str:
    try:
        Sandbox().enter()
    except RuntimeError as error:
        return str(error)
    return "entered"


ACTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "opens": opens,
    "whole": whole,
    "event_loop": event_loop,
    "plain_event_loop": plain_event_loop,
    "dials": dials,
    "disk": disk,
    "passed": passed,
    "nothing": lambda _: {},
    "import": _import,
    "twice": _enter_again,
    "abstract": lambda options: attempt(lambda: _connect(options["name"])),
    "execve": lambda _: os.execv("/bin/true", ["true"]),
    "execve in a thread": lambda _: _in_thread(lambda: os.execv("/bin/true", ["true"])),
    "fork": lambda _: os.fork(),
    "inet": lambda _: socket.socket(socket.AF_INET),
    "netlink": lambda _: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "packet": lambda _: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "setuid": lambda _: os.setuid(0),
    "setgroups": lambda _: os.setgroups([0]),
    "kill": lambda _: os.kill(os.getppid(), 0),
    "ptrace": lambda options: syscall(101, 16, options["parent"], 0, 0),
    "mount": lambda _: libc.mount(b"none", b"/", b"tmpfs", 0, None),
    "chroot": lambda _: os.chroot("/"),
    "io_uring in a vcpu": lambda _: _as_vcpu(lambda: syscall(425, 4, 0)),
    "open in a vcpu": lambda _: _as_vcpu(lambda: libc.open(b"/dev/null", os.O_RDWR)),
}


def _refuse(number: int, error: int) -> None:
    seccomp = ctypes.CDLL("libseccomp.so.2")
    seccomp.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(seccomp.seccomp_init(_ALLOW))
    assert seccomp.seccomp_rule_add(context, _ERRNO | error, number, 0) == 0
    assert seccomp.seccomp_load(context) == 0


def main() -> None:
    options, action = json.loads(sys.argv[1]), sys.argv[2]
    config = SandboxOptions(**{"families": ("unix",), **options.get("config", {})})
    if image := options.get("image"):
        options["opened"] = open_image(image, cache=options.get("cache", "writeback"))
    if path := options.get("dial"):
        options["dialer"] = Dialer([path])
    if "pass" in options:
        options["passed"] = [os.open(path, os.O_RDWR) for path in options["pass"]]
    if refused := options.get("refuse"):
        _refuse(*refused)
    if user := options.get("become"):
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        if options.get("dumpable", True):  # as a process is that was started by this user
            libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
    sandbox = Sandbox(config)
    report = sandbox.enter(KeptPath(path, writable) for path, writable in options.get("keep", ()))
    assert sandbox.report() is report
    result = ACTIONS[action](options)
    print(json.dumps({"result": result, "report": report.as_dict()}), flush=True)


if __name__ == "__main__":
    main()
