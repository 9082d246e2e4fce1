"""Swin: how far windows with and without shift carry, and an object that the borders of windows cut."""

from __future__ import annotations

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
from foveate.patterns import Full, Windows
from foveate.vision import ShiftedWindowAttention, explain_window

SIDE, PATCH, DIM, HEADS, WINDOW = 24, 4, 32, 2, 3
GRID = SIDE // PATCH  # 6 x 6 cells, a digit covers 2 x 2
STEPS, BATCH, RATE, POSITIONS = 200, 32, 1e-2, 0.5  # chosen on full attention alone
COUNTS_IF = (
    "by gradients at random weights, exactly: four layers, every second shifted, carry every pixel of one corner of a "
    "6 x 6 map to the opposite corner, two such layers and four without shift carry none; and on a map of twice the "
    "side a cell sees as many keys as before. And trained, three seeds, paired, 95 % intervals, 360 held-out digits in "
    "the middle, where the borders of four windows cut them: two layers, one of them shifted, name more from the "
    "corner than two without shift, of as many parameters, plus 0.1, and more than full attention less 0.1. Gate: full "
    "attention names at least 0.8, else open"
)
ARMS = {"full attention": (GRID, 0), "one layer shifted": (WINDOW, 1), "no layer shifted": (WINDOW, 0)}


def model(window: int, shifts: tuple[int, ...], seed: int) -> MapClassifier:
    """Layers with these shifts, read at the top left."""
    torch.manual_seed(seed)
    made = MapClassifier(
        lambda layer: ShiftedWindowAttention(DIM, HEADS, window, shift=shifts[layer]),
        side=SIDE,
        patch=PATCH,
        dim=DIM,
        depth=len(shifts),
        classes=10,
        readout="corner",
    )
    assert made.positions is not None
    nn.init.normal_(made.positions, std=POSITIONS, generator=generator(seed, 1))
    return made


def scenes(digits: Tensor) -> Tensor:
    """Images with digits in the middle, a quarter in each of four windows."""
    x = digits.new_zeros(len(digits), SIDE, SIDE)
    first = (SIDE - 8) // 2
    x[:, first : first + 8, first : first + 8] = digits
    return x


def trained(lab: Lab, name: str, seed: int) -> float:
    """Share of the held-out digits that are named; the first layer is the shifted one."""
    (x, y), (test, labels) = split()
    window, shift = ARMS[name]
    made = model(window, (shift, 0), seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(0, len(x), (lab.pick(BATCH, 4),), generator=generator(seed, 2, step))
        return scenes(x[at]), y[at]

    train(lab, made, batch, steps=lab.pick(STEPS, 4), lr=RATE, what=f"{name}, seed {seed}")
    return accuracy(made, scenes(test), labels)


def pairs_per_cell(n: int, shift: int) -> float:
    """Keys of the cell in the middle of an n x n map."""
    return float(
        Windows((n, n), WINDOW, shift=shift).layout(n * n).to_dense()[0, 0, n * n // 2 + n // 2].sum()
    )


def run(lab: Lab) -> Finding:
    """Does a shift in every second layer carry across borders what windows alone cannot?"""
    shifts = {"4 layers, 2 shifted": (0, 1, 0, 1), "2 layers, 1 shifted": (0, 1), "4 layers, none": (0,) * 4}
    reach = [
        Figure(
            f"pixels of the opposite corner reached: {name}",
            float(reached(model(WINDOW, each, 0), SIDE)[-8:, -8:].double().mean()),
        )
        for name, each in shifts.items()
    ]
    growth = Figure(
        "keys per cell at twice the side over before",
        max(pairs_per_cell(4 * GRID, s) / pairs_per_cell(2 * GRID, s) for s in (0, 1)),
    )
    found = {
        name: [lab.once(f"cut{i}-{seed}", partial(trained, lab, name, seed)) for seed in lab.seeds]
        for i, name in enumerate(ARMS)
    }
    mean = {name: interval(f"named: {name}", values) for name, values in found.items()}
    full, shifted, plain = ARMS
    gain = difference("named: shifted - not shifted", found[shifted], found[plain])
    loss = difference("named: shifted - full attention", found[shifted], found[full])
    exact = [figure.value for figure in (*reach, growth)] == [1, 0, 0, 1]
    verdict = OPEN
    if mean[full].value >= 0.8:
        verdict = all_of(
            judge(Figure("exact conditions", float(exact)), above=0.5),
            judge(gain, above=0.1),
            judge(loss, above=-0.1),
        )
    return Finding(
        question="Does a shift in every second layer carry across borders what windows alone cannot?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"A digit that borders cut is named from the corner by "
        f"{', '.join(f'{name}: {f.value:.3f}' for name, f in mean.items())}; pixels of the opposite corner that reach "
        f"one: {', '.join(f'{name}: {f.value:g}' for name, f in zip(shifts, reach, strict=True))}.",
        figures=(*mean.values(), gain, loss, *reach, growth),
        plot=bars(
            "A digit cut by the borders of four windows, two layers, read in one corner",
            "share named",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()],
            [full, plain],
        ),
        quality=mean[shifted].value / mean[full].value if mean[full].value else None,
        cost=Windows((GRID, GRID), WINDOW, shift=1).layout(GRID**2).area / Full().layout(GRID**2).area,
    )


def picture() -> dict[str, Any]:
    """What has reached a query after one to four layers, without shift and with one."""
    n, frames = 12, []
    for shift in (0, 1, 2):
        layers = [Windows((n, n), 4), Windows((n, n), 4, shift=shift)] * 2
        reach = explain_window(layers, n)
        for after in (1, 2, 3, 4):
            code = f"explain_window([Windows({n, n}, 4), Windows({n, n}, 4, shift={shift})] * 2, {n})"
            frames.append(({"shift": shift, "layers": after}, reach.reached[after - 1], code))
    return pictures.pairs(
        "A 12 x 12 map and windows of 4 x 4: one layer reads a window; with a shift in every second layer, each layer "
        "brings in the windows that the last one touched.",
        frames,
        tokens=n * n,
        grid=(n, n),
    )
