"""fio in the guest: command lines, and what its JSON says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from .qemu import Guest


@dataclass(frozen=True)
class FioResult:
    """What one job came to, reads and writes together."""

    iops: float
    bytes_per_second: float
    latency_mean_us: float
    latency_p99_us: float
    read_bytes: int
    written_bytes: int
    errors: int

    def as_json(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


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
    result = await guest.run(command, check=False)
    # Messages of fio's come before the JSON.
    start = result.output.find("{")
    if start < 0:
        raise ValueError(f"fio wrote no JSON (exit code {result.code}): {result.output}")
    (job,) = json.loads(result.output[start:])["jobs"]
    return parse(job, result.code)


def parse(job: dict[str, Any], code: int) -> FioResult:
    """The figures of a job; the speed and latency of a verify job are those of its writes."""
    read, write = job["read"], job["write"]
    main = write if write["total_ios"] else read
    percentiles = main["clat_ns"].get("percentile", {})
    return FioResult(
        iops=main["iops"],
        bytes_per_second=main["bw_bytes"],
        latency_mean_us=main["lat_ns"]["mean"] / 1000,
        latency_p99_us=percentiles.get("99.000000", 0) / 1000,
        read_bytes=read["io_bytes"],
        written_bytes=write["io_bytes"],
        errors=job["total_err"] if "total_err" in job else int(bool(job["error"] or code)),
    )
