"""The lab's own promises: what it says when a guest or a server dies."""

from __future__ import annotations

import signal

import pytest

from tests.lab.lab import Lab
from tests.lab.process import ProcessError
from tests.lab.qemu import GuestError

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_panic_is_reported_with_the_console(lab: Lab) -> None:
    root = lab.blk("panic-root", await lab.root_image())
    async with lab.serving(root), lab.boot([root]) as guest:
        with pytest.raises(GuestError, match="Kernel panic"):
            await guest.run("echo c >/proc/sysrq-trigger")


async def test_a_disk_without_a_file_system_is_reported_with_the_console(lab: Lab) -> None:
    root = lab.blk("empty-root", lab.blank("empty-root", 1 << 20))
    async with lab.serving(root):
        with pytest.raises(GuestError, match="cannot be mounted"):
            async with lab.boot([root]):
                pass


async def test_a_dead_server_ends_the_guest_and_is_reported(lab: Lab) -> None:
    root = lab.blk("dead-root", await lab.root_image())

    async def use() -> None:
        async with lab.serving(root) as server, lab.boot([root]) as guest:
            server.process.signal(signal.SIGKILL)
            # Never answered: the guest has nothing more to wait for.
            await guest.run("echo 3 >/proc/sys/vm/drop_caches; sleep infinity")

    # The server's end is the cause, the guest's only follows from it.
    with pytest.raises(ProcessError, match="before it was told to") as caught:
        await use()
    assert isinstance(caught.value.__context__, GuestError)
