"""What can become of a test inside; test_kvm_lab.py runs these through inner_tests.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.lab.kvm import EVENTS


def test_good() -> None:
    assert Path("/dev/kvm").exists()


def test_bad() -> None:
    print("printed inside")
    assert os.uname().nodename == "no such machine"


def test_left_out() -> None:
    pytest.skip("no moon in the lab")


def test_kills_the_lab() -> None:
    assert os.environ[EVENTS].startswith("/dev/virtio-ports/"), "only ever in the lab"
    Path("/proc/sysrq-trigger").write_text("c")


def test_after_that() -> None:
    assert Path("/dev/kvm").exists()
