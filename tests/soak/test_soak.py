"""The soak for a few rounds, and that it finds what it is there to find."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import pytest

from tests.frontend.blk import BlkClient
from tests.frontend.writer import AREA
from tests.lab import host
from tests.soak import attacks, soak
from tests.soak.soak import Soak, SoakError

ROUNDS = 6


def test_a_few_rounds(tmp_path: Path) -> None:
    if lacks := host.lacks_network():
        pytest.skip(lacks)
    report = Soak(tmp_path, seed=1, tap=f"soak{os.getpid() % 100_000}").run(3600, ROUNDS)
    assert report.rounds == ROUNDS
    assert report.kills
    assert report.writes > 100
    assert set(report.attacks) == {a.__name__ for a in (*attacks.DISK, *attacks.CARD)}
    assert report.attacks.total() == ROUNDS * soak.ATTACKS * 3


def test_what_a_healthy_client_would_see_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_elsewhere(path: Path, chance: random.Random) -> None:
        with open(path.with_name(f"{soak.HEALTHY[0]}.img"), "r+b") as image:
            image.write(chance.randbytes(AREA * 512))

    monkeypatch.setattr(soak, "DISK", (write_elsewhere,))
    with pytest.raises((SoakError, AssertionError)):
        Soak(tmp_path, seed=1, tap=None).run(3600, 2)


def test_what_a_worker_keeps_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[BlkClient] = []
    calls = itertools.count()

    def stay(path: Path, chance: random.Random) -> None:
        # In the second round: the first worker is killed.
        if path.name == soak.HOSTILE[1] and next(calls) == soak.ATTACKS:
            monkeypatch.setattr("tests.frontend.server.TIMEOUT", 1.0)  # for the server to tidy up
            kept.append(BlkClient(path))

    monkeypatch.setattr(soak, "DISK", (stay,))
    try:
        with pytest.raises(AssertionError, match="left over"):
            Soak(tmp_path, seed=1, tap=None).run(3600, 2)
    finally:
        for disk in kept:
            disk.close()
