"""Which workloads and servers were asked for."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from perf import servers, tools
from perf.errors import PerfError
from perf.measuring import Plan
from perf.run import Options
from perf.suites import all_suites


def plan_of(names: Sequence[str], only: str = "") -> Plan:
    """The workloads of the named suites (all of them where none is named) that hold `only`.

    Raises PerfError for a suite that does not exist, or when nothing is left.
    """
    suites = all_suites()
    unknown = [name for name in names if name not in suites]
    if unknown:
        raise PerfError(f"there is no suite {unknown[0]!r}; there are: {', '.join(suites)}")
    plan = [
        (suite, [workload for workload in suite.workloads if only in workload.name])
        for name, suite in suites.items()
        if not names or name in names
    ]
    plan = [(suite, workloads) for suite, workloads in plan if workloads]
    if not plan:
        raise PerfError(f"no workload's name holds {only!r}")
    return plan


def know(options: Namespace) -> list[str]:
    """Takes up --tool and --plugin; returns the names of the plug-ins' servers.

    Raises PerfError.
    """
    for setting in options.tool:
        name, _, path = setting.partition("=")
        tools.name_path(name, path)
    known = set(servers.names())
    for plugin in options.plugin:
        servers.add_plugin(plugin)
    return [name for name in servers.names() if name not in known]


def chosen_servers(options: Namespace) -> tuple[list[str], list[str]]:
    """The servers asked for by --server, and those that no workload names of itself.

    Raises PerfError.
    """
    extra = know(options)
    listed = {n for suite in all_suites().values() for w in suite.workloads for n in w.servers}
    chosen: list[str] = []
    for setting in options.server:
        if "=" in setting:
            chosen.append(servers.add_variant(setting))
            extra.append(chosen[-1])
        else:
            chosen.append(servers.find(setting).name)
            if chosen[-1] not in [*listed, *extra]:
                extra.append(chosen[-1])
    return chosen, extra


def run_options(options: Namespace) -> Options:
    """How long and how often."""
    return Options(pairs=options.pairs, seconds=options.seconds, cpus=options.cpus)
