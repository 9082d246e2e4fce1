"""What a comparison leaves behind: a terminal table, one self-contained HTML page, one picture."""

from __future__ import annotations

import math
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.bench import mechanisms as mechs
from foveate.bench import ruler
from foveate.bench.charts import Line, Point, lines, scatter, spread
from foveate.bench.compare import RECALL_LAYERS, RECALL_ROWS, describe_gate
from foveate.bench.results import write_atomic

if TYPE_CHECKING:
    from rich.table import Table

TEMPLATES = Path(__file__).parent / "templates"


# -------------------- numbers


def seconds(value: float | None) -> str:
    """
    >>> seconds(0.01234), seconds(0.5), seconds(12.0), seconds(200.0)
    ('12.3 ms', '500 ms', '12.0 s', '3 min 20 s')
    """
    if value is None:
        return "–"
    if value < 0.1:
        return f"{value * 1e3:.1f} ms"
    if value < 1:
        return f"{value * 1e3:.0f} ms"
    if value < 90:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    return f"{value // 60:.0f} min {value % 60:.0f} s"


def size(value: float | None) -> str:
    """
    >>> size(3 << 20), size(None), size(5 << 30)
    ('3.0 MiB', '–', '5.0 GiB')
    """
    if value is None:
        return "–"
    mib = value / 2**20
    if mib >= 1024:
        return f"{mib / 1024:.1f} GiB"
    return f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def signed(value: float, digits: int = 3) -> str:
    """
    >>> signed(0.0123), signed(-0.5), signed(0.0)
    ('+0.012', '−0.500', '0.000')
    """
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def lost(bpb: dict[str, Any] | None, plain: bool = False) -> str:
    """The paired difference with its interval, or a dash."""
    if bpb is None or bpb["difference"] is None:
        return "–"
    d = bpb["difference"]
    if d["low"] is None:
        return signed(d["value"])
    half = (d["high"] - d["low"]) / 2
    return (
        f"{signed(d['value'])} ±{half:.3f}"
        if plain
        else f"{signed(d['value'])} [{signed(d['low'])}, {signed(d['high'])}]"
    )


def kept(cell: dict[str, Any]) -> str:
    """Attention recall, or a dash.

    >>> kept({"attention_recall": {"value": 0.98765}}), kept({})
    ('98.8%', '–')
    """
    found = cell.get("attention_recall")
    return "–" if found is None else f"{found['value']:.1%}"


def label(name: str) -> str:
    return mechs.TITLES.get(name, name)


# -------------------- terminal


def table_width(results: dict[str, Any]) -> int:
    """Columns that `table` needs: 100 with the usual tasks."""
    return 100 + 7 * sum(any(cell.get(task) for cell in results["cells"]) for task in ruler.TASKS)


