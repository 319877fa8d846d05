"""An iothread: the native thread that owns queues, and how the event loop talks to it.

Theory of operation.  Every control message to a queue carries a token.  The iothread acts on its
messages in order and reports each token once through an event queue whose eventfd the event loop
watches; a future per token wakes the one who waits.  Giving up waiting does not take the message
back: the future stays until the report comes, so the bookkeeping is right even if the waiter was
cancelled.  The same event queue reports rings that broke by their guest's fault, and queues that
wait for a translation.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from vdev._native import ffi, lib

_EVENT_BATCH = 64
T = TypeVar("T")

_FAULTS: dict[int, str] = {
    value: name.removeprefix("VHOST_FAULT_").lower().replace("_", " ")
    for value, name in ffi.typeof("enum vhost_fault").elements.items()
}
_tokens = itertools.count(1)


def new_token() -> int:
    """A number that no other message or queue of this process has."""
    return next(_tokens)


class IOThread:
    """A native thread that serves rings; `start` it within a running event loop.

    poll_us: ceiling of the adaptive polling window in microseconds, 0 = never poll.
    cpu: the CPU to pin it to.  poll_always: never sleep, for a core of its own.
    """

    def __init__(
        self,
        poll_us: int = 32,
        cpu: int | None = None,
        io_uring: bool = True,
        poll_always: bool = False,
    ) -> None:
        self._config = ffi.new("struct vhost_iothread_config *")
        self._config.flags = (0 if io_uring else lib.VHOST_IOTHREAD_NO_IO_URING) | (
            lib.VHOST_IOTHREAD_POLL_ALWAYS if poll_always else 0
        )
        self._config.poll_max_us = poll_us
        self._config.cpu = -1 if cpu is None else cpu
        self._events: Any = None
        self._native: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # The arguments are held with the future: what they point to must outlive the message.
        self._pending: dict[int, tuple[asyncio.Future[int], tuple[Any, ...]]] = {}
        self._on_broken: dict[int, Callable[[str], None]] = {}
        self._on_miss: dict[int, Callable[[int, int], None]] = {}
        self.queues = 0  # running on this thread; new queues go where there are fewest

    def start(self) -> None:
        """Starts the thread and watches its events in the running loop. Raises OSError."""
        if self._native is not None:
            raise RuntimeError("this iothread is already running")
        loop = asyncio.get_running_loop()
        out = ffi.new("struct vhost_events **")
        _check(lib.vhost_events_new(out), "events of an iothread")
        events = ffi.gc(out[0], lib.vhost_events_free)
        thread = ffi.new("struct vhost_iothread **")
        _check(lib.vhost_iothread_new(self._config, events, thread), "iothread")
        self._events, self._native, self._loop = events, thread[0], loop
        loop.add_reader(lib.vhost_events_fd(events), self._read_events)

    async def close(self) -> None:
        """Ends the thread, when the messages under way are done. Raises OSError (EBUSY) while
        queues run on it."""
        if self._native is None:
            return
        while self._pending:
            await asyncio.wait([future for future, _ in self._pending.values()])
        if self._native is None:
            return
        _check(lib.vhost_iothread_free(self._native), "iothread that is being closed")
        assert self._loop is not None
        self._loop.remove_reader(lib.vhost_events_fd(self._events))
        self._native = None
        ffi.release(self._events)
        self._events = None
        self._on_broken.clear()
        self._on_miss.clear()

    async def call(self, fn: Callable[..., int], *args: Any) -> int:
        """Posts `fn(*args, token)` and returns the value that the iothread reports for it.

        Raises OSError where posting or the message itself failed.  Cancelling the waiter does not
        cancel the message.
        """
        assert self._loop is not None, "the iothread is not running"
        token = new_token()
        future: asyncio.Future[int] = self._loop.create_future()
        self._pending[token] = (future, args)
        result = fn(*args, token)
        if result < 0:
            del self._pending[token]
            raise OSError(-result, os.strerror(-result))
        return await asyncio.shield(future)

    def on_broken(self, token: int, callback: Callable[[str], None]) -> None:
        """Has `callback(fault)` called, once, if the queue with this token breaks."""
        self._on_broken[token] = callback

    def on_miss(self, token: int, callback: Callable[[int, int], None]) -> None:
        """Has `callback(iova, access)` called when the queue with this token lacks a translation,
        for which it waits."""
        self._on_miss[token] = callback

    def forget(self, token: int) -> None:
        """Takes back `on_broken` and `on_miss`."""
        self._on_broken.pop(token, None)
        self._on_miss.pop(token, None)

    @property
    def native(self) -> Any:
        """The `struct vhost_iothread *`."""
        return self._native

    @property
    def has_io_uring(self) -> bool:
        return bool(lib.vhost_iothread_has_io_uring(self._native))

    @property
    def tid(self) -> int:
        """The kernel's id of the thread."""
        return int(lib.vhost_iothread_tid(self._native))

    def stats(self) -> dict[str, int]:
        """Wake-ups since the start, and the present polling window in nanoseconds."""
        out = ffi.new("struct vhost_iothread_stats *")
        lib.vhost_iothread_read_stats(self._native, out)
        return {"wakeups": out.wakeups, "poll_ns": out.poll_ns, "queues": self.queues}

    def _read_events(self) -> None:
        for event in read_events(self._events):
            if event.kind == lib.VHOST_EVENT_DONE:
                self._done(event.token, event.result, event.value)
            elif event.kind == lib.VHOST_EVENT_MISS:
                if missed := self._on_miss.get(event.token):
                    missed(event.value, event.result)
            elif callback := self._on_broken.pop(event.token, None):
                callback(_FAULTS.get(event.value, f"fault {event.value}"))

    def _done(self, token: int, result: int, value: int) -> None:
        future, _ = self._pending.pop(token)
        if result < 0:
            future.set_exception(OSError(-result, os.strerror(-result)))
            future.exception()  # nobody need be waiting any more
        else:
            future.set_result(value)


def read_events(events: Any) -> Iterator[Any]:
    """All that has come to a `struct vhost_events *`, each until the next is asked for."""
    batch = ffi.new("struct vhost_event[]", _EVENT_BATCH)
    count = _EVENT_BATCH
    while count == _EVENT_BATCH:
        count = lib.vhost_events_read(events, batch, _EVENT_BATCH)
        for at in range(count):
            yield batch[at]


async def settle(task: asyncio.Future[T]) -> T:
    """Waits for `task` to its end, whatever happens to the waiter, whose cancellation comes after.

    For what must not be left half done: the owner frees what the task still uses.
    """
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, os.strerror(-result), what)
