"""The mechanisms of a comparison: names -> policies, all at one density.

Every mechanism has one knob that changes its density monotonically (mostly the width of its window); the
knob is bisected until the mechanism lets through the asked share of the causal pairs at the length at hand.
So they differ in *which* pairs they keep, not in how many. FlexPrefill chooses by content: its knob, gamma,
is bisected on measured forwards (`Tune`).

A new mechanism is a builder (length, density, shape, seed) -> `Built` and a line of `MECHANISMS`; where only a forward
shows what a setting keeps, `tuned` makes the builder from the setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from foveate.bench.pictures import data_uri
from foveate.core.build import build_layout
from foveate.core.layout import TILE, BlockLayout
from foveate.core.patterns import Causal, Dilated, Pattern, PowerOfTwo, Random, Shards, Sinks, SlidingWindow
from foveate.core.patterns.base import CACHE
from foveate.core.selectors.base import Selector

SHORTEST = 256
SINKS = 16
NEAR = 64
HIP_KEYS = 4


@dataclass(frozen=True)
class Shape:
    """Heads of the model under comparison: ``heads`` query heads on ``kv_heads`` key/value heads."""

    heads: int
    kv_heads: int


@dataclass(frozen=True)
class Tune:
    """A knob whose effect only a forward shows: density grows with it between ``low`` and ``high``."""

    make: Callable[[float], Built]
    low: float
    high: float
    steps: int = 7


@dataclass(frozen=True)
class Built:
    """A policy for `foveate.hf.apply`, how it reads, and its numbers."""

    policy: Any
    text: str
    parameters: dict[str, Any] = field(default_factory=dict)
    tune: Tune | None = None


Build = Callable[[int, float, Shape, int], Built]
"""(length, density, shape, seed) -> the policy."""


def causal_pairs(n: int) -> int:
    """Pairs that causal attention lets through: n (n + 1) / 2."""
    return n * (n + 1) // 2


def causal_tiles(n: int) -> int:
    """64 x 64 tiles that hold at least one causal pair."""
    t = -(-n // TILE)
    return t * (t + 1) // 2


def density_of(layout: BlockLayout) -> float:
    """Allowed pairs over causal pairs, averaged over the layout's batch rows and heads (square layouts)."""
    return layout.area / (layout.batch * layout.heads * causal_pairs(layout.q_len))


def policy(name: str, length: int, density: float, shape: Shape, seed: int = 0) -> Built:
    """The policy of a mechanism for sequences of ``length`` tokens at a density in (0, 1).

    Raises:
        ValueError: the density cannot be reached at this length.

    >>> built = policy("sliding_sinks", 1024, 0.25, Shape(4, 2))
    >>> built.text
    'Causal() & (SlidingWindow(121) | Sinks(16))'
    """
    return _policy(name, length, density, shape, seed)


@lru_cache(maxsize=256)
def _policy(name: str, length: int, density: float, shape: Shape, seed: int) -> Built:
    if name not in _BUILDERS:
        raise ValueError(f"unknown mechanism {name!r}; accepted: {', '.join(NAMES)}")
    return _BUILDERS[name](length, density, shape, seed)


def _dense(length: int, density: float, shape: Shape, seed: int) -> Built:
    return Built("dense", "dense")


def _sliding_sinks(length: int, density: float, shape: Shape, seed: int) -> Built:
    def make(window: int) -> Pattern:
        return Causal() & (SlidingWindow(window) | Sinks(SINKS))

    window = _fit(make, length, density)
    text = f"Causal() & (SlidingWindow({window}) | Sinks({SINKS}))"
    return Built(make(window), text, {"window": window, "sinks": SINKS})


