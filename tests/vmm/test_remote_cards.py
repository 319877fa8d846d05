"""Network cards that another process serves: what they are to the guest is the machine's to say."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from unittest import mock

import pytest

from tests.protocol.fake_backend import FEATURES, PROTOCOL, FakeBackend
from tests.vmm.snapshots import machine_in, without_kvm
from vdev._native import lib
from vdev.errors import NotSupported, UserError
from vdev.iothread import IOThread
from vdev.registers import PIO
from vdev.virtio.queue import QueueConfig
from vdev.vmm.acpi.registers import Register
from vdev.vmm.config import MachineConfig, NicConfig
from vdev.vmm.layout import HOTPLUG_PORT, MIB
from vdev.vmm.machine import Machine
from vdev.vmm.parts import Maker
from vdev.vmm.plugs import Plugged
from vdev.vmm.ram import Ram
from vdev.vmm.sandbox import SandboxReport
from vdev.vmm.snapshot import Snapshot, config_of, read

MAC = "52:54:00:0a:0b:0c"
BYTES = bytes.fromhex("5254000a0b0c")
F_MAC, F_MTU = 1 << lib.VIRTIO_NET_F_MAC, 1 << lib.VIRTIO_NET_F_MTU
PAIRS = FEATURES | 1 << lib.VIRTIO_NET_F_MQ | 1 << lib.VIRTIO_NET_F_CTRL_VQ
NO_CONFIG = PROTOCOL & ~(1 << lib.VHOST_USER_PROTOCOL_F_CONFIG)


SANDBOX = SandboxReport(
    user="1:1",
    namespaces=(),
    own_root=True,
    landlock=1,
    seccomp=True,
    families=("unix",),
    kept=(),
    degraded=(),
)


@contextlib.asynccontextmanager
async def made() -> AsyncIterator[tuple[Maker, contextlib.AsyncExitStack]]:
    ram, thread = Ram(32 * MIB), IOThread(poll_us=0, io_uring=False)
    thread.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(ram.close)
        stack.push_async_callback(thread.close)
        yield Maker([thread], ram), stack


@pytest.mark.parametrize("protocol", [PROTOCOL, NO_CONFIG])
async def test_its_address_is_the_machines(tmp_path: Path, protocol: int) -> None:
    """Whether the back-end has a space of its own or none; it is not told of the feature."""
    path = tmp_path / "s"
    with FakeBackend(path, protocol=protocol, features=FEATURES | F_MTU) as back_end:
        async with made() as (maker, stack):
            card = await maker.nic(NicConfig(socket=str(path), mac=MAC, id="lan"), stack)
            assert card.config()[:6] == BYTES
            assert card.features & F_MAC
            has_space = protocol == PROTOCOL
            assert bool(card.features & F_MTU) == has_space
            if has_space:
                assert card.config()[6:12] == bytes(back_end.space[6:12])
            else:
                assert card.config()[6] & lib.VIRTIO_NET_S_LINK_UP
            card.negotiate(1 << lib.VIRTIO_F_VERSION_1 | F_MAC)
            ring = QueueConfig(0, 8, 1 << lib.VIRTIO_F_VERSION_1, 0x1000, 0x2000, 0x3000)
            await (await card.start_queue(ring, maker.ram.memory)).stop()
            assert back_end.accepted & 1 << lib.VIRTIO_F_VERSION_1
            assert not back_end.accepted & F_MAC


async def test_the_machine_serves_the_control_queue(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with FakeBackend(path, features=PAIRS):
        async with made() as (maker, stack):
            nic = NicConfig(socket=str(path), mac=MAC, id="lan", queues=1)
            card = await maker.nic(nic, stack)
            assert card.num_queues == 3
            card.negotiate(1 << lib.VIRTIO_F_VERSION_1 | 1 << lib.VIRTIO_NET_F_CTRL_VQ)
            ring = QueueConfig(2, 8, 1 << lib.VIRTIO_F_VERSION_1, 0x1000, 0x2000, 0x3000)
            assert await (await card.start_queue(ring, maker.ram.memory)).stop() == 0


async def test_ram_that_nobody_else_can_have_is_said(tmp_path: Path) -> None:
    """A machine that went on from a snapshot without such devices."""
    path = tmp_path / "s"
    with without_kvm(), FakeBackend(path) as back_end:
        (tmp_path / "m").mkdir()
        snapshot = await snapshot_of(machine_in(tmp_path / "m"), tmp_path)
        async with Machine(config_of(snapshot), snapshot) as machine:
            await machine.start()
            before = [plugged.id for plugged in machine._board.plugs]
            with pytest.raises(UserError, match="went on from a snapshot") as raised:
                await machine.add_nic(NicConfig(socket=str(path)))
            assert str(raised.value).startswith(f"nic0: {path}: no other process can have the RAM")
            assert "\n" not in str(raised.value)
            assert [plugged.id for plugged in machine._board.plugs] == before
        assert back_end.connections == 0


async def test_the_verb_for_a_cable(tmp_path: Path) -> None:
    """Of a card that another process serves the cable is that one's."""
    path = tmp_path / "s"
    (tmp_path / "m").mkdir()
    nics = (NicConfig(socket=str(path), id="lan"),)
    with without_kvm(), FakeBackend(path):
        async with Machine(machine_in(tmp_path / "m", nics=nics)) as machine:
            await machine.start()
            with pytest.raises(UserError, match="this machine has"):
                await machine.set_link("wan", False)
            with pytest.raises(NotSupported, match="no cable here"):
                await machine.set_link("lan", False)
            pulled: list[bool] = []
            with mock.patch.object(card_of(machine).device, "set_link", pulled.append):
                await machine.set_link("lan", False)
            assert pulled == [False]
            gone = OSError(errno.EBADFD, "gone")
            with (
                mock.patch.object(card_of(machine).device, "set_link", side_effect=gone),
                pytest.raises(UserError, match="its tap: gone"),
            ):
                await machine.set_link("lan", True)


