"""How a machine ends, by the guest's doing and by ours."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.lab.innermost import Material
from tests.vmm.boot_images import elf
from tests.vmm.kvm.guest import MIB, READY, booted, config_of, started, within
from vdev.vmm.api import End, Outcome, State
from vdev.vmm.config import DiskConfig, MachineConfig
from vdev.vmm.layout import KERNEL_BASE

_REBOOTS = 20
_COUNT = """
n=$(head -c 8 /dev/vda | tr -d '\\0')
echo $((n + 1)) | dd of=/dev/vda bs=512 conv=sync,notrunc oflag=direct 2>/dev/null
"""


@pytest.mark.long
async def test_a_guest_reboots_twenty_times(material: Material, tmp_path: Path) -> None:
    """Each boot finds what the one before wrote, and all devices anew."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    config = config_of(
        material.cloud,
        script=_COUNT,
        end="reboot",
        words="mitigations=off lab.modules=virtio_pci,virtio_blk",
        memory=128 * MIB,
        disks=(DiskConfig(str(disk)),),
    )
    async with started(config) as guest:
        for number in range(1, _REBOOTS + 1):
            await guest.until(READY)
            await guest.until(b"GUEST EXIT 0")
            assert disk.read_bytes()[:8].split(b"\n")[0] == str(number).encode()
        await guest.until(READY)
        assert guest.machine.state is State.RUNNING
        # Nothing of the machines before is left in this one.
        assert len(guest.machine.counters()["vcpus"]) == 1


async def test_a_reset_that_is_refused_ends_the_machine(material: Material) -> None:
    config = config_of(material.cloud, script="true", end="reboot", reboot=False)
    async with started(config) as guest:
        assert (await guest.end()).end is End.RESET_REFUSED


async def test_a_reset_button_boots_again(material: Material) -> None:
    async with booted(config_of(material.cloud, cpus=2)) as guest:
        await guest.sh("touch /run/before")
        await guest.reset()
        await guest.sh("! test -e /run/before")
        assert await guest.sh("nproc") == "2\n"


async def test_a_panic_is_told(material: Material) -> None:
    async with booted(config_of(material.generic, cpus=2)) as guest:
        await guest.type(b"echo c >/proc/sysrq-trigger\n")
        assert (await guest.end()).end is End.PANIC


@pytest.mark.long
async def test_a_panic_that_nobody_tells_resets(material: Material) -> None:
    """As panic=-1 has it, where the guest lacks the driver of the panic device."""
    config = config_of(material.cloud, words="lab.modules=virtio_pci", reboot=False)
    async with booted(config) as guest:
        await guest.type(b"echo c >/proc/sysrq-trigger\n")
        assert (await guest.end()).end is End.RESET_REFUSED


async def test_a_triple_fault_is_a_crash(material: Material) -> None:
    config = config_of(material.cloud, words="reboot=t", script="true", end="reboot")
    async with started(config) as guest:
        assert await guest.end() == Outcome(End.CRASHED, "triple fault on vCPU 0")


@pytest.mark.parametrize("transport", ["pci", pytest.param("mmio", marks=pytest.mark.long)])
async def test_the_power_button_is_an_event_for_the_guest(
    material: Material, transport: str
) -> None:
    async with booted(config_of(material.generic, transport=transport)) as guest:
        await guest.sh("grep -q LNXPWRBN /proc/bus/input/devices || cat /proc/bus/input/devices")
        await guest.sh("exec 3</dev/input/event0")
        for _ in range(2):
            await guest.machine.power_button()
            # Pressed, a mark, released, a mark; struct input_event is of 24 bytes.
            events = await guest.sh("head -c 96 <&3 | od -An -v -t x1")
            told = list(struct.iter_unpack("<QQHHi", bytes.fromhex(events.replace("\n", ""))))
            assert [event[2:] for event in told] == [(1, 116, 1), (0, 0, 0), (1, 116, 0), (0, 0, 0)]
        assert await guest.power_off() == Outcome(End.SHUTDOWN)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        pytest.param(b"Linux version", marks=pytest.mark.long),
        pytest.param(b"GUEST READY", marks=pytest.mark.long),
    ],
)
async def test_it_can_be_stopped_at_any_time(material: Material, said: bytes) -> None:
    config = config_of(material.cloud, words="loglevel=7", cpus=2)
    async with started(config) as guest:
        await guest.until(said)
        await guest.machine.stop()
        assert await guest.end() == Outcome(End.STOPPED)


@pytest.mark.parametrize("code", [b"\xfa\xeb\xfe", b"\xfa\xf4\xeb\xfd"], ids=["spins", "halts"])
async def test_a_guest_that_hears_no_interrupt_can_be_paused_and_stopped(
    tmp_path: Path, code: bytes
) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(elf([(KERNEL_BASE, code, 4096)]))
    config = MachineConfig(name="deaf", kernel=str(kernel), memory=64 * MIB)
    async with started(config) as guest:
        machine = guest.machine
        for _ in range(3):
            await within(machine.pause(), "it does not stand still")
            assert machine.state is State.PAUSED
            await within(machine.resume(), "it does not go on")
        await within(machine.reset(), "it cannot be reset")
        assert machine.counters()["vcpus"][0]["told"] == 0
    assert await machine.wait() == Outcome(End.STOPPED)
