"""``vdev run`` and ``vdev vm`` with a real guest (QEMU without KVM), and what they refuse."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab import host
from vdev.runtime import runtime_dir
from vdev.server.control import find_machine
from vdev.vmm.host import kvm_usable

from .conftest import VDEV, Run
from .machines import (
    PROMPT,
    TIMEOUT,
    Guest,
    OnTerminal,
    Reader,
    children_of,
    stopped,
    wait_for_end,
)

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def guest() -> Guest:
    if lacks := host.lacks_guest() or host.lacks_network():
        pytest.skip(lacks)
    return Guest()


@pytest.fixture
def name() -> str:
    return f"test-{os.getpid()}"


@pytest.fixture
def bridge() -> str:
    return f"vdev-{os.getpid() % 1_000_000}-r"


def interfaces() -> set[str]:
    return set(os.listdir("/sys/class/net"))


class TestOnATerminal:
    def test_a_shell_to_leave(self, guest: Guest, disk: str, name: str, bridge: str) -> None:
        options = ("--name", name, "--disk", f"{disk},serial=d1", "--net", f"bridge={bridge}")
        with OnTerminal(guest.options(*options)) as terminal:
            terminal.screen.expect(f"{name} runs; ^] ends it")
            terminal.screen.expect(PROMPT)
            assert not terminal.settings[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
            assert "2048" in terminal.run("cat /sys/block/vda/size")
            assert "d1" in terminal.run("cat /sys/block/vda/serial")
            assert "52:54:00" in terminal.run("cat /sys/class/net/eth0/address")
            terminal.run("echo from-the-guest | dd of=/dev/vda conv=fsync 2>/dev/null")
            terminal.type("echo $((40 + 2))x; cat\n")
            terminal.screen.expect("42x")
            terminal.type("\x03")  # is the guest's, and ends its cat
            terminal.screen.expect(PROMPT)
            children = children_of(terminal.process.pid)
            taps = set(os.listdir(f"/sys/class/net/{bridge}/brif"))
            assert children
            assert taps
            terminal.type("\x1d")
            assert terminal.wait() == 0
            assert terminal.settings == terminal.before
        assert Path(disk).read_bytes().startswith(b"from-the-guest\n")
        assert not interfaces() & {bridge, *taps}
        assert find_machine(name) is None
        for child in children:
            assert not Path(f"/proc/{child}").exists()

    def test_suspended_and_continued(self, guest: Guest) -> None:
        with OnTerminal(guest.options()) as terminal:
            terminal.screen.expect(PROMPT)
            raw = terminal.settings
            os.kill(terminal.process.pid, signal.SIGTSTP)
            stopped(terminal.process)
            assert terminal.settings == terminal.before
            os.kill(terminal.process.pid, signal.SIGCONT)
            assert "still here" in terminal.run("echo still here")
            assert terminal.settings == raw
            os.kill(terminal.process.pid, signal.SIGTERM)
            assert terminal.wait() == 0
            assert terminal.settings == terminal.before

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_a_signal_ends_it(self, guest: Guest, number: signal.Signals) -> None:
        with OnTerminal(guest.options("--loop", "asyncio")) as terminal:
            terminal.screen.expect("ends it")
            os.kill(terminal.process.pid, number)
            assert terminal.wait() == 0
            assert terminal.settings == terminal.before

    def test_a_terminal_that_goes_away(self, guest: Guest) -> None:
        with OnTerminal(guest.options()) as terminal:
            terminal.screen.expect("ends it")
            children = children_of(terminal.process.pid)
            terminal.hang_up()
            assert terminal.process.wait(TIMEOUT) == 0
            for child in children:
                wait_for_end(child)

    def test_a_terminal_that_has_gone_away_before(self, tmp_path: Path) -> None:
        program = """
import asyncio, select, sys
from vdev.cli.terminal import Terminal

async def output():
    yield b"nobody reads this"

async def write(data):
    raise ValueError("nobody typed this")

