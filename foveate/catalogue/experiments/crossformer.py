"""CrossFormer: what short and long distance groups connect together, and whether a far digit can be named by them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from foveate.catalogue import pictures
from foveate.catalogue.experiments.maxvit import scenes
from foveate.catalogue.lab import OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.canvas import MapClassifier, accuracy, reached
from foveate.catalogue.lab.tiny import train
from foveate.patterns import Grid, Windows
from foveate.vision import LSDAttention

PATCH, DIM, HEADS, GROUP, INTERVAL, HIDDEN = 2, 32, 2, 4, 2, 8
SIDE = PATCH * GROUP * INTERVAL  # one tile of 8 x 8 cells
STEPS, BATCH, RATE, POSITIONS, TEST = 300, 32, 1e-2, 0.5, 1000  # chosen on full attention alone
COUNTS_IF = (
    "two layers, groups of 4 x 4 cells, interval 2, by the gradient of one cell's feature: short then long distance "
    "reaches all of 8 x 8 cells, short distance twice a quarter; on 16 x 16 cells, which are four tiles, short then "
    "long reaches its own tile, a quarter. And three seeds, paired, 95 % intervals, 1,000 test scenes of two digits in "
    "opposite corners, the far one to be named from the cell of the near corner, all arms with the same parameters. "
    "Gate: full attention names at least 0.8, else open. Then both: short then long names at least 0.4 more than short "
    "twice, and at least 0.8"
)
ARMS = {  # (group, interval) of the two layers; the MLP of the offset has the same parameters in all
    "full": ((8, 1), (8, 1)),
    "short + long": ((GROUP, 1), (GROUP, INTERVAL)),
    "long + long": ((GROUP, INTERVAL), (GROUP, INTERVAL)),
    "short + short": ((GROUP, 1), (GROUP, 1)),
}


def model(name: str, seed: int, side: int = SIDE) -> MapClassifier:
    """Two layers, read out at the top left cell; the arms differ in who attends to whom and in nothing else."""
    torch.manual_seed(seed)
    layer = lambda i: LSDAttention(  # noqa: E731
        DIM, HEADS, group=ARMS[name][i][0], interval=ARMS[name][i][1], hidden=HIDDEN
    )
    made = MapClassifier(layer, side=side, patch=PATCH, dim=DIM, classes=10, readout="corner")
    assert made.positions is not None
    nn.init.normal_(made.positions, std=POSITIONS)
    return made


def named(lab: Lab, name: str, seed: int) -> float:
    """Share of the far digits that the arm names."""
    made, batch = model(name, seed), lab.pick(BATCH, 4)
    draw = lambda step: scenes(1000 * (seed + 1) + step, batch)  # noqa: E731
    train(lab, made, draw, steps=lab.pick(STEPS, 4), lr=RATE, what=f"{name}, seed {seed}")
    return accuracy(made, *scenes(0, lab.pick(TEST, 50), test=True))


def run(lab: Lab) -> Finding:
    """Do short and long distance attention together connect a tile, and is that enough to name a far digit?"""
    share = lambda name, side: float(reached(model(name, 0, side), side).double().mean())  # noqa: E731
    field = {name: Figure(f"pixels reached: {name}", share(name, SIDE)) for name in ARMS}
    tiles = Figure("pixels reached of four tiles: short + long", share("short + long", 2 * SIDE))
    quarter = 1 / INTERVAL**2
    connected = (
        field["short + long"].value == 1
        and field["short + short"].value == quarter
        and tiles.value == quarter
    )
    found = {
        name: [
            lab.once(f"{name.replace(' ', '')}-{seed}", partial(named, lab, name, seed)) for seed in lab.seeds
        ]
        for name in ARMS
    }
    mean = {name: interval(f"named: {name}", values) for name, values in found.items()}
    gain = difference("short + long - short + short", found["short + long"], found["short + short"])
    verdict = OPEN
    if mean["full"].value >= 0.8:
        verdict = all_of(judge(gain, 0.4), judge(mean["short + long"], 0.8))
    verdict = all_of(verdict, judge(Figure("connected", float(connected)), 0.5))
    cost = Figure("pairs of a layer over full attention's", quarter)
    return Finding(
        question="Do short and long distance attention together connect a tile, and do they name a far digit?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Reached by one cell after two layers: "
        + ", ".join(f"{name} {figure.value:g}" for name, figure in field.items())
        + f"; of four tiles {tiles.value:g}. Far digits named: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in mean.items())
        + f"; a layer has {cost.value:g} of full attention's pairs.",
        figures=(*field.values(), tiles, *mean.values(), gain, cost),
        plot=bars(
            "The digit in the opposite corner, two layers, 8 x 8 cells",
            "share named",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()],
            ["full", "long + long", "short + short"],
        ),
        quality=mean["short + long"].value / max(mean["full"].value, 0.1),
        cost=cost.value,
    )


def picture() -> dict[str, Any]:
    """Groups of 4 x 4 on two tiles, at intervals 1 and 2."""
    shape = (8, 16)
    near = Windows(shape, (GROUP, GROUP))
    far = Windows(shape, (8, 8)) & Grid(shape, (GROUP, 2 * GROUP))
    return pictures.pairs(
        "Two tiles of 8 x 8 cells. Interval 1: a token reads the 4 x 4 around it. Interval 2: every second row and "
        "column of its tile, and nothing of the other.",
        [
            ({"interval": 1}, near, "LSDAttention(dim, heads, group=4, interval=1)"),
            ({"interval": 2}, far, "LSDAttention(dim, heads, group=4, interval=2)"),
        ],
        tokens=128,
        grid=shape,
    )
