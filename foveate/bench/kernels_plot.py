"""Plots of the kernel benchmark: rate against length for a sweep, figures against their targets for a preset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from foveate.bench.kernels_peers import PEERS
from foveate.bench.kernels_table import Row, number
from foveate.bench.kernels_targets import LINEAR_MASK, Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "native": "#1f5fa8", "flex": "#1f5fa8", "sdpa": "#d9822b", "sdpa_mask": "#b5467f", "torch_flex": "#2f8f5b",
    "sdpa_flash": "#d9822b", "sdpa_efficient": "#a8742f", "sdpa_cudnn": "#e0b13c", "sdpa_math": "#8c8c8c",
    "flash_attn": "#7a52b3", "natten": "#3aa6a6", "xformers": "#6b7f3a",
}  # fmt: skip
COLUMNS = 5


def plot(
    rows: Iterable[Row], path: Path, found: Sequence[tuple[Target, float | None]] | None = None
) -> list[Path]:
    """Draw what the rows hold; the PNG files written, beside `path` (the CSV).

    A preset (`found`: its targets and figures) gives one file; a sweep gives one per direction, dtype and head dim.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'foveate[viz]'") from error
    matplotlib.use("Agg")
    measured = [row for row in rows if row["status"] == "ok"]
    if not measured:
        return []
    if found is not None:
        return [_save(_targets(measured, found), path.with_suffix(".png"))]
    written = []
    groups = dict.fromkeys((row["direction"], row["dtype"], row["head_dim"]) for row in measured)
    for direction, dtype, dim in groups:
        chosen = [
            row
            for row in measured
            if (row["direction"], row["dtype"], row["head_dim"]) == (direction, dtype, dim)
        ]
        target = path.with_name(f"{path.stem}-{direction}-{dtype}-d{dim}.png")
        written.append(_save(_sweep(chosen), target))
    return written


def _save(figure: Figure, path: Path) -> Path:
    from matplotlib import pyplot as plt

    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=130)
    plt.close(figure)
    temporary.replace(path)
    return path


# --------------------------------------------------------------------------------------------- a sweep
def _sweep(rows: Sequence[Row]) -> Figure:
    """One panel per mask: rate on the allowed pairs against the number of keys."""
    from matplotlib import pyplot as plt

    masks = list(dict.fromkeys(row["mask"] for row in rows))
    engines = [name for name in PEERS if any(row["engine"] == name for row in rows)]
    columns = min(COLUMNS, len(masks))
    lines = -(-len(masks) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.7 * columns + 0.6, 2.2 * lines + 1.3), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    lengths = sorted({int(row["k_len"]) for row in rows})
    product = [
        median(number(row, "matmul_gflops_per_sec") or 0.0 for row in rows if int(row["k_len"]) == n)
        for n in lengths
    ]
    for axis, mask in zip(axes.flat, masks, strict=False):
        axis.plot(lengths, product, color="0.6", lw=1, ls=(0, (4, 3)), marker="_", label="matrix product")
        for engine in engines:
            points = sorted(
                (int(row["k_len"]), number(row, "gflops_per_sec"))
                for row in rows
                if row["mask"] == mask and row["engine"] == engine
            )
            if points:
                x, y = zip(*points, strict=True)
                axis.plot(x, y, color=COLOURS[engine], marker="o", ms=3.5, lw=1.6, label=engine)
        axis.set_title(mask, fontsize=8.5, loc="left")
    for axis in axes.flat[len(masks) :]:
        axis.set_visible(False)
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_yscale("log")
    axes[0, 0].yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes[0, 0].set_xticks(lengths, [_length(n) for n in lengths])
    for axis in axes.flat[: len(masks)]:
        axis.minorticks_off()
        axis.grid(axis="y", color="0.9", lw=0.6)
        axis.tick_params(labelsize=7.5)
        axis.spines[["top", "right"]].set_visible(False)
    handles: dict[str, Any] = {}
    for axis in axes.flat[: len(masks)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    first = rows[0]
    said = "forward" if first["direction"] == "fwd" else "forward + backward"
    figure.suptitle(
        f"{said}, {first['dtype']}, {first['heads']} heads of {first['head_dim']}: GFLOP/s on the allowed pairs "
        f"by number of keys\n{_where(first)}",
        fontsize=9.5, x=0.01, ha="left",
    )  # fmt: skip
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower left",
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
    )
    return figure


