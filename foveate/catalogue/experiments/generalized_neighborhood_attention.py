"""Generalised neighbourhood attention: does the stride that fits the tiles gain what the simulator says?"""

from __future__ import annotations

import time
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
from foveate.core.patterns.base import CACHE
from foveate.patterns import Full, Neighborhood, Pattern, Random, tile_major

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
    patterns: dict[str, Pattern] = {}
    reports, groups = {}, {}
    for family, (shape, window, tile, strides) in FAMILIES.items():
        for stride in strides:
            arm = f"{family}, stride {stride}"
            patterns[arm] = neighborhood = Neighborhood(shape, window, stride, order=tile_major(shape, tile))
            reports[arm] = simulate(neighborhood, tile)
            groups.setdefault(family, []).append(arm)
    slow, fast = "64 x 64, window 24, stride 1", "64 x 64, window 24, stride 8"
    CACHE.clear()
    start = time.perf_counter()
    layouts = {arm: pattern.layout(4096) for arm, pattern in patterns.items()}
    building = (time.perf_counter() - start) / len(layouts)
    same_tiles = sum(reports[arm].visited == layout.nnz for arm, layout in layouts.items())
    bounds = {arm: report.bound for arm, report in reports.items()}
    for arm in (slow, fast):  # the control: as many tiles, anywhere
        name = f"random tiles, as many as {arm}"
        patterns[name], bounds[name] = Random.matching(layouts[arm], causal=False), bounds[arm]
        groups.setdefault("random tiles, as many", []).append(name)

    g = torch.Generator().manual_seed(lab.seeds[0])
    q, k, v = (torch.randn(1, heads, 4096, 64, generator=g) for _ in range(3))
    patterns["dense"] = Full()
    arms = {arm: lambda p=p: fv.attention(q, k, v, p, engine="native") for arm, p in patterns.items()}
    times = paired_times(lab, arms, lab.pick(25, 3))
    speed = {arm: times.speedup(arm, "dense", arm) for arm in bounds}

    rank = spearman("rank correlation of speed-up and bound", [bounds[arm] for arm in reports],
                    [speed[arm].value for arm in reports])  # fmt: skip
    fits = times.speedup(fast, slow, "stride 8 against stride 1, window 24")
    reached = [share_of(speed[arm], report.bound) for arm, report in reports.items() if report.perfect]
    verdicts = [judge(figure, above=0.8) for figure in reached] + [judge(fits, above=1.5)]
    verdicts += [HOLDS if rank.value >= 0.9 else FAILS, HOLDS if same_tiles == len(reports) else FAILS]
    drawn = [series("the bound itself", [3, 16], [3, 16], reference=True)]
    for name, members in groups.items():
        points = sorted((bounds[arm], speed[arm].value) for arm in members)
        drawn.append(series(name, [x for x, _ in points], [y for _, y in points]))
    return Finding(
        question="Does a stride that fits the tiles turn the same number of keys per query into more speed, up to the "
        "whole bound that the tile simulator predicts?",
        counts_if=COUNTS_IF,
        verdict=all_of(*verdicts),
        summary=f"The speed-up over dense ranks like the bound (Spearman {rank.value:.2f}); with window 24 stride 8 is "
        f"{fits.value:.2f} times as fast as stride 1; settings that waste nothing reach "
        f"{100 * min(f.value for f in reached):.0f} % of their bound or more.",
        figures=(
            rank,
            fits,
            Figure("settings in which the simulator's tiles are the layout's", same_tiles, n=len(reports)),
            *reached,
            *speed.values(),
            Figure("building a layout, once, on average", building * 1e3, unit="ms"),
        ),
        plot=lines(
            f"4096 tokens, {heads} heads, float32, forward, one point per stride",
            "bound of the tile simulator",
            "measured speed-up over dense",
            drawn,
        ),
        cost=1 / speed[fast].value,
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
