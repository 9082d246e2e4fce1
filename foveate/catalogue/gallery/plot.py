"""The plot of a record, as drawn by `foveate reproduce`, made fit for the inside of a page; its numbers as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from foveate.catalogue.gallery.clean import named, parse, rebuilt, serialise

TAGS = named("svg g defs path use clipPath rect line circle polyline polygon text tspan title desc")
DROP = frozenset({"metadata", "style"})
ATTRIBUTES = named(
    "id d x y x1 y1 x2 y2 cx cy r rx ry width height viewBox points transform clip-path clip-rule fill fill-opacity "
    "fill-rule stroke stroke-width stroke-opacity stroke-dasharray stroke-dashoffset stroke-linecap stroke-linejoin "
    "stroke-miterlimit opacity text-anchor font-size font-weight font-style"
)
PREFIX = "plot-"  # of every id, so that none meets an id of the page


def inline(path: Path, label: str) -> Markup:
    """The drawing as inline SVG: style sheets become attributes, ids get a prefix, nothing else is let through.

    Raises:
        Unclean: an element that no plot of ours has.
    """
    tree = rebuilt(parse(path.read_text(encoding="utf-8")), TAGS, _attributes, drop=DROP)
    for name in ("width", "height"):
        tree.attrib.pop(name, None)
    tree.set("class", "plot")
    tree.set("role", "img")
    tree.set("aria-label", label)
    tree.set("stroke-linejoin", "round")
    return Markup(serialise(tree))


def _attributes(tag: str, found: Mapping[str, str]) -> dict[str, str]:
    made: dict[str, str] = {}
    for name, value in found.items():
        local = name.rsplit("}", 1)[-1]
        if local == "href":
            if value.startswith("#"):
                made["href"] = f"#{PREFIX}{value[1:]}"
        elif name == "style":
            made.update(_declared(value))
        elif name in ATTRIBUTES:
            made[name] = f"{PREFIX}{value}" if name == "id" else value
    return {name: _local_references(value) for name, value in made.items()}


def _declared(style: str) -> dict[str, str]:
    """The declarations of a style attribute as presentation attributes."""
    made = {}
    for declaration in style.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            size = re.search(r"([\d.]+)px", value)
            if size:
                made["font-size"] = size[1]
        elif name in ATTRIBUTES:
            made[name] = value.removesuffix("px") if name in ("font-size", "stroke-width") else value
    return made


def _local_references(value: str) -> str:
    """url(#x) -> url(#plot-x); any other address becomes none."""

    def named(found: re.Match[str]) -> str:
        target = found[1].strip("\"' ")
        return f"url(#{PREFIX}{target[1:]})" if target.startswith("#") else "none"

    return re.sub(r"url\(([^)]*)\)", named, value)


def table(plot: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(column names, rows) of the numbers behind a plot.

    >>> table({"kind": "bars", "y": "s", "bars": [{"label": "a", "value": 0.5, "low": 0.4, "high": 0.6}]})
    (['', 's', 'from', 'to'], [['a', '0.5', '0.4', '0.6']])
    """
    if plot["kind"] == "bars":
        rows = [[str(b["label"]), *map(_number, (b["value"], b["low"], b["high"]))] for b in plot["bars"]]
        return ["", str(plot["y"]), "from", "to"], rows
    rows = []
    for line in plot["series"]:
        lows, highs = (line[side] or [None] * len(line["x"]) for side in ("low", "high"))
        for values in zip(line["x"], line["y"], lows, highs, strict=True):
            rows.append([str(line["label"]), *map(_number, values)])
    return ["", str(plot["x"]), str(plot["y"]), "from", "to"], rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
