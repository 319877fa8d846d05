"""Devices written in Python: subclass `BatchDevice`, and requests come in batches.

This is the slower path, for devices whose requests are few or whose work is Python's anyway; it
costs an event of the event loop a batch.  The iothread still owns the rings: it pops chains ahead,
within a bound, and completes what the device hands back.

Two kinds of queues.  Most carry requests: `handle` gets each chain that the driver makes available.
Those in `on_demand` carry buffers that wait for something, such as input: `available` says that
some are there, and `take` gets them when there is a use for them.  Chains that were not taken go
back into the ring, unseen, when the queue stops, so nobody has to wait for input then.

Chains are the guest's: nothing in them can be trusted, not even to stay what it was.  `Chain.read`
copies once; check the copy and use the copy.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from vdev._native import ffi, lib
from vdev.iothread import IOThread
from vdev.ratelog import RateLimitedLog
from vdev.virtio.device import NativeDevice
from vdev.virtio.spec import RING_FEATURES

BATCH = 64
READ_MOST = 1 << 20
_EVENTS = 64


class Chain:
    """A request of the driver: bytes to read, then bytes to write (virtio 1.3, section 2.6).

    queue: the index it came by.  readable_len, writable_len: bytes; a guest can make up to 4 GiB
    of a few bytes of memory.  written: bytes that `write` put there.  done: completed or given
    back; it is of no use then.
    """

    __slots__ = (
        "_buffers",
        "_counts",
        "_device",
        "_id",
        "_owner",
        "_read_at",
        "_views",
        "done",
        "queue",
        "readable_len",
        "writable_len",
        "written",
    )

    def __init__(self, device: BatchDevice, queue: int, native: Any, owner: Any) -> None:
        self.queue = queue
        self.readable_len: int = native.readable_len
        self.writable_len: int = native.writable_len
        self.written = 0
        self.done = False
        self._device = device
        self._owner = owner
        self._id: int = native.id
        self._buffers = native.buffers
        self._counts: tuple[int, int] = (native.readable, native.writable)
        self._views: tuple[list[memoryview], list[memoryview]] | None = None
        self._read_at = 0

    @property
    def readable(self) -> Sequence[memoryview]:
        """The buffers to read, in guest memory: they may change at any time.

        They stay valid for as long as they are held, but are the driver's when the chain is done.
        """
        return self._split()[0]

    @property
    def writable(self) -> Sequence[memoryview]:
        """The buffers to write, in guest memory; valid as `readable` is."""
        return self._split()[1]

    @property
    def writable_ranges(self) -> list[tuple[int, int]]:
        """Guest address and size, in bytes, of each buffer to write."""
        self._check()
        first, count = self._counts
        buffers = (self._buffers[at] for at in range(first, first + count))
        return [(buffer.guest_addr, buffer.size) for buffer in buffers]

    def read(self, most: int = READ_MOST) -> bytes:
        """A copy of the next bytes to read, `most` at most; empty at the end."""
        parts: list[bytes] = []
        skip = self._read_at
        for view in self.readable:
            if skip >= len(view):
                skip -= len(view)
                continue
            if most <= 0:
                break
            parts.append(bytes(view[skip : skip + most]))
            most -= len(parts[-1])
            self._read_at += len(parts[-1])
            skip = 0
        return b"".join(parts)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Puts `data` behind what was written before. Returns how many bytes there was room for."""
        left = memoryview(data)
        skip = self.written
        for view in self.writable:
            if skip >= len(view):
                skip -= len(view)
                continue
            if not left:
                break
            part = min(len(view) - skip, len(left))
            view[skip : skip + part] = left[:part]
            left = left[part:]
            self.written += part
            skip = 0
        return len(data) - len(left)

    def complete(self, written: int | None = None) -> None:
        """Hands the chain back to the driver with so many bytes written; None: by `write`.

        Raises ValueError for more than there is room for, RuntimeError where it is done already.
        """
        written = self.written if written is None else written
        if not 0 <= written <= self.writable_len:
            raise ValueError(f"{written} bytes written of {self.writable_len}")
        self._finish()
        self._device._complete(self.queue, self._id, written)

    def give_back(self) -> None:
        """As if the chain had not been taken: it waits to be taken again.

        For queues that are `on_demand`, and in others after `recall`; RuntimeError otherwise.
        """
        self._check()
        self._device._give_back(self.queue, self._id)
        self._finish()

    def _check(self) -> None:
        if self.done:
            raise RuntimeError("this chain is done")

    def _finish(self) -> None:
        self._check()
        self.done = True
        self._views = None
        self._buffers = self._owner = None

    def _split(self) -> tuple[list[memoryview], list[memoryview]]:
        self._check()
        if self._views is None:
            readable, writable = self._counts
            buffers = [self._buffers[at] for at in range(readable + writable)]
            views = [_view(buffer.base, buffer.size, self._owner) for buffer in buffers]
            self._views = ([v.toreadonly() for v in views[:readable]], views[readable:])
        return self._views


