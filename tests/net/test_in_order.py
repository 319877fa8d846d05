"""DPDK's driver, which accepts VIRTIO_F_IN_ORDER: pings into it are answered, on both layouts."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from .namespace import Namespace
from .served import Served

PINGS = 300  # more than a ring has entries


@pytest.fixture(params=["split", "packed"])
def testpmd(card: Served, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Answers ARP and ICMP as whoever is asked for."""
    program = shutil.which("dpdk-testpmd")
    if program is None:
        pytest.skip("dpdk-testpmd (dpdk-dev) is not installed")
    layout = int(request.param == "packed")
    device = f"net_virtio_user0,path={card.path},queues=1,in_order=1,mrg_rxbuf=1,packed_vq={layout}"
    with subprocess.Popen(
        [
            *(program, "--no-pci", "--no-huge", "-m", "256", "--no-telemetry", "-l", "0,1"),
            *("--file-prefix", f"vdev-{request.node.name}", "--vdev", device, "--"),
            *("--forward-mode=icmpecho", "--interactive", "--total-num-mbufs=4096"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdin is not None
        print("start", file=process.stdin, flush=True)
        try:
            yield process
        finally:
            print("stop\nquit", file=process.stdin, flush=True)
            process.communicate()
            assert process.returncode == 0


def test_dpdk(ns: Namespace, card: Served, testpmd: subprocess.Popen[str]) -> None:
    ns.ip("addr add 10.9.0.1/24 dev tap0")
    # The first until it is answered: testpmd takes a while to start.
    ping = ns.argv("ping", "-q", "10.9.0.2")
    subprocess.run([*ping, "-c", "1", "-w", "20"], check=True, capture_output=True)
    subprocess.run([*ping, "-f", "-c", str(PINGS), "-w", "20"], check=True, capture_output=True)
    assert "IN_ORDER" in card.features()
    assert card.count(0, "packets") >= PINGS
    assert card.count(1, "packets") >= PINGS
    assert testpmd.poll() is None
