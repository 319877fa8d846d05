"""The suites, a file each: workloads times servers, as data. Every module's ``SUITE`` is known."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from perf.model import Suite


@cache
def all_suites() -> Mapping[str, Suite]:
    """The suites by name, in the order of their names."""
    modules = (
        importlib.import_module(f"{__name__}.{found.name}")
        for found in pkgutil.iter_modules(__path__)
    )
    return {module.SUITE.name: module.SUITE for module in modules}
