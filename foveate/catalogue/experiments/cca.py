"""CCA: pass keys found through core tokens, against a window of as many pairs and plain averages of the groups."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

import foveate as fv
from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    FAILS,
    HOLDS,
    OPEN,
    Figure,
    Finding,
    Lab,
    all_of,
    banded,
    difference,
    interval,
    judge,
    lines,
)
from foveate.catalogue.lab.carrying import Carrying
from foveate.catalogue.lab.controls import equal_window
from foveate.catalogue.lab.tiny import Attend
from foveate.compress import CCACache, cca_attention
from foveate.compress.cca import CoreTokens, CoreWindow
from foveate.core.rotary import Rotary
from foveate.patterns import Causal, MaskMod, Pattern

TOKENS, GROUP, LOCAL = 256, 16, 32
REACH = 94  # of two layers of the window with as many pairs, of 48 tokens
ROPE = Rotary()
COUNTS_IF = (
    "two layers, 256 tokens, groups of 16 and 32 exact tokens; gate: dense finds at least 0.95 of the pass keys more "
    "than 94 tokens away, else open. Then all of: CCA finds at least 0.9 of them on average (fewer: open); more than a "
    "sliding window of at least as many pairs, by more than 0.1, and more than CCA with plain averages, by more than 0 "
    "(95 % intervals over three seeds, paired); with groups of 16 and 1,024 exact tokens at 32,768 tokens it computes "
    "at most 0.15 of the causal pairs, pooling included, and its cache holds at most 0.1 of the pairs of a key and a "
    "value. A window beside the last token of each group as it is, with as many pairs, is shown and no condition"
)


def share(n: int, group: int, local: int) -> float:
    """Pairs that CCA computes, one per token for pooling among them, over those of causal attention."""
    cores = n // group
    seen = CoreWindow(group, local).layout(n).area + (
        CoreTokens(group, local).layout(n, cores).area if cores else 0
    )
    return (seen + n) / (n * (n + 1) / 2)


def held(n: int, group: int, local: int) -> float:
    """Most pairs of a key and a value that the cache holds while n tokens arrive, over n."""
    cache, most = CCACache(group, local), 0
    for size in [1024 - 1, 1] * (n // 1024):
        x = torch.zeros(1, 1, size, 2)
        cache.append(x, x, x)
        most = max(most, cache.pairs)
    return most / cache.length


def over(pattern: Pattern) -> Attend:
    """Attention over a set of pairs, rotated."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        return cast(Tensor, fv.attention(ROPE(q, place), ROPE(k, place), v, pattern))

    return attend


def group_ends(n: int) -> Pattern:
    """The window, and of every group before it the last token as it is: as many pairs as CCA."""
    last = MaskMod(lambda b, h, q, k: (k % GROUP == GROUP - 1) & (k <= q))
    return CoreWindow(GROUP, LOCAL) | last


def arms() -> dict[str, Attend]:
    core = {"group": GROUP, "local": LOCAL, "rope": ROPE}
    return {
        "dense": over(Causal()),
        "CCA": partial(cca_attention, **core),
        "plain averages": partial(cca_attention, **core, pool="mean"),
        "window": over(equal_window(share(TOKENS, GROUP, LOCAL), TOKENS)),
        "ends of groups": over(group_ends(TOKENS)),
    }


def run(lab: Lab) -> Finding:
    """Do core tokens let a model find what lies far behind its window, and better than plain averages do?"""
    task = Carrying(
        TOKENS,
        layers=2,
        heads=4,
        edges=(1, 9, 33, 65, 95, 149, 202, 255),
        steps=200,
        lr=4e-3,
        positions="none",
    )
    found = {name: [task.found(lab, name, arm, seed) for seed in lab.seeds] for name, arm in arms().items()}
    far = {name: [task.far(shares, REACH) for shares in runs] for name, runs in found.items()}
    mean = {name: interval(f"found far away: {name}", shares) for name, shares in far.items()}
    gains = {name: difference(f"CCA - {name}", far["CCA"], far[name]) for name in far if name != "CCA"}
    n = lab.pick(32768, 4096)
    pairs = Figure(f"share of causal pairs, {n:,} tokens", share(n, 16, 1024))
    kept = Figure(f"share of keys and values held, {n:,} tokens", held(n, 16, 1024))
    verdict = OPEN
    if mean["dense"].value >= 0.95:
        verdict = all_of(
            HOLDS if mean["CCA"].value >= 0.9 else OPEN,
            judge(gains["window"], 0.1),
            judge(gains["plain averages"], 0.0),
            HOLDS if pairs.value <= 0.15 and kept.value <= 0.1 else FAILS,
        )
    return Finding(
        question="Do core tokens let a model find what lies far behind its window, and better than plain averages of "
        "the groups do?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Pass keys more than {REACH} tokens away found: "
        + ", ".join(f"{name} {figure.value:.3g}" for name, figure in mean.items())
        + f"; at {n:,} tokens {pairs.value:.1%} of the causal pairs and {kept.value:.1%} of the keys and values.",
        figures=(*mean.values(), *gains.values(), pairs, kept),
        plot=lines(
            "Pass keys found, two layers of four heads",
            "distance (tokens)",
            "share found",
            [
                banded(name, task.middles, runs, most=1.0, reference=name == "dense")
                for name, runs in found.items()
            ],
        ),
        quality=mean["CCA"].value / max(mean["dense"].value, 1e-9),
        cost=share(TOKENS, GROUP, LOCAL),
    )


def picture() -> dict[str, Any]:
    """Who reads what: core tokens left, tokens as they are right of the gap."""
    frames, n = [], 48
    for group in (2, 4, 8):
        for local in (1, 8, 16):
            core = CoreTokens(group, local).layout(n, 24).to_dense()[0, 0]
            window = CoreWindow(group, local).layout(n).to_dense()[0, 0]
            code = f"cca_attention(q, k, v, group={group}, local={local})"
            gap = torch.zeros(n, 2, dtype=torch.bool)
            frames.append(({"group": group, "local": local}, torch.cat([core, gap, window], 1), code))
    return pictures.pairs(
        "Left, one column per core token: groups that are finished and behind the window. Right, the tokens "
        "themselves. Together they are the past, once.",
        frames,
    )
