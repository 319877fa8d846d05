"""What fio says of a job in JSON, as numbers. Works with --output-format=json and json+.

Only json+ has the latencies of all requests; without it they are summed up by fio alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

_PERCENTILES = {
    "latency_p50_us": "50.000000",
    "latency_p99_us": "99.000000",
    "latency_p999_us": "99.900000",
}


class FioOutputError(ValueError):
    """The output holds no results of a job; the message shows what fio said instead."""


@dataclass(frozen=True)
class FioResult:
    """What one job came to.

    Figures are those of the writes where there were any, else of the reads: a job that verifies
    what it wrote is as fast as its writes. One that reads and writes at once wants fio's
    ``unified_rw_reporting=1``, and then they are those of both, `read_bytes` too.

    `latency`: nanoseconds → requests, empty without json+. `corrupt`: those of the `errors` that
    were blocks with another content than was written.
    """

    iops: float
    bytes_per_second: float
    latency_mean_us: float
    latency_p50_us: float
    latency_p99_us: float
    latency_p999_us: float
    operations: int
    seconds: float
    read_bytes: int
    written_bytes: int
    errors: int
    corrupt: int
    latency: Mapping[int, int] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The figures by the names of perf.model.METRICS."""
        names = ("iops", "bytes_per_second", "latency_mean_us", *_PERCENTILES)
        return {name: getattr(self, name) for name in names}

    def as_json(self) -> dict[str, Any]:
        """All figures by name."""
        return asdict(self)


def parse(output: str, code: int = 0) -> FioResult:
    """The figures of the only job (or group) in fio's output, which may hold messages too.

    `code`: its exit code; one that fio reported no error for counts as an error. Raises
    FioOutputError.
    """
    start, end, found = _json(output)
    said = (output[:start] + output[end:]).strip()[-2000:]
    try:
        (job,) = found["jobs"]
        result = _result(job, code)
    except (LookupError, TypeError, ValueError) as error:
        raise FioOutputError(
            f"fio (exit code {code}) wrote no results of one job ({error!r}): {said}"
        ) from None
    if not result.operations:
        raise FioOutputError(f"fio (exit code {code}) did nothing: {said}")
    return result


def _json(output: str) -> tuple[int, int, Any]:
    """Where the JSON starts and ends, and what it is; messages may stand before and after it."""
    for line in re.finditer(r"^\{$", output, re.MULTILINE):
        with contextlib.suppress(json.JSONDecodeError):
            found, end = json.JSONDecoder().raw_decode(output, line.start())
            return line.start(), end, found
    return len(output), len(output), None


def _result(job: Mapping[str, Any], code: int) -> FioResult:
    used = [job[name] for name in ("mixed", "write", "read") if name in job]
    used = [direction for direction in used if direction["total_ios"]] or used[-1:]
    main = used[0]
    # Where the job says lat_percentiles=1 latencies are from before the submission.
    waits = main["lat_ns" if "percentile" in main["lat_ns"] else "clat_ns"]
    percentiles = waits.get("percentile", {})
    errors = max(job.get("total_err", 0), int(bool(job["error"] or code)))
    first = job.get("first_error") or job["error"]
    return FioResult(
        iops=main["iops"],
        bytes_per_second=main["bw_bytes"],
        latency_mean_us=main["lat_ns"]["mean"] / 1000,
        **{name: percentiles.get(key, 0) / 1000 for name, key in _PERCENTILES.items()},
        operations=sum(direction["total_ios"] for direction in used),
        # Writing and verifying come one after the other.
        seconds=sum(direction["runtime"] for direction in used) / 1000,
        read_bytes=job["read"]["io_bytes"] if "read" in job else main["io_bytes"],
        written_bytes=job["write"]["io_bytes"] if "write" in job else 0,
        errors=errors,
        corrupt=errors if first == errno.EILSEQ else 0,
        latency={int(floor): count for floor, count in waits.get("bins", {}).items()},
    )
