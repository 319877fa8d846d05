"""The console (virtio 1.3, section 5.3): one port, whose input queue is 0 and output queue 1.

Neither side can make the other's memory grow.  Input that the driver has no buffers for waits up
to `INPUT_MOST` bytes, and `feed` says what it took.  Output goes to `output` in pieces straight out
of the driver's buffers: while the host's side is paused they are not taken, and the driver waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from vdev._native import ffi, lib
from vdev.errors import PeerError, UserError
from vdev.iothread import IOThread
from vdev.virtio.batch import BATCH, BatchDevice, Chain
from vdev.virtio.spec import RING_FEATURES

INPUT, OUTPUT = 0, 1
INPUT_MOST = 64 << 10
PIECE = 64 << 10
PIECES_A_TURN = 8
SIZE_MOST = 0xFFFF

Output = Callable[[bytes], None]


class ConsoleDevice(BatchDevice):
    """A virtio-console device of one port.

    output: is given what the guest writes, in pieces of at most `PIECE` bytes; see `attach`.
    keep_unread: while no `output` is attached the guest waits; otherwise what it writes is dropped,
        and counted in `dropped`, in bytes.
    """

    device_id = lib.VIRTIO_ID_CONSOLE
    on_demand = frozenset({INPUT, OUTPUT})
    features = (
        RING_FEATURES | 1 << lib.VIRTIO_CONSOLE_F_SIZE | 1 << lib.VIRTIO_CONSOLE_F_EMERG_WRITE
    )

    def __init__(
        self,
        *,
        iothreads: Sequence[IOThread],
        name: str = "console",
        output: Output | None = None,
        keep_unread: bool = False,
    ) -> None:
        self.name = name
        self.dropped = 0
        self._output = output
        self._keep_unread = keep_unread
        self._paused = False
        self._sending: Chain | None = None  # a chain of which a part was put out
        self._sent = 0
        self._finish = False  # that chain's queue is stopping
        self._output_turn: asyncio.Handle | None = None
        self._input_turn: asyncio.Handle | None = None
        self._input = bytearray()
        self._input_moved = asyncio.Event()
        self._columns = self._rows = 0
        super().__init__(2, iothreads)

    # ---- the host's side ----

    def attach(self, output: Output | None) -> None:
        """Gives what the guest writes from here on to `output`; None detaches."""
        self._output = output
        self._drop_what_stops()
        self._put_out()

    def pause_output(self) -> None:
        """The host's side takes no more, until `resume_output`: the guest waits."""
        self._paused = True
        self._drop_what_stops()

    def resume_output(self) -> None:
        self._paused = False
        self._put_out()

    def feed(self, data: bytes) -> int:
        """Input for the guest. Returns how many bytes of `data` were taken: maybe not all."""
        taken = data[: INPUT_MOST - len(self._input)]
        self._input += taken
        self._put_in()
        return len(taken)

    async def send(self, data: bytes) -> None:
        """Feeds all of `data`, waiting for the guest. Raises BrokenPipeError when closed."""
        while data := data[self.feed(data) :]:
            self._input_moved.clear()
            await self._input_moved.wait()
            if not self.native:
                raise BrokenPipeError(f"{self.name}: the console is closed")

    def resize(self, columns: int, rows: int) -> None:
        """Tells the guest the size of the terminal, in characters. Raises UserError."""
        if not (0 <= columns <= SIZE_MOST and 0 <= rows <= SIZE_MOST):
            raise UserError(f"console of {columns} x {rows}: at most {SIZE_MOST} each")
        if (columns, rows) != (self._columns, self._rows):
            self._columns, self._rows = columns, rows
            self.notify_config()

    # ---- the device ----

    def config(self) -> bytes:
        """struct virtio_console_config."""
        space = ffi.new("struct virtio_console_config *")
        space.cols, space.rows, space.max_nr_ports = self._columns, self._rows, 1
        return bytes(ffi.buffer(space))

    def write_config(self, offset: int, data: bytes) -> None:
        """A character by emergency write (5.3.4), which a driver may do at any time."""
        field = ffi.offsetof("struct virtio_console_config", "emerg_wr")
        if offset != field or not data:
            raise PeerError(f"{self.name}: only the emergency write field may be written")
        self._emit(data[:1])

    def available(self, queue: int) -> None:
        if queue == INPUT:
            self._put_in()
        else:
            self._put_out()

    def recall(self, queue: int) -> None:
        """What was put out in part cannot go back; while nobody reads its rest is dropped."""
        if queue == OUTPUT and self._sending is not None:
            self._finish = True
            self._drop_what_stops()

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "console",
            "attached": self._output is not None,
            "dropped": self.dropped,
            "input_waiting": len(self._input),
        }

    def close(self) -> None:
        for turn in (self._input_turn, self._output_turn):
            if turn is not None:
                turn.cancel()
        super().close()
        self._input_moved.set()

    # ---- within ----

    def _put_in(self) -> None:
        if self._input_turn is not None:
            self._input_turn.cancel()
            self._input_turn = None
        for _ in range(BATCH):
            if not self._input:
                break
            chains = self.take(INPUT, 1)
            if not chains:
                return
            count = chains[0].write(bytes(self._input[: chains[0].writable_len]))
            chains[0].complete()
            del self._input[:count]
            if count:
                self._input_moved.set()
        if self._input:
            self._input_turn = self._loop.call_soon(self._put_in)

    def _put_out(self) -> None:
        if self._output_turn is not None:
            self._output_turn.cancel()
            self._output_turn = None
        for _ in range(PIECES_A_TURN):
            if self._holds_back():
                return
            if self._sending is None:
                chains = self.take(OUTPUT, 1)
                if not chains:
                    return
                self._sending, self._sent, self._finish = chains[0], 0, False
            data = self._sending.read(PIECE)
            self._sent += len(data)
            if self._sent == self._sending.readable_len:
                self._end_sending()
            if data:
                self._emit(data)
        self._output_turn = self._loop.call_soon(self._put_out)

    def _holds_back(self) -> bool:
        return self._paused or (self._output is None and self._keep_unread)

    def _end_sending(self) -> None:
        assert self._sending is not None
        self._sending.complete(0)
        self._sending = None

    def _drop_what_stops(self) -> None:
        if self._sending is not None and self._finish and self._holds_back():
            self.dropped += self._sending.readable_len - self._sent
            self._end_sending()

    def _emit(self, data: bytes) -> None:
        if self._output is None or self._paused:
            self.dropped += len(data)
            return
        try:
            self._output(data)
        except Exception as error:
            self._log.warning("%s: its output ends: %r", self.name, error)
            self._output = None
            self.dropped += len(data)
