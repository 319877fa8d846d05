"""The state of a machine out of a snapshot by somebody else: it fits, or its user hears why not.

The machines have all but KVM.
"""

from __future__ import annotations

import asyncio
import copy
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vmm.rig import held
from tests.vmm.snapshots import Vm, contents, machine_in, mutate, rewrite_state, without_kvm
from vdev.errors import UserError
from vdev.virtio.mmio import MmioTransport
from vdev.virtio.pci import PciTransport
from vdev.virtio.transport import Transport
from vdev.vmm.api import State
from vdev.vmm.config import NicConfig, VsockConfig
from vdev.vmm.devices.rng import RngDevice
from vdev.vmm.layout import GED_GSI
from vdev.vmm.machine import Machine
from vdev.vmm.snapshot import Snapshot, config_of, read

LIVE = 1 | 2 | 4 | 8


@pytest.fixture(autouse=True)
def _no_kvm() -> Iterator[None]:
    with without_kvm():
        yield


async def come_alive(transport: Transport) -> None:
    """As a driver does, which then waits; its rings are empty."""
    assert isinstance(transport, PciTransport | MmioTransport)
    pci = isinstance(transport, PciTransport)
    registers = transport.common if isinstance(transport, PciTransport) else transport.window
    registers.write("driver_feature" if pci else "driver_features", 1, 1)
    for queue in range(transport.device.num_queues):
        registers.write("queue_size" if pci else "queue_num", 16, queue)
        for part, name in enumerate(("desc", "driver", "device")):
            registers.write(f"queue_{name}", 0x200000 + 0x1000 * (3 * queue + part), queue)
        registers.write("queue_enable" if pci else "queue_ready", 1, queue)
    for status in (1, 3, 11, LIVE):
        await transport.write_status(status)
    assert transport.status == LIVE
    assert len(transport.info()["queues"]) == transport.device.num_queues


def make(place: Path, transport: str) -> Path:
    """The snapshot of a machine all of whose devices are in use."""

    async def write() -> None:
        config = machine_in(place, transport=transport, console="virtio", vsock=VsockConfig(cid=3))
        async with Machine(config) as machine:
            await machine.start()
            for plugged in machine._board.plugs:
                await come_alive(plugged.function.transport)
            await machine.set_balloon(8 << 20)
            await machine.snapshot(str(place / "snapshot"))
            assert machine.state is State.RUNNING
            assert all(len(p.function.transport.info()["queues"]) for p in machine._board.plugs)

    with without_kvm():
        asyncio.run(write())
    return place / "snapshot"


