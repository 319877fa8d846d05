"""One server spoken to in several manners: layouts of rings, used in any order or in order, with
in-flight tracking and without, with a dirty log and without.

A manner goes by a server's name, so that manners are paired in one run as servers are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from perf import images
from perf.frontend.blk import BlkFrontend, Pattern
from perf.frontend.connection import RING_FEATURES, RING_IN_ORDER, RING_PACKED
from perf.loads.blk import BlkTarget, served_disk
from perf.model import Place, Server, Target, Unsupported


@dataclass(frozen=True)
class Manner:
    """Features of the ring, and whether is noted what is in flight, and which pages are written."""

    features: int = RING_FEATURES
    inflight: bool = False
    logged: bool = False


MANNERS: Mapping[str, Manner] = {
    "vdev": Manner(),
    "vdev-packed": Manner(RING_FEATURES | RING_PACKED),
    "vdev-in-order": Manner(RING_FEATURES | RING_IN_ORDER),
    "vdev-packed-in-order": Manner(RING_FEATURES | RING_PACKED | RING_IN_ORDER),
    "vdev-inflight": Manner(inflight=True),
    "vdev-packed-inflight": Manner(RING_FEATURES | RING_PACKED, inflight=True),
    "vdev-logged": Manner(logged=True),
    "vdev-packed-logged": Manner(RING_FEATURES | RING_PACKED, logged=True),
}


@dataclass(frozen=True)
class Rings:
    """The native driver with this pattern on an image of this kind, in the manner of the server."""

    image: str
    pattern: Pattern

    @contextlib.contextmanager
    def attach(self, server: Server, place: Place) -> Iterator[Target]:
        if (manner := MANNERS.get(server.name)) is None:
            raise Unsupported(f"{server.name} is none of {', '.join(MANNERS)}")
        with (
            images.opened(self.image, blank=self.pattern.verify) as image,
            served_disk(server, image, place) as (started, disk),
            BlkFrontend(
                disk.socket,
                depth=self.pattern.depth,
                block_size=self.pattern.block_size,
                features=manner.features,
                inflight=manner.inflight,
                logged=manner.logged,
            ) as frontend,
        ):
            frontend.require(manner.features, server.name)
            yield BlkTarget(started, frontend, self.pattern, place)