def table(results: dict[str, Any]) -> Table:
    """A rich table of all cells, at most 100 columns wide with the usual tasks. "recall" is of attention."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    model, text = results["identity"]["model"], results["identity"]["text"]
    made = Table(
        title=Text(f"{model['name']} on {text['name']}"),
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
    )
    made.add_column("mechanism", no_wrap=True)
    more = [task for task in ruler.TASKS if any(cell.get(task) for cell in results["cells"])]
    heads = [
        "tokens",
        "density",
        "recall",
        "prefill",
        "speed-up",
        "memory",
        "bpb",
        "lost vs dense",
        "needle",
    ]
    for head in [*heads, *more]:
        made.add_column(head, justify="right", no_wrap=True)
    last = None
    for cell in results["cells"]:
        if last is not None and cell["length"] != last:
            made.add_section()
        last = cell["length"]
        bpb, needle = cell["bpb"], cell["needle"]
        row = [
            cell["mechanism"],
            str(cell["length"]),
            f"{cell['density']:.1%}",
            kept(cell),
            seconds(cell["prefill"]["seconds"]),
            f"{cell['prefill']['speedup']:.2f}×",
            size(cell["memory"]["peak_bytes"]),
            "–" if bpb is None else f"{bpb['value']:.3f}",
            lost(bpb, plain=True),
            "–" if needle is None else f"{needle['hits']}/{needle['n']}",
            *("–" if cell.get(task) is None else f"{cell[task]['recall']:.0%}" for task in more),
        ]
        made.add_row(*(Text(x) for x in row), style="dim" if cell["mechanism"] == "random" else "")
    return made


# -------------------- the page


def longest_shown(results: dict[str, Any], task: str) -> int | None:
    """The longest length at which a task is shown for dense and for something else, or None."""
    shown = [c for c in results["cells"] if c[task] is not None]
    others = {c["length"] for c in shown if c["mechanism"] != "dense"}
    return max(
        (c["length"] for c in shown if c["mechanism"] == "dense" and c["length"] in others), default=None
    )


def _at(results: dict[str, Any], length: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Cells of a length by name, and the restrictions among them: at the density asked, not the control."""
    cells = {c["mechanism"]: c for c in results["cells"] if c["length"] == length}
    off = off_density(list(cells.values()), results["identity"]["settings"]["density"])
    return cells, [c for n, c in cells.items() if n not in ("dense", "random", *off)]


def headline(results: dict[str, Any]) -> list[str]:
    """Two or three sentences on what was found, each at the longest length that shows it."""
    out = []
    length = longest_shown(results, "bpb")
    if length is not None:
        cells, clever = _at(results, length)
        out += _about_text(length, cells, [c for c in clever if c["bpb"]])
    length = longest_shown(results, "needle")
    if length is not None:
        cells, clever = _at(results, length)
        out += _about_needles(length, cells, [c for c in clever if c["needle"]])
    return out


def _about_text(length: int, cells: dict[str, Any], clever: list[dict[str, Any]]) -> list[str]:
    if not clever:
        return []
    best = min(clever, key=lambda c: c["bpb"]["difference"]["value"])
    lost_by, dense = best["bpb"]["difference"], cells["dense"]["bpb"]["value"]
    text = (
        f"At {length:,} tokens and {best['density']:.0%} of the causal pairs, {label(best['mechanism'])} kept "
        f"the text best: {signed(lost_by['value'])} bits per byte against dense ({dense:.3f}), at "
        f"{best['prefill']['speedup']:.2f} times its prefill speed."
    )
    if lost_by["high"] is not None and lost_by["high"] < 0:
        text += " Less than nothing is lost: this model predicts text better when it sees less of it."
    control = cells.get("random")
    if control is None or not control["bpb"]:
        return [text]
    mine = control["bpb"]["difference"]["value"]
    worse = [label(c["mechanism"]) for c in clever if c["bpb"]["difference"]["value"] >= mine]
    ending = f"; {', '.join(worse)} did no better." if worse else ", more than every mechanism."
    return [text, f"Random blocks of the same density lost {signed(mine)}{ending}"]


def _about_needles(length: int, cells: dict[str, Any], clever: list[dict[str, Any]]) -> list[str]:
    if not clever:
        return []
    dense, best = cells["dense"]["needle"], max(clever, key=lambda c: c["needle"]["hits"])
    text = (
        f"At {length:,} tokens dense attention found {dense['hits']} of {dense['n']} needles; "
        f"the best restriction, {label(best['mechanism'])}, {best['needle']['hits']}"
    )
    control = cells.get("random")
    return [
        text + (f", random blocks {control['needle']['hits']}." if control and control["needle"] else ".")
    ]


def off_density(cells: list[dict[str, Any]], asked: float) -> list[str]:
    """Mechanisms whose measured density is more than a tenth away from what was asked."""
    return [
        c["mechanism"] for c in cells if c["mechanism"] != "dense" and abs(c["density"] / asked - 1) > 0.1
    ]


