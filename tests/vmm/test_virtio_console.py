"""The console: bytes in, bytes out, and no more memory than is allowed."""

from __future__ import annotations

import asyncio
import struct

import pytest

from tests.frontend.ring import Desc
from tests.vmm.served import SIZE, Served, threads
from vdev._native import lib
from vdev.errors import PeerError, UserError
from vdev.vmm.devices.console import INPUT, INPUT_MOST, OUTPUT, PIECE, ConsoleDevice


class Screen:
    """What the guest wrote, and a way to wait for it."""

    def __init__(self) -> None:
        self.text = b""
        self.pieces: list[int] = []
        self._moved = asyncio.Event()

    def __call__(self, data: bytes) -> None:
        self.text += data
        self.pieces.append(len(data))
        self._moved.set()

    async def shows(self, text: bytes) -> None:
        while self.text != text:
            self._moved.clear()
            await self._moved.wait()


async def test_output_arrives_in_order() -> None:
    screen = Screen()
    async with Served(ConsoleDevice(iothreads=threads(), output=screen)) as served:
        for line in (b"login: ", b"root\n"):
            assert await served.request(OUTPUT, served.data(line)) == 0
        assert await served.request(OUTPUT, served.data(b"# "), served.data(b"exit")) == 0
        assert screen.text == b"login: root\n# exit"


async def test_input_arrives_in_order() -> None:
    device = ConsoleDevice(iothreads=threads())
    async with Served(device) as served:
        assert device.feed(b"before there are buffers ") == 25
        buffers = [served.room(16) for _ in range(3)]
        for buffer in buffers:
            served.submit(INPUT, buffer)
        assert (await served.used(INPUT)).len == 16
        assert (await served.used(INPUT)).len == 9
        assert device.feed(b"and after") == 9
        assert (await served.used(INPUT)).len == 9
        assert served.content(buffers[0]) == b"before there are"
        assert served.content(buffers[1], size=9) == b" buffers "
        assert served.content(buffers[2], size=9) == b"and after"


async def test_input_is_bounded_and_sending_waits() -> None:
    device = ConsoleDevice(iothreads=threads())
    text = bytes(range(256)) * 1024
    async with Served(device) as served:
        assert device.feed(text) == INPUT_MOST
        assert device.feed(text) == 0
        sending = asyncio.ensure_future(device.send(text[INPUT_MOST:]))
        got = b""
        while len(got) < len(text):
            room = served.room(4096)
            length = await served.request(INPUT, room)
            got += served.content(room, size=length)
            served.release([room])
            assert device.describe()["input_waiting"] <= INPUT_MOST
        assert got == text
        await sending


async def test_sending_ends_with_the_console() -> None:
    device = ConsoleDevice(iothreads=threads())
    device.feed(bytes(INPUT_MOST))
    sending = asyncio.ensure_future(device.send(b"more"))
    await asyncio.sleep(0)
    device.close()
    with pytest.raises(BrokenPipeError):
        await sending


async def test_a_guest_waits_while_the_host_is_paused() -> None:
    screen = Screen()
    device = ConsoleDevice(iothreads=threads(), output=screen)
    async with Served(device) as served:
        device.pause_output()
        for _ in range(SIZE):
            served.submit(OUTPUT, served.data(b"x"))
        assert await served.stop() == [0, 0]  # nothing was taken, and nothing holds the stop up
        assert screen.text == b""
        await served.start()
        device.resume_output()
        await screen.shows(b"x" * SIZE)
        for _ in range(SIZE):
            await served.used(OUTPUT)
        assert device.dropped == 0


async def test_output_without_a_reader() -> None:
    device = ConsoleDevice(iothreads=threads())
    async with Served(device) as served:
        assert await served.request(OUTPUT, served.data(b"lost")) == 0
        assert device.dropped == 4
        screen = Screen()
        device.attach(screen)
        await served.request(OUTPUT, served.data(b"seen"))
        device.attach(None)
        await served.request(OUTPUT, served.data(b"lost"))
        assert (screen.text, device.dropped) == (b"seen", 8)