class BatchDevice(NativeDevice):
    """A device whose requests `handle` carries out; made within a running event loop.

    Subclasses set the attributes of `NativeDevice` (but `native` and `num_queues`) and implement
    `handle`, `config` where there is a configuration space, and `reset` where there is state.

    on_demand: indexes of the queues whose chains wait until the device takes them.
    iothreads: the threads that own its rings; they stay the caller's.
    """

    features: int = RING_FEATURES
    on_demand: frozenset[int] = frozenset()

    def __init__(self, num_queues: int, iothreads: Sequence[IOThread]) -> None:
        super().__init__(iothreads)
        self.num_queues = num_queues
        self._log = RateLimitedLog(logging.getLogger(__name__))
        self._loop = asyncio.get_running_loop()
        self._events = _new("struct vhost_events **", lib.vhost_events_new)
        try:
            self.native = _new(
                "struct vhost_device **", partial(lib.vhost_batch_new, num_queues, self._events)
            )
        except OSError:
            lib.vhost_events_free(self._events)
            raise
        self._loop.add_reader(lib.vhost_events_fd(self._events), self._read_events)
        self._taken = ffi.new("struct vhost_chain[]", BATCH)
        self._done: list[list[tuple[int, int]]] = [[] for _ in range(num_queues)]
        self._flushing = False
        self._handling: dict[int, asyncio.Future[None]] = {}
        self._recalled: set[int] = set()

    # ---- what a device implements ----

    def handle(self, queue: int, chains: list[Chain]) -> Awaitable[None] | None:
        """Carries out requests, oldest first; may be `async def`.

        A queue has one call at a time: meanwhile its requests wait.  A chain that the call leaves
        neither completed nor given back, also because it raised, is completed with length 0.
        """
        raise NotImplementedError(f"{self.name}: queue {queue} has no handler")

    def available(self, queue: int) -> None:
        """Chains have come to wait in a queue that is `on_demand`; `take` until none are left."""

    def recall(self, queue: int) -> None:
        """The queue is stopping and waits for the chains that the device holds.

        For handlers that may take long: complete them, or give back those not begun.
        """

    def config(self) -> bytes:
        return b""

    def reset(self) -> None:
        """The driver let go of the device; no queue runs."""

    def close(self) -> None:
        """Releases everything; no queue runs."""
        if not self.native:
            return
        for task in self._handling.values():
            task.cancel()
        self._loop.remove_reader(lib.vhost_events_fd(self._events))
        super().close()
        lib.vhost_events_free(self._events)

    # ---- what a device calls ----

    def take(self, queue: int, most: int = BATCH) -> list[Chain]:
        """Up to `most` of the chains that wait, oldest first, to be completed or given back."""
        if not self.native:
            return []
        memory = ffi.new("struct vhost_memory **")
        count = lib.vhost_batch_take(self.native, queue, self._taken, min(most, BATCH), memory)
        if count == 0:
            return []
        owner = ffi.gc(memory[0], lib.vhost_memory_unref)
        return [Chain(self, queue, self._taken[at], owner) for at in range(count)]

    # ---- within ----

    def _read_events(self) -> None:
        events = ffi.new("struct vhost_event[]", _EVENTS)
        for at in range(lib.vhost_events_read(self._events, events, _EVENTS)):
            queue: int = events[at].token
            if events[at].kind == lib.VHOST_EVENT_RECALL:
                self._recalled.add(queue)
                self._guard(self.recall, queue)
            elif queue in self.on_demand:
                self._recalled.discard(queue)
                self._guard(self.available, queue)
            else:
                self._serve(queue)

    def _guard(self, callback: Callable[[int], None], queue: int) -> None:
        try:
            callback(queue)
        except Exception as error:
            self._failed(queue, error)

    def _failed(self, queue: int, error: BaseException) -> None:
        self._log.warning("%s: queue %d: %r", self.name, queue, error)

    def _serve(self, queue: int) -> None:
        """One batch; another one comes in a later turn of the loop, so that others have theirs."""
        if queue in self._handling:
            return
        chains = self.take(queue)
        if not chains:
            return
        self._recalled.discard(queue)
        try:
            result = self.handle(queue, chains)
        except Exception as error:
            self._failed(queue, error)
            result = None
        if result is None:
            self._handled(queue, chains)
            return
        task = asyncio.ensure_future(result)
        self._handling[queue] = task
        task.add_done_callback(partial(self._task_done, queue, chains))

    def _task_done(self, queue: int, chains: list[Chain], task: asyncio.Future[None]) -> None:
        del self._handling[queue]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(queue, error)
        if self.native:
            self._handled(queue, chains)

    def _handled(self, queue: int, chains: list[Chain]) -> None:
        for chain in chains:
            if not chain.done:
                chain.complete(0)
        self._flush()
        self._loop.call_soon(self._serve, queue)

    def _complete(self, queue: int, chain: int, written: int) -> None:
        self._done[queue].append((chain, written))
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        for queue, done in enumerate(self._done):
            if not done:
                continue
            array = ffi.new("struct vhost_chain_done[]", done)
            _check(lib.vhost_batch_complete(self.native, queue, array, len(done)))
            done.clear()

    def _give_back(self, queue: int, chain: int) -> None:
        if queue not in self.on_demand and queue not in self._recalled:
            raise RuntimeError(f"queue {queue} is not one of chains on demand")
        _check(lib.vhost_batch_give_back(self.native, queue, chain))


def _view(base: Any, size: int, owner: Any) -> memoryview:
    """`size` bytes of guest memory, mapped for as long as the view or a slice of it lives."""
    start = ffi.gc(ffi.cast("char *", base), partial(_let_go, owner))
    return memoryview(ffi.buffer(start, size)).cast("B")


def _let_go(owner: Any, start: Any) -> None:
    """The destructor of a view's start: being its argument kept the owner alive until now."""


def _new(kind: str, make: Callable[[Any], int]) -> Any:
    out = ffi.new(kind)
    _check(make(out))
    return out[0]


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