def _points(cells: list[dict[str, Any]], task: str) -> list[Point]:
    out = []
    for c in cells:
        name, shown = c["mechanism"], c[task]
        if shown is None:
            continue
        if task == "bpb":
            d = shown["difference"] or {"value": 0.0, "low": None, "high": None}
            y, low, high = d["value"], d["low"], d["high"]
            note = f"{label(name)}: {lost(shown)} bits per byte, {c['prefill']['speedup']:.2f}× dense speed"
        else:
            y, low, high = shown["recall"], shown["low"], shown["high"]
            note = (
                f"{label(name)}: {shown['hits']} of {shown['n']}, {c['prefill']['speedup']:.2f}× dense speed"
            )
        out.append(
            Point(
                label(name),
                c["prefill"]["speedup"],
                y,
                low,
                high,
                mechs.COLOURS.get(name, "#888888"),
                name == "random",
                note,
            )
        )
    return out


def _recall_points(cells: list[dict[str, Any]]) -> list[Point]:
    out = []
    for c in cells:
        name, found = c["mechanism"], c.get("attention_recall")
        if found is None:
            continue
        shares = f"{c['tiles']:.0%} of the tiles, {c['density']:.1%} of the pairs"
        note = f"{label(name)}: {kept(c)} of the attention, {shares}"
        colour = mechs.COLOURS.get(name, "#888888")
        out.append(Point(label(name), c["tiles"], found["value"], None, None, colour, name == "random", note))
    return out


def _sections(results: dict[str, Any]) -> list[dict[str, Any]]:
    made = []
    for length in results["identity"]["settings"]["lengths"]:
        cells = [c for c in results["cells"] if c["length"] == length]
        if not cells:
            continue
        bpb, needle, recall = _points(cells, "bpb"), _points(cells, "needle"), _recall_points(cells)
        more = [task for task in ruler.TASKS if any(c.get(task) for c in cells)]
        curves = [
            Line(
                label(c["mechanism"]),
                c["bpb"]["difference"]["by_position"],
                mechs.COLOURS.get(c["mechanism"], "#888888"),
                c["mechanism"] == "random",
            )
            for c in cells
            if c["bpb"] and c["bpb"]["difference"]
        ]
        x_title = "prefill speed relative to dense"
        made.append(
            {
                "length": length,
                "cells": cells,
                "gates": [g for g in results["gates"] if g["length"] == length],
                "bpb_chart": scatter(
                    bpb,
                    title=f"Bits per byte lost against speed at {length} tokens",
                    x_title=x_title,
                    y_title="bits per byte lost",
                    flip=True,
                )
                if len(bpb) > 1
                else None,
                "needle_chart": scatter(
                    needle,
                    title=f"Needle recall against speed at {length} tokens",
                    x_title=x_title,
                    y_title="needles found",
                    percent=True,
                )
                if len(needle) > 1
                else None,
                "recall_chart": scatter(
                    recall,
                    title=f"Attention recall against tiles computed at {length} tokens",
                    x_title="share of the causal tiles that are computed",
                    y_title="dense attention kept",
                    percent=True,
                    x_percent=True,
                )
                if len(recall) > 1
                else None,
                "more": more,
                "position_chart": lines(
                    curves,
                    length,
                    title=f"Bits per byte lost by position at {length} tokens",
                    x_title="position in the window, tokens",
                    y_title="bits per byte lost",
                )
                if curves
                else None,
                "off": off_density(cells, results["identity"]["settings"]["density"]),
                "depths": next((c["needle"]["by_depth"] for c in cells if c["needle"]), []),
            }
        )
    return made


