"""The arguments of ``vdev``, ``vdev-blk`` and ``vdev-net``."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, NoReturn, cast

from vdev.blk.options import CACHE_MODES, ENGINES, LOCKS
from vdev.cli.parsing import Fill, LaterParser, Parser, add_loop_argument, command, whole_number
from vdev.cli.switch_parser import add_switch_parsers
from vdev.cli.vm_parser import add_run_parser, add_vm_parsers

EPILOG = """\
exit codes:
  0    done; a server that was asked to end (SIGTERM, SIGINT, vdev stop) ended cleanly
  1    doctor: something that serving needs is missing; status, vm list: none runs;
       a server: an unexpected failure
  2    a mistake in the arguments or the configuration, something the host lacks, or a
       server that could not be replaced: one line on stderr says what was given, what is
       wrong, and what would be right
  10   run: the guest wanted a reset, with --no-reboot
  11   run: the guest's kernel panicked
  12   run: the guest crashed (a triple fault)
  13   run: the machine monitor was killed
  130  interrupted before anything had started
"""


def vdev_parser() -> Parser:
    """The parser of ``vdev``."""
    parser = Parser(
        prog="vdev",
        description="Serve virtio devices to virtual machines, and run such machines.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version, help="print the version and exit")
    add = parser.add_subparsers(
        metavar="COMMAND",
        required=True,
        prog=parser.prog,
        parser_class=cast("type[Parser]", LaterParser),
    ).add_parser
    for name, text, fill in (
        ("blk", "a block device over vhost-user", partial(_add_device, "blk", add_blk_arguments)),
        ("net", "a network device over vhost-user", partial(_add_device, "net", add_net_arguments)),
        ("serve", "serve the devices of a configuration file, again when that crashes", _add_serve),
        ("run", "run a machine, with its console on this terminal", add_run_parser),
        ("vm", "what a running machine shall do", _add_vm),
        ("switch", "a virtual switch between guests", _add_switch),
        ("status", "what the running servers and machines of this user do", _add_status),
        ("resize", "tell a server that a disk's image has another size", _add_resize),
        ("link", "plug or pull the cable of a server's network card", _add_link),
        ("stop", "end a server, as SIGTERM does", _add_stop),
        ("upgrade", "replace a server that runs, while its guests go on", _add_upgrade),
        ("doctor", "what this host can do, what it lacks, how to get it", _add_doctor),
    ):
        add(name, **_described(text), fill=fill)
    # Without a help text, they are not listed: what servers start their workers by, and a
    # supervisor its next program.
    add("worker", fill=_add_worker)
    add("supervisor", fill=_add_supervisor)
    return parser


def _described(text: str) -> dict[str, Any]:
    return {"help": text, "description": f"{text[0].upper()}{text[1:]}.", "allow_abbrev": False}


def _add_device(kind: str, add_arguments: Fill, parser: Parser) -> None:
    verbs = parser.add_subparsers(metavar="COMMAND", required=True, prog=parser.prog)
    what = {"blk": "block", "net": "network"}[kind]
    text = f"serve a {what} device on a socket, in the foreground"
    serve = verbs.add_parser("serve", **_described(text))
    add_arguments(serve)
    add_server_arguments(serve)
    serve.set_defaults(run=command("vdev.cli.serve", kind))


def _add_serve(parser: Parser) -> None:
    parser.add_argument("config", metavar="CONFIG.toml", help="see README.md for an example")
    parser.add_argument(
        "--isolate", action="store_true", help="each device in a process of its own"
    )
    add_loop_argument(parser)
    parser.set_defaults(run=command("vdev.cli.serve", "config"))


def _add_vm(parser: Parser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True, prog=parser.prog)
    add_vm_parsers(lambda name, text: verbs.add_parser(name, **_described(text)))


def _add_switch(parser: Parser) -> None:
    verbs = parser.add_subparsers(metavar="VERB", required=True, prog=parser.prog)
    add_switch_parsers(lambda name, text: verbs.add_parser(name, **_described(text)))


def _add_status(parser: Parser) -> None:
    parser.add_argument("server", nargs="?", metavar="PID|NAME|SOCKET", help="this one only")
    parser.add_argument("--json", action="store_true", help="all there is, as JSON")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=positive_seconds,
        const=1.0,
        metavar="SECONDS",
        help="again and again, with rates",
    )
    parser.set_defaults(run=command("vdev.cli.status", "status"))


def _add_resize(parser: Parser) -> None:
    parser.add_argument("server", metavar="PID|SOCKET")
    parser.add_argument("device", metavar="DEVICE", help="its name in vdev status")
    parser.add_argument("size", nargs="?", help="grow the image to this size, like 20GiB")
    parser.set_defaults(run=command("vdev.cli.status", "resize"))


def _add_link(parser: Parser) -> None:
    parser.add_argument("server", metavar="PID|SOCKET")
    parser.add_argument("device", metavar="DEVICE", help="its name in vdev status")
    parser.add_argument("state", choices=("up", "down"))
    parser.set_defaults(run=command("vdev.cli.status", "link"))


def _add_stop(parser: Parser) -> None:
    parser.add_argument("server", metavar="PID|NAME|SOCKET")
    parser.set_defaults(run=command("vdev.cli.status", "stop"))


def _add_upgrade(parser: Parser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("server", nargs="?", metavar="PID|SOCKET")
    which.add_argument("--all", action="store_true", help="every server of this user")
    parser.add_argument(
        "--program", metavar="PATH", help="the vdev to go on with (default: that which runs)"
    )
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        default=30.0,
        metavar="SECONDS",
        help="for the new process to get ready; the guests do not wait meanwhile (default: 30)",
    )
    parser.set_defaults(run=command("vdev.cli.upgrade", "upgrade"))


def _add_worker(parser: Parser) -> None:
    parser.add_argument("fd", type=int)
    parser.set_defaults(run=command("vdev.cli.serve", "worker"))


def _add_supervisor(parser: Parser) -> None:
    parser.add_argument("fd", type=int)
    parser.add_argument("--attempt", type=int)
    parser.set_defaults(run=command("vdev.cli.serve", "supervisor"))


def _add_doctor(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=command("vdev.cli.doctor", "doctor"))


def add_socket_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the front-end comes from."""
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--socket-path", metavar="PATH", help="Unix socket to listen on")
    place.add_argument(
        "--fd", type=int, metavar="N", help="inherited socket, connected or listening"
    )


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """What every server in the foreground has."""
    add_socket_arguments(parser)
    parser.add_argument(
        "--connect",
        action="store_true",
        help="connect to --socket-path, again and again, instead of listening",
    )
    parser.add_argument(
        "--poll-us",
        type=whole_number,
        default=32,
        metavar="U",
        help="longest time to poll a ring before sleeping; 0 = never poll (default: 32)",
    )
    parser.add_argument(
        "--iothreads", type=whole_number, default=1, metavar="N", help="threads that serve queues"
    )
    parser.add_argument(
        "--control",
        metavar="PATH",
        help="control socket for vdev status (default: PID.sock where vdev status looks)",
    )
    add_loop_argument(parser)


