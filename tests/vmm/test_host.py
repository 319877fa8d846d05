"""What is looked at before a machine touches anything."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from vdev.errors import UserError
from vdev.vmm import host
from vdev.vmm.config import MachineConfig
from vdev.vmm.host import check_host, check_kernel, kvm_usable

ELF = b"\x7fELF\x02\x01\x01" + bytes(11) + b"\x3e\0"
BZIMAGE = bytes(0x1FE) + b"\x55\xaa" + bytes(2) + b"HdrS" + bytes(16)


@pytest.mark.parametrize("content", [ELF, BZIMAGE])
def test_kernels(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "k").write_bytes(content)
    check_kernel(str(tmp_path / "k"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        ELF[:18],
        b"\x7fELF\x01" + ELF[5:],
        ELF[:18] + b"\xb7\0",
        BZIMAGE[:0x202],
        bytes(0x202) + b"HdrS",
        BZIMAGE.replace(b"HdrS", b"Hdrs"),
        b"\x1f\x8b" + bytes(600),
    ],
)
def test_what_is_no_kernel(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "k").write_bytes(content)
    with pytest.raises(UserError, match="neither a bzImage nor an x86-64 ELF kernel"):
        check_kernel(str(tmp_path / "k"))


def test_a_pipe_is_no_kernel_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "k")
    with pytest.raises(UserError, match="not a regular file"):
        check_kernel(str(tmp_path / "k"))


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "k").write_bytes(ELF)
    monkeypatch.setattr(host, "memory_total", lambda: 1 << 30)
    monkeypatch.setattr(host, "_HUGE_PAGES", tmp_path)
    (tmp_path / "free_hugepages").write_text("70\n")
    # Somebody has these already, whose machine has not touched them.
    (tmp_path / "resv_hugepages").write_text("6\n")

    def check(memory: int, hugepages: bool = False) -> None:
        check_host(
            MachineConfig(name="m", kernel=f"{tmp_path}/k", memory=memory, hugepages=hugepages)
        )

    check(1 << 30)
    check(128 << 20, hugepages=True)
    with pytest.raises(UserError, match="memory of 1026 MiB: this host has 1024 MiB"):
        check((1 << 30) + (2 << 20))
    with pytest.raises(UserError, match=r"128MiB are free: sysctl vm\.nr_hugepages=65"):
        check(130 << 20, hugepages=True)
    (tmp_path / "resv_hugepages").unlink()
    with pytest.raises(UserError, match="hugepages: 0B are free"):
        check(128 << 20, hugepages=True)


class TestKvm:
    @pytest.mark.parametrize(
        ("number", "words"),
        [(errno.EACCES, "no rights"), (errno.ENOENT, "load kvm-intel"), (errno.ENXIO, "No such")],
    )
    def test_that_cannot_be_opened(
        self, monkeypatch: pytest.MonkeyPatch, number: int, words: str
    ) -> None:
        def refuse(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "open", refuse)
        reason = kvm_usable()
        assert reason is not None
        assert words in reason
        assert "\n" not in reason

    @pytest.mark.parametrize(
        ("version", "emulates", "reason"),
        [(12, False, None), (11, False, "API version 11"), (12, True, "emulates guest kernel")],
    )
    def test_that_answers(
        self, monkeypatch: pytest.MonkeyPatch, version: int, emulates: bool, reason: str | None
    ) -> None:
        opened = os.open
        monkeypatch.setattr(os, "open", lambda path, flags: opened("/dev/null", flags))
        monkeypatch.setattr(fcntl, "ioctl", lambda *_: version)
        monkeypatch.setattr(os.path, "exists", lambda path: emulates)
        found = kvm_usable()
        assert found is None if reason is None else found is not None and reason in found

    def test_that_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = os.open
        monkeypatch.setattr(os, "open", lambda path, flags: opened("/dev/null", flags))
        assert "it is no KVM" in (kvm_usable() or "")
