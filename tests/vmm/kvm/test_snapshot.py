"""Guests under load stop in one machine and go on in another, as often as one likes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import socket
import struct
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.innermost import Material
from tests.lab.process import run
from tests.vmm.kvm.guest import GUARD, MIB, Guest, booted, config_of, eventually, within
from vdev.errors import UserError
from vdev.vmm.api import End, Outcome, State
from vdev.vmm.config import DiskConfig, MachineConfig, NicConfig
from vdev.vmm.machine import Machine
from vdev.vmm.snapshot import Snapshot, read
from vdev.vmm.snapshot import config_of as next_config

# Boots and restores of machines in an emulated one.
pytestmark = pytest.mark.timeout(1800)

PORT = 7777
BLOCK = 256 << 10
SLOTS = 16
SERVER, GUEST = "10.77.3.1", "10.77.3.2"
BRIDGE = "vdev-snap"
_BYTES_RECEIVED = 128
"""Where struct tcp_info has them (linux/tcp.h)."""

_WRITER = f"""
mkdir -p /run/sums; n=0
while [ ! -e /run/enough ]; do
    n=$((n + 1)); slot=$(($1 + n % {SLOTS}))
    yes "$1 $n" | head -c {BLOCK} >/run/block$1
    rm -f /run/sums/$slot
    dd if=/run/block$1 of=/dev/vda bs={BLOCK} seek=$slot oflag=direct conv=notrunc
    sha256sum </run/block$1 >/run/sum$1; mv /run/sum$1 /run/sums/$slot
    echo $n >/run/rounds$1
