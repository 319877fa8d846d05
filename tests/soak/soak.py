"""A server under attack and killed now and then, beside disks in use that must not notice.

Rounds: in each, every attacker makes a number of attacks while each healthy client writes, reads
and flushes, knowing what must be on its disk; then, attackers gone, the server has to hold the
descriptors and mappings that it held at first, and its memory must not have grown. In the first
half of the time the server's worker is killed now and then, with requests in flight.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.frontend.server import Server
from tests.frontend.survivor import Survivor
from tests.frontend.wire import Closed
from tests.frontend.writer import AREA, DEPTH, Writer
from tests.soak.attacks import CARD, DISK, Attack, attack
from vdev.runtime import runtime_dir
from vdev.server.control import request

HEALTHY, HOSTILE = ("disk0", "disk1"), ("hostile0", "hostile1")
ATTACKS = 20
"""Of each attacker in a round."""
GROWTH = 4 << 20
"""Bytes that may come to a worker between its first rounds and its last: what the C library's
arenas and caches do not give back; a leak of one page an attack is more within a minute."""
_SETTLED = 5


class SoakError(Exception):
    """Something that a healthy client or the host would have noticed."""


@dataclass
class Report:
    """What happened. memory: of the last worker in bytes, after each round."""

    attacks: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    kills: int = 0
    writes: int = 0
    memory: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        grown = (self.memory[-1] - self.memory[min(_SETTLED, len(self.memory)) - 1]) >> 10
        return (
            f"{self.rounds} rounds, {self.attacks.total()} attacks, {self.kills} kills, "
            f"{self.writes} writes verified, memory {self.memory[-1] >> 10} KiB ({grown:+} KiB)"
        )


class Soak:
    """One server in `directory`, and all who use it. `tap`: a card is attacked too, as root."""

    def __init__(self, directory: Path, seed: int, *, tap: str | None) -> None:
        self._directory = directory
        self._chance = random.Random(seed)
        self._tap = tap
        self.report = Report()

    def run(self, seconds: float, rounds: int | None = None) -> Report:
        """Until `seconds` have gone, or so many rounds. Raises SoakError, AssertionError."""
        with self._server() as self._program, contextlib.ExitStack() as stack:
            self._disks = [
                stack.enter_context(Survivor(self._directory / name, queues=2)) for name in HEALTHY
            ]
            self._writers = [Writer(disk, self._chance.getrandbits(32)) for disk in self._disks]
            self._pid = self._worker()
            self._held = self._program.holdings(self._directory / HOSTILE[0])
            end = time.monotonic() + seconds
            while self.report.rounds < (rounds or sys.maxsize) and time.monotonic() < end:
                early = time.monotonic() < end - seconds / 2
                self._round(kill=early and self.report.rounds % 8 == 0)
                self._check()
            for writer in self._writers:
                writer.finish()
                writer.check()
            self._check_growth()
            if self._program.stop() != 0 or "Traceback" in self._program.output:
                raise SoakError(self._program.output)
        self.report.writes = sum(writer.done for writer in self._writers)
        return self.report

    @contextlib.contextmanager
    def _server(self) -> Iterator[Server]:
        config = []
        for name in (*HEALTHY, *HOSTILE):
            image = self._directory / f"{name}.img"
            with image.open("wb") as file:
                file.truncate(AREA * 512)
            config.append(f'[[blk]]\nsocket = "{name}"\nimage = "{image.name}"\nqueues = 2\n')
        if self._tap is not None:
            config.append(f'[[net]]\nsocket = "card"\ntap = "{self._tap}"\n')
        path = self._directory / "soak.toml"
        path.write_text("\n".join(config))
        with Server([sys.executable, "-m", "tests.frontend.supervised", str(path)]) as server:
            yield server

    def _round(self, *, kill: bool) -> None:
        targets: list[tuple[str, tuple[Attack, ...]]] = [(name, DISK) for name in HOSTILE]
        if self._tap is not None:
            targets.append(("card", CARD))
        failures: list[BaseException] = []

        def attacker(path: Path, attacks: tuple[Attack, ...], chance: random.Random) -> None:
            try:
                for _ in range(ATTACKS):
                    self.report.attacks[attack(attacks, path, chance)] += 1
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(
                target=attacker,
                args=(self._directory / name, attacks, random.Random(self._chance.getrandbits(32))),
            )
            for name, attacks in targets
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for writer in self._writers:
                writer.fill()
                writer.take(self._chance.randrange(DEPTH))
                writer.fill()
                writer.read()
            if kill:
                self._kill()
                kill = False
        for thread in threads:
            thread.join()
        self._program.check_alive()
        if failures:
            raise SoakError(f"an attacker found: {failures[0]!r}") from failures[0]
        self.report.rounds += 1

    def _worker(self) -> int:
        status = request(runtime_dir() / f"{self._program.pid}.sock", "status")
        pid: int = status["workers"][0]["pid"]
        return pid

    def _kill(self) -> None:
        for writer in self._writers:
            writer.fill()
        os.kill(self._worker(), signal.SIGKILL)
        for disk in self._disks:
            disk.wire.wait_closed()
            disk.reconnect()
        self.report.kills += 1
        self._pid = self._worker()
        self.report.memory.clear()

    def _check(self) -> None:
        if self._worker() != self._pid:
            raise SoakError(f"the worker died of an attack:\n{self._program.output}")
        try:
            self._program.check_holdings(self._directory / HOSTILE[0], self._held)
        except Closed as error:
            raise SoakError(f"a healthy connection was closed: {error}") from error
        self.report.memory.append(self._program.rss())

    def _check_growth(self) -> None:
        memory = self.report.memory
        if len(memory) > _SETTLED and memory[-1] - memory[_SETTLED - 1] > GROWTH:
            raise SoakError(f"memory grows: {[size >> 10 for size in memory]} KiB")