def add_blk_arguments(parser: argparse.ArgumentParser) -> None:
    """What a block device is made of."""
    parser.add_argument(
        "--blk-file",
        required=True,
        metavar="FILE",
        help="raw image, block device, or null:SIZE (reads zeroes, forgets writes)",
    )
    parser.add_argument("--read-only", action="store_true", help="refuse every write")
    parser.add_argument("--num-queues", type=whole_number, default=1, metavar="N")
    parser.add_argument("--serial", metavar="ID", help="at most 20 characters")
    parser.add_argument(
        "--cache",
        choices=CACHE_MODES,
        default="writeback",
        help="as in QEMU (default: writeback)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="auto: io_uring where the kernel allows it, else threads",
    )
    parser.add_argument(
        "--lock",
        choices=LOCKS,
        default="open",
        help="running: only while a guest uses it, for both ends of a migration (default: open)",
    )


def add_net_arguments(parser: argparse.ArgumentParser) -> None:
    """What a network device is made of."""
    parser.add_argument(
        "--tap", metavar="TAP", help="this tap: used as it is, or made and removed again"
    )
    parser.add_argument(
        "--bridge", metavar="BRIDGE", help="plug the tap, or one of its own, into this bridge"
    )
    parser.add_argument("--queues", type=whole_number, default=1, metavar="N", help="queue pairs")
    parser.add_argument("--mac", help="of the guest's card (default: the guest's or the VMM's)")
    parser.add_argument("--mtu", type=whole_number, help="68 to 65535")
    parser.add_argument("--address", metavar="CIDR", help="host's address on the bridge or tap")


def positive_seconds(text: str) -> float:
    """A number of seconds above 0."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


class Version(argparse.Action):
    """``--version``; the package's metadata are read only when asked for."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import vdev

        print(f"vdev {vdev.__version__}")
        parser.exit()