done
touch /run/ended$1
"""
_LINES = "i=0; while true; do i=$((i + 1)); echo line $i; sleep 0.1; done"
_TICKS = "i=0; while true; do i=$((i + 1)); echo $i >/run/ticks; sleep 0.2; done"
_SUMS = "cd /run/sums; for s in *; do echo $s $(cut -c1-64 $s); done"


class LineServer:
    """Takes one connection at a time, whose lines it keeps and sends back."""

    def __init__(self, address: str) -> None:
        self.lines: list[str] = []
        self.connections = 0
        self._connection: socket.socket | None = None
        self._kept = 0
        self._news = threading.Condition()
        self._listening = socket.create_server((address, PORT), reuse_port=True)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            self._connection, self._kept = connection, 0
            with (
                contextlib.suppress(OSError),
                connection,
                connection.makefile("rwb", buffering=0) as stream,
            ):
                for line in stream:
                    with self._news:
                        self.lines.append(line.decode().strip())
                        self._kept += len(line)
                        self._news.notify_all()
                    stream.write(line)

    def keep_all(self) -> None:
        """Returns when all that the kernel has received by the present connection is kept."""
        assert self._connection is not None
        info = self._connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        (received,) = struct.unpack_from("Q", info, _BYTES_RECEIVED)
        with self._news:
            assert self._news.wait_for(lambda: self._kept >= received, GUARD)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture(scope="module")
def server() -> Iterator[LineServer]:
    """On a bridge of this host's, which outlives the machines on it."""
    ip("link", "add", BRIDGE, "type", "bridge")
    try:
        ip("address", "add", f"{SERVER}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        server = LineServer(SERVER)
        yield server
        server.close()
    finally:
        ip("link", "del", BRIDGE)


def balloon_of(machine: Machine) -> tuple[int, int]:
    """How large the balloon should be, and is, in bytes."""
    (balloon,) = (d for d in machine.info()["devices"] if d["id"] == "balloon")
    return balloon["target"], balloon["actual"]


def file_of(path: Path, size: int) -> str:
    with path.open("wb") as file:
        file.truncate(size)
    return str(path)


@contextlib.asynccontextmanager
async def going_on(snapshot: Snapshot, config: MachineConfig) -> AsyncIterator[Guest]:
    """The guest of a snapshot, whose shell waits for commands."""
    async with Machine(config, snapshot) as machine:
        guest = Guest(machine)
        watching = asyncio.ensure_future(guest.watch())
        try:
            await machine.start()
            yield guest
        except Exception as error:
            said = bytes(guest.said[-4000:]).decode(errors="replace").replace("\r", "")
            error.add_note(f"state: {machine.info()}\nthe end of its console:\n{said}")
            raise
        finally:
            await machine.stop()
            await watching


async def number(guest: Guest, command: str) -> float:
    return float((await guest.sh(command)).split()[0])


async def rises(guest: Guest, file: str) -> None:
    """Something in the guest goes on counting."""
    before = int(await number(guest, f"cat {file}"))
    await guest.sh(f"until [ $(cat {file}) -gt {before} ]; do sleep 0.05; done")


async def checked_disk(guest: Guest) -> dict[int, str]:
    """Has the writers end; slot → checksum of what they wrote, which is what the disk has."""
    await guest.sh(
        "touch /run/enough; for rounds in /run/rounds*; do"
        " until [ -e /run/ended${rounds#/run/rounds} ]; do sleep 0.1; done; done"
    )
    sums = dict(line.split() for line in (await guest.sh(_SUMS)).splitlines())
    assert sums
    for slot, known in sums.items():
        found = await guest.sh(
            f"dd if=/dev/vda bs={BLOCK} skip={slot} count=1 iflag=direct 2>/dev/null | sha256sum"
        )
        assert found.split()[0] == known, f"slot {slot}"
    return {int(slot): known for slot, known in sums.items()}


def check_host_disk(path: Path, sums: dict[int, str]) -> None:
    with path.open("rb") as disk:
        for slot, known in sums.items():
            disk.seek(slot * BLOCK)
            assert hashlib.sha256(disk.read(BLOCK)).hexdigest() == known, f"slot {slot}"


@dataclass(frozen=True)
class Taken:
    """A snapshot, and what the guest and its peer had seen by then."""

    directory: Path
    uptime: float
    date: float
    lines: int
    """That had come to the server when the guest stood still."""


async def _take(material: Material, place: Path, server: LineServer) -> Taken:
    config = config_of(
        material.generic,
        name="snap",
        cpus=2,
        console="virtio",
        balloon=True,
        disks=(DiskConfig(file_of(place / "disk", 64 * MIB), queues=2),),
        nics=(NicConfig(bridge=BRIDGE),),
    )
    async with booted(config) as guest:
        machine = guest.machine
        await guest.sh(f"ip link set eth0 up; ip addr add {GUEST}/24 dev eth0; ping -c1 {SERVER}")
        await machine.add_disk(DiskConfig(file_of(place / "plugged", 8 * MIB), id="plugged"))
        await guest.sh("until [ -b /dev/vdb ]; do sleep 0.1; done")
        await guest.sh("echo by hot-plug | dd of=/dev/vdb conv=fsync 2>/dev/null")
        await machine.set_balloon(32 * MIB)
        await eventually(
            lambda: balloon_of(machine) == (32 * MIB, 32 * MIB), "the balloon does not grow"
        )
        await guest.sh(f"cat >/run/writer <<'END'\n{_WRITER}END\n")
        for first in (0, SLOTS):
            await guest.sh(f"sh /run/writer {first} >/dev/null 2>&1 &")
        await guest.sh(f"({_LINES}) | nc {SERVER} {PORT} >/run/echo 2>/dev/null & echo $! >/run/nc")
        await guest.sh(f"({_TICKS}) >/dev/null 2>&1 &")
        await guest.sh("until [ -s /run/echo ]; do sleep 0.1; done")
        for file in ("/run/rounds0", f"/run/rounds{SLOTS}"):
            await guest.sh(f"until [ -s {file} ]; do sleep 0.1; done")
        uptime = await number(guest, "cat /proc/uptime")
        date = await number(guest, "date +%s")
        await machine.pause()
        await machine.snapshot(str(place / "snapshot"))
        await asyncio.to_thread(server.keep_all)
        lines = len(server.lines)
        assert machine.state is State.PAUSED
    return Taken(place / "snapshot", uptime, date, lines)


@pytest.fixture(scope="module")
def taken(
    material: Material, tmp_path_factory: pytest.TempPathFactory, server: LineServer
) -> Taken:
    """One boot for all; the machine ends where the snapshot was taken."""
    return asyncio.run(_take(material, tmp_path_factory.mktemp("taken"), server))


async def test_everything_goes_on(taken: Taken, server: LineServer, tmp_path: Path) -> None:
    """The first to go on from it: the server's connection is still where it was."""
    snapshot = read(str(taken.directory))
    assert snapshot.memory.stat().st_blocks * 512 < snapshot.config.memory
    assert set(snapshot.disks) == {"disk0", "plugged"}
    config = next_config(snapshot, disks=str(tmp_path))
    connections = server.connections
    async with going_on(snapshot, config) as guest:
        uptime = await number(guest, "cat /proc/uptime")
        assert taken.uptime <= uptime < taken.uptime + 60
        assert await number(guest, "date +%s") >= taken.date
        await rises(guest, "/run/ticks")
        await rises(guest, "/run/rounds0")
        await rises(guest, f"/run/rounds{SLOTS}")

        await eventually(
            lambda: len(server.lines) > taken.lines + 10, "the connection does not go on"
        )
        assert server.connections == connections
        assert server.lines == [f"line {n + 1}" for n in range(len(server.lines))]
        await guest.sh(f"until grep -qx 'line {taken.lines + 5}' /run/echo; do sleep 0.1; done")
        echoed = (await guest.sh("head -n 40 /run/echo")).splitlines()
        assert echoed == server.lines[: len(echoed)]

        assert "reseeded due to virtual machine fork" in await guest.sh("dmesg | grep crng")
        assert (await guest.sh("head -c 32 /dev/hwrng | wc -c")).strip() == "32"
        assert await guest.sh("head -n 1 /dev/vdb") == "by hot-plug\n"
        assert (await guest.sh("nproc")).strip() == "2"

        assert balloon_of(guest.machine) == (32 * MIB, 32 * MIB)
        await guest.machine.set_balloon(0)
        await eventually(
            lambda: balloon_of(guest.machine) == (0, 0), "the balloon does not become smaller"
        )

        sums = await checked_disk(guest)
        assert await guest.power_off() == Outcome(End.SHUTDOWN)
    check_host_disk(tmp_path / "disk0", sums)


@pytest.mark.long
async def test_it_is_rolled_back_and_taken_again(taken: Taken, tmp_path: Path) -> None:
    """Twice from one, and from one that went on from there; and one that cannot be written."""
    snapshot = read(str(taken.directory))
    config = next_config(snapshot, disks=str(tmp_path / "disks"))
    again = tmp_path / "again"
    async with going_on(snapshot, config) as guest:
        await guest.sh("kill $(cat /run/nc); echo later >/run/later")
        await guest.sh("echo later | dd of=/dev/vdb conv=fsync 2>/dev/null")
        small = tmp_path / "small"
        small.mkdir()
        await run("mount", "-t", "tmpfs", "-o", "size=4m", "none", small)
        try:
            with pytest.raises(UserError, match="No space left on device"):
                await guest.machine.snapshot(str(small / "full"))
            assert list(small.iterdir()) == []
        finally:
            await run("umount", small)
        assert guest.machine.state is State.RUNNING
        await rises(guest, "/run/rounds0")
        await guest.machine.snapshot(str(again))
        await rises(guest, "/run/rounds0")
    async with going_on(snapshot, config) as guest:
        await guest.sh("kill $(cat /run/nc); test ! -e /run/later")
        assert await guest.sh("head -n 1 /dev/vdb") == "by hot-plug\n"
        await checked_disk(guest)
    second = read(str(again))
    assert second.memory.stat().st_blocks * 512 < config.memory
    async with going_on(second, next_config(second)) as guest:
        assert await guest.sh("cat /run/later; head -n 1 /dev/vdb") == "later\nlater\n"
        await rises(guest, "/run/ticks")
        sums = await checked_disk(guest)
        assert await guest.power_off() == Outcome(End.SHUTDOWN)
    check_host_disk(tmp_path / "disks/disk0", sums)


def mapped(file: Path, field: str) -> int:
    """Bytes of all mappings of a file in this process, as smaps counts them."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-", line):
            ours = line.endswith(str(file))
        elif ours and line.startswith(f"{field}:"):
            found += int(line.split()[1]) << 10
    return found


@pytest.mark.long
async def test_two_clones_live_side_by_side(taken: Taken, tmp_path: Path) -> None:
    snapshot = read(str(taken.directory))
    configs = [
        next_config(snapshot, name=name, disks=str(tmp_path / name), clone=True)
        for name in ("one", "other")
    ]
    (source,) = (nic.mac for nic in snapshot.config.nics)
    async with contextlib.AsyncExitStack() as stack:
        guests = [await stack.enter_async_context(going_on(snapshot, config)) for config in configs]
        macs = {source}
        for at, (guest, config) in enumerate(zip(guests, configs, strict=True)):
            (mac,) = (nic.mac for nic in config.nics)
            macs.add(mac)
            await guest.sh(
                f"kill $(cat /run/nc);"
                f" until grep -q {mac} /sys/class/net/*/address; do sleep 0.1; done"
            )
            card = (await guest.sh(f"grep -l {mac} /sys/class/net/*/address")).split("/")[4]
            assert str(source) not in await guest.sh("cat /sys/class/net/*/address")
            await guest.sh(f"ip link set {card} up; ip addr add 10.77.3.{10 + at}/24 dev {card}")
            await guest.sh(f"ping -c 1 {SERVER}")
        assert len(macs) == 3
        await guests[0].sh("ping -c 1 10.77.3.11")
        randoms = [await guest.sh("head -c 16 /dev/urandom | base64") for guest in guests]
        assert randoms[0] != randoms[1]
        for guest in guests:
            assert "virtual machine fork" in await guest.sh("dmesg | grep crng")
        shared, apart = mapped(snapshot.memory, "Rss"), mapped(snapshot.memory, "Anonymous")
        # What neither has written is there once for both, and what they wrote is a small part.
        of_file = shared - apart
        assert mapped(snapshot.memory, "Pss") - apart < 0.7 * of_file
        assert apart < snapshot.config.memory // 2
        sums = [await checked_disk(guest) for guest in guests]
        await guests[0].sh("echo one | dd of=/dev/vdb conv=fsync 2>/dev/null")
        assert await guests[1].sh("head -n 1 /dev/vdb") == "by hot-plug\n"
        for guest in guests:
            assert await guest.power_off() == Outcome(End.SHUTDOWN)
    for config, known in zip(configs, sums, strict=True):
        check_host_disk(Path(config.disks[0].path), known)
    assert read(str(taken.directory)).state == snapshot.state


@pytest.mark.long
async def test_a_guest_on_mmio_goes_on(material: Material, tmp_path: Path) -> None:
    config = config_of(
        material.cloud,
        name="snap",
        transport="mmio",
        disks=(DiskConfig(file_of(tmp_path / "disk", 64 * MIB)),),
    )
    async with booted(config) as guest:
        await guest.sh(f"cat >/run/writer <<'END'\n{_WRITER}END\n")
        await guest.sh("sh /run/writer 0 >/dev/null 2>&1 &")
        await guest.sh(f"({_TICKS}) >/dev/null 2>&1 &")
        await guest.sh("until [ -s /run/rounds0 ]; do sleep 0.1; done")
        await within(guest.machine.snapshot(str(tmp_path / "snapshot")), "it is not written")
        await rises(guest, "/run/rounds0")
    snapshot = read(str(tmp_path / "snapshot"))
    async with going_on(snapshot, next_config(snapshot)) as guest:
        await rises(guest, "/run/ticks")
        await rises(guest, "/run/rounds0")
        sums = await checked_disk(guest)
        assert guest.machine.config.disks == config.disks
        assert await guest.power_off() == Outcome(End.SHUTDOWN)
    check_host_disk(tmp_path / "disk", sums)
