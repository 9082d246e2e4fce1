"""Swin: how far windows with and without shift carry, and whether a model learns to use it."""

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
from foveate.vision import ShiftedWindowAttention

SIDE, PATCH, DIM, HEADS, WINDOW, DEPTH = 24, 4, 32, 2, 3, 4
GRID = SIDE // PATCH  # 6 x 6 cells, a digit covers 2 x 2
STEPS, BATCH, RATE, POSITIONS = 200, 32, 1e-2, 0.5  # chosen on full attention alone
CHANCE = 0.1
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 360 scenes of digits held out. A digit lies in each of two opposite corners, "
    "and the cell in one corner names the digit in the other. Gate: four layers of full attention name at least 0.8, "
    "else open. Then all of: by gradients the cell depends on every pixel of the other digit with four layers of which "
    "two are shifted, and on none with two such layers or four without shift; the four shifted layers name more than "
    "0.5, and more than the four without shift, of as many parameters, plus 0.3; those name fewer than chance, 0.1, "
    "plus 0.1; and on a map of twice the side windows, shifted or not, visit exactly as many keys per cell inside "
    "as before"
)
ARMS = {  # window, depth, shift
    "full attention, 4 layers": (GRID, 4, 0),
    "shifted windows, 4 layers": (WINDOW, 4, 1),
    "shifted windows, 2 layers": (WINDOW, 2, 1),
    "windows, 4 layers": (WINDOW, 4, 0),
}


def model(name: str, seed: int) -> MapClassifier:
    """Every second layer shifted by half a window where the arm says so, read at the top left."""
    window, depth, shift = ARMS[name]
    torch.manual_seed(seed)
    made = MapClassifier(
        lambda layer: ShiftedWindowAttention(DIM, HEADS, window, shift=layer % 2 * shift),
        side=SIDE,
        patch=PATCH,
        dim=DIM,
        depth=depth,
        classes=10,
        readout="corner",
    )
    assert made.positions is not None
    nn.init.normal_(made.positions, std=POSITIONS, generator=generator(seed, 1))
    return made


def scenes(digits: Tensor, others: Tensor) -> Tensor:
    """Images with `digits` at the bottom right and `others` at the top left."""
    x = digits.new_zeros(len(digits), SIDE, SIDE)
    x[:, -8:, -8:], x[:, :8, :8] = digits, others
    return x


def trained(lab: Lab, name: str, seed: int) -> float:
    """Share of the held-out scenes whose digit at the bottom right is named."""
    (x, y), (test, labels) = split()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(0, len(x), (2, lab.pick(BATCH, 4)), generator=generator(seed, 2, step))
        return scenes(x[at[0]], x[at[1]]), y[at[0]]

    made = model(name, seed)
    train(lab, made, batch, steps=lab.pick(STEPS, 4), lr=RATE, what=f"{name}, seed {seed}")
    return accuracy(made, scenes(test, test.roll(1, 0)), labels)


def pairs_per_cell(n: int, shift: int) -> float:
    """Keys of the cell in the middle of an n x n map."""
    return float(
        Windows((n, n), WINDOW, shift=shift).layout(n * n).to_dense()[0, 0, n * n // 2 + n // 2].sum()
    )


def run(lab: Lab) -> Finding:
    """Does a shift in every second layer carry from corner to corner what windows alone cannot?"""
    reach = {
        name: Figure(
            f"pixels of the far digit reached: {name}",
            float(reached(model(name, 0), SIDE)[-8:, -8:].double().mean()),
        )
        for name in ARMS
    }
    found = {
        name: [lab.once(f"arm{i}-{seed}", partial(trained, lab, name, seed)) for seed in lab.seeds]
        for i, name in enumerate(ARMS)
    }
    mean = {name: interval(f"named: {name}", values) for name, values in found.items()}
    full, four, two, plain = ARMS
    gain = difference("shifted - not shifted, 4 layers", found[four], found[plain])
    growth = Figure(
        "keys per cell at twice the side over before",
        max(pairs_per_cell(4 * GRID, s) / pairs_per_cell(2 * GRID, s) for s in (0, 1)),
    )
    exact = reach[four].value == 1 and reach[two].value == 0 and reach[plain].value == 0 and growth.value == 1
    under = Figure(
        "chance + 0.1 - named without shift", CHANCE + 0.1 - mean[plain].value, *_flipped(mean[plain])
    )
    verdict = OPEN
    if mean[full].value >= 0.8:
        verdict = all_of(
            judge(Figure("exact conditions", float(exact)), above=0.5),
            judge(mean[four], above=0.5),
            judge(gain, above=0.3),
            judge(under, above=0),
        )
    return Finding(
        question="Does a shift in every second layer carry from corner to corner what windows alone cannot?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"The far digit is named by {', '.join(f'{name}: {f.value:.3f}' for name, f in mean.items())}; its "
        f"pixels reached: {', '.join(f'{f.value:g}' for f in reach.values())}.",
        figures=(*mean.values(), *reach.values(), gain, under, growth),
        plot=bars(
            f"A digit named at the opposite corner of {GRID} x {GRID} cells, windows of {WINDOW}",
            "share named",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()],
            [full, plain],
        ),
        quality=mean[four].value / mean[full].value,
        cost=Windows((GRID, GRID), WINDOW, shift=1).layout(GRID**2).area / Full().layout(GRID**2).area,
    )


def _flipped(figure: Figure) -> tuple[float | None, float | None, int]:
    """Bounds and count of chance + 0.1 - figure."""
    if figure.low is None or figure.high is None:
        return None, None, figure.n
    return CHANCE + 0.1 - figure.high, CHANCE + 0.1 - figure.low, figure.n


def picture() -> dict[str, Any]:
    """Windows of one layer, with and without shift."""
    n = 10
    frames = [
        ({"window": w, "shift": s}, Windows((n, n), w, shift=s), f"Windows(({n}, {n}), {w}, shift={s})")
        for w in (3, 4, 5)
        for s in (0, 1, 2)
    ]
    return pictures.pairs(
        "A 10 x 10 map: a query sees its window; a shift moves all windows, and those at the borders shrink.",
        frames,
        tokens=n * n,
        grid=(n, n),
    )