# ------------------------------------------------------------------------------------------- a preset
def _targets(rows: Sequence[Row], found: Sequence[tuple[Target, float | None]]) -> Figure:
    """Each figure over its bound as a bar (past 1: met), and below them the linear case on log-log axes."""
    from matplotlib import pyplot as plt

    linear = sorted(
        (
            row
            for row in rows
            if row["mask"] == LINEAR_MASK and row["direction"] == "fwd" and row["engine"] == "native"
        ),
        key=lambda row: int(row["k_len"]),
    )
    bars = [
        (target, value) for target, value in found if value is not None and not (target.low and target.high)
    ]
    heights = (0.27 * len(bars) + 0.8, 3.2)
    figure, axes = plt.subplots(
        2, 1, figsize=(10.5, sum(heights) + 0.5), height_ratios=heights, layout="constrained", squeeze=False
    )
    if bars:
        _bars(axes[0, 0], bars)
    else:
        axes[0, 0].set_axis_off()
    if len(linear) > 1:
        _line(axes[1, 0], linear)
    else:
        axes[1, 0].set_axis_off()
    figure.suptitle(_where(rows[0]), fontsize=9, x=0.01, ha="left")
    return figure


def _bars(axis: Axes, bars: Sequence[tuple[Target, float]]) -> None:
    shares = [(value / target.low if target.low else (target.high or 1.0) / value) for target, value in bars]
    colours = ["#1f5fa8" if target.met(value) else "#c9605b" for target, value in bars]
    axis.barh([target.what for target, _ in bars], shares, color=colours, height=0.66)
    for place, ((target, value), share) in enumerate(zip(bars, shares, strict=True)):
        told = f"{value:.3g}{target.unit} ({target.wanted})"
        axis.text(max(share, 1.0) + 0.02, place, told, va="center", fontsize=7.5)
    axis.axvline(1, color="0.25", lw=1)
    axis.set_xlim(0, 1.45 * max(1.0, *shares))
    axis.set_ylim(len(bars) - 0.4, -0.6)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("figure over its target (blue: met, red: missed)", fontsize=8.5)


def _line(axis: Axes, rows: Sequence[Row]) -> None:
    lengths = [int(row["k_len"]) for row in rows]
    for column, label, factor, colour in (
        ("step_time", "time, s", 1e-3, "#1f5fa8"),
        ("peak_mem", "added memory, GiB", 1 / 1024, "#d9822b"),
    ):
        points = [
            (n, value * factor)
            for n, row in zip(lengths, rows, strict=True)
            if (value := number(row, column))
        ]
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, marker="o", ms=4, lw=1.6, color=colour, label=label)
            proportional = [y[-1] * n / x[-1] for n in x]
            axis.plot(x, proportional, color="0.7", lw=1, ls=(0, (3, 3)), zorder=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [_length(n) for n in lengths], fontsize=7.5)
    axis.minorticks_off()
    axis.tick_params(labelsize=7.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(
        "window 512, forward: growth with the tokens\n(dashed: proportional)", fontsize=8.5, loc="left"
    )
    axis.legend(frameon=False, fontsize=8)


def _length(n: int) -> str:
    """A length for an axis.

    >>> _length(4096), _length(1 << 20), _length(1000)
    ('4k', '1M', '1000')
    """
    if n % (1 << 20) == 0:
        return f"{n >> 20}M"
    return f"{n >> 10}k" if n % 1024 == 0 else str(n)


def _where(row: Row) -> str:
    threads = f", {row['threads']} threads" if row["device"] == "cpu" else ""
    device = row["cpu"] if row["device"] == "cpu" else row["device"]
    return f"{device}{threads}, torch {row['torch']}, {row['date'][:10]}"
