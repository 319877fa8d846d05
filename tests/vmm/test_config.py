"""A machine's configuration: what is right is read, what is wrong is named in one line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdev.errors import UserError
from vdev.tables import decode, encode, parse_options
from vdev.vmm.config import (
    DiskConfig,
    LimitsConfig,
    MachineConfig,
    NicConfig,
    ShareConfig,
    VhostUserConfig,
    VsockConfig,
)
from vdev.vmm.decode import load_machine

KERNEL = 'kernel = "vmlinuz"\n'
WHOLE = """\
name = "whole"
kernel = "boot/vmlinuz"
initrd = "/boot/initrd"
cmdline = "root=/dev/vda"
cpus = 4
memory = "4GiB"
hugepages = true
console = "virtio"
rng = false
balloon = true
transport = "mmio"
reboot = false
iothreads = 2
poll_us = 0
vmm = "kvm"

[[disk]]
path = "root.img"
serial = "root"
cache = "none"
engine = "threads"
queues = 2

[[disk]]
path = "null:1G"
read_only = true
id = "scratch"

[[nic]]
bridge = "br0"
tap = "tap0"
mac = "52:54:00:AB:cd:01"
mtu = 9000
address = "10.0.0.1/24"

[[nic]]
socket = "net.sock"
queues = 2

[[share]]
directory = "/srv"

[[vhost_user]]
socket = "fs.sock"
kind = "fs"
tag = "home"

[vsock]
cid = 7
path = "vsock"

[limits]
cpu = 2
memory = "5G"
pids = 64

