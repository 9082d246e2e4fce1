"""The picture of docs/vision.md: receptive fields that grow. `.venv/bin/python docs/vision.py`"""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from foveate.patterns import Grid, Neighborhood, Pattern, Windows
from foveate.vision import explain_window
from foveate.vision.explain import LEGEND

GRID = (28, 28)
PLAIN, MOVED = Windows(GRID, 7), Windows(GRID, 7, shift=3)
ROWS: dict[str, list[tuple[str, Pattern]]] = {
    "Swin": [("window", PLAIN), ("shifted", MOVED), ("window", PLAIN), ("shifted", MOVED)],
    "MaxViT": [("window", PLAIN), ("grid", Grid(GRID, 7)), ("window", PLAIN), ("grid", Grid(GRID, 7))],
    "neighbourhood": [("7 x 7", Neighborhood(GRID, 7))] * 4,
    "dilated neighbourhood": [
        ("7 x 7", Neighborhood(GRID, 7)),
        ("every 4th", Neighborhood(GRID, 7, dilation=4)),
    ]
    * 2,
}


def main() -> None:
    """Writes docs/vision.png."""
    figure = Figure(figsize=(9.6, 2.5 * len(ROWS)), layout="constrained")
    axes = figure.subplots(len(ROWS), 4)
    for row, (family, layers) in zip(axes, ROWS.items(), strict=True):
        reach = explain_window([p for _, p in layers], GRID, names=[name for name, _ in layers])
        reach.draw(row, (9, 12))
        row[0].set_ylabel(family, fontsize=9)
    figure.suptitle(f"query {LEGEND}", fontsize=9)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
