"""A loop of one's own, which runs only while one of its steps does.

The lab is asynchronous, a measurement is not: between two windows nothing of this process may
run. However a step is cut short (Ctrl-C, a signal handler that raises), what it was doing is
cancelled and has ended before the exception goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Steps:
    """A context manager; what was entered by `enter` is left in reverse order at its end."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._entered = contextlib.AsyncExitStack()
        self._task: asyncio.Task[Any] | None = None

    def run(self, step: Coroutine[Any, Any, T]) -> T:
        """Runs a step to its end."""
        try:
            return self._runner.run(self._watched(step))
        except BaseException:
            if self._task and not self._task.done():
                # The exception came from beside the task, which knows nothing of it.
                self._task.cancel()
                self._runner.run(_ended(self._task))
            raise
        finally:
            self._task = None

    async def _watched(self, step: Coroutine[Any, Any, T]) -> T:
        self._task = asyncio.current_task()
        return await step

    def enter(self, context: AbstractAsyncContextManager[T]) -> T:
        """Enters a context, to be left at the end."""
        return self.run(self._entered.enter_async_context(context))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.run(self._entered.aclose())
        finally:
            self._runner.close()


async def _ended(task: asyncio.Task[Any]) -> None:
    await asyncio.wait([task])
