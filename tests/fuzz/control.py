"""A fuzz target: a network card's control queue, from the ring to its pairs.

An input is a series of commands: how the buffers are cut, and what the driver wrote into them.
After each the card must have as many pairs as its answer says, and every chain comes back once.
"""

from __future__ import annotations

import asyncio
import sys

from tests.frontend.ring import Desc
from tests.vmm.served import Served
from tests.vmm.test_net_control import PAIRS, Card, running, started
from vdev._native import lib

COMMANDS = 16
_MQ_SET = bytes([lib.VIRTIO_NET_CTRL_MQ, lib.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET])


def take(data: bytes) -> list[tuple[list[bytes], list[int]]]:
    """Commands: the readable buffers, and the sizes of the writable ones.

    Each begins with a byte for the numbers of readable and of writable buffers, below 4 each, and
    one for the size of each.
    """
    commands: list[tuple[list[bytes], list[int]]] = []
    at = 0
    while at < len(data) and len(commands) < COMMANDS:
        shape, at = data[at], at + 1
        out, into = shape & 3, shape >> 2 & 3
        sizes, at = data[at : at + out + into], at + out + into
        readable = []
        for size in sizes[:out]:
            readable.append(data[at : at + size % 9])
            at += size % 9
        commands.append(([part for part in readable if part], [1 + n % 3 for n in sizes[out:]]))
    return commands


async def obey(served: Served, card: Card, out: list[bytes], into: list[int]) -> None:
    rooms = [served.room(size) for size in into]
    chain: list[Desc] = [*map(served.data, out), *rooms]
    if not chain:
        return
    before = running(card)
    written = await served.request(0, *chain)
    command = b"".join(out)
    pairs = int.from_bytes(command[2:4], "little")
    good = command[:2] == _MQ_SET and len(command) >= 4 and 1 <= pairs <= PAIRS
    assert running(card) == (list(range(2 * pairs)) if good else before)
    assert written == (1 if rooms else 0)
    if rooms:
        assert served.content(rooms[0])[0] == (lib.VIRTIO_NET_OK if good else lib.VIRTIO_NET_ERR)


async def _run(data: bytes) -> None:
    card, nic = await started()
    async with Served(nic._control) as served:
        for out, into in take(data):
            await obey(served, card, out, into)
        assert served.faults.empty()


def run(data: bytes) -> None:
    """Raises where the device did."""
    asyncio.run(_run(data))


def main() -> None:
    """Fuzz, with libFuzzer's arguments."""
    import atheris

    atheris.instrument_all()
    atheris.Setup(sys.argv, run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
