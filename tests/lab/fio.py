"""fio in the guest: its command lines."""

from __future__ import annotations

from perf.fio_output import FioResult, parse

from .qemu import Guest

__all__ = ["FioResult", "random", "verify"]

_COMMON = "--direct=1 --ioengine=libaio --iodepth=32 --group_reporting --output-format=json"


async def verify(guest: Guest, device: str, mib: int, *, bs: str = "4k-64k") -> FioResult:
    """Write all of an area in random order and read it back, every block checked by crc32c."""
    return await _run(
        guest,
        f"fio --name=verify --filename={device} --size={mib}M --rw=randwrite --bsrange={bs} "
        f"--verify=crc32c --do_verify=1 --verify_fatal=1 {_COMMON}",
    )


async def random(guest: Guest, device: str, *, rw: str, seconds: int, mib: int) -> FioResult:
    """Random 4 KiB requests, 32 at a time, for some seconds."""
    return await _run(
        guest,
        f"fio --name={rw} --filename={device} --size={mib}M --rw={rw} --bs=4k "
        f"--time_based --runtime={seconds} {_COMMON}",
    )


async def _run(guest: Guest, command: str) -> FioResult:
    """Raises FioOutputError, a ValueError."""
    result = await guest.run(command, check=False)
    return parse(result.output, result.code)
