"""The arguments of ``vdev run`` and ``vdev vm``."""

from __future__ import annotations

from collections.abc import Callable

from vdev.cli.parsing import Parser, add_loop_argument, command, whole_number

VMMS = ("auto", "kvm", "qemu", "cloud-hypervisor")
ESCAPE = "^]"


def add_run_parser(parser: Parser) -> None:
    """``vdev run``."""
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG.toml", help="the whole machine: see docs/run.md")
    add("--name", help="of the machine, for vdev vm (default: the file's, or vm-PID)")
    add("--kernel", metavar="FILE", help="bzImage, or ELF with a PVH entry")
    add("--initrd", metavar="FILE")
    add("--append", metavar="TEXT", help="the kernel's command line")
    add("--cpus", type=whole_number, metavar="N", help="1 to 64 (default: 1)")
    add("--memory", metavar="SIZE", help="like 512M or 4G (default: 512M)")
    add("--hugepages", action="store_true", help="memory in pages of 2 MiB")
    add(
        "--disk",
        action="append",
        default=[],
        metavar="FILE[,ro,KEY=VALUE...]",
        help="raw image, block device or null:SIZE; cache, engine, queues, serial, id",
    )
    add(
        "--net",
        action="append",
        default=[],
        metavar="bridge=B|tap=T|switch=W|socket=S[,KEY=VALUE...]",
        help="a network card; mac, queues, mtu, address, id",
    )
    add(
        "--share",
        action="append",
        default=[],
        metavar="DIR[,tag=T]",
        help="a folder of the host's, by virtiofs",
    )
    add(
        "--vhost-user",
        action="append",
        default=[],
        metavar="SOCKET,kind=blk|net|fs[,KEY=VALUE...]",
        help="a device that another process serves; queues, tag, id",
    )
    add("--vsock", metavar="CID[,path=P]")
    add(
        "--serial",
        dest="console",
        action="store_const",
        const="serial",
        help="the console is an 8250 serial port, ttyS0 (default)",
    )
    add(
        "--virtio-console",
        dest="console",
        action="store_const",
        const="virtio",
        help="the console is a virtio one, hvc0",
    )
    add("--balloon", action="store_true", help="memory can be taken back: vdev vm balloon")
    add("--no-reboot", action="store_true", help="the guest's reset ends the machine")
    add("--transport", choices=("pci", "mmio"), help="of virtio devices (default: pci)")
    add("--no-sandbox", action="store_true", help="keep all rights of whoever starts it")
    add("--vmm", choices=VMMS, help="auto (default): KVM where it runs machines, else QEMU")
    add("--restore", metavar="DIR", help="go on where a snapshot stood: vdev vm snapshot")
    add("--disks", metavar="DIR", help="with --restore: its disks are copied there")
    add("--clone", action="store_true", help="with --restore, --name: a machine of its own")
    add("--detach", action="store_true", help="return when the machine runs")
    add("--escape", default=ESCAPE, metavar="KEY", help="ends it; a key like ^], or none")
    add_loop_argument(parser, default="asyncio")
    parser.set_defaults(run=command("vdev.cli.run", "run", tls=False))


def add_vm_parsers(new: Callable[[str, str], Parser]) -> None:
    """``vdev vm VERB NAME``; `new(name, text)` makes a verb's parser."""
    listing = new("list", "the machines of this user")
    listing.add_argument("--json", action="store_true", help="all there is, as JSON")
    listing.set_defaults(run=command("vdev.cli.vm", "list_machines"))

    def verb(name: str, function: str, text: str) -> Parser:
        parser = new(name, text)
        parser.add_argument("name", metavar="NAME|PID", help="see vdev vm list")
        parser.set_defaults(run=command("vdev.cli.vm", function), verb=name)
        return parser

    verb("info", "show", "what it is, as JSON")
    verb("counters", "show", "what its devices have done, as JSON")
    verb("pause", "plain", "stop its CPUs")
    verb("resume", "plain", "let its CPUs go on")
    verb("power-button", "plain", "press it: the guest shuts itself down, if it wants")
    verb("reset", "plain", "press the reset button")
    verb("stop", "stop", "end it without asking the guest; returns when it has ended")
    console = verb("console", "console", "its console on this terminal")
    console.add_argument("--escape", default=ESCAPE, metavar="KEY", help="leaves; like ^], or none")
    console.add_argument("--no-history", action="store_true", help="only what comes from now on")
    disk = verb("add-disk", "add_disk", "plug a disk in; prints its id")
    disk.add_argument("disk", metavar="FILE[,ro,KEY=VALUE...]", help="as vdev run --disk")
    nic = verb("add-nic", "add_nic", "plug a network card in; prints its id")
    nic.add_argument(
        "nic", metavar="bridge=B|tap=T|switch=W|socket=S[,...]", help="as vdev run --net"
    )
    remove = verb("remove", "remove", "unplug a disk or a card; returns when the guest let go")
    remove.add_argument("device", metavar="ID", help="its id in vdev vm info")
    link = verb("link", "link", "plug or pull the cable of a network card")
    link.add_argument("device", metavar="ID", help="its id in vdev vm info")
    link.add_argument("state", choices=("up", "down"))
    balloon = verb("balloon", "balloon", "take memory back from the guest")
    balloon.add_argument("size", metavar="SIZE", help="how much; 0 gives everything back")
    snapshot = verb("snapshot", "snapshot", "write the whole machine into a new folder")
    snapshot.add_argument("directory", metavar="DIR")
    snapshot.add_argument("--track", action="store_true", help="note what is written from now on")
    snapshot.add_argument(
        "--base", metavar="DIR", help="the last one, if it was taken with --track"
    )
