"""Drawing the plot of a record: `lines` and `bars` of `lab.finding` -> SVG for pages, PNG for people."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.bench.results import write_atomic
from foveate.catalogue import pictures
from foveate.catalogue.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#2f6fb3", "#d9822b", "#3a9a5c", "#b04a7a", "#7a6bc2", "#8a8d2f", "#2f9aa0", "#a3603a")
REFERENCE = "#808890"


def figure(plot: Mapping[str, Any]) -> Figure:
    """The matplotlib figure of a plot specification.

    Raises:
        ImportError: without matplotlib, the extra `foveate[viz]`.
        ValueError: a kind other than lines and bars.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing evidence needs matplotlib: pip install 'foveate[viz]'") from error
    made = Figure(figsize=(6.4, 3.6), layout="constrained")
    draw(made.subplots(), plot)
    return made


def draw(axes: Axes, plot: Mapping[str, Any]) -> None:
    """Draw a plot specification on given matplotlib axes."""
    drawers = {"lines": _lines, "bars": _bars}
    if plot["kind"] not in drawers:
        raise ValueError(f"plot: kind {plot['kind']!r}; accepted: {', '.join(drawers)}")
    drawers[plot["kind"]](axes, plot)
    axes.set_title(plot["title"], fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _lines(axes: Axes, plot: Mapping[str, Any]) -> None:
    colours = iter(COLOURS * 4)
    for line in plot["series"]:
        style: dict[str, Any] = (
            {"color": REFERENCE, "linestyle": "--"} if line["reference"] else {"color": next(colours)}
        )
        marker = "o" if len(line["x"]) <= 24 else None
        axes.plot(
            line["x"], line["y"], label=line["label"], marker=marker, markersize=3.5, linewidth=1.6, **style
        )
        if line["low"] is not None:
            axes.fill_between(
                line["x"], line["low"], line["high"], color=style["color"], alpha=0.18, linewidth=0
            )
    if plot["log_x"]:
        axes.set_xscale("log", base=2)
    if plot["log_y"]:
        axes.set_yscale("log")
    axes.set_xlabel(plot["x"], fontsize=9)
    axes.set_ylabel(plot["y"], fontsize=9)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(fontsize=8, frameon=False)


def _bars(axes: Axes, plot: Mapping[str, Any]) -> None:
    bars = plot["bars"]
    places = range(len(bars))
    axes.barh(
        list(places),
        [b["value"] for b in bars],
        color=[REFERENCE if b["reference"] else COLOURS[0] for b in bars],
        height=0.62,
    )
    for place, bar in zip(places, bars, strict=True):
        if bar["low"] is not None:
            low, high = max(0.0, bar["value"] - bar["low"]), max(0.0, bar["high"] - bar["value"])
            axes.errorbar(bar["value"], place, xerr=[[low], [high]], color="#303438", capsize=3, linewidth=1)
    axes.set_yticks(list(places), [b["label"] for b in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(plot["y"], fontsize=9)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)


def svg(plot: Mapping[str, Any]) -> str:
    """The plot as SVG text that takes the page's text colour; the same plot gives the same bytes."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": "foveate", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure(plot).savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for black in ("#000000", "black", "#303438"):
        text = text.replace(f": {black}", ": currentColor")
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def png(plot: Mapping[str, Any]) -> bytes:
    """The plot as PNG."""
    out = io.BytesIO()
    figure(plot).savefig(out, format="png", dpi=110)
    return out.getvalue()


def page_png(record: Record, path: Path) -> None:
    """The picture of a record and its plot, side by side, as a PNG file."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing evidence needs matplotlib: pip install 'foveate[viz]'") from error
    parts = [part for part in (record.picture, record.plot) if part is not None]
    made = Figure(figsize=(5.6 * len(parts), 4.2), layout="constrained")
    for axes, part in zip(made.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        if part is record.picture:
            _picture(axes, part)
        else:
            draw(axes, part)
    out = io.BytesIO()
    made.savefig(out, format="png", dpi=110)
    write_atomic(path, out.getvalue())


def _picture(axes: Axes, picture: Mapping[str, Any]) -> None:
    import base64

    import numpy as np

    if picture["kind"] == "pairs":
        frame = picture["frames"][0]
        matrix = np.array(pictures.unpack(frame))
        title, across, down = frame["code"], "key", "query"
    else:
        matrix = np.frombuffer(base64.b64decode(picture["levels"]), np.uint8).reshape(picture["shape"])
        title, across, down = picture["code"], picture["columns"], picture["rows"]
    axes.imshow(matrix, cmap="Blues", vmin=0, interpolation="nearest")
    axes.set(xlabel=across, ylabel=down)
    axes.set_title(textwrap.fill(title, 60), fontsize=8)
