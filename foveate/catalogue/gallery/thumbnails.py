"""Pictures of records as small SVG drawings that take the page's colour."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from foveate.catalogue.pictures import unpack

SIDE = 64  # cells per side of a reduced map
LEVELS = 5


def first(picture: Mapping[str, Any]) -> int:
    """The frame that a page shows first: numbers in the middle of their values, words at their first one.

    >>> frames = [{"setting": {"window": w}} for w in (1, 2, 4)]
    >>> first({"controls": [{"name": "window", "values": [1, 2, 4]}], "frames": frames})
    1
    """
    wanted = {
        c["name"]: c["values"][(len(c["values"]) - 1) // 2 if numeric(c) else 0] for c in picture["controls"]
    }
    return next(i for i, frame in enumerate(picture["frames"]) if dict(frame["setting"]) == wanted)


def numeric(control: Mapping[str, Any]) -> bool:
    """Whether a control is a slider over numbers."""
    return all(type(value) in (int, float) for value in control["values"])


def drawing(picture: Mapping[str, Any], label: str = "") -> Markup:
    """A picture as SVG; with a label it is an image for everybody, without one it is decoration."""
    if picture["kind"] == "pairs":
        rows = unpack(picture["frames"][first(picture)])
        height, width = len(rows), len(rows[0])
        layers = [(1.0, _runs(rows))]
    else:
        levels = _reduced(picture)
        height, width = len(levels), len(levels[0])
        layers = [
            ((level + 1) / LEVELS, _runs([[cell == level for cell in row] for row in levels]))
            for level in range(LEVELS)
        ]
    paths = "".join(f'<path d="{path}" stroke-opacity="{opacity:.2g}"/>' for opacity, path in layers if path)
    name = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true" focusable="false"'
    return Markup(
        f'<svg class="cells" viewBox="0 0 {width} {height}" {name} preserveAspectRatio="xMidYMid meet">'
        f'<rect class="ground" width="{width}" height="{height}"/>'
        f'<g fill="none" stroke="currentColor" stroke-width="1" shape-rendering="crispEdges">{paths}</g></svg>'
    )


def _runs(rows: Sequence[Sequence[bool]]) -> str:
    """A path of horizontal strokes, one per run of cells that are set."""
    parts = []
    for y, row in enumerate(rows):
        x = 0
        while x < len(row):
            if not row[x]:
                x += 1
                continue
            start = x
            while x < len(row) and row[x]:
                x += 1
            parts.append(f"M{start} {y}.5h{x - start}")
    return "".join(parts)


def _reduced(picture: Mapping[str, Any]) -> list[list[int]]:
    """A map in `LEVELS` steps of the square root of its weights, -1 for almost nothing.

    Where cells fall together, the largest counts.
    """
    n, m = picture["shape"]
    data = base64.b64decode(picture["levels"])
    step = max(1, -(-max(n, m) // SIDE))
    made = []
    for y in range(0, n, step):
        row = []
        for x in range(0, m, step):
            top = max(data[i * m + j] for i in range(y, min(y + step, n)) for j in range(x, min(x + step, m)))
            row.append(-1 if top < 4 else min(LEVELS - 1, int(LEVELS * (top / 256) ** 0.5)))
        made.append(row)
    return made
