"""The other devices in a guest: console, network, entropy, balloon, shared folders, back-ends."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.innermost import Material
from tests.lab.process import run, running
from tests.vmm.kvm.guest import MIB, booted, config_of, eventually, within
from vdev.vmm.api import State
from vdev.vmm.config import DiskConfig, NicConfig, ShareConfig, VhostUserConfig


@pytest.mark.long
@pytest.mark.parametrize(("console", "flood"), [("serial", 100_000), ("virtio", 1_500_000)])
async def test_the_console_carries_bytes_unharmed(
    material: Material, console: str, flood: int
) -> None:
    async with booted(config_of(material.generic, console=console, cpus=2)) as guest:
        machine = guest.machine
        # On a virtio console Linux takes ^O for its magic key, in raw mode, too.
        typed = os.urandom(10_000).replace(b"\x0f", b"O")
        await guest.type(
            b"stty raw; echo GO; head -c 10000 </dev/console >/run/typed; "
            b"stty -raw -echo -onlcr; echo BACK\n"
        )
        await guest.until(b"GO\n")
        await guest.type(typed)
        await guest.until(b"BACK\n")
        assert (await guest.sh("sha256sum </run/typed")).split()[0] == hashlib.sha256(
            typed
        ).hexdigest()

        machine.console.resize(132, 50)
        if console == "virtio":
            size = "$(stty size </dev/console)"
            await guest.sh(f'until [ "{size}" = "50 132" ]; do sleep 0.1; done')

        flooding = asyncio.ensure_future(guest.sh(f"head -c {flood} /dev/zero | tr '\\0' x"))
        for _ in range(3):
            await within(machine.pause(), "it does not stand still")
            assert machine.state is State.PAUSED
            await machine.resume()
            await asyncio.sleep(0.1)
        said = await flooding
        dropped = machine.counters()["serial"]["dropped"]
        assert said.strip("x") == ""
        assert len(said) + dropped == flood


@pytest.fixture
async def bridge() -> AsyncIterator[str]:
    """A bridge on this host with the address 10.77.0.1/24."""
    await run("ip", "link", "add", "vt-bridge", "type", "bridge")
    try:
        await run("ip", "address", "add", "10.77.0.1/24", "dev", "vt-bridge")
        await run("ip", "link", "set", "vt-bridge", "up")
        yield "vt-bridge"
    finally:
        await run("ip", "link", "del", "vt-bridge")


@contextlib.asynccontextmanager
async def _echo() -> AsyncIterator[int]:
    """A server that sends back what it gets; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "10.77.0.1")
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize("transport", ["pci", pytest.param("mmio", marks=pytest.mark.long)])
async def test_the_network(
    material: Material, tools: Path, tmp_path: Path, bridge: str, transport: str
) -> None:
    config = config_of(
        material.generic,
        transport=transport,
        cpus=2,
        nics=(NicConfig(bridge=bridge, id="lan"),),
        disks=(DiskConfig(str(tools), read_only=True),),
    )
    async with booted(config) as guest, _echo() as port:
        sh = guest.sh
        assert (await sh("cat /sys/class/net/eth0/address")).strip() == config.nics[0].mac
        await sh("ip address add 10.77.0.2/24 dev eth0; ip link set eth0 up")
        await sh("ping -c 3 -i 0.2 10.77.0.1")
        await run("ping", "-c", "3", "-i", "0.2", "10.77.0.2")

        await sh("mkdir /tools; mount -t ext4 -o ro,noload /dev/vda /tools")
        await sh("for d in dev proc sys tmp; do mount --bind /$d /tools/$d; done")
        await sh("head -c 6000001 /dev/urandom >/run/data")
        await sh(f"nc 10.77.0.1 {port} </run/data >/run/back && cmp /run/data /run/back")

        iperf = ("iperf3", "--server", "--bind", "10.77.0.1", "--forceflush")
        async with running("iperf3", iperf, tmp_path / "log", pipe=True) as server:
            await server.line_with("listening")
            client = "chroot /tools iperf3 -c 10.77.0.1 -n 24M -P 2 -J"
            for direction, at_least in (("", "sum_sent"), (" -R", "sum_received")):
                report: dict[str, Any] = json.loads(await sh(client + direction))
                assert report["end"][at_least]["bytes"] >= 24 * MIB, report["end"]
        counters = guest.machine.counters()["devices"]["lan"]
        assert counters["total"]["packets"] > 1000, counters


