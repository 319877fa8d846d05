"""``vdev run`` in its sandbox and cgroup: a guest's whole life, and what a kill leaves."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli import machines
from tests.cli.machines import Reader, children_of, wait_for_end
from tests.lab.innermost import Material
from vdev.blk import open_image
from vdev.errors import UserError
from vdev.net.wiring import sweep
from vdev.runtime import runtime_dir
from vdev.server.control import find_machine, request
from vdev.vmm.cgroup import device_number
from vdev.vmm.sandbox import FREE_UIDS

VDEV = (sys.executable, "-m", "vdev")
MAC = "52:54:00:00:00:42"
BRIDGE, OTHER_BRIDGE = "vdev-confined", "vdev-confined2"
# Several boots of a machine in an emulated one.
pytestmark = pytest.mark.timeout(420)
LIMITS = {"cpu.max": "150000 100000", "memory.max": str(1 << 30), "pids.max": "100"}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated machine on a busy host takes its time."""
    monkeypatch.setattr(machines, "TIMEOUT", 240.0)


def vdev(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VDEV, *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )


def done(*arguments: str, at: Path | None = None) -> str:
    """What it printed, which succeeds."""
    answer = subprocess.run(
        [*VDEV, *arguments],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=at,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def info(name: str) -> dict[str, Any]:
    answer = vdev("vm", "info", name)
    assert answer.returncode == 0, answer.stderr
    told: dict[str, Any] = json.loads(answer.stdout)
    return told


@pytest.fixture
def configure(material: Material, tmp_path: Path) -> Callable[..., str]:
    """Writes a machine's file; returns its path."""

    def configure(name: str, more: str) -> str:
        disk = tmp_path / "disk.img"
        with disk.open("wb") as file:
            file.truncate(8 << 20)
        bootable = material.cloud
        path = tmp_path / f"{name}.toml"
        path.write_text(
            f"""
            kernel = "{bootable.vmlinux}"
            initrd = "{bootable.initrd}"
            cmdline = "console=hvc0 quiet panic=-1 mitigations=off"
            memory = "256M"
            console = "virtio"
            vmm = "kvm"
            [[disk]]
            path = "disk.img"
            [[nic]]
            bridge = "{BRIDGE}"
            [limits]
            cpu = 1.5
            memory = "1G"
            pids = 100
            {more}
            """
        )
        return str(path)

    return configure


class Running:
    """A machine in the foreground, its console on pipes."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*VDEV, "run", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self.screen = Reader(self.process.stdout.fileno())

    def shell(self, command: str) -> str:
        """What a command in the guest's shell wrote."""
        self.type(f"echo BEG''IN; {command}; echo E''ND\n")
        self.screen.expect("BEGIN")
        return self.screen.expect("END").removesuffix("END").replace("\r", "").strip()

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def end(self) -> str:
        """What it wrote on stderr."""
        assert self.process.stderr is not None
        self.screen.rest()
        return self.process.stderr.read().decode()


@pytest.fixture
def run() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def run(*arguments: str) -> Running:
        started.append(Running(*arguments))
        return started[-1]

    yield run
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
        running.process.communicate()


def status(pid: int, task: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/task/{task}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


@pytest.mark.long
def test_a_guests_whole_life(
    configure: Callable[..., str], run: Callable[..., Running], tmp_path: Path
) -> None:
    running = run(configure("confined", ""))
    pid = running.process.pid
    running.screen.expect("GUEST READY")

    told = info("confined")
    sandbox, group = told["sandbox"], Path(told["cgroup"])
    assert int(sandbox["user"].split(":")[0]) in FREE_UIDS
    assert sandbox["seccomp"]
    assert sandbox["own_root"]
    assert {"mount", "ipc", "uts"} <= set(sandbox["namespaces"])
    assert sandbox["families"] == ["unix"]
    for file, value in LIMITS.items():
        assert (group / file).read_text().strip() == value
    (keeper,) = children_of(pid)
    # KVM has a kernel thread in it, too.
    assert {pid, keeper} <= set(map(int, (group / "cgroup.procs").read_text().split()))
    threads = [status(pid, int(task)) for task in os.listdir(f"/proc/{pid}/task")]
    assert len(threads) >= 3  # an iothread, a vCPU and this one
    for thread in threads:
        assert (thread["Seccomp"], thread["NoNewPrivs"], thread["CapEff"]) == ("2", "1", "0" * 16)
        assert int(thread["Uid"].split()[0]) in FREE_UIDS
    assert told["devices"][0]["image"]["path"] == str(tmp_path / "disk.img")

    assert running.shell("cat /sys/block/vda/size") == str((8 << 20) >> 9)
    running.shell("echo kept | dd of=/dev/vda conv=fsync 2>/dev/null")
    assert (tmp_path / "disk.img").read_bytes().startswith(b"kept\n")
    running.shell("ip link set eth0 address 52:54:00:00:00:99; ip link set eth0 up")
    running.shell("ip link set eth0 mtu 1400; ip link set eth0 down; ip link set eth0 up")
    assert "52:54:00:00:00:99" in running.shell("cat /sys/class/net/eth0/address")

    address = hot_plug(running, tmp_path)
    assert vdev("vm", "pause", "confined").returncode == 0
    assert info("confined")["state"] == "paused"
    assert vdev("vm", "resume", "confined").returncode == 0
    counters = json.loads(vdev("vm", "counters", "confined").stdout)
    assert counters["devices"]["disk0"]["total"]["requests"] > 0

    running.type("reboot -f\n")
    running.screen.expect("GUEST READY")
    assert running.shell("head -c 4 /dev/vda") == "kept"
    assert vdev("vm", "reset", "confined").returncode == 0
    running.screen.expect("GUEST READY")

    assert Path(f"/sys/class/net/{BRIDGE}").exists()
    running.type("poweroff -f\n")
    said = running.end()
    assert running.process.wait() == 0, said
    assert "Traceback" not in said
    assert not Path(f"/sys/class/net/{BRIDGE}").exists()
    assert not list(runtime_dir().glob("confined.*"))
    wait_for_end(keeper)
    assert not group.exists()

    clone(run, tmp_path, address)


def hot_plug(running: Running, folder: Path) -> str:
    """What a confined machine cannot open is passed to it: a disk, a card, a snapshot's files.

    Returns the card's address.
    """
    socket = find_machine("confined")
    assert socket is not None
    asked: dict[str, dict[str, Any]] = {
        "add-disk": {"disk": {"path": str(folder / "disk.img")}},
        "add-nic": {"nic": {"bridge": BRIDGE}},
        "snapshot": {"directory": str(folder / "refused")},
    }
    for command, arguments in asked.items():
        with pytest.raises(UserError, match="its sandbox lets it open nothing"):
            request(socket, command, patience=None, **arguments)

    (folder / "second.img").write_bytes(b"second".ljust(4 << 20, b"\0"))
    assert done("vm", "add-disk", "confined", "second.img,cache=none", at=folder) == "disk1"
    assert "in use by" in vdev("vm", "add-disk", "confined", str(folder / "disk.img")).stderr
    assert running.shell("until [ -b /dev/vdb ]; do :; done; head -c 6 /dev/vdb") == "second"
    running.shell("echo written | dd of=/dev/vdb conv=fsync 2>/dev/null")
    assert (folder / "second.img").read_bytes().startswith(b"written\n")
    assert done("vm", "add-disk", "confined", "null:1M") == "disk2"

    card = f"bridge={OTHER_BRIDGE},address=10.213.77.1/24,queues=2"
    assert done("vm", "add-nic", "confined", card) == "nic1"
    # Whoever wires next sees that it is in use.
    asyncio.run(sweep())
    assert "10.213.77.1/24" in addresses()
    assert running.shell(
        "until ip link set eth1 up 2>/dev/null; do :; done; ip addr add 10.213.77.2/24 dev eth1; "
        "until ping -c 1 -W 9 10.213.77.1 >/dev/null; do :; done; echo there"
    ).endswith("there")

    address = running.shell("cat /sys/class/net/eth1/address; remembered=$((6 * 7))")
    snapshot = vdev("vm", "snapshot", "confined", str(folder / "snapshot"))
    assert snapshot.returncode == 0, snapshot.stderr
    assert sorted(os.listdir(folder / "snapshot/disks")) == ["disk0", "disk1"]
    assert "it exists" in vdev("vm", "snapshot", "confined", str(folder / "snapshot")).stderr
    assert info("confined")["state"] == "running"

    for device in ("disk2", "disk1", "nic1"):
        assert done("vm", "remove", "confined", device) == ""
        assert device not in [one["id"] for one in info("confined")["devices"]]
    assert (
        running.shell("ls /dev/vdb /dev/vdc /sys/class/net/eth1 2>/dev/null; echo gone") == "gone"
    )
    assert not Path(f"/sys/class/net/{OTHER_BRIDGE}").exists()
    # Its lock is given back.
    open_image(str(folder / "second.img")).close()
    return address


def clone(run: Callable[..., Running], folder: Path, address: str) -> None:
    """From the snapshot, with the devices that were plugged in at that time."""
    (folder / "second.img").unlink()
    options = ("--clone", "--name", "clone", "--disks", str(folder / "restored"))
    again = run("--restore", str(folder / "snapshot"), *options)
    assert again.shell("echo $remembered") == "42"
    assert again.shell("head -c 7 /dev/vdb; head -c 4 /dev/vda") == "writtenkept"
    # Its cards are plugged in anew, on the taps that they have.
    assert again.shell(
        f"cd /sys/class/net; until grep -q : eth1/address && ! grep -q {address} eth1/address; "
        "do :; done; ip addr add 10.213.77.3/24 dev eth1; ip link set eth1 up; "
        "until ping -c 1 -W 9 10.213.77.1 >/dev/null; do :; done; echo there"
    ).endswith("there")
    assert info("clone")["sandbox"]["seccomp"]
    again.type("poweroff -f\n")
    wrote = again.end()
    assert again.process.wait() == 0, wrote
    assert "Traceback" not in wrote
    assert not Path(f"/sys/class/net/{OTHER_BRIDGE}").exists()


def addresses() -> str:
    return subprocess.run(
        ["ip", "addr", "show", "dev", OTHER_BRIDGE], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def block_devices(tmp_path: Path) -> Iterator[list[str]]:
    made = []
    for name in ("first", "second"):
        (tmp_path / name).write_bytes(bytes(4 << 20))
        loop = subprocess.run(
            ["losetup", "--find", "--show", tmp_path / name], stdout=subprocess.PIPE, check=True
        )
        made.append(loop.stdout.decode().strip())
    yield made
    for path in made:
        subprocess.run(["losetup", "--detach", path], check=True)


@pytest.mark.long
def test_disks_that_come_later_are_limited_too(
    material: Material,
    run: Callable[..., Running],
    block_devices: list[str],
    tmp_path: Path,
) -> None:
    first, second = block_devices
    bootable = material.cloud
    (tmp_path / "limited.toml").write_text(
        f"""
        kernel = "{bootable.vmlinux}"
        initrd = "{bootable.initrd}"
        cmdline = "console=hvc0 quiet panic=-1 mitigations=off"
        memory = "256M"
        console = "virtio"
        vmm = "kvm"
        [[disk]]
        path = "{first}"
        [limits]
        io = "2M"
        """
    )
    running = run(str(tmp_path / "limited.toml"))
    running.screen.expect("GUEST READY")
    limits = Path(info("limited")["cgroup"], "io.max")

    def limited() -> dict[str, str]:
        return dict(line.split(" ", 1) for line in limits.read_text().splitlines())

    words = f"rbps={2 << 20} wbps={2 << 20} riops=max wiops=max"
    assert limited() == {device_number(first): words}
    assert done("vm", "add-disk", "limited", f"{second},cache=none") == "disk1"
    assert limited() == {device_number(first): words, device_number(second): words}
    # tmpfs lies on none; what is refused is not plugged in.
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    refused = vdev("vm", "add-disk", "limited", str(tmp_path / "file"))
    assert refused.returncode == 2
    assert f"I/O limit of {tmp_path / 'file'}: it lies on no block device" in refused.stderr
    assert done("vm", "add-disk", "limited", "null:1M") == "disk2"
    assert running.shell(
        "until [ -b /dev/vdc ]; do :; done; dd if=/dev/vdb bs=64k count=4 iflag=direct 2>&1 "
        ">/dev/null | grep -c '4+0 records out'"
    ).endswith("1")
    running.type("poweroff -f\n")
    said = running.end()
    assert running.process.wait() == 0, said


@pytest.mark.long
def test_what_a_kill_leaves_is_in_nobodys_way(
    configure: Callable[..., str], run: Callable[..., Running], tmp_path: Path
) -> None:
    """With a shared folder, whose server is a child, and a disk that another process serves."""
    (tmp_path / "share").mkdir()
    (tmp_path / "share/file").write_text("shared")
    served = f"{tmp_path}/served"
    (tmp_path / "served.toml").write_text(
        """
        [[blk]]
        socket = "served"
        image = "null:1M"
        [[net]]
        socket = "card"
        bridge = "vdev-served"
        """
    )
    with subprocess.Popen([*VDEV, "serve", str(tmp_path / "served.toml")]) as server:
        while not Path(served).exists() or not (tmp_path / "card").exists():
            assert server.poll() is None
            select.select([], [], [], 0.01)
        try:
            config = configure(
                "confined",
                f"""
                [[share]]
                directory = "share"
                tag = "it"
                [[vhost_user]]
                socket = "{served}"
                kind = "blk"
                """,
            )
            before = {path.name for path in Path("/tmp").glob("vdev-*")}
            running = run(config)
            pid = running.process.pid
            running.screen.expect("GUEST READY")
            assert running.shell("mount -t virtiofs it /mnt && cat /mnt/file") == "shared"
            assert running.shell("cat /sys/block/vdb/size") == "2048"
            assert done("vm", "add-nic", "confined", f"bridge={OTHER_BRIDGE}") == "nic1"
            assert done("vm", "add-nic", "confined", f"socket={tmp_path}/card,mac={MAC}") == "nic2"
            running.shell(f"until grep -qs {MAC} /sys/class/net/eth2/address; do :; done")
            group = Path(info("confined")["cgroup"])
            children = children_of(pid)
            assert len(children) == 3  # keeper, dialer, virtiofsd
            socket = find_machine("confined")
            assert socket is not None

            os.kill(pid, signal.SIGKILL)
            running.process.wait()
            for child in children:
                wait_for_end(child)
            assert not Path(f"/sys/class/net/{BRIDGE}").exists()
            assert not Path(f"/sys/class/net/{OTHER_BRIDGE}").exists()
            assert not socket.exists()
            assert not group.exists()
            assert {path.name for path in Path("/tmp").glob("vdev-*")} <= before

            again = run(config, "--loop", "asyncio")
            again.screen.expect("GUEST READY")
            assert again.shell("mount -t virtiofs it /mnt && cat /mnt/file") == "shared"
            os.kill(again.process.pid, signal.SIGTERM)
            said = again.end()
            assert again.process.wait() == 0, said
            assert "Traceback" not in said
            assert not Path(f"/sys/class/net/{BRIDGE}").exists()
        finally:
            server.terminate()
