"""Varying window attention: what a wide context costs, and whether a marker outside the window is found."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.patterns import QueryContextWindows
from foveate.vision import VaryingWindowAttention, multiply_adds

SIDE, WINDOWS, IDS, CLASSES, REGIONS, DIM = 8, 4, 4, 4, 3, 32
STEPS, BATCH, RATE, TEST = 300, 16, 1e-2, 256  # chosen on the naive arm alone
COUNTS_IF = (
    "multiply-adds of the layer on 64 x 64 cells of 64 channels, windows of 8 x 8: with the context packed those of "
    "ratios 1, 2, 4 and 8 differ by less than 1 %, and the pairs of the naive form grow as the ratio's square. And "
    "three seeds, paired, 95 % intervals, 256 maps of 8 x 8 cells in three regions; a cell tells its region, one cell "
    "of each region its class, which all its cells are to tell; windows of 2 x 2, one layer with two branches. Gate: "
    "naive contexts of ratios 2 and 4 reach a mean IoU of at least 0.7, else open. Then: packed contexts of ratios 2 "
    "and 4 have a mean IoU at least 0.1 above that of two branches of ratio 1, whose matrices are as large"
)
ARMS = {  # (ratios, packed)
    "naive 2, 4": ((2, 4), False),
    "packed 2, 4": ((2, 4), True),
    "packed 1, 1": ((1, 1), True),
}


def maps(seed: int, batch: int) -> tuple[Tensor, Tensor]:
    """(cells (batch, 8, 8, IDS + CLASSES), classes (batch, 64)): the nearest of three seeds is a cell's region."""
    g = generator(seed)
    at = torch.rand(batch, SIDE * SIDE, generator=g).argsort(1)[
        :, :REGIONS
    ]  # the seeds, which hold the classes
    place = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).float()
    region = torch.cdist(place.expand(batch, -1, -1), place[at]).argmin(2)  # (batch, cells)
    names = torch.rand(batch, IDS, generator=g).argsort(1)[:, :REGIONS]
    classes = torch.randint(CLASSES, (batch, REGIONS), generator=g)
    cells = torch.zeros(batch, SIDE * SIDE, IDS + CLASSES)
    cells.scatter_(2, names.gather(1, region)[:, :, None], 1.0)
    row = torch.arange(batch)[:, None]
    cells[row, at, IDS + classes] = 1.0
    return cells.view(batch, SIDE, SIDE, -1), classes.gather(1, region)


class Segmenter(nn.Module):
    """(B, H, W, IDS + CLASSES) -> (B, H W, CLASSES): two branches of the attention beside the cell itself, an MLP."""

    def __init__(self, ratios: tuple[int, ...], packed: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(IDS + CLASSES, DIM)
        self.branches = nn.ModuleList(
            VaryingWindowAttention(DIM, windows=WINDOWS, ratio=r, rescale=packed, shortcut=False)
            for r in ratios
        )
        self.head = nn.Sequential(nn.Linear(3 * DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(torch.cat([x, *(branch(x) for branch in self.branches)], 3)).flatten(1, 2)


def mean_iou(model: nn.Module, cells: Tensor, classes: Tensor) -> float:
    """Intersection over union of found and true cells, mean over the classes."""
    model.eval()
    with torch.no_grad():
        found = model(cells).argmax(2)
    both = [
        ((found == c) & (classes == c)).sum() / ((found == c) | (classes == c)).sum() for c in range(CLASSES)
    ]
    return float(torch.stack(both).mean())


def segmented(lab: Lab, name: str, seed: int) -> float:
    """Mean IoU of an arm on maps that it was not trained on."""
    torch.manual_seed(seed)
    model, batch = Segmenter(*ARMS[name]), lab.pick(BATCH, 2)
    draw = lambda step: maps(1000 * (seed + 1) + step, batch)  # noqa: E731
    train(lab, model, draw, steps=lab.pick(STEPS, 3), lr=RATE, what=f"{name}, seed {seed}")
    return mean_iou(model, *maps(0, lab.pick(TEST, 8)))


class _Nchw(nn.Module):
    def __init__(self, ratio: int, packed: bool) -> None:
        super().__init__()
        self.layer = VaryingWindowAttention(64, windows=8, ratio=ratio, rescale=packed, shortcut=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1))


def cost(ratio: int, packed: bool) -> int:
    """Multiply-adds on 64 x 64 cells of 64 channels."""
    with torch.device("meta"):
        return multiply_adds(_Nchw(ratio, packed), 64, in_channels=64)


def run(lab: Lab) -> Finding:
    """Does a context many times as wide cost no more when it is packed, and is what stands in it still found?"""
    ratios = (1, 2, 4, 8)
    packed, naive = ([cost(r, p) for r in ratios] for p in (True, False))
    pairs = [QueryContextWindows((64, 64), 8, r).layout(4096).area / (4096 * 64) for r in ratios]
    even = Figure("multiply-adds packed, largest over smallest", max(packed) / min(packed))
    wide = Figure("multiply-adds at ratio 8, naive over packed", naive[-1] / packed[-1])
    square = Figure("pairs naive, ratio 8 over ratio 1", pairs[-1])
    counted = even.value < 1.01 and pairs == [r * r for r in ratios]
    found = {
        name: [
            lab.once(f"{name.replace(' ', '')}-{seed}", partial(segmented, lab, name, seed))
            for seed in lab.seeds
        ]
        for name in ARMS
    }
    mean = {name: interval(f"mean IoU: {name}", values) for name, values in found.items()}
    gain = difference("packed 2, 4 - packed 1, 1", found["packed 2, 4"], found["packed 1, 1"])
    verdict = OPEN
    if mean["naive 2, 4"].value >= 0.7:
        verdict = judge(gain, 0.1)
    verdict = all_of(verdict, judge(Figure("counted", float(counted)), 0.5))
    return Finding(
        question="Does a wide context cost no more when it is packed, and is what stands in it still found?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Mean IoU where the class stands anywhere in the region: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in mean.items())
        + f". Packed, ratios 1 to 8 cost the same within {100 * (even.value - 1):.2g} %; naive, ratio 8 costs "
        f"{wide.value:.1f} times as much.",
        figures=(*mean.values(), gain, even, wide, square),
        plot=bars(
            "Regions named by one cell of theirs, windows of 2 x 2",
            "mean IoU",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()],
            ["naive 2, 4", "packed 1, 1"],
        ),
        quality=cast(float, mean["packed 2, 4"].value / max(mean["naive 2, 4"].value, 0.1)),
        cost=1 / wide.value,
    )


def picture() -> dict[str, Any]:
    """Contexts of three widths."""
    shape = (12, 12)
    return pictures.pairs(
        "A map of 12 x 12 cells in windows of 3 x 3. The queries of a window read the square around it, which moves "
        "inwards at the borders.",
        [
            ({"ratio": r}, QueryContextWindows(shape, 3, r), f"QueryContextWindows({shape}, 3, {r})")
            for r in (1, 2, 3, 4)
        ],
        tokens=144,
        grid=shape,
    )
