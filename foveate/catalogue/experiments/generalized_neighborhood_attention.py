"""Generalised neighbourhood attention: does the stride that fits the tiles gain what the simulator says?"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

import foveate as fv
from foveate.bench.neighborhood_tiles import simulate
from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    FAILS,
    HOLDS,
    Figure,
    Finding,
    Lab,
    all_of,
    judge,
    lines,
    paired_times,
    series,
    spearman,
)
from foveate.patterns import Full, Neighborhood, Random, tile_major

FAMILIES = {  # name: grid, window, tile of 64 cells, strides
    "64 x 64, window 16": ((64, 64), 16, 8, (1, 4, 8, 12, 16)),
    "64 x 64, window 24": ((64, 64), 24, 8, (1, 4, 8, 12, 16, 24)),
    "16 x 16 x 16, window 8": ((16, 16, 16), 8, 4, (1, 2, 4, 8)),
}
COUNTS_IF = (
    "Over 15 settings (4096 tokens on 2-D and 3-D grids, equal keys per query within a window) the measured speed-up "
    "over dense attention on the same engine ranks like the simulator's bound (Spearman at least 0.9); the simulator's "
    "tiles are those of the layout in every setting; with window 24, stride 8 is more than 1.5 times as fast as stride "
    "1; and each of the four settings that waste nothing reaches more than 80 % of its bound (95 % intervals wholly "
    "above)."
)


def run(lab: Lab) -> Finding:
    """Does a stride that fits the tiles turn the same number of keys per query into more speed, up to the whole bound
    that the tile simulator predicts?"""
    heads = lab.pick(8, 1)
    g = torch.Generator().manual_seed(lab.seeds[0])
    q, k, v = (torch.randn(1, heads, 4096, 64, generator=g) for _ in range(3))
    reports, patterns = {}, {}
    for name, (shape, window, tile, strides) in FAMILIES.items():
        for stride in strides:
            arm = f"{name}, stride {stride}"
            patterns[arm] = Neighborhood(shape, window, stride, order=tile_major(shape, tile))
            reports[arm] = simulate(patterns[arm], tile)
    same_tiles = sum(reports[arm].visited == p.layout(prod(p.shape)).nnz for arm, p in patterns.items())
    controls = {
        f"random tiles, as many as stride {s}": patterns[f"64 x 64, window 24, stride {s}"] for s in (1, 8)
    }
    patterns |= {name: Random.matching(p.layout(4096), causal=False) for name, p in controls.items()}
    patterns["dense"] = Full()
    arms = {arm: lambda p=p: fv.attention(q, k, v, p, engine="native") for arm, p in patterns.items()}
    times = paired_times(lab, arms, lab.pick(25, 3))

    speed = {arm: times.speedup(arm, "dense", arm) for arm in patterns if arm != "dense"}
    rank = spearman("rank correlation of speed-up and bound", [r.bound for r in reports.values()],
                    [speed[arm].value for arm in reports])  # fmt: skip
    fits = times.speedup(
        "64 x 64, window 24, stride 8", "64 x 64, window 24, stride 1", "stride 8 against stride 1, window 24"
    )
    reached = [share_of(speed[arm], r.bound) for arm, r in reports.items() if r.perfect]
    worst = min(reached, key=lambda f: f.value)
    met = [judge(f, above=0.8) for f in reached] + [judge(fits, above=1.5)]
    met += [HOLDS if rank.value >= 0.9 else FAILS, HOLDS if same_tiles == len(reports) else FAILS]
    window_24 = [f"64 x 64, window 24, stride {s}" for s in (1, 8)]
    control = sorted(
        (reports[arm].bound, speed[name].value) for arm, name in zip(window_24, controls, strict=True)
    )
    drawn = []
    for name in FAMILIES:
        points = sorted((r.bound, speed[arm].value) for arm, r in reports.items() if arm.startswith(name))
        drawn.append(series(name, *zip(*points, strict=True)))
    return Finding(
        question="Does a stride that fits the tiles turn the same number of keys per query into more speed, up to the "
        "whole bound that the tile simulator predicts?",
        counts_if=COUNTS_IF,
        verdict=all_of(*met),
        summary=f"The speed-up over dense ranks like the bound (Spearman {rank.value:.2f}); with window 24 stride 8 is "
        f"{fits.value:.2f} times as fast as stride 1; settings that waste nothing reach {100 * worst.value:.0f} % of "
        "their bound or more.",
        figures=(
            rank,
            fits,
            Figure("settings in which the simulator's tiles are the layout's", same_tiles, n=len(reports)),
            *reached,
            *speed.values(),
        ),
        plot=lines(
            f"4096 tokens, {heads} heads, float32, forward, one point per stride",
            "bound of the tile simulator",
            "measured speed-up over dense",
            [
                *drawn,
                series("random tiles, as many", *zip(*control, strict=True), reference=True),
                series("the bound itself", [3, 16], [3, 16], reference=True),
            ],
        ),
        cost=1 / speed["64 x 64, window 24, stride 8"].value,
    )


def share_of(speedup: Figure, bound: float) -> Figure:
    """A measured speed-up as a share of its bound."""
    low, high = (None if edge is None else edge / bound for edge in (speedup.low, speedup.high))
    return Figure(f"share of the bound: {speedup.name}", speedup.value / bound, low, high, speedup.n)


def picture() -> dict[str, Any]:
    """Strides on an 8 x 8 grid, from a window that slides cell by cell to blocks."""
    frames = []
    for window in (4, 5, 6):
        for stride in (1, 2, 3, 4):
            for causal, axes in (("no axis", False), ("rows", (True, False))):
                pattern = Neighborhood((8, 8), window, stride, causal=axes)
                code = f"Neighborhood((8, 8), {window}, stride={stride}, causal={axes})"
                frames.append(({"window": window, "stride": stride, "causal": causal}, pattern, code))
    return pictures.pairs(
        "With a stride, neighbouring queries share one window: stride 1 slides cell by cell, stride 4 with window 4 "
        "cuts the grid into blocks.",
        frames,
        tokens=64,
        grid=(8, 8),
    )