def html(results: dict[str, Any]) -> str:
    """The whole report as one page: inline styles and pictures, no script, nothing loaded from anywhere."""
    import jinja2

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters.update(
        seconds=seconds, size=size, signed=signed, lost=lost, label=label, gate=describe_gate, kept=kept
    )
    longest = max((c["length"] for c in results["cells"]), default=0)
    gallery = [c for c in results["cells"] if c["length"] == longest and c["picture"]]
    return env.get_template("report.html.j2").render(
        results=results,
        settings=results["identity"]["settings"],
        model=results["identity"]["model"],
        text=results["identity"]["text"],
        environment=results["environment"],
        headline=headline(results),
        sections=_sections(results),
        gallery=gallery,
        longest=longest,
        about=mechs.ABOUT,
        sources=mechs.SOURCES,
        colours=mechs.COLOURS,
        tasks=ruler.TITLES,
        recall_layers=RECALL_LAYERS,
        recall_rows=RECALL_ROWS,
        total=math.fsum(c["seconds"] for c in results["cells"]),
    )


# -------------------- the picture


def tradeoff_png(results: dict[str, Any]) -> bytes:
    """The trade-off as a PNG, each task at the longest length that shows it (needs matplotlib)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: list[tuple[str, int, list[Point]]] = []
    for name in ("bpb", "needle"):
        length = longest_shown(results, name)
        if length is not None:
            cells = [c for c in results["cells"] if c["length"] == length]
            panels.append((name, length, _points(cells, name)))
    figure = Figure(figsize=(5.8 * max(len(panels), 1), 3.8), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0] if panels else []
    for axis, (name, length, points) in zip(axes, panels, strict=True):
        _panel(axis, points, name, length)
    share = results["identity"]["settings"]["density"]
    title = f"{results['identity']['model']['name']}: what {share:.0%} of the pairs costs, and saves"
    figure.suptitle(title.replace("$", r"\$"), fontsize=11, x=0.01, ha="left", weight="bold")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _panel(axis: Any, points: list[Point], name: str, length: int) -> None:
    for p in points:
        face = "white" if p.control else p.colour
        axis.scatter([p.x], [p.y], s=64, zorder=3, facecolor=face, edgecolor=p.colour, linewidth=1.6)
        if p.low is not None and p.high is not None:
            axis.vlines(p.x, p.low, p.high, color=p.colour, alpha=0.5, linewidth=1.4, zorder=2)
    axis.set_xlabel("prefill speed relative to dense  (×, right is faster)", fontsize=9)
    what = "bits per byte lost" if name == "bpb" else "needles found"
    axis.set_title(f"{what} at {length:,} tokens  (up is better)", fontsize=9.5, loc="left", color="#555555")
    axis.tick_params(labelsize=8, length=0)
    axis.grid(True, color="#e6e6e6", linewidth=0.8)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.margins(x=0.08, y=0.12)
    if name == "bpb":
        axis.invert_yaxis()
    else:
        axis.set_ylim(-0.05, 1.08)
        axis.yaxis.set_major_formatter(lambda v, _: f"{v:.0%}")
    # names to the right of the panel, spread apart, each with a thin line to its point
    low, high = sorted(axis.get_ylim())
    share = [(p.y - low) / (high - low) for p in points]
    top_down = name == "bpb"
    places = spread([1 - v if top_down else v for v in share], 0.062, 0.02, 0.98)
    for p, place in zip(points, places, strict=True):
        at = (1.03, place)
        axis.annotate(
            "",
            (p.x, p.y),
            xytext=at,
            textcoords="axes fraction",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6},
        )
        axis.text(1.04, place, p.label, transform=axis.transAxes, fontsize=8.5, va="center", color=p.colour)


def write(results: dict[str, Any], directory: Path) -> list[Path]:
    """Write ``report.html`` and, where matplotlib is installed, ``tradeoff.png``; returns their paths."""
    page = directory / "report.html"
    write_atomic(page, html(results))
    written = [page]
    try:
        picture = tradeoff_png(results)
    except ModuleNotFoundError:
        return written
    write_atomic(directory / "tradeoff.png", picture)
    return [*written, directory / "tradeoff.png"]
