"""The colours of charts: one a server, the same in every chart of a run.

The page's charts name CSS variables, which page.css gives a value for light and for dark, so one
chart serves both. Pictures have the light values on white, which reads on any background. The
colours differ in lightness too, and servers have a shape of their own: hue is not needed to tell
them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"

# Light and dark. The base has the first, the accent; an eighth server starts over.
SERVERS = (
    ("#1f5fd6", "#6aa6ff"),
    ("#e08700", "#f2a53c"),
    ("#b0246e", "#d6517f"),
    ("#1fae98", "#45e0c8"),
    ("#4a1a8c", "#8f5be0"),
    ("#5f6570", "#a0a39a"),
    ("#6b3410", "#d8e39a"),
)
# SVG paths within a square from -1 to 1, for Vega and for the page's legends alike.
SHAPES = (
    "M-1,0a1,1 0 1,0 2,0a1,1 0 1,0 -2,0z",
    "M-.9,-.9h1.8v1.8h-1.8z",
    "M0,-1.1L1.1,.85H-1.1z",
    "M0,-1.2L1,0L0,1.2L-1,0z",
    "M0,1.1L1.1,-.85H-1.1z",
    "M-.38,-1.1h.76v.72h.72v.76h-.72v.72h-.76v-.72h-.72v-.76h.72z",
    "M1.1,0L-.85,1.1V-1.1z",
)
NAMED = {
    "ink": ("#1b1f24", "#e6e8eb"),
    "muted": ("#646c76", "#98a1ac"),
    "grid": ("#e4e6e9", "#2b3037"),
    "ahead": ("#12855a", "#3fbf8a"),
    "even": ("#7d848e", "#98a1ac"),
    "behind": ("#cf3b33", "#ff7b72"),
}


@dataclass(frozen=True)
class Theme:
    """Where colours come from; `legend`: whether charts explain them (the page does it itself)."""

    servers: Sequence[str]
    colours: Mapping[str, str]
    palette: Sequence[str]
    legend: bool

    def colour(self, server: str) -> str:
        """A server's."""
        return self.palette[self.servers.index(server) % len(self.palette)]

    def shape(self, server: str) -> str:
        """A server's."""
        return SHAPES[self.servers.index(server) % len(SHAPES)]

    def config(self) -> dict[str, Any]:
        """Vega-Lite's configuration."""
        ink, muted, grid = (self.colours[name] for name in ("ink", "muted", "grid"))
        return {
            "background": "transparent" if not self.legend else "white",
            "font": FONT,
            "view": {"stroke": None},
            "title": {
                "color": ink,
                "subtitleColor": muted,
                "fontSize": 13,
                "fontWeight": 600,
                "anchor": "start",
                "offset": 10,
            },
            "axis": {
                "labelColor": muted,
                "titleColor": muted,
                "labelFontSize": 11,
                "titleFontSize": 11,
                "titleFontWeight": "normal",
                "gridColor": grid,
                "domain": False,
                "ticks": False,
                "labelPadding": 6,
                "titlePadding": 8,
            },
            "legend": {
                "labelColor": ink,
                "titleColor": muted,
                "labelFontSize": 12,
                "orient": "bottom",
                "symbolSize": 90,
                "symbolStrokeWidth": 0,
                "symbolOpacity": 1,
            },
            "text": {"color": ink, "fontSize": 11},
            "rule": {"color": muted},
        }


def for_page(servers: Sequence[str]) -> Theme:
    """Colours by CSS variables."""
    palette = [f"var(--server-{number})" for number in range(len(SERVERS))]
    return Theme(servers, {name: f"var(--{name})" for name in NAMED}, palette, legend=False)


def for_pictures(servers: Sequence[str]) -> Theme:
    """The light colours themselves."""
    colours = {name: light for name, (light, _) in NAMED.items()}
    return Theme(servers, colours, [light for light, _ in SERVERS], legend=True)


def css_variables(*, dark: bool) -> str:
    """The values of the variables that `for_page` names, as CSS declarations."""
    named = [(name, pair[dark]) for name, pair in NAMED.items()]
    servers = [(f"server-{number}", pair[dark]) for number, pair in enumerate(SERVERS)]
    return " ".join(f"--{name}: {value};" for name, value in [*named, *servers])
