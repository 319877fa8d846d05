"""The arguments of ``vdev switch``."""

from __future__ import annotations

from collections.abc import Callable

from vdev.cli.parsing import Parser, add_loop_argument, command, whole_number

_PORT = "NAME,socket=S|tap=T|bridge=B[,KEY=VALUE...]"
_SETTINGS = (
    "vlan, trunk, mac, bound, private, mirror, mirrored, rate, burst, storm, stations: see "
    "docs/switch.md"
)


def add_switch_parsers(add: Callable[[str, str], Parser]) -> None:
    """`add` makes the parser of a verb, by its name and what it does."""
    _add_serve(add("serve", "serve a virtual switch, in the foreground"))

    def verb(name: str, function: str, text: str) -> Parser:
        parser = add(name, text)
        parser.set_defaults(run=command("vdev.cli.switch", function))
        return parser

    def asking(name: str, function: str, text: str) -> Parser:
        parser = verb(name, function, text)
        parser.add_argument("switch", metavar="NAME", help="of the switch, or its process id")
        return parser

    def listing(parser: Parser) -> None:
        parser.add_argument("--json", action="store_true", help="all there is, as JSON")

    listing(verb("list", "list_switches", "the switches of this user that run"))
    listing(asking("ports", "ports", "the ports of a switch, with what they counted"))
    listing(asking("table", "table", "the stations that a switch knows"))
    plug = asking("add", "add", "plug a port in")
    plug.add_argument("port", metavar=_PORT, help=f"queues, mtu, address; {_SETTINGS}")
    change = asking("set", "change", "change the settings of a port")
    change.add_argument("port", metavar="PORT")
    change.add_argument("settings", metavar="KEY=VALUE[,...]", help=_SETTINGS)
    asking("remove", "remove", "take a port out").add_argument("port", metavar="PORT")


def _add_serve(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "name",
        nargs="?",
        metavar="NAME",
        help="by which guests find it: vdev run --net switch=NAME",
    )
    add("--config", metavar="FILE.toml", help="the whole switch: see docs/switch.md")
    add(
        "--socket-path",
        metavar="PATH",
        help="Unix socket where each front-end gets a port (default: NAME.switch where vdev run "
        "looks)",
    )
    add("--guests", metavar="KEY=VALUE[,...]", help=f"of those ports: queues, mtu; {_SETTINGS}")
    add(
        "--port",
        action="append",
        default=[],
        metavar=_PORT,
        help=f"a port by name: queues, mtu, address; {_SETTINGS}",
    )
    add("--stations", type=whole_number, metavar="N", help="room of its table (default: 8192)")
    add("--age", type=whole_number, metavar="S", help="until a station is forgotten (default: 300)")
    add("--poll-us", type=whole_number, metavar="U", help="as vdev net serve (default: 32)")
    add("--control", metavar="PATH", help="control socket (default: where vdev status looks)")
    add_loop_argument(parser)
    parser.set_defaults(run=command("vdev.cli.switch", "serve"))
