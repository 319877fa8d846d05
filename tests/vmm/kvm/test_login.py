"""Debian's userland on a disk of ours, used as a person does: by a login on the console."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tests.lab import rootfs
from tests.lab.image import copy
from tests.lab.innermost import Material
from tests.lab.process import run
from tests.vmm.kvm.guest import config_of, started
from vdev.vmm.api import End, Outcome
from vdev.vmm.config import DiskConfig

_PROMPT = b"root@guest:~# "


@pytest.mark.long
@pytest.mark.parametrize(("flavour", "transport"), [("generic", "pci"), ("cloud", "mmio")])
async def test_root_logs_in_on_the_console(
    material: Material, tools: Path, tmp_path: Path, flavour: str, transport: str
) -> None:
    image = await copy(tools, tmp_path / "root.img")
    config = config_of(
        getattr(material, flavour),
        transport=transport,
        console="virtio",
        disks=(DiskConfig(str(image)),),
    )
    words = "console=hvc0 quiet panic=-1 root=/dev/vda rw init=/sbin/login-init"
    async with started(dataclasses.replace(config, cmdline=words)) as guest:
        for password, answer in (("guess", b"Login incorrect"), (rootfs.PASSWORD, _PROMPT)):
            await guest.until(b"login: ")
            await guest.type(b"root\n")
            await guest.until(b"Password: ")
            await guest.type(f"{password}\n".encode())
            said = await guest.until(answer)
            assert password.encode() not in said

        await guest.type(b"id -un; tty; findmnt -no SOURCE,FSTYPE,OPTIONS /\n")
        said = await guest.until(_PROMPT)
        assert re.search(rb"root\r\n/dev/hvc0\r\n/dev/vda +ext4 +rw", said), said
        # It has job control: what is in the foreground hears of Ctrl-C, and the shell does not.
        await guest.type(b"sed -u 's/.*/<&>/'\nis there\n")
        await guest.until(b"<is there>\r\n")
        await guest.type(b"\x03")
        await guest.until(_PROMPT)
        await guest.type(b'echo "$? kept" >kept; exit\n')
        assert await guest.end() == Outcome(End.SHUTDOWN)
    assert await run("debugfs", "-R", "cat /root/kept", image) == b"130 kept\n"
    await run("e2fsck", "-fn", image)
