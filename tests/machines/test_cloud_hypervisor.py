"""Machines on cloud-hypervisor, with a program in its place that has no guest (fake)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.machines import Reader, children_of, wait_for_end
from vdev.errors import UserError
from vdev.machines import choice, cloud_hypervisor, foreign
from vdev.machines.choice import new_machine
from vdev.vmm.api import End, NotSupported, State, VirtualMachine
from vdev.vmm.config import (
    DiskConfig,
    LimitsConfig,
    MachineConfig,
    NicConfig,
    SandboxConfig,
    ShareConfig,
    VhostUserConfig,
    VsockConfig,
)

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).with_name("fake_cloud_hypervisor.py")
NO_KVM = "no KVM"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the program in PATH, a kernel, and an image of 1 MiB that begins with "image"."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "cloud-hypervisor"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("FAKE_CH_LOG", str(tmp_path / "requests"))
    monkeypatch.setattr(choice, "kvm_usable", lambda: None)
    (tmp_path / "kernel").write_bytes(b"\x7fELF\x02\x01" + bytes(12) + b"\x3e\0" + bytes(600))
    (tmp_path / "image").write_bytes(b"image" + bytes((1 << 20) - 5))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    return tmp_path


def config(folder: Path, **settings: Any) -> MachineConfig:
    settings = {"memory": 64 << 20, "disks": (DiskConfig(str(folder / "image")),), **settings}
    return MachineConfig(
        name="m", kernel=str(folder / "kernel"), vmm="cloud-hypervisor", **settings
    )


def requests(folder: Path) -> dict[str, Any]:
    """The last body of each command."""
    return dict(json.loads(line) for line in (folder / "requests").read_text().splitlines())


async def expect(machine: VirtualMachine, text: str, times: int = 1) -> None:
    """Its console has shown the text so often."""
    async with contextlib.aclosing(machine.console.attach()) as output:
        seen = b""
        async for data in output:
            seen += data
            if seen.count(text.encode()) >= times:
                return
    raise AssertionError(f"{text!r} did not come: {seen!r}")


@contextlib.asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[VirtualMachine]:
    async with new_machine(config(folder, **settings)) as machine:
        await machine.start()
        await expect(machine, "booted")
        yield machine


def descriptors() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def programs_of(folder: Path) -> list[int]:
    """Our children that run the program of this folder; the test run may have others."""
    found = []
    for pid in children_of(os.getpid()):
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        if os.fsencode(folder / "requests") in environment:
            found.append(pid)
    return found


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


async def test_what_it_is_told(folder: Path) -> None:
    outside = VhostUserConfig("/nowhere", "fs", tag="t", id="share")
    (folder / "initrd").write_bytes(b"x")
    built = new_machine(
        config(
            folder,
            initrd=str(folder / "initrd"),
            cmdline="quiet a=b,c",
            cpus=2,
            balloon=True,
            console="virtio",
            disks=(DiskConfig(str(folder / "image"), queues=2),),
            nics=(NicConfig(socket="/net", mac="52:54:00:00:00:07", queues=2, mtu=9000),),
            vhost_user=(outside,),
            sandbox=SandboxConfig(seccomp=False),
        )
    )
    async with built as machine:
        assert machine.state is State.BUILT
        told = requests(folder)["vm.create"]
        (pid,) = programs_of(folder)
        arguments = command_of(pid)[2:]
        # Nobody finds a way in but by the descriptors of ours.
        assert not list((folder / "tmp").iterdir())
    assert arguments[-2:] == ["--seccomp", "false"]
    assert re.fullmatch(r"--api-socket fd=\d+ --event-monitor fd=\d+", " ".join(arguments[:-2])), (
        arguments
    )
    (disk,) = told.pop("disks")
    assert re.fullmatch(rf"/proc/{os.getpid()}/fd/\d+", disk.pop("vhost_socket"))
    assert disk == {"id": "disk0", "vhost_user": True, "num_queues": 2}
    mac = "52:54:00:00:00:07"
    assert told == {
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2},
        "memory": {"size": 64 << 20, "shared": True},
        "payload": {
            "kernel": str(folder / "kernel"),
            "initramfs": str(folder / "initrd"),
            "cmdline": "quiet a=b,c",
        },
        "rng": {"src": "/dev/urandom"},
        "serial": {"mode": "Off"},
        "console": {"mode": "Tty"},
        "pvpanic": True,
        "balloon": {"size": 0, "deflate_on_oom": True, "free_page_reporting": True},
        "net": [
            {
                "id": "nic0",
                "vhost_user": True,
                "mac": mac,
                "num_queues": 4,
                "mtu": 9000,
                "vhost_socket": "/net",
            }
        ],
        "fs": [
            {"id": "share", "tag": "t", "num_queues": 1, "queue_size": 1024, "socket": "/nowhere"}
        ],
    }


async def test_verbs(folder: Path) -> None:
    before = descriptors()
    async with running(folder, balloon=True) as machine:
        await expect(machine, "disk0 has image")
        info = machine.info()
        assert (info["vmm"], info["accelerator"]) == ("cloud-hypervisor", "kvm")
        assert (info["state"], info["devices"][0]["state"]) == ("running", "connected")
        await machine.console.write(b"hello\n")
        await expect(machine, "HELLO")

        for _ in range(2):
            await machine.pause()
            assert machine.state is State.PAUSED
        for _ in range(2):
            await machine.resume()
            assert machine.state is State.RUNNING
        await machine.power_button()
        await expect(machine, "power button")
        await machine.set_balloon(32 << 20)
        await expect(machine, f"balloon {32 << 20}")
        with pytest.raises(UserError, match="the machine has 64MiB"):
            await machine.set_balloon(64 << 20)
        with pytest.raises(NotSupported, match="cannot write a snapshot"):
            await machine.snapshot("s")

        (folder / "second").write_bytes(b"second" + bytes((1 << 20) - 6))
        second = DiskConfig(str(folder / "second"))
        assert await machine.add_disk(second) == "disk1"
        await expect(machine, "disk1 has second")
        # Its back-end is ready for a reset, by the same way.
        await machine.reset()
        await expect(machine, "disk0 has image", times=2)
        await machine.remove("disk1")
        assert [device["id"] for device in machine.info()["devices"]] == ["disk0"]
        assert list(machine.counters()["devices"]) == ["disk0"]

        with pytest.raises(UserError, match=r"vm\.add-disk: The disk could not be added to the VM"):
            await machine.add_disk(DiskConfig(str(folder / "second"), id="refused"))
        # What was refused is not kept open.
        assert await machine.add_disk(second) == "disk1"
        assert not list((folder / "tmp").iterdir())
        await machine.stop()
        assert (await machine.wait()).end is End.STOPPED
        with pytest.raises(UserError, match="it is ended"):
            await machine.pause()
    assert "vmm.shutdown" in requests(folder)
    assert descriptors() == before


@pytest.mark.parametrize(
    ("word", "settings", "end", "detail"),
    [
        (b"poweroff", {}, End.SHUTDOWN, ""),
        (b"panic", {}, End.PANIC, "kernel panicked"),
        (b"reboot", {"reboot": False}, End.RESET_REFUSED, "wanted a reset"),
        (b"fault", {}, End.CRASHED, "VCPU generated error: VcpuRun"),
    ],
)
async def test_how_it_ends(
    folder: Path, word: bytes, settings: dict[str, Any], end: End, detail: str
) -> None:
    async with running(folder, **settings) as machine:
        await machine.console.write(word + b"\n")
        outcome = await machine.wait()
    assert outcome.end is end
    assert detail in outcome.detail
    if word == b"poweroff":
        assert b"goodbye" in machine.console.history  # its last words are not lost


async def test_a_reset_of_its_own(folder: Path) -> None:
    async with running(folder) as machine:
        await machine.console.write(b"reboot\n")
        await expect(machine, "disk0 has image", times=2)
        assert machine.state is State.RUNNING


async def test_a_reset_that_was_asked_for_is_not_refused(folder: Path) -> None:
    async with running(folder, reboot=False) as machine:
        await machine.reset()
        await expect(machine, "booted", times=2)
        await machine.console.write(b"reboot\n")
        assert (await machine.wait()).end is End.RESET_REFUSED


async def test_a_program_that_was_killed(folder: Path) -> None:
    async with running(folder) as machine:
        (pid,) = programs_of(folder)
        os.kill(pid, signal.SIGKILL)
        outcome = await machine.wait()
        assert outcome.end is End.KILLED
        assert "cloud-hypervisor ended with signal 9" in outcome.detail
        with pytest.raises(UserError, match="it is ended"):
            await machine.reset()


@pytest.mark.parametrize(
    ("how", "settings", "complaint"),
    [
        ("die", {}, r"^cloud-hypervisor does not start: Failed to open hyper.*: no /dev/kvm$"),
        ("hang", {}, r"^cloud-hypervisor does not start: no answer within 0\.5 s$"),
        ("garbage", {}, "^cloud-hypervisor does not start: it said nothing$"),
        ("", {"cpus": 3}, "vm.create: The VM could not be created: three is a crowd$"),
    ],
)
async def test_a_program_that_does_not_start(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    settings: dict[str, Any],
    complaint: str,
) -> None:
    before = descriptors()
    monkeypatch.setenv("FAKE_CH", how)
    if how == "hang":
        monkeypatch.setattr(cloud_hypervisor, "START_PATIENCE", 0.5)
    if how == "garbage":
        monkeypatch.setattr(foreign, "STOP_PATIENCE", 0.1)
    with pytest.raises(UserError, match=complaint) as caught:
        async with new_machine(config(folder, **settings)):
            pass
    assert "\n" not in str(caught.value)
    assert not programs_of(folder)
    assert not list((folder / "tmp").iterdir())
    assert descriptors() == before


async def test_a_program_that_does_not_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CH", "deaf")
    monkeypatch.setattr(foreign, "STOP_PATIENCE", 0.1)
    async with running(folder) as machine:
        await machine.stop()
        assert (await machine.wait()).end is End.STOPPED
    assert not programs_of(folder)


async def test_a_caller_who_gives_up_takes_no_answer_along(folder: Path) -> None:
    async with running(folder) as machine:
        asking = asyncio.ensure_future(machine.power_button())
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await machine.pause()
        await machine.resume()
        assert machine.state is State.RUNNING


def test_a_kill_leaves_nothing(folder: Path) -> None:
    program = """