async def test_output_that_is_kept_until_there_is_a_reader() -> None:
    device = ConsoleDevice(iothreads=threads(), keep_unread=True)
    async with Served(device) as served:
        served.submit(OUTPUT, served.data(b"kept"))
        screen = Screen()
        await served.stop()
        await served.start()
        device.attach(screen)
        await screen.shows(b"kept")
        await served.used(OUTPUT)
        assert device.dropped == 0


async def test_an_output_that_fails_is_detached(caplog: pytest.LogCaptureFixture) -> None:
    def fail(data: bytes) -> None:
        raise OSError("the terminal is gone")

    device = ConsoleDevice(iothreads=threads(), output=fail)
    async with Served(device) as served:
        for _ in range(20):
            await served.request(OUTPUT, served.data(b"x"))
        assert device.dropped == 20
        assert len(caplog.records) == 1
        assert not device.describe()["attached"]


async def test_a_request_of_many_megabytes_comes_in_pieces() -> None:
    got = 0

    def output(data: bytes) -> None:
        nonlocal got
        assert 0 < len(data) <= PIECE
        got += len(data)

    async with Served(ConsoleDevice(iothreads=threads(), output=output)) as served:
        high = served.memory.regions[1]
        chain = [Desc(high.guest_addr, high.size)] * 8
        await served.request(OUTPUT, *chain)
        assert got == 8 * high.size


async def test_a_stop_in_the_middle_of_a_request_drops_its_rest() -> None:
    got = 0

    def output(data: bytes) -> None:
        nonlocal got
        got += len(data)
        device.pause_output()

    device = ConsoleDevice(iothreads=threads(), output=output)
    async with Served(device) as served:
        served.submit(OUTPUT, served.data(bytes(3 * PIECE)))
        served.submit(OUTPUT, served.data(b"next"))
        while not got:
            await asyncio.wait([asyncio.ensure_future(asyncio.sleep(0))])
        assert await served.stop() == [0, 1]
        assert (got, device.dropped) == (PIECE, 2 * PIECE)
        await served.start()
        device.resume_output()
        await served.used(OUTPUT)
        await served.used(OUTPUT)
        assert got == PIECE + 4


async def test_chains_in_the_wrong_direction() -> None:
    screen = Screen()
    device = ConsoleDevice(iothreads=threads(), output=screen)
    async with Served(device) as served:
        assert await served.request(OUTPUT, served.room(16)) == 0
        assert await served.request(OUTPUT, served.data(b"ok"), served.room(16)) == 0
        assert screen.text == b"ok"
        wrong = served.data(b"readable")
        for _ in range(SIZE - 1):
            served.submit(INPUT, wrong)
        room = served.room(8)
        served.submit(INPUT, room)
        device.feed(b"input")
        assert {(await served.used(INPUT)).len for _ in range(SIZE - 1)} == {0}
        assert (await served.used(INPUT)).len == 5
        assert served.content(wrong, room, size=13) == b"readableinput"


async def test_the_size_of_the_terminal() -> None:
    device = ConsoleDevice(iothreads=threads())
    told: list[bytes] = []
    device.config_changed.append(lambda: told.append(device.config()))
    device.resize(132, 50)
    device.resize(132, 50)
    assert told == [struct.pack("<HHII", 132, 50, 1, 0)]
    assert device.features >> lib.VIRTIO_CONSOLE_F_SIZE & 1
    for size in ((-1, 0), (0, 65536)):
        with pytest.raises(UserError, match="console of"):
            device.resize(*size)
    device.close()


async def test_the_configuration_space_takes_emergencies_only() -> None:
    screen = Screen()
    device = ConsoleDevice(iothreads=threads(), output=screen)
    device.write_config(8, struct.pack("<I", 0x41))
    device.write_config(8, b"B")
    assert screen.text == b"AB"
    for offset, data in ((0, b"\1\0"), (4, b"\1\0\0\0"), (9, b"C"), (8, b"")):
        with pytest.raises(PeerError):
            device.write_config(offset, data)
    device.pause_output()
    device.write_config(8, b"C")
    assert (screen.text, device.dropped) == (b"AB", 1)
    device.close()