@pytest.mark.long
async def test_a_card_of_two_queue_pairs(material: Material, tools: Path, bridge: str) -> None:
    """Both carry traffic, each way; with one pair switched off the other carries it all."""
    config = config_of(
        material.generic,
        cpus=2,
        nics=(NicConfig(bridge=bridge, queues=2, id="lan"),),
        disks=(DiskConfig(str(tools), read_only=True),),
    )
    async with booted(config) as guest, _echo() as port:
        sh = guest.sh

        def moved() -> list[int]:
            """Packets by queue: received and sent by the first pair, then by the second."""
            queues = guest.machine.counters()["devices"]["lan"]["queues"]
            return [queue["packets"] for queue in queues]

        await sh("mkdir /tools; mount -t ext4 -o ro,noload /dev/vda /tools")
        await sh("for d in dev proc sys; do mount --bind /$d /tools/$d; done")
        await sh("ip address add 10.77.0.2/24 dev eth0; ip link set eth0 up; ping -c 1 10.77.0.1")
        await sh("head -c 1000001 /dev/urandom >/run/data")
        # The driver sends by the queue of its processor, the tap answers by that of the flow.
        transfer = (
            f"for cpu in 1 2; do (taskset $cpu nc 10.77.0.1 {port} </run/data >/run/back$cpu) & "
            "done; wait; cmp /run/data /run/back1 && cmp /run/data /run/back2"
        )
        await sh(transfer)
        # A segment has 64 KiB at most.
        assert all(packets >= 16 for packets in moved()), moved()

        await sh("chroot /tools /usr/sbin/ethtool -L eth0 combined 1")
        before = moved()
        await sh(transfer)
        gone = [now - then for now, then in zip(moved(), before, strict=True)]
        assert min(gone[:2]) >= 32, gone
        assert gone[2:] == [0, 0], gone

        await sh("chroot /tools /usr/sbin/ethtool -L eth0 combined 2")
        before = moved()
        await sh(transfer)
        assert all(now > then for now, then in zip(moved(), before, strict=True)), moved()
        await guest.reset()
        await sh("ip address add 10.77.0.2/24 dev eth0; ip link set eth0 up; ping -c 1 10.77.0.1")


@pytest.mark.long
async def test_entropy_and_balloon(material: Material) -> None:
    async with booted(config_of(material.generic, balloon=True, cpus=2)) as guest:
        machine = guest.machine
        assert (await guest.sh("cat /sys/class/misc/hw_random/rng_current")).startswith("virtio")
        numbers = await guest.sh("for n in 1 2; do head -c 32 /dev/hwrng | sha256sum; done")
        assert len(set(numbers.split())) == 3, numbers

        def balloon() -> dict[str, Any]:
            return next(d for d in machine.info()["devices"] if d["id"] == "balloon")

        free = "awk '/MemFree/ { print $2 * 1024 }' /proc/meminfo"
        await guest.sh("head -c 100000000 /dev/urandom >/run/fill")
        filled = machine.info()["resident"]
        assert filled > 100 * 10**6
        # What the guest frees, it reports: its host has it back without asking.
        await guest.sh("rm /run/fill")
        await eventually(
            lambda: machine.info()["resident"] < filled - 70 * MIB, "free pages are not reported"
        )

        before = int(await guest.sh(free))
        await machine.set_balloon(64 * MIB)
        await eventually(lambda: balloon()["actual"] == 64 * MIB, "the balloon does not grow")
        assert int(await guest.sh(free)) < before - 40 * MIB
        await machine.set_balloon(0)
        await eventually(lambda: balloon()["actual"] == 0, "the balloon does not shrink")
        assert int(await guest.sh(free)) > before - 40 * MIB
        await guest.sh("head -c 100000000 /dev/zero >/run/fill")
        assert (await guest.sh("tr -d '\\0' </run/fill | wc -c")).strip() == "0"


@pytest.mark.long
@pytest.mark.parametrize("transport", ["pci", "mmio"])
async def test_a_folder_is_shared(material: Material, tmp_path: Path, transport: str) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "from-host").write_bytes(os.urandom(300_000))
    digest = hashlib.sha256((folder / "from-host").read_bytes()).hexdigest()
    config = config_of(
        material.generic, transport=transport, shares=(ShareConfig(str(folder), "docs"),)
    )
    async with booted(config) as guest:
        for _ in range(2):
            await guest.sh("mount -t virtiofs docs /mnt")
            assert (await guest.sh("sha256sum </mnt/from-host")).split()[0] == digest
            await guest.sh("mkdir -p /mnt/made; cp /mnt/from-host /mnt/made/in-guest; sync")
            copied = (folder / "made/in-guest").read_bytes()
            assert hashlib.sha256(copied).hexdigest() == digest
            (folder / "made/in-guest").unlink()
            await guest.sh("umount /mnt")
            await guest.reset()


@pytest.mark.long
@pytest.mark.parametrize("backend", ["vdev", "qemu-storage-daemon"])
async def test_disks_of_other_processes(material: Material, tmp_path: Path, backend: str) -> None:
    image, socket = tmp_path / "image", tmp_path / "socket"
    image.write_bytes(bytes(32 * MIB))
    vdev = (sys.executable, "-m", "vdev", "blk", "serve")
    command = {
        "vdev": (*vdev, "--socket-path", socket, "--blk-file", image, "--num-queues", "2"),
        "qemu-storage-daemon": (
            *("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=disk,filename={image}"),
            "--export",
            f"type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,"
            f"addr.type=unix,addr.path={socket}",
        ),
    }[backend]
    async with running(backend, command, tmp_path / "log"):
        await eventually(socket.exists, f"{backend} does not listen")
        other = VhostUserConfig(str(socket), "blk", queues=2)
        async with booted(config_of(material.generic, cpus=2, vhost_user=(other,))) as guest:
            for _ in range(2):
                await guest.sh("head -c 8388608 /dev/urandom >/run/data")
                await guest.sh("dd if=/run/data of=/dev/vda bs=64k oflag=direct; sync")
                await guest.sh("dd if=/dev/vda of=/run/back bs=64k count=128 iflag=direct")
                await guest.sh("cmp /run/data /run/back")
                digest = (await guest.sh("sha256sum </run/data")).split()[0]
                assert hashlib.sha256(image.read_bytes()[: 8 * MIB]).hexdigest() == digest
                # The back-end is there for the next boot, too.
                await guest.reset()
