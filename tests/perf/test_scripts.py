"""The measurements that are programs of their own: each takes one figure of its kind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perf import handover, installed, machine_start


def test_the_pause_of_a_hand_over() -> None:
    pauses = handover.measure(depth=4, times=1)
    assert len(pauses.replaced) == len(pauses.undisturbed) == 1
    assert min(*pauses.replaced, *pauses.undisturbed) > 0
    assert pauses.line().split()[:2] == ["4", "1"]


@pytest.fixture
def kvm() -> None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        pytest.skip(f"no usable KVM here: /dev/kvm: {error.strerror}")


@pytest.mark.usefixtures("kvm")
def test_the_start_of_a_machine(tmp_path: Path) -> None:
    program = installed.find()
    commands = machine_start.commands(program.command[0], tmp_path)
    alone, machine = (
        machine_start.measure(*commands[name], program.environment)
        for name in ("python alone", "vdev run, no card")
    )
    assert machine.seconds > alone.seconds > 0
    assert alone.memory < machine.memory < machine_start.GUEST_MEMORY


def test_a_machine_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with 0 before its guest ran"):
        machine_start.measure(["true"], "-", dict(os.environ))