[sandbox]
user = "nobody"
landlock = false
"""

Load = Callable[[str], MachineConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str) -> MachineConfig:
        (tmp_path / "vm.toml").write_text(text)
        return load_machine(str(tmp_path / "vm.toml"))

    return load


def machine(**settings: Any) -> MachineConfig:
    return MachineConfig(**{"name": "m", "kernel": "k", **settings})


def test_a_whole_file(load: Load, tmp_path: Path) -> None:
    config = load(WHOLE)
    assert config.kernel == f"{tmp_path}/boot/vmlinuz"
    assert config.initrd == "/boot/initrd"
    assert (config.cpus, config.memory, config.hugepages) == (4, 4 << 30, True)
    assert (config.transport, config.reboot, config.vmm) == ("mmio", False, "kvm")
    root, scratch = config.disks
    assert (root.path, root.id, root.queues) == (f"{tmp_path}/root.img", "disk0", 2)
    assert (scratch.path, scratch.id, scratch.read_only) == ("null:1G", "scratch", True)
    first, second = config.nics
    assert (first.mac, first.id) == ("52:54:00:ab:cd:01", "nic0")
    assert (second.socket, second.queues) == (f"{tmp_path}/net.sock", 2)
    assert second.mac is not None
    assert second.mac.startswith("52:54:00:")
    assert config.shares == (ShareConfig("/srv", tag="share0", id="share0"),)
    assert config.vhost_user[0].id == "vhost0"
    assert config.vsock == VsockConfig(7, f"{tmp_path}/vsock")
    assert config.limits == LimitsConfig(cpu=2, memory=5 << 30, pids=64)
    assert config.limits.any
    assert (config.sandbox.user, config.sandbox.landlock) == ("nobody", False)


def test_a_machine_comes_back_from_its_table(load: Load) -> None:
    for config in (load(WHOLE), machine()):
        table = json.loads(json.dumps(encode(config)))
        assert decode(MachineConfig, table, "") == config


def test_the_least_file(load: Load, tmp_path: Path) -> None:
    config = load(KERNEL)
    assert (config.name, config.cpus, config.memory) == ("vm", 1, 512 << 20)
    assert not config.limits.any
    assert load_machine(str(tmp_path / "vm.toml"), name="other", vmm="qemu").name == "other"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "kernel is missing"),
        ('kernel = ""', "kernel '' is no path"),
        (KERNEL + "memroy = 1", "unknown key 'memroy': did you mean memory?"),
        (KERNEL + "cpus = 0", "cpus = 0: 1 to 64"),
        (KERNEL + "cpus = 65", "cpus = 65: 1 to 64"),
        (KERNEL + 'cpus = "2"', 'cpus = "2": must be a whole number'),
        (KERNEL + "cpus = true", "cpus = true: must be a whole number"),
        (KERNEL + "cpus = 1.5", "cpus = 1.5: must be a whole number"),
        (KERNEL + "memory = 1.5", "memory = 1.5: must be a size like 512MiB"),
        (KERNEL + 'memory = "lots"', "memory: size 'lots' is not a number of bytes"),
        (KERNEL + 'memory = "1GB"', "ambiguous"),
        (KERNEL + 'memory = "31M"', "at least 32 MiB"),
        (KERNEL + 'memory = "33M"', "a multiple of 2 MiB"),
        (KERNEL + "memory = -1", "at least 32 MiB"),
        (KERNEL + 'console = "vga"', "console 'vga' does not exist: serial, virtio"),
        (KERNEL + 'transport = "usb"', "transport 'usb' does not exist: pci, mmio"),
        (KERNEL + 'vmm = "xen"', "vmm 'xen' does not exist: auto, kvm, qemu"),
        (KERNEL + 'name = "a/b"', "name 'a/b': at most 48 letters"),
        (KERNEL + 'name = "7"', "name '7'"),
        (KERNEL + f'cmdline = "{"x" * 2048}"', "cmdline of 2048 bytes"),
        (KERNEL + 'cmdline = "a\\nb"', "one line of at most 2047 bytes"),
        (KERNEL + "hugepages = 1", "hugepages = 1: must be true or false"),
        (KERNEL + "[disk]", "disk must be written [[disk]]: one table a device"),
        (KERNEL + "disk = [1]", "[[disk]] number 1: must be a table"),
        (KERNEL + "[[disks]]", "unknown key 'disks': did you mean disk?"),
        (KERNEL + "[[disk]]", "[[disk]] number 1: path is missing"),
        (KERNEL + '[[disk]]\npath = "d"\ncache = "wb"', "number 1: cache 'wb' does not exist"),
        (KERNEL + '[[disk]]\npath = "d"\nqueues = 0', "queues = 0: 1 to 256"),
        (KERNEL + f'[[disk]]\npath = "d"\nserial = "{"s" * 21}"', "at most 20 printable"),
        (KERNEL + '[[disk]]\npath = "d"\nid = "a b"', "id 'a b': a letter, then"),
        (KERNEL + '[[disk]]\npath = "d"\nid = "x"\n[[nic]]\ntap = "t"\nid = "x"', "id 'x': two de"),
        (KERNEL + "[[nic]]", "[[nic]] number 1: a network card needs a bridge"),
        (KERNEL + '[[nic]]\nsocket = "s"\ntap = "t"', "a socket or a tap, not both"),
        (KERNEL + '[[nic]]\ntap = "t"\nmac = "52:54"', "six bytes like"),
        (KERNEL + '[[nic]]\ntap = "t"\nmac = "01:00:5e:00:00:01"', "a multicast address"),
        (KERNEL + '[[nic]]\ntap = "t"\nmtu = 67', "mtu = 67: 68 to 65535"),
        (KERNEL + '[[share]]\ndirectory = "d"\ntag = "' + "t" * 37 + '"', "at most 36 bytes"),
        (KERNEL + '[[vhost_user]]\nsocket = "s"\nkind = "gpu"', "kind 'gpu' does not exist"),
        (KERNEL + '[[vhost_user]]\nsocket = "s"\nkind = "fs"', "a device of kind fs has one"),
        (KERNEL + "vsock = 3", "vsock must be a table: [vsock]"),
        (KERNEL + "[vsock]\ncid = 2", "[vsock]: vsock cid = 2: 3 to 4294967294"),
        (KERNEL + "[limits]\ncpu = 0", "[limits]: limit cpu = 0: above 0"),
        (KERNEL + '[limits]\nmemory = "0"', "limit memory = 0: above 0"),
        (KERNEL + "[sandbox]\nseccomp = 3", "[sandbox]: seccomp = 3: must be true or false"),
        ("[[kernel", "not TOML"),
    ],
)
def test_a_mistake_is_named_in_one_line(load: Load, text: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        load(text)
    (line,) = str(caught.value).splitlines()
    assert "vm.toml: " in line
    assert complaint in line


def test_every_mistake_has_a_line(load: Load) -> None:
    with pytest.raises(UserError) as caught:
        load(KERNEL + 'cpu = 1\n[[disk]]\npath = "d"\nqueues = 0\n[[nic]]\n[vsock]\nport = 1\n')
    assert len(str(caught.value).splitlines()) == 5


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "vm.toml").write_bytes(content)
    with pytest.raises(UserError, match=r"vm\.toml: "):
        load_machine(str(tmp_path / "vm.toml"))


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("d.img", DiskConfig("d.img")),
        ("d.img,ro", DiskConfig("d.img", read_only=True)),
        ("a,,b.img,read-only=off", DiskConfig("a,b.img")),
        ("path=d,queues=2,serial=7", DiskConfig("d", queues=2, serial="7")),
        ("k=v.img,id=x", DiskConfig("k=v.img", id="x")),
    ],
)
def test_disk_options(text: str, disk: DiskConfig) -> None:
    assert parse_options(DiskConfig, text, "path", "--disk: ") == disk


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "path '' is no path"),
        ("d,rw", "'rw': write KEY=VALUE, with one of path, read_only"),
        ("d,ro=maybe", 'read_only = "maybe": must be true or false'),
        ("d,queues=two", 'queues = "two": must be a whole number'),
        ("d,queues=1,queues=2", "queues is given twice"),
        ("d,sreial=x", "unknown key 'sreial': did you mean serial?"),
        ("d,path=e", "path is given twice"),
    ],
)
def test_disk_options_that_are_wrong(text: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_options(DiskConfig, text, "path", "--disk: ")
    assert str(caught.value).startswith("--disk: ")
    assert complaint in str(caught.value)


def test_other_options() -> None:
    nic = parse_options(NicConfig, "bridge=br0,mtu=9000,address=10.0.0.1/24", None, "")
    assert nic == NicConfig(bridge="br0", mtu=9000, address="10.0.0.1/24")
    assert parse_options(VsockConfig, "5,path=v", "cid", "") == VsockConfig(5, "v")
    other = parse_options(VhostUserConfig, "s,kind=blk", "socket", "")
    assert other == VhostUserConfig("s", "blk")


@given(st.text())
def test_any_text_is_a_disk_or_a_users_mistake(text: str) -> None:
    try:
        disk = parse_options(DiskConfig, text, "path", "")
    except UserError:
        return
    assert decode(DiskConfig, encode(disk), "") == disk


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_value_anywhere_is_taken_or_a_users_mistake(value: object) -> None:
    for spec in dataclasses.fields(MachineConfig):
        key = spec.metadata.get("table", spec.name)
        table = {"name": "m", "kernel": "k", key: value}
        try:
            config = decode(MachineConfig, table, "")
        except UserError:
            continue
        assert decode(MachineConfig, json.loads(json.dumps(encode(config))), "") == config


def test_ids_are_free_ones_and_addresses_stay() -> None:
    disks = (DiskConfig("a"), DiskConfig("b", id="disk0"))
    config = machine(disks=disks, nics=(NicConfig(tap="t"), NicConfig(tap="u")))
    assert [disk.id for disk in config.disks] == ["disk1", "disk0"]
    first, second = (nic.mac for nic in config.nics)
    assert first != second
    assert machine(nics=(NicConfig(tap="v"),)).nics[0].mac == first
    assert machine(name="n", nics=(NicConfig(tap="v"),)).nics[0].mac != first
