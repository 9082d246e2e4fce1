"""MedViTV2: neighbourhoods with and without dilation: what four layers reach, and digits under corruptions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from foveate.catalogue.lab.canvas import MapClassifier
from foveate.catalogue.lab.digits import batches, split
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.patterns import Neighborhood
from foveate.vision import NeighborhoodAttention2d

SIDE, TILE, DIM, HEADS, KERNEL, DEPTH = 12, 2, 32, 2, 3, 4
STEPS, BATCH, RATE = 120, 16, 1e-2  # chosen on neighbourhoods without dilation, with neighbouring tiles
QUESTION = (
    "Do alternating dilations let four layers of 3 x 3 neighbourhoods compare opposite corners of an image?"
)
COUNTS_IF = (
    "three seeds, paired, 95 % intervals. Two tiles are the same or not, read out at the corner of the first, chance "
    "0.5. Gate: neighbourhoods without dilation tell at least 0.9 when the tiles are neighbours, else open. Then with "
    "the tiles in opposite corners, both of: alternating dilations of 1 and floor(side / kernel), of as many "
    "parameters and keys, tell at least 0.25 more; and the corner depends on all cells of the second tile with "
    "dilation, on none without. Digits with noise, blur and low contrast are reported, without a condition"
)
ARMS: dict[str, tuple[int | str, int | str]] = {"plain": (1, 1), "dilated": (1, "widest")}
CORRUPTIONS = ("clean", "noise", "blur", "contrast")


def model(
    arm: str, side: int, classes: int, depth: int, patch: int = 1, readout: str = "corner"
) -> MapClassifier:
    """Blocks of neighbourhood attention on a map."""
    return MapClassifier(
        lambda layer: NeighborhoodAttention2d(DIM, HEADS, KERNEL, dilation=ARMS[arm][layer % 2]),
        side=side,
        patch=patch,
        dim=DIM,
        depth=depth,
        classes=classes,
        readout=readout,
    )


def tiles(seed: int, batch: int, apart: bool, step: int) -> tuple[Tensor, Tensor]:
    """(B, side, side) with two tiles of +1 or -1, in opposite corners or side by side, and 1 where they are equal."""
    g = generator(seed, step)
    signs = 2 * torch.randint(0, 2, (2, batch, 1, 1), generator=g) - 1
    x = 0.1 * torch.randn(batch, SIDE, SIDE, generator=g)
    x[:, :TILE, :TILE] += signs[0]
    far = slice(SIDE - TILE, SIDE)
    if apart:
        x[:, far, far] += signs[1]
    else:
        x[:, :TILE, TILE : 2 * TILE] += signs[1]
    return x, (signs[0] == signs[1]).flatten().long()


def corners(lab: Lab, arm: str, apart: bool, seed: int) -> float:
    """Share of pairs of tiles told right."""
    torch.manual_seed(seed)
    net = model(arm, SIDE, 2, DEPTH)
    batch = partial(tiles, seed, lab.pick(BATCH, 2), apart)
    train(lab, net, batch, steps=lab.pick(STEPS, 2), lr=RATE, what=f"{arm}, seed {seed}")
    x, same = tiles(seed, lab.pick(512, 8), apart, 1 << 20)
    net.eval()
    with torch.no_grad():
        return float((net(x).argmax(1) == same).double().mean())


def corrupted(x: Tensor, kind: str) -> Tensor:
    """Test images with noise of half a deviation, a 3 x 3 mean, or a third of the contrast."""
    if kind == "noise":
        return x + 0.5 * torch.randn(x.shape, generator=generator(6))
    if kind == "blur":
        return F.avg_pool2d(x[:, None], 3, 1, 1, count_include_pad=False)[:, 0]
    return x / 3 if kind == "contrast" else x


def digits(lab: Lab, arm: str, seed: int) -> list[float]:
    """Shares of the test digits of 16 x 16 recognised under each corruption, trained on clean ones."""
    torch.manual_seed(seed)
    net = model(arm, 16, 10, 2, patch=2, readout="mean")
    if net.positions is not None:
        nn.init.normal_(net.positions, std=0.5, generator=generator(seed, 1))
    draw = batches(seed, lab.pick(2 * BATCH, 2), 16)
    train(lab, net, draw, steps=lab.pick(200, 2), lr=RATE, what=f"digits, {arm}, seed {seed}")
    _, (x, y) = split(16)
    net.eval()
    with torch.no_grad():
        return [float((net(corrupted(x, kind)).argmax(1) == y).double().mean()) for kind in CORRUPTIONS]


def reached(arm: str) -> tuple[Figure, Figure]:
    """Share of the map, and of the second tile, that the corner's result depends on after the layers."""
    torch.manual_seed(0)
    mixers: Any = nn.Sequential(*(NeighborhoodAttention2d(DIM, HEADS, KERNEL, dilation=ARMS[arm][i % 2])
                                  for i in range(DEPTH))).double()  # fmt: skip
    x = torch.randn(1, SIDE, SIDE, DIM, generator=generator(4), dtype=torch.float64).requires_grad_()
    mixers(x)[0, 0, 0].sum().backward()
    assert x.grad is not None
    seen = (x.grad[0].abs().sum(2) > 0).double()
    far = seen[SIDE - TILE :, SIDE - TILE :]
    return (
        Figure(f"reached from the corner: {arm}", float(seen.mean())),
        Figure(f"of the second tile: {arm}", float(far.mean())),
    )


