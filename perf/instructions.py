"""``python -m perf.instructions``: instructions a request in libvhost, counted by callgrind.

A count does not depend on what else the machine does, so that a change of one percent shows. What
is counted, and what is not, is told by native/bench/ring_cost.c, which runs the requests.

Each scenario runs twice, with n and with 2n requests; the difference is what n requests take, and
whatever happens once is not in it.

A count depends on the compiler, its flags and the libraries, so only counts with an equal
`Toolchain` may be compared. It does not depend on the CPU: libc chooses its memset and memcpy by
what the CPU can do, and is told here that it can do nothing but what every x86-64 can. So these
cost more in the counts than they do in life (memset of 4 KiB: 461 instructions; with AVX2, half of
that). System calls and readings of the clock cost next to nothing in the counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from perf.errors import PerfError
from perf.tools import find_tool

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "perf" / "bench"
PROGRAM = BUILD / "native" / "bench" / "ring_cost"
REQUESTS = 6400  # whole turns of the benchmark's rings, and of its batches
TIMEOUT_SECONDS = 120

# What libc is not to look for in the CPU.
CPU_FEATURES = ("AVX2", "AVX512VL", "ERMS", "FSRM", "SSSE3", "AVX_Fast_Unaligned_Load")
# The whole environment of a counted run.
ENVIRONMENT = {
    "PATH": os.defpath,
    "LD_BIND_NOW": "1",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=" + ",".join(f"-{name}" for name in CPU_FEATURES),
}
CALLGRIND = (
    *("--tool=callgrind", "--command-line-only=yes", "--vgdb=no", "--quiet"),
    *("--toggle-collect=counted", "--toggle-collect=uncounted"),
    *("--compress-strings=no", "--compress-pos=no", "--dump-line=no"),
)


class UnknownScenario(PerfError):
    """A scenario that the benchmark does not have; the message names those that it has."""


class BenchmarkFailed(PerfError):
    """The benchmark cannot be built or does not run; the message is what was said of it."""


@dataclass(frozen=True)
class Toolchain:
    """What a count depends on beside the source. Counts compare if these are equal."""

    compiler: str
    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    machine: str


@dataclass(frozen=True)
class Instructions:
    """Instructions a request by scenario, and of each how many each function took itself."""

    toolchain: Toolchain
    per_request: Mapping[str, float]
    functions: Mapping[str, Mapping[str, float]]  # most expensive first; sums are per_request


def measure(
    scenarios: Iterable[str] | None = None, progress: Callable[[str], None] | None = None
) -> Instructions:
    """Counts the scenarios (all of them), building the benchmark if need be.

    Raises ToolMissing, UnknownScenario or BenchmarkFailed.
    """
    valgrind = find_tool("valgrind")
    if progress:
        progress("building the benchmark")
    toolchain = _build()
    known = _run(str(PROGRAM), "--list").split()
    wanted = known if scenarios is None else list(dict.fromkeys(scenarios))
    for name in wanted:
        if name not in known:
            raise UnknownScenario(f"no scenario {name}: there are {', '.join(known)}")
    functions: dict[str, dict[str, float]] = {}
    per_request: dict[str, float] = {}
    for name in wanted:
        if progress:
            progress(name)
        twice = _count(valgrind, name, 2 * REQUESTS)
        twice.subtract(_count(valgrind, name, REQUESTS))
        by_cost = sorted(twice.items(), key=lambda item: (-item[1], item[0]))
        functions[name] = {function: n / REQUESTS for function, n in by_cost if n}
        per_request[name] = twice.total() / REQUESTS
    return Instructions(toolchain, per_request, functions)


def _run(*command: str, environment: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkFailed(f"{' '.join(command)}: no end after {TIMEOUT_SECONDS} s") from None
    if done.returncode:
        said = (done.stdout + done.stderr).strip()
        raise BenchmarkFailed(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
    return done.stdout


@cache
def _build() -> Toolchain:
    """Builds the benchmark, with libvhost as vdev has it.

    All is built anew, so that the compiler of today is the one that has compiled it.
    """
    meson = (sys.executable, "-m", "mesonbuild.mesonmain")
    # ninja is where meson is, in the interpreter's environment.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    environment = {**os.environ, "PATH": path}
    options = ["-Dpython=false", "-Dbuildtype=release"]
    if (BUILD / "build.ninja").exists():
        options.append("--wipe")
    _run(*meson, "setup", str(BUILD), str(ROOT), *options, environment=environment)
    _run(*meson, "compile", "-C", str(BUILD), "-j2", "ring_cost", environment=environment)
    asked = ("--compilers", "--dependencies", "--targets")
    told = json.loads(_run(*meson, "introspect", str(BUILD), *asked, environment=environment))
    compiler = told["compilers"]["host"]["c"]
    parameters = next(
        source["parameters"]
        for target in told["targets"]
        if (target["name"], target["type"]) == ("vhost", "static library")
        for source in target["target_sources"]
        if "compiler" in source
    )
    return Toolchain(
        compiler=f"{compiler['id']} {compiler['version']} ({compiler['full_version']})",
        # Where files lie, and what is warned of, makes no difference to the code.
        flags=tuple(p for p in parameters if not p.startswith(("-I", "-W", "-fdiagnostics"))),
        libraries=(
            " ".join(platform.libc_ver()),
            *(
                f"{d['name']} {d['version']}"
                for d in told["dependencies"]
                if d["name"] == "liburing"
            ),
        ),
        machine=platform.machine(),
    )


def _count(valgrind: str, scenario: str, requests: int) -> Counter[str]:
    """The instructions of a run by function, each without those that it calls."""
    with tempfile.TemporaryDirectory(prefix="perf-") as directory:
        out = Path(directory) / "callgrind.out"
        _run(
            *(valgrind, *CALLGRIND, f"--callgrind-out-file={out}"),
            *(str(PROGRAM), scenario, str(requests)),
            environment=ENVIRONMENT,
        )
        counts, total = parse(out.read_text().splitlines())
    if counts.total() != total or total == 0:
        raise BenchmarkFailed(f"callgrind's output does not add up: {counts.total()} of {total}")
    return counts


def parse(lines: Iterable[str]) -> tuple[Counter[str], int]:
    """A callgrind profile without compression: instructions by function, and their total."""
    counts: Counter[str] = Counter()
    function = ""
    total = 0
    inclusive = False  # the line after a call is what it cost, which the callee has already
    for line in lines:
        if line.startswith("fn="):
            function = line.removeprefix("fn=")
        elif line.startswith("totals:"):
            total = int(line.removeprefix("totals:"))
        elif line.startswith("calls="):
            inclusive = True
        elif line[:1].isdigit():
            if not inclusive:
                counts[function] += int(line.split()[1])
            inclusive = False
    return counts, total


def show(counted: Instructions, top: int) -> str:
    """A line a scenario, and below it its most expensive functions."""
    lines = []
    for name, cost in counted.per_request.items():
        lines.append(f"{name:26}{cost:10.1f}")
        functions = list(counted.functions[name].items())[:top]
        lines.extend(f"    {function:30}{n:10.1f}" for function, n in functions)
    toolchain = counted.toolchain
    lines.append(f"{', '.join((toolchain.compiler, *toolchain.libraries, toolchain.machine))}")
    lines.append(" ".join(toolchain.flags))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perf.instructions",
        description="Instructions a request in libvhost, counted by callgrind.",
    )
    parser.add_argument("scenario", nargs="*", help="what to count (everything)")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="show N functions of each")
    parser.add_argument("--json", action="store_true", help="print all that was counted, as JSON")
    options = parser.parse_args(argv)
    try:
        counted = measure(options.scenario or None)
    except PerfError as error:
        print(f"perf: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(counted), indent=2) if options.json else show(counted, options.top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
