"""What a hostile front-end or guest does to a device, at random; each attack is one connection.

How a refusal looks is for tests/hostile to check: here only the server's life, the other clients'
data and what is left of a connection that has gone count.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.frontend.blk import LAYOUTS, T_FLUSH, T_OUT, BlkClient, header
from tests.frontend.net import NetClient
from tests.frontend.ring import Ring
from tests.frontend.session import Refused
from tests.frontend.wire import Closed, Request, Wire, message, u64

Attack = Callable[[Path, random.Random], None]

_REQUESTS = [request.value for request in Request]


def leave_half_open(path: Path, chance: random.Random) -> None:
    """Says nothing, or half a header."""
    with Wire.connect(path) as wire:
        wire.send_raw(chance.randbytes(chance.randrange(12)))


def send_noise(path: Path, chance: random.Random) -> None:
    """Bytes that nobody made for this."""
    with Wire.connect(path) as wire:
        wire.send_raw(chance.randbytes(chance.randrange(1, 5000)))


def send_wrong_messages(path: Path, chance: random.Random) -> None:
    """Messages in the right frame: any request, payload and descriptors, in any order."""
    with Wire.connect(path) as wire, open(os.devnull) as null:
        for _ in range(chance.randrange(1, 30)):
            payload = chance.randbytes(8 * chance.randrange(12))
            if chance.randrange(2):
                payload = u64(chance.choice([0, 1, 0x100, 1 << 30, (1 << 64) - 1])) + payload[8:]
            fds = [null.fileno()] * chance.choice([0, 0, 0, 1, 1, 8])
            wire.send(chance.choice(_REQUESTS), payload, fds)


def repeat_a_good_start(path: Path, chance: random.Random) -> None:
    """A session that was set up as it should be, and then wrong messages on it."""
    with _disk(path, chance) as disk:
        for _ in range(chance.randrange(1, 10)):
            payload = chance.randbytes(8 * chance.randrange(1, 6))
            disk.wire.send_raw(message(chance.choice(_REQUESTS), payload))


def leave_requests_behind(path: Path, chance: random.Random) -> None:
    """Goes with requests in flight."""
    with _disk(path, chance) as disk:
        _fill(disk, chance)


def stop_and_start(path: Path, chance: random.Random) -> None:
    """Rings stopped, started and disabled with requests in flight."""
    with _disk(path, chance) as disk:
        for _ in range(chance.randrange(1, 5)):
            _fill(disk, chance)
            disk.enable(0, on=False)
            disk.enable(0)
            base = disk.get_vring_base(1)
            disk.start_ring(1, disk.rings[1], base=base)


def scribble_on_rings(path: Path, chance: random.Random) -> None:
    """Noise over descriptors and both rings, while they are served."""
    with _disk(path, chance) as disk:
        _fill(disk, chance)
        for _ in range(chance.randrange(1, 60)):
            _scribble(disk.rings[chance.randrange(2)], chance)


def take_memory_away(path: Path, chance: random.Random) -> None:
    """A file that gets shorter under the server: what it touches is gone (SIGBUS)."""
    with _disk(path, chance) as disk:
        _fill(disk, chance)
        disk.memory.regions[0].truncate(4096 * chance.randrange(64))
        disk.rings[0].kick()
        disk.rings[1].kick()


def send_wrong_frames(path: Path, chance: random.Random) -> None:
    """A card's frames of any length behind any header, and a transmit ring of noise."""
    with NetClient(path) as card:
        card.post(8)
        for _ in range(chance.randrange(1, 30)):
            card.submit(chance.randbytes(chance.randrange(1, 2000)))
            card.reap()
        for _ in range(chance.randrange(20)):
            _scribble(card.rings[chance.randrange(2)], chance)


DISK: tuple[Attack, ...] = (
    leave_half_open,
    send_noise,
    send_wrong_messages,
    repeat_a_good_start,
    leave_requests_behind,
    stop_and_start,
    scribble_on_rings,
    take_memory_away,
)
CARD: tuple[Attack, ...] = (leave_half_open, send_noise, send_wrong_messages, send_wrong_frames)


def attack(attacks: tuple[Attack, ...], path: Path, chance: random.Random) -> str:
    """One of them, which the server may end at any point; returns its name."""
    chosen = chance.choice(attacks)
    with contextlib.suppress(Closed, Refused, ConnectionError):
        chosen(path, chance)
    return chosen.__name__


def _disk(path: Path, chance: random.Random) -> BlkClient:
    # Rings that hold all that `_fill` adds in one attack.
    return BlkClient(path, queues=2, size=512, features=chance.choice(list(LAYOUTS.values())))


def _fill(disk: BlkClient, chance: random.Random) -> None:
    for _ in range(chance.randrange(1, 12)):
        queue = chance.randrange(2)
        data = chance.randbytes(512 * chance.randrange(1, 9))
        disk.submit(header(T_OUT, chance.randrange(1024)) + data, 1, queue=queue)
        disk.submit(header(T_FLUSH), 1, queue=queue)


def _scribble(ring: Ring, chance: random.Random) -> None:
    for address in (ring.desc, ring.avail, ring.used):
        ring.memory.write(address + chance.randrange(32), chance.randbytes(chance.randrange(1, 64)))
    ring.kick()