@pytest.fixture(scope="module", params=["pci", "mmio"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("snapshot"), request.param)


async def restored(found: Snapshot) -> dict[str, Any]:
    """What a machine says that goes on from there, all of it."""
    async with Machine(config_of(found), found) as machine:
        await machine.start()
        assert machine.state is State.RUNNING
        info = machine.info()
        await machine.pause()
        await machine.resume()
        await machine.reset()
        await machine.pause()
        return info


async def test_all_goes_on(directory: Path) -> None:
    found = read(str(directory))
    info = await restored(found)
    assert info["devices"]
    for device in info["devices"]:
        assert device["status"] == LIVE
        assert device["queues"]
        assert not any(queue["broken"] for queue in device["queues"])
        assert device["slot"] == found.state["devices"][device["id"]]["slot"]
    balloon = next(device for device in info["devices"] if device["id"] == "balloon")
    assert balloon["target"] == 8 << 20


async def test_the_state_is_the_same_again(directory: Path) -> None:
    found = read(str(directory))
    async with Machine(config_of(found), found) as machine:
        await machine.start()
        await machine.pause()
        again = machine._board.save()
    # The generation changed, and the guest will hear of it.
    assert again["power"].pop("events") != found.state["power"].pop("events")
    # A new device told of its configuration: its generation may have gone up.
    for state in (again, found.state):
        for device in state["devices"].values():
            transport = device["function"]["transport"]
            transport.get("common", transport.get("registers")).pop("config_generation")
    assert again == found.state


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["devices"].pop("rng"),
        lambda s: s["devices"].update(more=s["devices"]["rng"]),
        lambda s: s["devices"].update(rng=None),
        lambda s: s["devices"].update(rng=[]),
        lambda s: s["devices"]["rng"].pop("slot"),
        lambda s: s["devices"]["rng"].update(slot=-1),
        lambda s: s["devices"]["rng"].update(slot=32),
        lambda s: s["devices"]["rng"].update(slot=1 << 70),
        lambda s: s["devices"]["rng"].update(slot="1"),
        lambda s: s["devices"]["rng"].update(slot=True),
        lambda s: s["devices"]["rng"].update(slot=s["devices"]["disk0"]["slot"]),
        lambda s: s["devices"]["rng"].update(function=[]),
        lambda s: s["devices"]["rng"].update(device={"some": 1}),
        lambda s: s["devices"]["rng"].update(device=7),
        lambda s: s["devices"]["disk0"].update(device={}),
        lambda s: s["devices"]["disk0"].update(device=[]),
        lambda s: s["devices"]["disk0"].update(device={"writeback": 1}),
        lambda s: s["devices"]["balloon"].update(device=[]),
        lambda s: s["devices"]["balloon"].update(device={"target": -1, "actual": 0}),
        lambda s: s["devices"]["disk0"]["function"]["transport"].update(features=float("inf")),
        lambda s: s["devices"]["disk0"]["function"]["transport"].update(features=-1),
        lambda s: s["devices"]["disk0"]["function"]["transport"].update(features=1 << 200),
        lambda s: s["devices"]["disk0"]["function"]["transport"].update(features=1 << 33 | 1 << 63),
        lambda s: s["devices"]["disk0"]["function"]["transport"].update(next={"0": 1e400}),
        lambda s: s["devices"]["disk0"]["function"]["transport"].update(next={"9": 1}),
        lambda s: s["devices"]["disk0"]["function"]["transport"].update(next={"0": 65536}),
        lambda s: s["devices"]["disk0"]["function"]["transport"].update(next=[1]),
        lambda s: s.update(vm="AAAA"),
        lambda s: s.update(vm="not base64"),
        lambda s: s.update(vm="ä"),
        lambda s: s.update(vm=None),
        lambda s: s.update(vcpus=[]),
        lambda s: s.update(vcpus=None),
        lambda s: s["vcpus"].append(s["vcpus"][0]),
        lambda s: s.update(vcpus=["AA==", "AA=="]),
        lambda s: s.update(serial="AA=="),
        lambda s: s.update(serial={}),
        lambda s: s.update(power=[]),
        lambda s: s["power"].update(events=[1 << 32]),
        lambda s: s["power"].update(events=[1.5]),
        lambda s: s.pop("power"),
    ],
)
async def test_states_that_do_not_fit(directory: Path, change: Any) -> None:
    found = read(str(directory))
    change(state := copy.deepcopy(dict(found.state)))
    before, files = held(), contents(directory.parent)
    with pytest.raises(UserError) as raised:
        await restored(Snapshot(found.directory, found.config, state, found.disks))
    assert contents(directory.parent) == files
    assert str(raised.value).startswith(f"{directory}: it does not fit: ")
    assert len(str(raised.value).splitlines()) == 1
    assert held() == before


@given(data=st.data())
@settings(max_examples=150)
def test_any_state_goes_on_or_is_refused(directory: Path, data: st.DataObject) -> None:
    found = read(str(directory))
    state = mutate(data, copy.deepcopy(dict(found.state)))
    snapshot = Snapshot(found.directory, found.config, state, found.disks)
    with without_kvm():
        try:
            asyncio.run(restored(snapshot))
        except UserError as error:
            assert str(error).startswith(f"{directory}: it does not fit: ")  # noqa: PT017


