"""Sockets between host and guest: streams each way, through halves that close one by one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from pathlib import Path

import pytest

from tests.lab.innermost import Material
from tests.vmm.kvm.guest import booted, config_of, within
from vdev.vmm.config import DiskConfig, VsockConfig

CID = 7
_SIZE = 400_001


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends back what comes, and ends after it has."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _converse(path: Path, port: int, data: bytes) -> bytes:
    """Sends all to a port of the guest, closes that half, and returns what comes until the end."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        writer.write(f"CONNECT {port}\n".encode())
        if not (await reader.readline()).startswith(b"OK "):
            raise ConnectionRefusedError
        writer.write(data)
        writer.write_eof()
        return await reader.read()
    finally:
        writer.close()


@pytest.mark.long
@pytest.mark.parametrize(("flavour", "transport"), [("generic", "pci"), ("cloud", "mmio")])
async def test_streams_go_both_ways(
    material: Material, tools: Path, tmp_path: Path, flavour: str, transport: str
) -> None:
    path = tmp_path / "vsock"
    config = config_of(
        getattr(material, flavour),
        transport=transport,
        cpus=2,
        vsock=VsockConfig(cid=CID, path=str(path)),
        disks=(DiskConfig(str(tools), read_only=True),),
    )
    async with (
        await asyncio.start_unix_server(_echo, f"{path}_5000"),
        booted(config) as guest,
    ):
        sh = guest.sh
        await sh("mkdir /tools; mount -t ext4 -o ro,noload /dev/vda /tools")
        await sh("for d in dev proc sys; do mount --bind /$d /tools/$d; done")
        socat = "chroot /tools socat -t 60"

        await sh(f"head -c {_SIZE} /dev/urandom >/run/data")
        connects = f"{socat} - VSOCK-CONNECT:2"
        await sh(f"{connects}:5000 </run/data >/run/back && cmp /run/data /run/back")
        # Nobody listens there.
        await sh(f"{connects}:5001", code=1)

        with pytest.raises(ConnectionRefusedError):
            await within(_converse(path, 6000, b""), "the guest does not answer")
        await sh(f"{socat} -d -d VSOCK-LISTEN:6000,fork EXEC:/bin/cat >/run/log 2>&1 &")
        await sh("until grep -q listening /run/log; do sleep 0.05; done")
        data = [os.urandom(_SIZE) for _ in range(4)]
        answers = await within(
            asyncio.gather(*(_converse(path, 6000, each) for each in data)),
            "the guest does not send all back",
        )
        assert answers == data
        accepted = re.findall(
            rf"accepting connection from AF=40 cid:2 port:(\d+) on AF=40 cid:{CID} port:6000",
            await sh("cat /run/log"),
        )
        assert len(set(accepted)) == len(data), accepted

        await guest.reset()
        await sh("mkdir -p /tools; mount -t ext4 -o ro,noload /dev/vda /tools")
        said = await sh(f"echo again | {connects}:5000")
        assert said == "again\n"
