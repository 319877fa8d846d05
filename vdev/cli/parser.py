"""The arguments of ``vdev``, ``vdev-blk`` and ``vdev-net``."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import NoReturn

from vdev.blk.options import CACHE_MODES, ENGINES

EPILOG = """\
exit codes:
  0    done; a server that was asked to end (SIGTERM, SIGINT, vdev stop) ended cleanly
  1    doctor: something that serving needs is missing; status: no server runs;
       a server: an unexpected failure
  2    a mistake in the arguments or the configuration, or something the host lacks:
       one line on stderr says what was given, what is wrong, and what would be right
  130  interrupted before anything had started
"""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        program = self.prog.split()[0]
        self.exit(2, f"{program}: {message} (see {self.prog} --help)\n")


def command(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """The function of a command, imported when it is called."""

    def run(arguments: argparse.Namespace) -> int:
        code: int = getattr(importlib.import_module(module), function)(arguments)
        return code

    return run


def vdev_parser() -> Parser:
    """The parser of ``vdev``."""
    parser = Parser(
        prog="vdev",
        description="Serve virtio devices to virtual machines.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    for kind, what, add in (
        ("blk", "block device", add_blk_arguments),
        ("net", "network device", add_net_arguments),
    ):
        group = _add(commands, kind, f"a {what} over vhost-user")
        verbs = group.add_subparsers(metavar="COMMAND", required=True)
        serve = _add(verbs, "serve", f"serve a {what} on a socket, in the foreground")
        add(serve)
        add_server_arguments(serve)
        serve.set_defaults(run=command("vdev.cli.serve", kind))

    serve = _add(commands, "serve", "serve the devices of a configuration file, in one process")
    serve.add_argument("config", metavar="CONFIG.toml", help="see README.md for an example")
    add_loop_argument(serve)
    serve.set_defaults(run=command("vdev.cli.serve", "config"))

    status = _add(commands, "status", "what the running servers of this user do")
    status.add_argument("server", nargs="?", metavar="PID|SOCKET", help="this one only")
    status.add_argument("--json", action="store_true", help="all there is, as JSON")
    status.add_argument(
        "--watch",
        nargs="?",
        type=positive_seconds,
        const=1.0,
        metavar="SECONDS",
        help="again and again, with rates",
    )
    status.set_defaults(run=command("vdev.cli.status", "status"))

    resize = _add(commands, "resize", "tell a server that a disk's image has another size")
    resize.add_argument("server", metavar="PID|SOCKET")
    resize.add_argument("device", metavar="DEVICE", help="its name in vdev status")
    resize.add_argument("size", nargs="?", help="grow the image to this size, like 20GiB")
    resize.set_defaults(run=command("vdev.cli.status", "resize"))

    stop = _add(commands, "stop", "end a server, as SIGTERM does")
    stop.add_argument("server", metavar="PID|SOCKET")
    stop.set_defaults(run=command("vdev.cli.status", "stop"))

    doctor = _add(commands, "doctor", "what this host can do, what it lacks, how to get it")
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(run=command("vdev.cli.doctor", "doctor"))
    return parser


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


def add_loop_argument(parser: argparse.ArgumentParser) -> None:
    """Which event loop."""
    parser.add_argument(
        "--loop",
        choices=("uvloop", "asyncio"),
        default="uvloop",
        help="event loop; asyncio is for debugging vdev itself",
    )


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


def whole_number(text: str) -> int:
    """A decimal number from 0 up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


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


def _add(commands: argparse._SubParsersAction[Parser], name: str, text: str) -> Parser:
    return commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
