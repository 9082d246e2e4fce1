"""Charts of a comparison as inline SVG that follows the page's colours; nothing is loaded or scripted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Point:
    """One mechanism in a scatter: place, interval on y (or None), colour, and whether it is the control (hollow).

    href: a page the point leads to. key: a name for scripts, in the attribute `data-key`.
    """

    label: str
    x: float
    y: float
    low: float | None
    high: float | None
    colour: str
    control: bool = False
    note: str = ""
    href: str = ""
    key: str = ""


@dataclass(frozen=True)
class Line:
    label: str
    ys: Sequence[float]
    colour: str
    control: bool = False


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span [low, high].

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = max(high - low, 1e-12)
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 10) + 0.0 for i in range(first, last + 1)]


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, at least ``gap`` apart, inside [low, high] where there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    places = [wanted[i] for i in order]
    for _ in range(200):
        moved = False
        for a in range(len(places) - 1):
            short = gap - (places[a + 1] - places[a])
            if short > 1e-6:
                places[a] -= short / 2
                places[a + 1] += short / 2
                moved = True
        if places and places[0] < low:
            places[0], moved = low, True
        if places and places[-1] > high:
            places[-1], moved = high, True
        if not moved:
            break
    result = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        result[i] = places[rank]
    return result


def number(value: float) -> str:
    """A tick label: no exponent, no trailing zeros."""
    text = f"{value:.6f}".rstrip("0").rstrip(".")
    return text.replace("-", "−") if text not in ("", "-0") else "0"


class _Frame:
    """Axes of one panel; `x` and `y` map data to pixels."""

    left, right, top, bottom = 56, 118, 14, 44
    inset = 12  # the outermost points do not sit on the frame

    def __init__(self, width: int, height: int, xs: list[float], ys: list[float], flip: bool) -> None:
        self.width, self.height, self.flip = width, height, flip
        self.xs, self.ys = xs, ys

    def x(self, value: float) -> float:
        share = (value - self.xs[0]) / (self.xs[-1] - self.xs[0])
        return self.left + self.inset + share * (self.width - self.left - self.right - 2 * self.inset)

    def y(self, value: float) -> float:
        share = (value - self.ys[0]) / (self.ys[-1] - self.ys[0])
        share = share if self.flip else 1 - share
        return self.top + self.inset + share * (self.height - self.top - self.bottom - 2 * self.inset)

    def axes(self, x_title: str, y_title: str, x_format, y_format) -> list[str]:
        x0, x1 = self.left, self.width - self.right
        y0, y1 = self.top, self.height - self.bottom
        out = []
        for value in self.ys:
            y = self.y(value)
            out.append(f'<line class="grid" x1="{x0}" y1="{y:.1f}" x2="{x1}" y2="{y:.1f}"/>')
            out.append(
                f'<text class="tick" x="{x0 - 8}" y="{y + 4:.1f}" text-anchor="end">{y_format(value)}</text>'
            )
        for value in self.xs:
            x = self.x(value)
            out.append(f'<line class="grid" x1="{x:.1f}" y1="{y0}" x2="{x:.1f}" y2="{y1}"/>')
            out.append(
                f'<text class="tick" x="{x:.1f}" y="{y1 + 18}" text-anchor="middle">{x_format(value)}</text>'
            )
        out.append(
            f'<text class="axis" x="{(x0 + x1) / 2:.0f}" y="{self.height - 6}" text-anchor="middle">'
            f"{escape(x_title)}</text>"
        )
        middle = (y0 + y1) / 2
        out.append(
            f'<text class="axis" x="14" y="{middle:.0f}" text-anchor="middle" '
            f'transform="rotate(-90 14 {middle:.0f})">{escape(y_title)}</text>'
        )
        return out

    def labels(self, items: list[tuple[str, float, float, str]]) -> list[str]:
        """Names to the right of the panel, spread apart, each with a thin line to its point."""
        at = spread([y for _, _, y, _ in items], 15, self.top, self.height - self.bottom)
        edge = self.width - self.right
        out = []
        for (label, x, y, colour), place in zip(items, at, strict=True):
            out.append(f'<path class="leader" d="M{x:.1f} {y:.1f}L{edge + 6} {place:.1f}"/>')
            out.append(f'<circle cx="{edge + 11}" cy="{place:.1f}" r="3.5" fill="{escape(colour)}"/>')
            out.append(f'<text class="name" x="{edge + 19}" y="{place + 4:.1f}">{escape(label)}</text>')
        return out

    def svg(self, parts: list[str], title: str, role: str = "img") -> Markup:
        return Markup(
            f'<svg viewBox="0 0 {self.width} {self.height}" role="{role}" aria-label="{escape(title)}">'
            + "".join(parts)
            + "</svg>"
        )


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    x_title: str,
    y_title: str,
    percent: bool = False,
    x_percent: bool = False,
    flip: bool = False,
    names: bool = True,
    room: int = 118,
    width: int = 520,
    height: int = 320,
) -> Markup:
    """Mechanisms as points with their intervals. ``flip`` puts small y on top, so up is better for a loss.

    ``percent`` and ``x_percent``: that axis holds shares, from 0 to 1 at least. ``names``: names beside the
    panel, which leaves them ``room``. Points with an address are links.
    """
    if x_percent:
        xs = ticks(0.0, max([1.0, *(p.x for p in points)]))
    else:
        xs = ticks(min([1.0, *(p.x for p in points)]), max([1.0, *(p.x for p in points)]) * 1.02)
    lows = [p.y if p.low is None else p.low for p in points]
    highs = [p.y if p.high is None else p.high for p in points]
    if percent:
        ys = ticks(0.0, max([1.0, *highs]))
    else:
        ys = ticks(min([0.0, *lows]), max([0.0, *highs]) or 0.01)
    if len(xs) < 2:
        xs = [0.0, 1.0, 2.0]
    frame = _Frame(width, height, xs, ys, flip)
    frame.right = room
    parts = frame.axes(
        x_title,
        y_title,
        (lambda v: f"{v:.0%}") if x_percent else (lambda v: f"{number(v)}×"),
        (lambda v: f"{v:.0%}") if percent else number,
    )
    if names:
        parts += frame.labels([(p.label, frame.x(p.x), frame.y(p.y), p.colour) for p in points])
    for p in sorted(points, key=lambda p: not p.control):
        x, y = frame.x(p.x), frame.y(p.y)
        c = escape(p.colour)
        if p.low is not None and p.high is not None:
            parts.append(
                f'<line x1="{x:.1f}" y1="{frame.y(p.low):.1f}" x2="{x:.1f}" y2="{frame.y(p.high):.1f}" '
                f'stroke="{c}" stroke-width="1.5" opacity=".55"/>'
            )
        fill, edge = ("var(--page)", c) if p.control else (c, "var(--page)")
        dot = (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6.5" fill="{fill}" stroke="{edge}" stroke-width="1.8">'
            f"<title>{escape(p.note or p.label)}</title></circle>"
        )
        if p.href:
            key = f' data-key="{escape(p.key)}"' if p.key else ""
            dot = f'<a href="{escape(p.href)}" aria-label="{escape(p.note or p.label)}"{key}>{dot}</a>'
        parts.append(dot)
    return frame.svg(parts, title, "group" if any(p.href for p in points) else "img")


def lines(
    items: Sequence[Line],
    length: int,
    *,
    title: str,
    x_title: str,
    y_title: str,
    width: int = 520,
    height: int = 300,
) -> Markup:
    """Bits per byte lost in each stretch of the window, one line per mechanism."""
    low = min([0.0, *(y for item in items for y in item.ys)])
    high = max([0.0, *(y for item in items for y in item.ys)])
    frame = _Frame(
        width,
        height,
        [0.0, length / 4, length / 2, 3 * length / 4, float(length)],
        ticks(low, high or 0.01),
        False,
    )
    parts = frame.axes(x_title, y_title, lambda v: f"{v:,.0f}", number)
    ends = []
    for item in items:
        bins = len(item.ys)
        at = [(frame.x((i + 0.5) * length / bins), frame.y(y)) for i, y in enumerate(item.ys)]
        dash = ' stroke-dasharray="5 4"' if item.control else ""
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        parts.append(
            f'<path d="M{path}" fill="none" stroke="{escape(item.colour)}" stroke-width="2"{dash} '
            f'stroke-linejoin="round"><title>{escape(item.label)}</title></path>'
        )
        ends.append((item.label, at[-1][0], at[-1][1], item.colour))
    parts += frame.labels(ends)
    return frame.svg(parts, title)
