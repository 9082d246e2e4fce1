"""MaxViT: what windows and a grid connect together, and whether a far digit can be named through them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.canvas import MapClassifier, accuracy, reached
from foveate.catalogue.lab.digits import split
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.patterns import Grid, Windows
from foveate.vision import BlockAttention, GridAttention, explain_window

SIDE, PATCH, DIM, HEADS, SIZE = 16, 2, 32, 2, 4
CELLS = SIDE // PATCH  # a side; SIZE * SIZE >= CELLS, so windows and grid reach all
STEPS, BATCH, RATE, POSITIONS, TEST = 300, 32, 1e-2, 0.5, 1000  # chosen on full attention alone
COUNTS_IF = (
    "two layers of windows of 4 x 4 cells and a grid of 4 x 4 on 8 x 8 cells, by the gradient of one cell's feature: "
    "window and grid reach all pixels, windows twice and grids twice just a quarter. And three seeds, paired, 95 % "
    "intervals, 1,000 test scenes of two digits in opposite corners, the far one to be named from the cell of the near "
    "corner. Gate: full attention names at least 0.8, else open. Then both: window and grid name at least 0.4 more "
    "than windows twice, and at least full attention's share less 0.05"
)
ARMS: dict[str, Callable[[int], nn.Module]] = {
    "full": lambda _: GridAttention(DIM, HEADS, size=CELLS),
    "window + grid": lambda layer: (BlockAttention, GridAttention)[layer](DIM, HEADS, size=SIZE),
    "grid + grid": lambda _: GridAttention(DIM, HEADS, size=SIZE),
    "window + window": lambda _: BlockAttention(DIM, HEADS, size=SIZE),
}


def model(name: str, seed: int) -> MapClassifier:
    """Two layers, read out at the top left cell; the arms differ in who attends to whom, and in bias tables."""
    torch.manual_seed(seed)
    made = MapClassifier(ARMS[name], side=SIDE, patch=PATCH, dim=DIM, classes=10, readout="corner")
    assert made.positions is not None
    nn.init.normal_(made.positions, std=POSITIONS)
    return made


def scenes(seed: int, batch: int, *, test: bool = False) -> tuple[Tensor, Tensor]:
    """(images (batch, 16, 16), class of the digit at the bottom right); another digit stands at the top left."""
    x, y = split()[int(test)]
    near, far = torch.randint(len(x), (2, batch), generator=generator(seed))
    images = torch.zeros(batch, SIDE, SIDE)
    images[:, :8, :8], images[:, -8:, -8:] = x[near], x[far]
    return images, y[far]


def named(lab: Lab, name: str, seed: int) -> float:
    """Share of the far digits that the arm names."""
    made, batch = model(name, seed), lab.pick(BATCH, 4)
    draw = lambda step: scenes(1000 * (seed + 1) + step, batch)  # noqa: E731
    train(lab, made, draw, steps=lab.pick(STEPS, 4), lr=RATE, what=f"{name}, seed {seed}")
    return accuracy(made, *scenes(0, lab.pick(TEST, 50), test=True))


def run(lab: Lab) -> Finding:
    """Do a window and a grid attention together connect all cells, and is that enough to name a far digit?"""
    field = {
        name: Figure(f"pixels reached: {name}", float(reached(model(name, 0), SIDE).double().mean()))
        for name in ARMS
    }
    connected = field["window + grid"].value == 1 and all(
        field[twice].value == SIZE**2 / CELLS**2 for twice in ("grid + grid", "window + window")
    )
    found = {
        name: [
            lab.once(f"{name.replace(' ', '')}-{seed}", partial(named, lab, name, seed)) for seed in lab.seeds
        ]
        for name in ARMS
    }
    mean = {name: interval(f"named: {name}", values) for name, values in found.items()}
    ours = found["window + grid"]
    gain = difference("window + grid - window + window", ours, found["window + window"])
    rest = difference("window + grid - full", ours, found["full"])
    verdict = OPEN
    if mean["full"].value >= 0.8:
        verdict = all_of(judge(gain, 0.4), judge(rest, -0.05))
    verdict = all_of(verdict, judge(Figure("connected", float(connected)), 0.5))
    cost = Figure("pairs of a layer over full attention's", SIZE**2 / CELLS**2)
    return Finding(
        question="Do a window and a grid attention together connect all cells, and do they name a far digit?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Reached by one cell after two layers: "
        + ", ".join(f"{name} {figure.value:g}" for name, figure in field.items())
        + ". Far digits named: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in mean.items())
        + f"; a layer has {cost.value:g} of full attention's pairs.",
        figures=(*field.values(), *mean.values(), gain, rest, cost),
        plot=bars(
            "The digit in the opposite corner, two layers, 8 x 8 cells",
            "share named",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()],
            ["full", "grid + grid", "window + window"],
        ),
        quality=mean["window + grid"].value / max(mean["full"].value, 0.1),
        cost=cost.value,
    )


def picture() -> dict[str, Any]:
    """What has reached a query after one layer and after two: blocks, grids, one after the other."""
    shape, frames = (8, 8), []
    kinds = {"block, block": (Windows, Windows), "grid, grid": (Grid, Grid), "block, grid": (Windows, Grid)}
    for kind, (first, second) in kinds.items():
        for size in (2, 4, 8):
            reach = explain_window([first(shape, size), second(shape, size)], shape)
            code = f"explain_window([{first.__name__}({shape}, {size}), {second.__name__}({shape}, {size})], {shape})"
            frames += [
                ({"attention": kind, "size": size, "layers": after}, reach.reached[after - 1], code)
                for after in (1, 2)
            ]
    return pictures.pairs(
        "An 8 x 8 map: tokens next to each other, or as many spread over the whole map. With 4 x 4 of either a token "
        "reads 16; one after the other they connect all.",
        frames,
        tokens=64,
        grid=shape,
    )