import asyncio, sys, tempfile
from vdev.machines import choice, run
from vdev.vmm.config import DiskConfig, MachineConfig
folder = sys.argv[1]
tempfile.tempdir = folder + "/tmp"
choice.kvm_usable = lambda: None
config = MachineConfig(
    name="m", kernel=folder + "/kernel", vmm="cloud-hypervisor", memory=64 << 20,
    disks=(DiskConfig(folder + "/image"),),
)

async def main():
    async with choice.new_machine(config) as machine:
        await machine.start()
        async for data in machine.console.attach():
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()

asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        Reader(process.stdout.fileno()).expect("booted")
        (child,) = children_of(process.pid)
        process.kill()
        process.wait()
        wait_for_end(child)
    assert not list((folder / "tmp").iterdir())


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"vsock": VsockConfig(3)}, "vsock"),
        ({"limits": LimitsConfig(cpu=1)}, "limits"),
        ({"sandbox": SandboxConfig(user="nobody")}, "sandbox user"),
        ({"transport": "mmio"}, "transport mmio"),
        ({"shares": (ShareConfig("/"),)}, "shares"),
        ({"rng": False}, "machine without rng"),
        ({"disks": (DiskConfig("null:1M"),) * 25}, "takes 24"),
    ],
)
def test_what_it_does_not_do_is_refused(folder: Path, settings: dict[str, Any], what: str) -> None:
    with pytest.raises(NotSupported, match=what):
        new_machine(config(folder, **settings))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (
            lambda patch, folder: patch.setattr(choice, "kvm_usable", lambda: NO_KVM),
            "^vmm cloud-hypervisor: no KVM$",
        ),
        (
            lambda patch, folder: (folder / "bin" / "cloud-hypervisor").unlink(),
            "^vmm cloud-hypervisor: cloud-hypervisor was not found: see vdev doctor$",
        ),
    ],
)
def test_what_it_lacks(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[pytest.MonkeyPatch, Path], object],
    complaint: str,
) -> None:
    spoil(monkeypatch, folder)
    with pytest.raises(UserError, match=complaint):
        new_machine(config(folder))