def test_the_caller_learns_it_by_the_file(directory: Path, tmp_path: Path) -> None:
    """The same by way of the directory, whose checksums are right."""
    own = make(tmp_path, read(str(directory)).config.transport)
    rewrite_state(own, lambda state: {**state, "vcpus": state["vcpus"][:1]})
    with pytest.raises(UserError, match="other processors than there are"):
        asyncio.run(restored(read(str(own))))


def test_nothing_is_logged_as_a_fault(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        asyncio.run(restored(read(str(directory))))
    assert not caplog.records


async def test_a_snapshot_that_fails_leaves_the_machine_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Machine(machine_in(tmp_path)) as machine:
        await machine.start()
        before = contents(tmp_path)
        descriptors = held()

        def full(*_arguments: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patches:
            patches.setattr(os, "fsync", full)
            for place in (tmp_path / "snapshot", tmp_path / "none/snapshot"):
                with pytest.raises(UserError, match=f"snapshot {place}: No s"):
                    await machine.snapshot(str(place))
                assert machine.state is State.RUNNING
                assert machine._board.running.runs  # type: ignore[attr-defined]
        assert contents(tmp_path) == before
        assert held() == descriptors
        await machine.snapshot(str(tmp_path / "snapshot"))
    assert read(str(tmp_path / "snapshot")).config == machine_in(tmp_path)


async def test_a_message_that_kvm_refuses_stays_pending(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A guest may write any address into an MSI-X entry, before a snapshot too: the machine goes
    on as it was, its other vectors interrupt, and the log names that one."""
    found = read(str(await asyncio.to_thread(make, tmp_path, "pci")))
    state = copy.deepcopy(dict(found.state))
    function = state["devices"]["disk0"]["function"]
    function["config"]["msix_control"] = [0x8000]
    table = function["msix"]
    for vector, address in ((0, 0xFEE00000), (1, 0x5_FEE00000)):
        table[f"address{vector}"], table[f"data{vector}"] = [address], [0x41 + vector]
        table[f"control{vector}"] = [0]
    snapshot = Snapshot(found.directory, found.config, state, found.disks)
    with caplog.at_level(logging.WARNING):
        async with Machine(config_of(found), snapshot) as machine:
            await machine.start()
            assert machine.state is State.RUNNING
            vm = machine._board.running
            assert isinstance(vm, Vm)
            assert vm.gsi_of(0xFEE00000, 0x41)
            assert {route.data for route in vm.routes.values()} == {0x41}
            again = machine._board.save()["devices"]["disk0"]["function"]["msix"]
            assert again == table
    (said,) = caplog.messages
    assert said.startswith("disk0: MSI-X vector 1: KVM takes no message 0x42 to 0x5fee00000")


async def test_interrupts_come_after_the_state_of_their_controllers(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is raised before would be undone: the new generation, the serial port, used buffers."""
    early: list[int] = []

    def load(vm: Vm, _state: bytes) -> None:
        early.extend(gsi for gsi in list(vm.irqfds) if vm.is_raised(gsi))

    monkeypatch.setattr(Vm, "load", load)
    found = read(str(directory))
    async with Machine(config_of(found), found) as machine:
        await machine.start()
        assert early == []
        vm = machine._board.running
        assert isinstance(vm, Vm)
        assert vm.is_raised(GED_GSI)


async def test_a_device_that_cannot_log_ends_the_tracking(tmp_path: Path) -> None:
    """What it writes would be missing from a snapshot that starts from the one before."""
    (tmp_path / "m").mkdir()
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    async with Machine(machine_in(tmp_path / "m")) as machine:
        await machine.start()
        await machine.snapshot(first, track=True)
        await machine.snapshot(second, base=first, track=True)

        async def silent(*arguments: Any) -> RngDevice:
            device = RngDevice(iothreads=machine._iothreads)
            device.supports_log = False
            arguments[1].callback(device.close)
            return device

        with mock.patch("vdev.vmm.parts.Maker.nic", side_effect=silent):
            await machine.add_nic(NicConfig(tap="unused"))
        with pytest.raises(UserError, match="not the last snapshot"):
            await machine.snapshot(third, base=second)
        await machine.snapshot(third)
