"""Catalogue, control plane 11-18: what a memory table may claim, and when it may change."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.frontend import wire
from tests.frontend.blk import S_OK, SECTOR, T_IN, BlkClient, header
from tests.frontend.memory import USER_BASE, GuestMemory, Region
from tests.frontend.ring import Desc
from tests.frontend.session import Refused
from tests.frontend.wire import Request, u64

from .target import (
    SPARE,
    Bad,
    Target,
    case,
    check_serves,
    expect_broken,
    expect_error_ack,
    expect_refusal,
    spare_ring,
    start_spare,
    submit_slow,
)

LETTERS = pytest.mark.parametrize("letter", ["ack", "close"])
FAR = 1 << 40
SIZE = 1 << 16
WRAP = (1 << 64) - 0x1000

OpenFd = Callable[[ExitStack, Path], int]


def held(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def memfd(stack: ExitStack, size: int = SIZE) -> int:
    fd = held(stack, os.memfd_create("bad", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.ftruncate(fd, size)
    return fd


def open_directory(stack: ExitStack, tmp: Path) -> int:
    return held(stack, os.open(tmp, os.O_RDONLY | os.O_DIRECTORY))


def open_null(stack: ExitStack, tmp: Path) -> int:
    return held(stack, os.open("/dev/null", os.O_RDWR))


def open_read_only(stack: ExitStack, tmp: Path) -> int:
    path = tmp / "file"
    path.write_bytes(bytes(SIZE))
    return held(stack, os.open(path, os.O_RDONLY))


def open_path_only(stack: ExitStack, tmp: Path) -> int:
    path = tmp / "file"
    path.write_bytes(bytes(SIZE))
    return held(stack, os.open(path, os.O_PATH))


def open_file(stack: ExitStack, tmp: Path) -> int:
    path = tmp / "file"
    path.write_bytes(bytes(SIZE))
    return held(stack, os.open(path, os.O_RDWR))


def open_pipe(stack: ExitStack, tmp: Path) -> int:
    reader, writer = os.pipe()
    held(stack, reader)
    return held(stack, writer)


def open_socket(stack: ExitStack, tmp: Path) -> int:
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    stack.enter_context(theirs)
    return theirs.fileno()


def open_eventfd(stack: ExitStack, tmp: Path) -> int:
    return held(stack, os.eventfd(0))


def open_sealed(stack: ExitStack, tmp: Path) -> int:
    fd = memfd(stack)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return fd


def each_fd(*kinds: OpenFd) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "kind",
        [
            pytest.param(kind, id="cp11-" + kind.__name__.removeprefix("open_").replace("_", "-"))
            for kind in kinds
        ],
    )


# ---- 11: the wrong kind of fd ----


@LETTERS
@pytest.mark.parametrize("how", ["table", "slot"])
@each_fd(
    open_directory,
    open_null,
    open_read_only,
    open_path_only,
    open_pipe,
    open_socket,
    open_eventfd,
    open_sealed,
)
def test_cp11_as_memory(
    victim: Target, tmp_path: Path, kind: OpenFd, how: str, letter: str
) -> None:
    with victim.client() as disk, ExitStack() as stack:
        fd = kind(stack, tmp_path)
        packed = wire.region(FAR, SIZE, USER_BASE + FAR, 0)
        if how == "slot":
            bad = Bad(Request.ADD_MEM_REG, wire.single_region(packed), [fd])
        else:
            regions = disk.memory.regions
            table = wire.mem_table([*(r.pack() for r in regions), packed])
            bad = Bad(Request.SET_MEM_TABLE, table, [*(r.fd for r in regions), fd])
        expect_refusal(disk, bad, letter)


@LETTERS
@pytest.mark.parametrize(
    "request_id", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]
)
@each_fd(open_directory, open_null, open_read_only, open_file, open_pipe, open_socket)
def test_cp11_as_eventfd(
    victim: Target, tmp_path: Path, kind: OpenFd, request_id: Request, letter: str
) -> None:
    with victim.client() as disk, ExitStack() as stack:
        disk.configure_ring(SPARE, spare_ring(disk, stack))
        bad = Bad(request_id, u64(SPARE), [kind(stack, tmp_path)])
        expect_refusal(disk, bad, letter)


@LETTERS
@each_fd(open_directory, open_null, open_read_only, open_pipe)
def test_cp11_as_backend_channel(victim: Target, tmp_path: Path, kind: OpenFd, letter: str) -> None:
    with victim.client() as disk, ExitStack() as stack:
        expect_refusal(disk, Bad(Request.SET_BACKEND_REQ_FD, b"", [kind(stack, tmp_path)]), letter)


# ---- 12-16: tables that cannot be true ----


def table(
    disk: BlkClient,
    regions: Iterable[tuple[int, int, int, int]],
    fds: list[int],
    *,
    count: int | None = None,
) -> Bad:
    payload = wire.mem_table((wire.region(*r) for r in regions), count=count)
    return Bad(Request.SET_MEM_TABLE, payload, fds)


def slot(region: tuple[int, int, int, int], fd: int) -> Bad:
    return Bad(Request.ADD_MEM_REG, wire.single_region(wire.region(*region)), [fd])


def honest(n: int) -> tuple[int, int, int, int]:
    at = FAR + n * (1 << 20)
    return at, SIZE, USER_BASE + at, 0


def counted(regions: int, claimed: int, fds: int) -> Callable[[BlkClient, ExitStack], Bad]:
    def build(disk: BlkClient, stack: ExitStack) -> Bad:
        opened = [memfd(stack) for _ in range(fds)]
        return table(disk, [honest(n) for n in range(regions)], opened, count=claimed)

    return build


def shaped(
    gpa: int, size: int, uva: int, offset: int, *, file_size: int = SIZE
) -> tuple[Callable[[BlkClient, ExitStack], Bad], Callable[[BlkClient, ExitStack], Bad]]:
    """The same region in a table and in a slot."""

    def in_table(disk: BlkClient, stack: ExitStack) -> Bad:
        return table(disk, [(gpa, size, uva, offset)], [memfd(stack, file_size)])

    def in_slot(disk: BlkClient, stack: ExitStack) -> Bad:
        return slot((gpa, size, uva, offset), memfd(stack, file_size))

    return in_table, in_slot


USER = USER_BASE + FAR
SHAPES = {
    "cp12-file-shorter-than-region": shaped(FAR, SIZE, USER, 0, file_size=SIZE - 4096),
    "cp12-file-shorter-by-one-byte": shaped(FAR, SIZE, USER, 0, file_size=SIZE - 1),
    "cp12-file-empty": shaped(FAR, SIZE, USER, 0, file_size=0),
    "cp14-size-0": shaped(FAR, 0, USER, 0),
    "cp14-gpa-plus-size-wraps": shaped(WRAP, 0x2000, USER, 0),
    "cp14-uva-plus-size-wraps": shaped(FAR, 0x2000, WRAP, 0),
    "cp14-offset-plus-size-wraps": shaped(FAR, 0x2000, USER, WRAP),
    "cp14-size-2-64-minus-1": shaped(FAR, (1 << 64) - 1, USER, 0),
    "cp14-size-2-63": shaped(FAR, 1 << 63, USER, 0),
    # Honest, and more than any process can map.
    "cp14-sparse-2-56": shaped(FAR, 1 << 56, USER, 0, file_size=1 << 56),
    "cp15-offset-beyond-the-file": shaped(FAR, SIZE, USER, 2 * SIZE),
    "cp15-offset-at-the-end": shaped(FAR, SIZE, USER, SIZE),
    "cp15-offset-plus-size-over-the-end": shaped(FAR, SIZE, USER, 4096),
    "cp15-offset-over-2-63": shaped(FAR, 0x1000, USER, (1 << 63) + 0x1000),
    "cp15-offset-2-63": shaped(FAR, 0x1000, USER, 1 << 63),
}


def overlapping(
    first: tuple[int, int], second: tuple[int, int]
) -> Callable[[BlkClient, ExitStack], Bad]:
    """Two regions given as (guest address, user address)."""

    def build(disk: BlkClient, stack: ExitStack) -> Bad:
        regions = [(gpa, SIZE, uva, 0) for gpa, uva in (first, second)]
        return table(disk, regions, [memfd(stack), memfd(stack)])

    return build


def same_twice(disk: BlkClient, stack: ExitStack) -> Bad:
    fd = memfd(stack)
    return table(disk, [honest(0), honest(0)], [fd, fd])


def slot_over(gpa: int, uva: int) -> Callable[[BlkClient, ExitStack], Bad]:
    """A slot beside the client's own two regions (0 and 4 GiB, 4 MiB each)."""
    return lambda disk, stack: slot((gpa, SIZE, uva, 0), memfd(stack))


