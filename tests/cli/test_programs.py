"""Back-end program conventions, the doctor, the version."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from .conftest import VDEV, VDEV_BLK, VDEV_NET, Run, Start

SHARE = Path(__file__).parents[2] / "vdev/share"


@pytest.mark.parametrize(
    ("program", "kind", "features"),
    [(VDEV_BLK, "block", ["read-only", "blk-file"]), (VDEV_NET, "net", None)],
)
@pytest.mark.parametrize("others", [[], ["--no-such-option", "--fd", "x"]])
def test_capabilities_whatever_else_is_said(
    vdev: Run, program: tuple[str, ...], kind: str, features: list[str] | None, others: list[str]
) -> None:
    result = vdev(*others, "--print-capabilities", program=program)
    assert (result.returncode, result.stderr) == (0, "")
    capabilities = json.loads(result.stdout)
    assert capabilities["type"] == kind
    assert capabilities.get("features") == features


@pytest.mark.parametrize(("name", "kind"), [("blk", "block"), ("net", "net")])
def test_descriptors_name_the_programs(name: str, kind: str) -> None:
    text = (SHARE / f"50-vdev-{name}.json.in").read_text().replace("@bindir@", "/usr/bin")
    descriptor = json.loads(text)
    assert descriptor["type"] == kind
    assert descriptor["binary"] == f"/usr/bin/vdev-{name}"
    assert descriptor["description"]


def test_the_program_serves_by_the_conventions(start: Start, disk: str) -> None:
    server = start("--socket-path", "s", "--blk-file", disk, "--read-only", program=VDEV_BLK)
    assert server.stop() == 0


@pytest.mark.parametrize("program", [VDEV, VDEV_BLK, VDEV_NET])
def test_version(vdev: Run, program: tuple[str, ...]) -> None:
    result = vdev("--version", program=program)
    assert (result.returncode, result.stdout) == (0, f"vdev {version('vdev')}\n")


def test_help_tells_the_exit_codes(vdev: Run) -> None:
    result = vdev("--help")
    assert result.returncode == 0
    assert "exit codes:" in result.stdout


def test_doctor_as_json(vdev: Run) -> None:
    result = vdev("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["ok"] else 1)
    assert report["ok"] == all(report["serves"].values())
    names = [check["name"] for check in report["checks"]]
    for name in ("kernel", "io_uring", "tun", "CAP_NET_ADMIN", "KVM", "hugepages", "memlock"):
        assert name in names
    for check in report["checks"]:
        assert check["found"]
        assert check["ok"] or check["fix"], f"{check['name']}: nothing says how to get it"


def test_doctor_as_a_table(vdev: Run) -> None:
    result = vdev("doctor")
    assert "libvhost" in result.stdout
    assert "block devices can be served here" in result.stdout


def test_doctor_without_rights(vdev: Run) -> None:
    launch = ("setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin")
    result = vdev("doctor", "--json", program=(*launch, *VDEV))
    report = json.loads(result.stdout)
    assert result.returncode == 1
    assert report["serves"] == {"blk": True, "net": False}