terminal = Terminal(None, print)
open(sys.argv[1], "w").close()
poll = select.poll()
poll.register(0, 0)
poll.poll()
assert asyncio.run(terminal.converse(output(), write)) is False
raise SystemExit(3)
"""
        os.mkfifo(ready := tmp_path / "ready")
        command = ("env", "--ignore-signal=HUP", sys.executable, "-c", program)
        with OnTerminal([str(ready)], program=command) as terminal:
            ready.read_bytes()
            terminal.hang_up()
            assert terminal.process.wait(TIMEOUT) == 3

    def test_words_that_cannot_be_written(self, guest: Guest) -> None:
        program = ("sh", "-c", 'exec "$@" 2>/dev/full', "sh", *VDEV)
        with OnTerminal(guest.options(), program=program) as terminal:
            terminal.screen.expect(PROMPT)
            terminal.type("\x1d")
            assert terminal.wait() == 0

    def test_an_exception_restores_it(self) -> None:
        program = """
import asyncio
from vdev.cli.terminal import Terminal

async def output():
    yield b"raw now"
    raise ValueError("a fault of ours")

async def write(data):
    pass

asyncio.run(Terminal(None, print).converse(output(), write))
"""
        with OnTerminal([], program=(sys.executable, "-c", program)) as terminal:
            terminal.screen.expect("100 30")  # columns and rows
            terminal.screen.expect("raw now")
            assert terminal.wait() == 1
            terminal.screen.expect("a fault of ours")
            assert terminal.settings == terminal.before

    def test_another_escape(self, guest: Guest) -> None:
        with OnTerminal(guest.options("--escape", "^A", "--virtio-console")) as terminal:
            terminal.screen.expect("^A ends it")
            terminal.type("\x1d\x01")
            assert terminal.wait() == 0

    def test_a_qemu_that_was_killed(self, guest: Guest) -> None:
        with OnTerminal(guest.options()) as terminal:
            terminal.screen.expect("ends it")
            (qemu,) = children_of(terminal.process.pid)
            os.kill(qemu, signal.SIGKILL)
            assert terminal.wait() == 13
            terminal.screen.expect("killed: QEMU ended with signal 9")
            assert terminal.settings == terminal.before


@pytest.mark.parametrize(
    ("options", "append", "code", "words"),
    [
        ((), "do=poweroff", 0, ""),
        (("--no-reboot",), "do=reboot", 10, "reset-refused"),
        ((), "do=panic", 11, "panic"),
    ],
)
def test_how_it_ends(
    guest: Guest, vdev: Run, options: tuple[str, ...], append: str, code: int, words: str
) -> None:
    result = vdev(*guest.options(*options, append=append))
    assert result.returncode == code, result.stderr
    assert words in result.stderr


def test_pipes_pause_reset_and_the_power_button(guest: Guest, vdev: Run, name: str) -> None:
    options = guest.options("--name", name, "--virtio-console", console="hvc0")
    with subprocess.Popen(
        [*VDEV, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        screen = Reader(process.stdout.fileno())
        screen.expect(PROMPT)
        assert vdev("vm", "pause", name).returncode == 0
        assert json.loads(vdev("vm", "info", name).stdout)["state"] == "paused"
        process.stdin.write(b"echo $((20 + 3))x\n")
        process.stdin.flush()
        assert vdev("vm", "resume", name).returncode == 0
        screen.expect("23x")
        assert json.loads(vdev("vm", "info", str(process.pid)).stdout)["state"] == "running"
        assert vdev("vm", "reset", name).returncode == 0
        screen.expect(PROMPT)
        screen.expect(PROMPT)
        process.stdin.close()
        assert vdev("vm", "power-button", name).returncode == 0
        screen.rest()
        assert process.wait() == 0


def test_output_that_nobody_reads_does_not_hold_up_the_end(guest: Guest) -> None:
    with subprocess.Popen(
        [*VDEV, *guest.options(append="do=flood")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdout is not None
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        Reader(process.stdout.fileno()).expect("flooding")
        process.terminate()
        assert process.wait(TIMEOUT) == 0


class TestDetached:
    @pytest.fixture
    def machine(self, guest: Guest, vdev: Run, disk: str, name: str) -> Iterator[str]:
        options = ("--name", name, "--disk", disk, "--balloon", "--detach")
        started = vdev(*guest.options(*options))
        assert (started.returncode, started.stdout) == (0, f"{name}\n"), started.stderr
        path = find_machine(name)
        assert path is not None
        pid = int(path.stem.rpartition(".")[2])
        try:
            yield name
        finally:
            if vdev("vm", "stop", name).returncode:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            wait_for_end(pid)
            (runtime_dir() / f"{name}.log").unlink(missing_ok=True)

    def test_verbs(self, machine: str, vdev: Run, bridge: str, folder: Path) -> None:
        with OnTerminal(["vm", "console", machine]) as console:
            console.screen.expect(PROMPT)
            (listed,) = (
                one
                for one in json.loads(vdev("vm", "list", "--json").stdout)
                if one["name"] == machine
            )
            assert (listed["vmm"], listed["state"], listed["cpus"]) == ("qemu", "running", 1)
            assert f"machine {machine} (running, qemu)" in vdev("status", listed["pid"]).stdout
            counters = json.loads(vdev("vm", "counters", machine).stdout)
            assert counters["devices"]["disk0"]["total"]["requests"] >= 0

            with open("second.img", "wb") as image:
                image.truncate(2 << 20)
            added = vdev("vm", "add-disk", machine, "second.img,ro,serial=second")
            assert added.stdout == "disk1\n", added.stderr
            console.run("while ! cat /sys/block/vdb/serial 2>/dev/null; do :; done")
            assert "4096" in console.run("cat /sys/block/vdb/size")
            assert "disk1" in vdev("vm", "info", machine).stdout
            assert "in use" in vdev("vm", "add-disk", machine, "disk.img").stderr

            added = vdev("vm", "add-nic", machine, f"bridge={bridge},mac=52:54:00:00:00:77")
            assert added.stdout == "nic0\n", added.stderr
            console.run("while ! cat /sys/class/net/eth0/address 2>/dev/null; do :; done")
            assert "52:54:00:00:00:77" in console.run("cat /sys/class/net/eth0/address")

            for device in ("disk1", "nic0"):
                removed = vdev("vm", "remove", machine, device)
                assert removed.returncode == 0, removed.stderr
                assert device not in vdev("vm", "info", machine).stdout
            assert bridge not in interfaces()
            assert "vdb" not in console.run("cat /proc/partitions")
            assert "disk1" in vdev("vm", "remove", machine, "disk1").stderr

            plenty = "grep -q 'MemFree: *[0-9]\\{6\\}' /proc/meminfo"  # 100000 KiB or more
            assert console.run(f"{plenty}; echo $?").endswith("0")
            assert vdev("vm", "balloon", machine, "128M").returncode == 0
            console.run(f"while {plenty}; do :; done")
            assert "the machine has 256MiB" in vdev("vm", "balloon", machine, "256M").stderr
            assert "cannot write a snapshot" in vdev("vm", "snapshot", machine, "s").stderr

            console.type("\x1d")
            assert console.wait() == 0
            assert console.settings == console.before
        assert vdev("vm", "info", machine).returncode == 0

    def test_what_a_kill_leaves(self, machine: str, guest: Guest, vdev: Run, disk: str) -> None:
        before = {path.name for path in Path("/tmp").glob("vdev-*")}
        path = find_machine(machine)
        assert path is not None
        assert (
            "one of that name runs already"
            in vdev(*guest.options("--name", machine, "--detach")).stderr
        )
        pid = int(path.stem.rpartition(".")[2])
        (qemu,) = children_of(pid)
        os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)
        wait_for_end(qemu)
        assert {path.name for path in Path("/tmp").glob("vdev-*")} <= before
        assert "does not run" in vdev("vm", "stop", machine).stderr
        # The next one trips over nothing: name, image, control socket.
        again = vdev(*guest.options("--name", machine, "--disk", disk, "--detach"))
        assert again.returncode == 0, again.stderr
        assert vdev("vm", "stop", machine).returncode == 0
        assert not path.exists()


RUN = ("run", "--vmm", "qemu", "--kernel")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run"], "give --kernel, or a CONFIG.toml"),
        ([*RUN, "missing"], "kernel missing: No such file or directory"),
        ([*RUN, "text"], "kernel text: neither a bzImage nor an x86-64 ELF kernel"),
        ([*RUN, "."], "kernel .: not a regular file"),
        ([*RUN, "kernel", "--initrd", "missing"], "initrd missing: No such file"),
        ([*RUN, "kernel", "--disk", "missing.img"], "image missing.img: no such file"),
        ([*RUN, "kernel", "--memory", "16T"], "memory of 16777216 MiB: this host has"),
        ([*RUN, "kernel", "--memory", "16T", "--detach"], "memory of 16777216 MiB: this host has"),
        ([*RUN, "kernel", "--disk", "no.img", "--detach"], "image no.img: no such file"),
        ([*RUN, "kernel", "--memory", "33M"], "a multiple of 2 MiB"),
        ([*RUN, "kernel", "--memory", "64MB"], "size '64MB' is ambiguous"),
        ([*RUN, "kernel", "--cpus", "65"], "cpus = 65: 1 to 64"),
        ([*RUN, "kernel", "--disk", "null:1M,cahce=none"], "unknown key 'cahce': did you mean cac"),
        (
            [*RUN, "kernel", "--net", "mac=52:54:00:00:00:01"],
            "needs a bridge, a tap, a switch or a",
        ),
        ([*RUN, "kernel", "--net", "br0"], "'br0': write KEY=VALUE"),
        ([*RUN, "kernel", "--share", "missing"], "share missing: no such folder"),
        ([*RUN, "kernel", "--share", "."], "the VMM qemu has no shares"),
        ([*RUN, "kernel", "--vsock", "2"], "vsock cid = 2: 3 to 4294967294"),
        ([*RUN, "kernel", "--escape", "]"], "escape ']': a key like ^]"),
        ([*RUN, "kernel", "--name", "a.b"], "name 'a.b'"),
        ([*RUN, "kernel", "--vhost-user", "nobody,kind=blk"], "QEMU does not start: "),
        ([*RUN, "kernel", "vm.toml"], "vm.toml describes the whole machine: --kernel belongs"),
        (["run", "--no-sandbox", "vm.toml"], "--no-sandbox belongs into it"),
        (["run", "vm.toml"], "vm.toml: unknown key 'kernell': did you mean kernel?"),
        (["vm", "pause", "nobody"], "machine 'nobody' does not run: see vdev vm list"),
        (["vm", "console", "nobody"], "machine 'nobody' does not run"),
        (["vm", "fly", "nobody"], "invalid choice: 'fly'"),
    ],
)
def test_mistakes(refused: Refused, folder: Path, arguments: list[str], complaint: str) -> None:
    (folder / "text").write_text("no kernel" * 100)
    (folder / "kernel").write_bytes(b"\x7fELF\x02\x01" + bytes(12) + b"\x3e\0" + bytes(600))
    (folder / "vm.toml").write_text('kernell = "kernel"\nkernel = "kernel"\n')
    assert complaint in refused(*arguments)


@pytest.mark.parametrize("vmm", ["kvm", "cloud-hypervisor"])
def test_a_kvm_that_runs_no_machines(refused: Refused, folder: Path, vmm: str) -> None:
    (folder / "kernel").write_bytes(b"\x7fELF\x02\x01" + bytes(12) + b"\x3e\0" + bytes(600))
    reason = kvm_usable()
    program: tuple[str, ...] = VDEV
    if reason is None:
        # Everybody but root and the group kvm lacks the rights.
        program = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *VDEV)
        reason = "/dev/kvm: no rights to open it"
    line = refused("run", "--vmm", vmm, "--kernel", "kernel", program=program)
    assert line.startswith(f"vdev: vmm {vmm}: {reason}")