def _dilated(length: int, density: float, shape: Shape, seed: int) -> Built:
    dilation = max(2, math.floor(0.5 / density))

    def make(window: int) -> Pattern:
        return Causal() & (SlidingWindow(NEAR) | Dilated(window, dilation))

    window = _fit(make, length, density, most=length // dilation)
    text = f"Causal() & (SlidingWindow({NEAR}) | Dilated({window}, dilation={dilation}))"
    return Built(make(window), text, {"window": window, "dilation": dilation, "near": NEAR})


def _power(length: int, density: float, shape: Shape, seed: int) -> Built:
    block = _power_block(length, density)

    def make(window: int) -> Pattern:
        return Causal() & (PowerOfTwo(block) | SlidingWindow(window) | Sinks(block))

    window = _fit(make, length, density)
    text = f"Causal() & (PowerOfTwo({block}) | SlidingWindow({window}) | Sinks({block}))"
    return Built(make(window), text, {"block": block, "window": window})


def _shards(length: int, density: float, shape: Shape, seed: int) -> Built:
    stride = max(2, round(2 / density))  # half of the density goes to the far blocks
    shards = Shards(TILE, 1, stride, layouts=shape.heads, require_coverage=False)

    def make(window: int) -> Pattern:
        return Causal() & (shards | SlidingWindow(window))

    window = _fit(make, length, density)
    text = f"Causal() & (Shards({TILE}, 1, {stride}, layouts={shape.heads}) | SlidingWindow({window}))"
    covered = min(shape.heads, stride) / stride  # share of the far blocks that some head sees
    return Built(make(window), text, {"block": TILE, "stride": stride, "window": window, "covered": covered})


def _random(length: int, density: float, shape: Shape, seed: int) -> Built:
    window = policy("sliding_sinks", length, density, shape).parameters["window"]
    like = build_layout(Causal() & (SlidingWindow(window) | Sinks(SINKS)), length, length)
    drawn = Causal() & Random.matching(_whole_blocks(like, shape.heads), seed=seed)
    text = f"Causal() & Random.matching(window + sinks in whole blocks, heads={shape.heads}, seed={seed})"
    return Built(drawn, text, {"seed": seed})


def _flexprefill(length: int, density: float, shape: Shape, seed: int) -> Built:
    from foveate.core.selectors.flexprefill import FlexPrefill

    def make(nines: float) -> Built:  # gamma = 1 - 10^-nines: the density rises steeply near 1
        gamma = round(1 - 10**-nines, 6)
        chosen = FlexPrefill(block=TILE, gamma=gamma, min_budget=TILE)
        return Built(chosen, f"FlexPrefill(block={TILE}, gamma={gamma}, min_budget={TILE})", {"gamma": gamma})

    start = make(1.0)
    return Built(start.policy, start.text, start.parameters, Tune(make, 0.01, 6.0))


def _fit(make: Callable[[int], Pattern], length: int, density: float, most: int | None = None) -> int:
    """The window whose layout is nearest to the density."""

    def got(window: int) -> float:
        return density_of(build_layout(make(window), length, length))

    low, high = 1, most or length
    least, top = got(low), got(high)
    if not least <= density * 1.1 or not top >= density * 0.9:
        raise ValueError(f"density {density:.0%} cannot be reached; accepted {least:.0%} to {top:.0%}")
    while high - low > 1:
        middle = (low + high) // 2
        if got(middle) < density:
            low = middle
        else:
            high = middle
    return min((low, high), key=lambda window: abs(got(window) - density))


def _power_block(length: int, density: float) -> int:
    """The largest block up to 256 whose powers of two and sink take at most 85 % of the density."""
    for block in (256, 128, 64, 32, 16):
        least = Causal() & (PowerOfTwo(block) | Sinks(block))
        if length // block >= 16 and density_of(build_layout(least, length, length)) <= 0.85 * density:
            return block
    return 8


def _whole_blocks(like: BlockLayout, heads: int) -> BlockLayout:
    """A layout with whole causal tiles, as many in each row as hold the pairs ``like`` has there.

    What rounding to whole tiles leaves over or under is carried to the next row, and starts elsewhere in
    each head, so the total is right to a fraction of a tile.
    """
    n, rows = like.q_len, like.q_tiles
    area = like.row_area[0, 0].numpy().astype(float)
    height = np.minimum(TILE, n - TILE * np.arange(rows)).astype(float)
    own = height * (height + 1) / 2
    blocks = np.zeros((heads, rows, rows), bool)
    for h in range(heads):
        carried = (h + 0.5) / heads - 0.5  # tiles
        for r in range(rows):
            wanted = max((area[r] - own[r]) / (height[r] * TILE), 0.0) + carried
            count = int(np.clip(round(wanted), 0, r))
            carried = wanted - count if r else carried
            blocks[h, r, : count + 1] = True
    return BlockLayout.from_blocks(torch.from_numpy(blocks), n, n, causal=True)


def tuned(
    make: Callable[[float], tuple[Selector, dict[str, Any]]], low: float, high: float, steps: int = 7
) -> Build:
    """The builder of a selector whose density grows with one setting between low and high.

    make: setting -> the selector and its parameters as they are reported.
    """

    def built(setting: float) -> Built:
        chosen, parameters = make(setting)
        return Built(chosen, repr(chosen), parameters)

    def build(length: int, density: float, shape: Shape, seed: int) -> Built:
        start = built((low + high) / 2)
        return Built(start.policy, start.text, start.parameters, Tune(built, low, high, steps))

    return build


def _anchor(theta: float) -> tuple[Selector, dict[str, Any]]:
    from foveate.core.selectors.anchor_attention import AnchorAttention

    theta = round(theta, 3)
    return AnchorAttention(block=NEAR // 4, step=4, theta=theta, init=SINKS), {"theta": theta}


def _dhsa(log_budget: float) -> tuple[Selector, dict[str, Any]]:
    from foveate.core.selectors.dhsa import DHSA

    budget = max(NEAR + SINKS, round(2**log_budget))
    return DHSA(NEAR, budget, NEAR, SINKS, chunk=4, per_head=True, instruction=0), {
        "budget": budget,
        "chunk": 4,
    }


def _hip(log_blocks: float) -> tuple[Selector, dict[str, Any]]:
    from foveate.core.selectors.hip import HiP

    keys = HIP_KEYS * max(1, round(2**log_blocks))
    chosen = HiP(keys, block_q=NEAR, stride_q=8, block_k=HIP_KEYS, sink=SINKS, window=2 * NEAR)
    return chosen, {"keys": keys, "block_k": HIP_KEYS}


def _top_blocks(score: str) -> Build:
    """The best blocks by a score: as many per row of query blocks as the density holds."""

    def build(length: int, density: float, shape: Shape, seed: int) -> Built:
        from foveate.core.selectors.top_blocks import TopBlocks

        rows = np.arange(-(-length // TILE))
        height = np.minimum(TILE, length - TILE * rows)
        kept = np.arange(1, len(rows) + 1)
        full = np.minimum(rows, kept[:, None] - 1) * TILE  # (keep, rows): columns before the diagonal block
        got = (height * (full + (height + 1) / 2)).sum(1) / causal_pairs(length)
        keep = int(kept[np.abs(got - density).argmin()])
        if got[0] > 1.1 * density:
            raise ValueError(f"density {density:.0%} cannot be reached; accepted {got[0]:.0%} to 100%")
        chosen = TopBlocks(TILE, keep, score)
        return Built(chosen, repr(chosen), {"block": TILE, "keep": keep})

    return build


@dataclass(frozen=True)
class Mechanism:
    """One row of the table: how a mechanism is called, shown and made.

    ``usual``: part of a comparison that names no mechanisms.
    """

    name: str
    title: str
    build: Build
    colour: str
    about: str
    source: str = ""
    usual: bool = True


MECHANISMS = (
    Mechanism("dense", "dense", _dense, "#7d848a", "Every key up to the query. What all others are measured against."),
    Mechanism(
        "sliding_sinks", "window + sinks", _sliding_sinks, "#2a7fc9",
        "The nearest keys and the first tokens, where models put attention they do not need.",
        "Efficient Streaming Language Models with Attention Sinks, 2023",
    ),
    Mechanism(
        "dilated", "dilated", _dilated, "#e0702b",
        "A close window, and further back only some of the keys: more reach for as many pairs.",
        "Longformer: The Long-Document Transformer, 2020",
    ),
    Mechanism(
        "power", "power of two", _power, "#1a9c76",
        "Blocks at distances 1, 2, 4, 8, …: every earlier token is at most a few layers away.",
        "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention, 2025",
    ),
    Mechanism(
        "shards", "shards", _shards, "#b657a8",
        "A near band, and in every head another share of the far blocks; together the heads see all.",
        "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads, 2024",
    ),
    Mechanism(
        "flexprefill", "FlexPrefill", _flexprefill, "#c08a00",
        "Looks at the content: the last queries vote for the columns and diagonals of each head.",
        "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference, 2025",
    ),
    Mechanism(
        "blocks_mean", "blocks by mean", _top_blocks("mean"), "#d1495b",
        "Looks at the content: each block of queries takes the blocks whose mean key fits its mean query best.",
        "MoBA: Mixture of Block Attention for Long-Context LLMs, 2025",
        usual=False,
    ),
    Mechanism(
        "blocks_bounds", "blocks by bounds", _top_blocks("bounds"), "#6a5acd",
        "Looks at the content: each block of queries takes the blocks that may hold the largest logit of its mean "
        "query, by the least and largest value of every key dimension.",
        "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, 2024",
        usual=False,
    ),
    Mechanism(
        "blocks_peak", "blocks by peak", _top_blocks("peak"), "#a0522d",
        "Looks at the content: each block of queries takes the blocks that hold the largest logits of its mean query.",
        usual=False,
    ),
    Mechanism(
        "anchor", "AnchorAttention", tuned(_anchor, -10.0, 14.0, steps=9), "#7a9a01",
        "Looks at the content: single columns whose logits come close to the largest one among the first and the "
        "nearest keys.",
        "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity, 2025",
        usual=False,
    ),
    Mechanism(
        "dhsa", "DHSA", tuned(_dhsa, 6.0, 17.0, steps=9), "#9932cc",
        "Looks at the content: each block of queries takes the keys of the short chunks that fit its mean query best.",
        "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs, 2025",
        usual=False,
    ),
    Mechanism(
        "hip", "HiP", tuned(_hip, 0.0, 14.0, steps=9), "#008b8b",
        "Looks at the content: a tree search for the blocks of a few keys that fit best, in rounds that halve ranges.",
        "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning, 2024",
        usual=False,
    ),
    Mechanism(
        "oracle", "oracle blocks", _top_blocks("mass"), "#3f9c9c",
        "The upper bound, at quadratic cost: each block of queries takes the blocks in which dense attention has most "
        "mass. Not a mechanism one would use.",
        usual=False,
    ),
    Mechanism(
        "random", "random blocks", _random, "#8a8f94",
        "The control: as many pairs in each row of query blocks as window + sinks, in whole blocks at random places, "
        "others in every head; the diagonal is always kept.",
    ),
)  # fmt: skip
"""In the order in which they are measured and shown. Colours are mid tones that read on light and on dark pages."""

NAMES = tuple(m.name for m in MECHANISMS)
USUAL = tuple(m.name for m in MECHANISMS if m.usual)
TITLES = {m.name: m.title for m in MECHANISMS}
ABOUT = {m.name: m.about for m in MECHANISMS}
SOURCES = {m.name: m.source for m in MECHANISMS}
COLOURS = {m.name: m.colour for m in MECHANISMS}
_BUILDERS = {m.name: m.build for m in MECHANISMS}


@dataclass(frozen=True, eq=False)
class Watching(Selector):
    """A selector that also keeps what it selected, for counting and drawing."""

    inner: Selector
    seen: list[BlockLayout] = field(default_factory=list)

    def layout(
        self, q: torch.Tensor, k: torch.Tensor, *, scale: float | None = None, is_causal: bool = True
    ) -> BlockLayout:
        made = self.inner.layout(q, k, scale=scale, is_causal=is_causal)
        self.seen.append(made)
        return made


class Watched:
    """A policy under observation during one forward: the layouts it gave."""

    def __init__(self, policy: Any, length: int) -> None:
        self.length = length
        self.watching = Watching(policy) if isinstance(policy, Selector) else None
        self.policy = policy if self.watching is None else self.watching
        self._given = policy

    def layouts(self) -> Sequence[BlockLayout]:
        """One layout per call for a selector, the pattern's own else."""
        if self.watching is not None:
            return self.watching.seen
        pattern = self._given if isinstance(self._given, Pattern) else Causal()
        return [pattern.layout(self.length)]

    def tiles(self) -> float:
        """Listed tiles over those of causal attention, averaged over calls and heads."""
        seen = self.layouts()
        if not seen:
            raise ValueError("no layout was asked for: the model did not call its attention")
        return float(np.mean([s.nnz / (s.batch * s.heads * causal_tiles(self.length)) for s in seen]))

    def picture(self, colour: str) -> str:
        """The layouts, averaged, as a picture."""
        return data_uri(list(self.layouts()), colour)


def forget_layouts() -> None:
    """Empty the layout cache, so that the next call pays for building its layout."""
    CACHE.clear()