def slot_again(disk: BlkClient, stack: ExitStack) -> Bad:
    region = disk.memory.regions[1]
    return Bad(Request.ADD_MEM_REG, wire.single_region(region.pack()), [region.fd])


def bad_payload(change: int) -> Callable[[BlkClient, ExitStack], Bad]:
    def build(disk: BlkClient, stack: ExitStack) -> Bad:
        good = table(disk, [honest(0), honest(1)], [memfd(stack), memfd(stack)])
        payload = good.payload + bytes(change) if change > 0 else good.payload[:change]
        return Bad(good.request, payload, good.fds)

    return build


@LETTERS
@pytest.mark.parametrize(
    "build",
    [
        case("cp13-nregions-0", counted(0, 0, 0)),
        case("cp13-nregions-0-with-an-fd", counted(0, 0, 1)),
        case("cp13-nregions-0-payload-of-1", counted(1, 0, 1)),
        case("cp13-nregions-9", counted(9, 9, 8)),
        case("cp13-nregions-33", counted(33, 33, 8)),
        case("cp13-nregions-2-32-minus-1", counted(1, 0xFFFFFFFF, 1)),
        case("cp13-nregions-2-27", counted(1, 1 << 27, 1)),
        case("cp13-more-fds-than-regions", counted(1, 1, 2)),
        case("cp13-fewer-fds-than-regions", counted(2, 2, 1)),
        case("cp13-payload-of-fewer-regions", counted(1, 2, 2)),
        case("cp13-payload-of-more-regions", counted(2, 1, 1)),
        case("cp13-payload-one-byte-more", bad_payload(1)),
        case("cp13-payload-one-byte-less", bad_payload(-1)),
        *(case(f"{name}-table", both[0]) for name, both in SHAPES.items()),
        *(case(f"{name}-slot", both[1]) for name, both in SHAPES.items()),
        case("cp16-gpa-overlap", overlapping((FAR, USER), (FAR + SIZE // 2, USER + 2 * SIZE))),
        case("cp16-gpa-last-byte", overlapping((FAR, USER), (FAR + SIZE - 1, USER + 2 * SIZE))),
        case("cp16-gpa-same", overlapping((FAR, USER), (FAR, USER + SIZE))),
        case("cp16-uva-overlap", overlapping((FAR, USER), (2 * FAR, USER + SIZE // 2))),
        case("cp16-uva-same", overlapping((FAR, USER), (2 * FAR, USER))),
        case("cp16-same-region-twice", same_twice),
        case("cp16-slot-gpa-overlap", slot_over(SIZE, USER)),
        case("cp16-slot-uva-overlap", slot_over(FAR, USER_BASE + SIZE)),
        case("cp16-slot-same-region-again", slot_again),
    ],
)
def test_refused_table(
    victim: Target, build: Callable[[BlkClient, ExitStack], Bad], letter: str
) -> None:
    with victim.client() as disk, ExitStack() as stack:
        expect_refusal(disk, build(disk, stack), letter)


def test_cp12_file_truncated_later(victim: Target) -> None:
    """Touching it is SIGBUS: the rings of this device may break, the process lives."""
    memory = GuestMemory.default()
    doomed = memory.add(Region(FAR, 1 << 20))
    with victim.client(memory=memory) as disk:
        disk.rings.append(disk.new_ring(region=doomed))
        disk.start_ring(SPARE, disk.rings[SPARE])
        check_serves(disk, SPARE)
        doomed.truncate(0)
        disk.rings[SPARE].kick()
        disk.rings[SPARE].wait_broken()
        disk.barrier()


# ---- 17: slots ----


def test_cp17_add_past_the_slots(victim: Target) -> None:
    with victim.client(slots=True) as disk, ExitStack() as stack:
        slots = disk.get_max_mem_slots()
        assert slots >= 509
        fd = memfd(stack)
        for n in range(slots - len(disk.memory.regions)):
            disk.do(Request.ADD_MEM_REG, slot(honest(n), fd).payload, [fd])
        expect_error_ack(disk, slot(honest(slots), fd))
        disk.do(Request.REM_MEM_REG, slot(honest(0), fd).payload)
        disk.do(Request.ADD_MEM_REG, slot(honest(slots), fd).payload, [fd])


def removed(change: tuple[int, int, int]) -> Callable[[BlkClient, ExitStack], Bad]:
    """REM of the second region with guest address, size and user address changed."""

    def build(disk: BlkClient, stack: ExitStack) -> Bad:
        region = disk.memory.regions[1]
        gpa, size, uva = change
        packed = wire.region(region.guest_addr + gpa, region.size + size, region.user_addr + uva, 0)
        return Bad(Request.REM_MEM_REG, wire.single_region(packed))

    return build


@LETTERS
@pytest.mark.parametrize(
    "build",
    [
        case("cp17-rem-unknown", lambda d, s: Bad(
            Request.REM_MEM_REG, wire.single_region(wire.region(*honest(0)))
        )),
        case("cp17-rem-size-0", removed((0, -(4 << 20), 0))),
        case("cp17-rem-first-half", removed((0, -4096, 0))),
        case("cp17-rem-second-half", removed((4096, -4096, 4096))),
        case("cp17-rem-longer", removed((0, 4096, 0))),
        case("cp17-rem-other-gpa", removed((4096, 0, 0))),
        case("cp17-rem-other-uva", removed((0, 0, 4096))),
    ],
)  # fmt: skip
def test_cp17_rem(
    victim: Target, build: Callable[[BlkClient, ExitStack], Bad], letter: str
) -> None:
    with victim.client(slots=True) as disk, ExitStack() as stack:
        expect_refusal(disk, build(disk, stack), letter)


def test_cp17_rem_ignores_the_offset(victim: Target) -> None:
    with victim.client(slots=True) as disk, Region(FAR, SIZE, offset=8192) as extra:
        disk.add_mem_reg(extra)
        packed = wire.region(extra.guest_addr, extra.size, extra.user_addr, 12345)
        disk.do(Request.REM_MEM_REG, wire.single_region(packed))
        with pytest.raises(Refused):
            disk.rem_mem_reg(extra)


def submit_reads(disk: BlkClient, region: Region, count: int, size: int) -> None:
    """`count` reads, headers and status outside `region`, data inside; one kick for all."""
    heads = []
    for n in range(count):
        request = header(T_IN, n * size // SECTOR)
        address = disk.memory.alloc(len(request) + 1, 16)
        disk.memory.write(address, request)
        data = disk.memory.alloc(size, 4096, region=region)
        heads.append(
            disk.ring.add(
                [
                    Desc(address, len(request)),
                    Desc(data, size, write=True),
                    Desc(address + len(request), 1, write=True),
                ]
            )
        )
    disk.ring.offer(*heads)
    disk.ring.kick()


def test_cp17_set_mem_table_with_io_in_flight(victim: Target) -> None:
    """A table that keeps the memory in use: everything in flight completes, each head once."""
    with victim.client(size=128) as disk, Region(FAR, SIZE) as extra:
        pending = submit_slow(disk)
        for _ in range(10):
            disk.set_mem_table([*disk.memory.regions, extra])
            disk.set_mem_table(disk.memory.regions)
        for request in pending:
            assert disk.finish(request).status == S_OK
        check_serves(disk)


def test_cp17_rem_with_io_in_flight(victim: Target) -> None:
    """After the acknowledgement nothing more is written into the removed region."""
    memory = GuestMemory.default()
    with victim.client(memory=memory, slots=True, size=256) as disk:
        extra = memory.add(Region(FAR, 4 << 20))
        disk.add_mem_reg(extra)
        submit_reads(disk, extra, 50, 64 * 1024)
        disk.rem_mem_reg(extra)
        extra.map[:] = b"\xaa" * extra.size
        for _ in range(20):
            disk.barrier()
        assert extra.map[:].count(b"\xaa") == extra.size
        # What was popped has completed; a request popped later met a hole, and broke the ring.
        served = 0
        while disk.ring.pop():
            served += 1
        if served < 50:
            expect_broken(disk)
        else:
            check_serves(disk)


# ---- 18: the region under a live ring ----


def test_cp18_rem_of_the_region_of_a_live_ring(victim: Target) -> None:
    memory = GuestMemory.default()
    home = memory.add(Region(FAR, 1 << 20))
    with victim.client(memory=memory, slots=True) as disk:
        ring = disk.new_ring(region=home)
        disk.rings.append(ring)
        disk.start_ring(SPARE, ring)
        check_serves(disk, SPARE)
        disk.rem_mem_reg(home)
        ring.wait_broken()
        check_serves(disk, 0)


def test_cp18_mem_table_without_the_region_of_a_live_ring(victim: Target) -> None:
    memory = GuestMemory.default()
    home = memory.add(Region(FAR, 1 << 20))
    with victim.client(memory=memory) as disk:
        ring = disk.new_ring(region=home)
        disk.rings.append(ring)
        disk.start_ring(SPARE, ring)
        check_serves(disk, SPARE)
        disk.set_mem_table([r for r in memory.regions if r is not home])
        ring.wait_broken()
        check_serves(disk, 0)


def test_cp18_ring_comes_back_with_its_region(victim: Target) -> None:
    memory = GuestMemory.default()
    home = memory.add(Region(FAR, 1 << 20))
    with victim.client(memory=memory, slots=True) as disk:
        ring = disk.new_ring(region=home)
        disk.rings.append(ring)
        disk.start_ring(SPARE, ring)
        disk.rem_mem_reg(home)
        ring.wait_broken()
        disk.add_mem_reg(home)
        disk.get_vring_base(SPARE)
        ring.reset()
        disk.rings.pop()
        start_spare(disk, ring)
        check_serves(disk, SPARE)


def test_cp16_reads_of_one_file_by_two_regions(victim: Target) -> None:
    """Legal: two regions of one file, apart in both address spaces (QEMU's below and above 4G)."""
    memory = GuestMemory.default()
    low = memory.add(Region(FAR, SIZE))
    os.ftruncate(low.fd, 2 * SIZE)
    memory.add(Region(2 * FAR, SIZE, offset=SIZE, fd=low.fd))
    with victim.client(memory=memory) as disk:
        pending = disk.submit(header(T_IN, 1), SECTOR + 1, region=memory.regions[-1])
        done = disk.finish(pending)
        assert (done.status, done.used) == (S_OK, SECTOR + 1)
        assert done.data == victim.image.read_bytes()[SECTOR : 2 * SECTOR]