def run(lab: Lab) -> Finding:
    """Reach, and digits under corruptions."""
    told = {
        arm: [lab.once(f"{arm}-{seed}", partial(corners, lab, arm, True, seed)) for seed in lab.seeds]
        for arm in ARMS
    }
    near = [lab.once(f"near-{seed}", partial(corners, lab, "plain", False, seed)) for seed in lab.seeds]
    shares = {
        arm: [lab.once(f"digits-{arm}-{seed}", partial(digits, lab, arm, seed)) for seed in lab.seeds]
        for arm in ARMS
    }
    neighbours = interval("told, neighbours: plain", near)
    figures = {arm: interval(f"told, corners: {arm}", values) for arm, values in told.items()}
    gain = difference("dilated - plain", told["dilated"], told["plain"])
    seen = {arm: reached(arm) for arm in ARMS}
    recognised = [
        interval(f"digits, {kind}: {arm}", [run[i] for run in shares[arm]])
        for i, kind in enumerate(CORRUPTIONS)
        for arm in ARMS
    ]
    verdict = OPEN
    if neighbours.value >= 0.9:
        # all of the second tile with dilation, nothing of it without
        reach = Figure("", seen["dilated"][1].value - seen["plain"][1].value)
        verdict = all_of(judge(gain, 0.25), judge(reach, 1 - 1e-9))
    return Finding(
        question=QUESTION,
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Tiles in opposite corners told: "
        + ", ".join(f"{arm} {figure.value:.3f}" for arm, figure in figures.items())
        + f"; neighbours, plain {neighbours.value:.3f}. The corner depends on "
        + ", ".join(f"{figures[0].value:.2f} of the map {arm}" for arm, figures in seen.items())
        + ". Digits (plain, dilated): "
        + ", ".join(
            f"{kind} {recognised[2 * i].value:.3f}, {recognised[2 * i + 1].value:.3f}"
            for i, kind in enumerate(CORRUPTIONS)
        )
        + ".",
        figures=(
            neighbours,
            *figures.values(),
            gain,
            *(figure for both in seen.values() for figure in both),
            *recognised,
        ),
        plot=bars(
            f"Four layers of 3 x 3 keys: same or different, tiles in opposite corners of {SIDE} x {SIDE}",
            "share told",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in figures.items()],
            ["plain"],
        ),
    )


def picture() -> dict[str, Any]:
    """Neighbourhoods of 3 x 3 on a map of 12 x 12, with growing dilation."""
    frames = [
        ({"dilation": r}, Neighborhood((12, 12), 3, dilation=r), f"Neighborhood((12, 12), 3, dilation={r})")
        for r in (1, 2, 4)
    ]
    return pictures.pairs(
        "Every pixel sees nine keys; dilation spreads them over the map, and at borders the window moves inwards.",
        frames,
        tokens=144,
        grid=(12, 12),
    )
