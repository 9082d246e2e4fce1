"""Fused neighbourhood attention: time and memory beside the unfused form and beside SDPA with a dense mask."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import foveate as fv
from foveate.bench.memory import peak_of
from foveate.catalogue import pictures
from foveate.catalogue.lab import FAILS, HOLDS, Figure, Finding, Lab, all_of, bars, judge, paired_times
from foveate.core.patterns.base import CACHE
from foveate.patterns import Full, Neighborhood, Random, tile_major

COUNTS_IF = (
    "On 4096 tokens, as a line with windows of 49 and as a 64 x 64 grid with windows of 7 x 7: the fused form is more "
    "than 5 times as fast as SDPA with the dense mask, more than 4 times as fast as the same engine without a mask, "
    "and more than twice as fast as the unfused form (95 % intervals wholly above); it needs less than 10 % of SDPA's "
    "memory besides the result; and no result differs from SDPA's by more than 1e-5."
)


def run(lab: Lab) -> Finding:
    """Is neighbourhood attention fused over tiles, on 1-D and 2-D grids, faster than its unfused form and than dense
    attention, with hardly any extra memory?"""
    side, heads = lab.pick(64, 32), lab.pick(8, 2)
    n = side * side
    line, grid = Neighborhood(n, 49), Neighborhood((side, side), 7, order=tile_major((side, side), 8))
    CACHE.clear()
    start = time.perf_counter()
    layout = grid.layout(n)
    building = time.perf_counter() - start
    mask = layout.to_dense()[0, 0]

    q, k, v = inputs(lab.seeds[0], heads, n)
    scattered = Random.matching(layout, causal=False)
    arms: dict[str, Callable[[], Any]] = {
        "dense, same engine": lambda: fv.attention(q, k, v, Full(), engine="native"),
        "random tiles, as many": lambda: fv.attention(q, k, v, scattered, engine="native"),
        **{f"{form} 1-D": call for form, call in forms(line, q, k, v).items()},
        **{f"{form} 2-D": call for form, call in forms(grid, q, k, v).items()},
    }
    times = paired_times(lab, arms, lab.pick(15, 3))
    extra = {form: extra_memory(arms[f"{form} 2-D"], q.nbytes) for form in ("fused", "unfused", "SDPA")}
    share = (extra["fused"] + layout.nbytes) / (extra["SDPA"] + mask.nbytes)
    worst = max(spread(pattern, *inputs(seed, heads, n)) for seed in lab.seeds for pattern in (line, grid))

    thresholds = {  # (arm, base): more than so many times as fast
        (f"fused {axes}", base): above
        for axes in ("1-D", "2-D")
        for base, above in ((f"SDPA {axes}", 5.0), (f"unfused {axes}", 2.0), ("dense, same engine", 4.0))
    }
    speed = [times.speedup(arm, base) for arm, base in thresholds]
    verdicts = [judge(f, above) for f, above in zip(speed, thresholds.values(), strict=True)]
    verdicts += [HOLDS if share < 0.1 else FAILS, HOLDS if worst <= 1e-5 else FAILS]
    return Finding(
        question="Is neighbourhood attention fused over tiles faster than its unfused form and than dense attention, "
        "in 1-D and 2-D, with hardly any extra memory?",
        counts_if=COUNTS_IF,
        verdict=all_of(*verdicts),
        summary=f"In 2-D the fused form is {speed[3].value:.1f} times as fast as SDPA with the mask and "
        f"{speed[4].value:.1f} times as fast as the unfused form, in 1-D {speed[0].value:.1f} and "
        f"{speed[1].value:.1f} times; it needs {100 * share:.1f} % of the memory that SDPA needs besides the result.",
        figures=(
            *speed,
            times.speedup("fused 2-D", "random tiles, as many"),
            Figure("memory besides the result, fused, of SDPA's", 100 * share, unit="%"),
            Figure("memory besides the result, unfused", extra["unfused"] / 2**20, unit="MiB"),
            Figure("largest difference from SDPA", worst),
            Figure("building the 2-D layout, once", building * 1e3, unit="ms"),
            Figure("fused 2-D, one call", times.median("fused 2-D") * 1e3, unit="ms"),
        ),
        plot=bars(
            f"{n} tokens, 49 keys per query, {heads} heads, float32, forward",
            "times as fast as SDPA with the dense mask",
            [times.speedup(arm, "SDPA 2-D", arm) for arm in arms if "SDPA" not in arm],
            ["dense, same engine", "random tiles, as many"],
        ),
        cost=times.median("fused 2-D") / times.median("dense, same engine"),
    )


def inputs(seed: int, heads: int, n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, n, 64, generator=g) for _ in range(3)]


def forms(pattern: Neighborhood, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
    """The same attention fused, unfused, and by SDPA with the dense mask; layout and masks are made beforehand."""
    n = q.shape[2]
    mask = pattern.layout(n).to_dense()[0, 0]
    near = mask.nonzero()[:, 1].view(n, -1)  # the keys of every query
    return {
        "fused": lambda: fv.attention(q, k, v, pattern, engine="native"),
        "unfused": lambda: unfused(q, k, v, near),
        "SDPA": lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }


def unfused(q: Tensor, k: Tensor, v: Tensor, near: Tensor) -> Tensor:
    """One neighbour after another, the weights of all queries stored in between; near: (queries, keys of a query)."""
    logits = torch.stack([(q * k[:, :, j]).sum(-1) for j in near.T], -1)  # (b, h, n, keys of a query)
    weights = torch.softmax(logits * q.shape[-1] ** -0.5, -1)
    out = torch.zeros_like(q)
    for i, j in enumerate(near.T):
        out += weights[..., i, None] * v[:, :, j]
    return out


def spread(pattern: Neighborhood, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Largest difference of the fused and the unfused result from SDPA's."""
    made = {form: call() for form, call in forms(pattern, q, k, v).items()}
    return max(float((made[form] - made["SDPA"]).abs().max()) for form in ("fused", "unfused"))


def extra_memory(call: Callable[[], Any], result: int) -> int:
    """Bytes that a call needs at its highest, besides its result."""
    peak = peak_of(call).bytes
    if peak is None:
        raise RuntimeError("the memory of a call cannot be measured here: there is no /proc")
    return max(peak - result, 0)


def picture() -> dict[str, Any]:
    """Windows on an 8 x 8 grid: they keep their size at the borders, and may be dilated or look back only."""
    frames = []
    for window in (2, 3, 4):
        for dilation in (1, 2):
            for causal, axes in (("no axis", False), ("rows", (True, False)), ("both axes", True)):
                pattern = Neighborhood((8, 8), window, dilation=dilation, causal=axes)
                code = f"Neighborhood((8, 8), {window}, dilation={dilation}, causal={axes})"
                frames.append(({"window": window, "dilation": dilation, "causal": causal}, pattern, code))
    return pictures.pairs(
        "Every cell of an 8 x 8 grid sees a window of its nearest cells; at the borders the window moves inwards and "
        "keeps its size.",
        frames,
        tokens=64,
        grid=(8, 8),
    )
