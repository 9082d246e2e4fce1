"""HaloNet: reading across the borders of blocks, at equal numbers of pairs and at equal parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    OPEN,
    Figure,
    Finding,
    Lab,
    all_of,
    bars,
    difference,
    interval,
    judge,
)
from foveate.catalogue.lab.tasks import IGNORE, generator
from foveate.catalogue.lab.tiny import train
from foveate.patterns import Halo, Neighborhood
from foveate.vision import HaloAttention

SIDE, BLOCK, VALUES, DIM, HEADS = 40, 8, 8, 32, 2
STEPS, BATCH, RATE = 150, 4, 1e-2  # chosen on blocks without halo alone, by their accuracy inside blocks
QUESTION = (
    "Does a halo read across the borders of blocks, where blocks with as many pairs but without halo cannot?"
)
COUNTS_IF = (
    "three seeds, paired, 95 % intervals; one layer names the left neighbour of every pixel, 8 values, chance 0.125. "
    "Gate: blocks of 8 without halo name at least 0.95 away from the left borders of blocks, else open. Then all of: "
    "at the borders, halo 1 names at least 0.9; it names at least 0.5 more than blocks of 8 and than blocks of 10, "
    "which see as many keys; with random weights a shift of the image by a block changes the interior by less than "
    "1e-5, one by a pixel by more than 1e-3; and a key is fetched at most half as often as by sliding windows of the "
    "same reach"
)
ARMS = {"blocks of 8": (8, 0), "halo 1": (8, 1), "blocks of 10": (10, 0)}


def layer(name: str) -> HaloAttention:
    """The arm's attention."""
    block, halo = ARMS[name]
    return HaloAttention(DIM, HEADS, block=block, halo=halo)


class Reader(nn.Module):
    """(B, side, side) of values -> logits (B, side, side, values): embedding, one attention, linear."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(VALUES, DIM), layer(name)
        self.constant = nn.Parameter(torch.ones(DIM))  # what all queries share, for the positions
        self.head = nn.Linear(DIM, VALUES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(x) + self.constant))


def draw(seed: int, batch: int, side: int, step: int) -> tuple[Tensor, Tensor]:
    """Random values, and the left neighbours of all but the first column."""
    x = torch.randint(0, VALUES, (batch, side, side), generator=generator(seed, step))
    left = torch.full_like(x, IGNORE)
    left[:, :, 1:] = x[:, :, :-1]
    return x, left


def trained(lab: Lab, name: str, seed: int) -> tuple[float, float]:
    """Share of neighbours named in the first columns of blocks, and in the others."""
    torch.manual_seed(seed)
    model = Reader(name)
    batch = partial(draw, seed, lab.pick(BATCH, 1), SIDE)
    train(lab, model, batch, steps=lab.pick(STEPS, 4), lr=RATE, what=f"{name}, seed {seed}")
    model.eval()
    x, left = draw(seed, 8, SIDE, 1 << 20)
    with torch.no_grad():
        hit = (model(x).argmax(3) == left).double().mean((0, 1))  # (side,) per column
    border = torch.arange(SIDE) % ARMS[name][0] == 0
    return float(hit[border][1:].mean()), float(hit[~border].mean())


def moved(shift: int) -> Figure:
    """Largest change of the interior when the image moves by `shift` pixels, with random weights."""
    torch.manual_seed(0)
    mix, g = layer("halo 1"), generator(3)
    x = torch.randn(1, SIDE, SIDE, DIM, generator=g)
    with torch.no_grad():
        apart = mix(x) - mix(x.roll(shift, 2)).roll(-shift, 2)
    return Figure(f"change after a shift by {shift}", float(apart[:, :, 16:24].abs().max()))


def run(lab: Lab) -> Finding:
    """Does a halo read across the borders of blocks?"""
    found = {
        name: [
            lab.once(f"{name.replace(' ', '')}-{seed}", partial(trained, lab, name, seed))
            for seed in lab.seeds
        ]
        for name in ARMS
    }
    border = {name: [pair[0] for pair in pairs] for name, pairs in found.items()}
    figures = {name: interval(f"at borders: {name}", values) for name, values in border.items()}
    inside = [interval(f"elsewhere: {name}", [pair[1] for pair in pairs]) for name, pairs in found.items()]
    gains = [
        difference(f"halo 1 - {name}", border["halo 1"], border[name])
        for name in ("blocks of 8", "blocks of 10")
    ]
    by_block, by_pixel = moved(BLOCK), moved(1)
    halo = 3  # of the paper: windows of 14; sliding windows of the same reach have side 7
    fetched = Figure("fetches of a key, halo 3", (BLOCK + 2 * halo) ** 2 / BLOCK**2)
    sliding = Figure("fetches of a key, sliding windows of side 7", float((2 * halo + 1) ** 2))
    saved = Figure("their ratio", fetched.value / sliding.value)
    verdict = OPEN
    if inside[0].value >= 0.95:
        verdict = all_of(
            judge(figures["halo 1"], 0.9),
            *(judge(gain, 0.5) for gain in gains),
            judge(Figure("", -by_block.value), -1e-5),
            judge(by_pixel, 1e-3),
            judge(Figure("", -saved.value), -0.5),
        )
    return Finding(
        question=QUESTION,
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Left neighbours named at the borders of blocks: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in figures.items())
        + f"; elsewhere without halo {inside[0].value:.3f}. A block's window of the paper fetches a key "
        f"{fetched.value:.2f} times, sliding windows of the same reach {sliding.value:.0f} times.",
        figures=(*figures.values(), *inside, *gains, by_block, by_pixel, fetched, sliding, saved),
        plot=bars(
            f"Left neighbours at the borders of blocks, {SIDE} x {SIDE}",
            "share named",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in figures.items()],
            ["blocks of 8", "blocks of 10"],
        ),
    )


def picture() -> dict[str, Any]:
    """Blocks of 4 with growing halos on a grid of 12 x 12, and sliding windows."""
    frames = [({"halo": h}, Halo((12, 12), 4, h), f"Halo((12, 12), block=4, halo={h})") for h in (0, 1, 2, 3)]
    sliding = Neighborhood((12, 12), 7).layout(144).density
    return pictures.pairs(
        "The 16 queries of a block share one window, the block and its halo. A sliding window of side 7 has "
        f"{sliding:.2f} of all pairs.",
        frames,
        tokens=144,
        grid=(12, 12),
    )
