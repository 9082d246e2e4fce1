"""Fused neighbourhood attention: time and memory beside the unfused form and beside SDPA with a dense mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import foveate as fv
from foveate.bench.memory import peak_of
from foveate.catalogue import pictures
from foveate.catalogue.lab import FAILS, HOLDS, Figure, Finding, Lab, all_of, bars, judge, paired_times
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
    grids = {
        "1-D": Neighborhood(n, 49),
        "2-D": Neighborhood((side, side), 7, order=tile_major((side, side), 8)),
    }
    masks = {name: pattern.layout(n).to_dense()[0, 0] for name, pattern in grids.items()}
    near = {name: mask.nonzero()[:, 1].view(n, 49) for name, mask in masks.items()}  # the keys of every query
    q, k, v = inputs(lab.seeds[0], heads, n)
    random = Random.matching(grids["2-D"].layout(n), causal=False)
    arms = {"dense, same engine": lambda: fv.attention(q, k, v, Full(), engine="native"),
            "random tiles, as many": lambda: fv.attention(q, k, v, random, engine="native")}  # fmt: skip
    for name, pattern in grids.items():
        arms |= {
            f"fused {name}": lambda p=pattern: fv.attention(q, k, v, p, engine="native"),
            f"unfused {name}": lambda j=near[name]: unfused(q, k, v, j),
            f"SDPA with the mask {name}": lambda m=masks[name]: sdpa(q, k, v, attn_mask=m),
        }
    times = paired_times(lab, arms, lab.pick(15, 3))
    worst = max(largest_difference(*inputs(seed, heads, n), grids, masks, near) for seed in lab.seeds)
    extra = {
        arm: extra_memory(arms[arm], q.nbytes)
        for arm in ("fused 2-D", "unfused 2-D", "SDPA with the mask 2-D")
    }
    share = (extra["fused 2-D"] + grids["2-D"].layout(n).nbytes) / (
        extra["SDPA with the mask 2-D"] + masks["2-D"].nbytes
    )

    verdicts, figures = [], []
    for name in grids:
        for base, above in (
            (f"SDPA with the mask {name}", 5.0),
            ("dense, same engine", 4.0),
            (f"unfused {name}", 2.0),
        ):
            figures.append(times.speedup(f"fused {name}", base))
            verdicts.append(judge(figures[-1], above))
    verdicts += [HOLDS if share < 0.1 else FAILS, HOLDS if worst <= 1e-5 else FAILS]
    figures += [
        Figure("extra memory of the fused form, of SDPA's with the mask", 100 * share, unit="%"),
        Figure("extra memory of the unfused form", extra["unfused 2-D"] / 2**20, unit="MiB"),
        Figure("largest difference from SDPA", worst),
        Figure("first call, layout included, 2-D", times.first["fused 2-D"] * 1e3, unit="ms"),
        Figure("later calls, 2-D", times.median("fused 2-D") * 1e3, unit="ms"),
        times.speedup("fused 2-D", "random tiles, as many"),
    ]
    shown = [times.speedup(arm, "SDPA with the mask 2-D", arm) for arm in arms if "SDPA" not in arm]
    return Finding(
        question="Is neighbourhood attention fused over tiles faster than its unfused form and than dense attention, "
        "in 1-D and 2-D, with hardly any extra memory?",
        counts_if=COUNTS_IF,
        verdict=all_of(*verdicts),
        summary=f"In 2-D the fused form is {figures[3].value:.1f} times as fast as SDPA with the mask and "
        f"{figures[5].value:.1f} times as fast as the unfused form, in 1-D {figures[0].value:.1f} and "
        f"{figures[2].value:.1f} times; it needs {100 * share:.1f} % of SDPA's extra memory.",
        figures=tuple(figures),
        plot=bars(
            f"{n} tokens, 49 keys per query, {heads} heads, float32, forward",
            "times as fast as SDPA with the dense mask",
            shown,
            ["dense, same engine", "random tiles, as many"],
        ),
        cost=times.median("fused 2-D") / times.median("dense, same engine"),
    )


def inputs(seed: int, heads: int, n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, n, 64, generator=g) for _ in range(3)]


def unfused(q: Tensor, k: Tensor, v: Tensor, near: Tensor) -> Tensor:
    """One neighbour after another, the weights of all queries stored in between; near: (queries, keys of a query)."""
    logits = (
        torch.stack([(q * k[:, :, j]).sum(-1) for j in near.T], -1) * q.shape[-1] ** -0.5
    )  # (b, h, n, 49)
    weights = torch.softmax(logits, -1)
    out = torch.zeros_like(q)
    for i, j in enumerate(near.T):
        out += weights[..., i, None] * v[:, :, j]
    return out


def largest_difference(q: Tensor, k: Tensor, v: Tensor, grids: Any, masks: Any, near: Any) -> float:
    """From SDPA with the dense mask, of both forms on every grid."""
    return max(
        float((form - sdpa(q, k, v, attn_mask=masks[name])).abs().max())
        for name, pattern in grids.items()
        for form in (fv.attention(q, k, v, pattern, engine="native"), unfused(q, k, v, near[name]))
    )


def extra_memory(call: Any, result: int) -> int:
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
