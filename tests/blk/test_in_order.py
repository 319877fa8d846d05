"""Drivers that accepted VIRTIO_F_IN_ORDER: what is completed early waits for what is older."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.frontend.blk import LAYOUTS, S_OK, SECTOR, T_FLUSH, T_IN, T_OUT, header
from tests.frontend.session import F_IN_ORDER

from .serving import Disk, make_image

BYTES = 8 * SECTOR
ROUNDS = 32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("in_order", [False, True], ids=["any-order", "in-order"])
def test_the_order_is_that_of_the_requests(
    disk_directory: Path, layout: str, in_order: bool
) -> None:
    """A flush takes its time, and what the page cache has is read meanwhile."""
    features = LAYOUTS[layout] | (F_IN_ORDER if in_order else 0)
    image = make_image(disk_directory / "disk.img", 1 << 20)
    overtaken = 0
    with Disk(disk_directory, image) as server, server.client(features=features) as disk:
        assert disk.features & F_IN_ORDER == features & F_IN_ORDER
        for n in range(ROUNDS):
            data = bytes([n]) * BYTES
            disk.write(8 * n, data)
            requests = [disk.submit(header(T_FLUSH), 1)]
            requests += [disk.submit(header(T_IN, 8 * n), BYTES + 1) for _ in range(4)]
            requests.append(disk.submit(header(T_OUT, 8 * n) + data, 1))
            done = [disk.rings[0].wait() for _ in requests]
            overtaken += [used.id for used in done] != [request.head for request in requests]
            lengths = {used.id: used.len for used in done}
            for request in requests:
                written = disk.memory.read(*request.writable)
                assert (written[-1], lengths[request.head]) == (S_OK, len(written))
                assert written[:-1] in (b"", data)
                del disk._open[request.queue, request.head]
                disk.release(request)
    assert bool(overtaken) != in_order