async def snapshot_of(config: MachineConfig, place: Path) -> Snapshot:
    async with Machine(config) as machine:
        await machine.start()
        await machine.snapshot(str(place / "snapshot"))
    return read(str(place / "snapshot"))


async def let_go(machine: Machine, slot: int) -> None:
    """As the guest does, which was asked to."""
    await machine._board._bus.access(PIO, HOTPLUG_PORT + Register.EJECT, 4, 1 << slot)


def card_of(machine: Machine) -> Plugged:
    return machine._board.plugs.find("lan")


@pytest.mark.parametrize("confined", [False, True])
async def test_a_clones_card_has_an_address_of_its_own(tmp_path: Path, confined: bool) -> None:
    """The driver, which knows the old one, has it taken away and finds it anew; the connection to
    the back-end stays, since a confined machine could make no other."""
    path = tmp_path / "s"
    (tmp_path / "m").mkdir()
    nics = (NicConfig(socket=str(path), id="lan"),)
    with without_kvm():
        with FakeBackend(path):
            snapshot = await snapshot_of(machine_in(tmp_path / "m", nics=nics), tmp_path)
        path.unlink()
        with FakeBackend(path) as back_end:
            config = config_of(snapshot, clone=True, name="clone", disks=str(tmp_path / "disks"))
            async with Machine(config, snapshot) as machine:
                if confined:
                    machine.sandbox = SANDBOX
                await machine.start()
                before = card_of(machine)
                assert machine._board.power.events.read("requested") == 1 << before.slot
                await let_go(machine, before.slot)
                after = card_of(machine)
                assert after.function is not before.function
                assert after.device is before.device
                assert machine._board.power.events.read("inserted") == 1 << after.slot
                own = bytes.fromhex(str(config.nics[0].mac).replace(":", ""))
                assert after.device.config()[:6] == own
                assert config.nics[0].mac != snapshot.config.nics[0].mac
                # The next time it goes for good.
                await let_go(machine, after.slot)
                assert "lan" not in [plugged.id for plugged in machine._board.plugs]
            assert back_end.connections == 1


async def test_a_card_that_is_removed_before_it_is_renewed_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    (tmp_path / "m").mkdir()
    nics = (NicConfig(socket=str(path), id="lan"),)
    with without_kvm():
        with FakeBackend(path):
            snapshot = await snapshot_of(machine_in(tmp_path / "m", nics=nics), tmp_path)
        path.unlink()
        with FakeBackend(path):
            config = config_of(snapshot, clone=True, name="clone", disks=str(tmp_path / "disks"))
            async with Machine(config, snapshot) as machine:
                await machine.start()
                slot = card_of(machine).slot
                removing = asyncio.ensure_future(machine.remove("lan"))
                await asyncio.sleep(0)
                await let_go(machine, slot)
                await removing
                assert "lan" not in [plugged.id for plugged in machine._board.plugs]
