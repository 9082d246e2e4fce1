"""VMoBA: blocks of a video cut in time, space or both; the query-block pairs of a head compete for similarity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.core.block_choice import choice_attention, choice_layout
from foveate.core.layout import BlockLayout
from foveate.core.patterns.base import integer
from foveate.core.patterns.orders import as_order, grid_shape, per_axis
from foveate.core.selectors.base import Selector

CHUNK = 1 << 22  # gates held at once, unless a pool has more
SORTED = 1 << 12  # pools with more pairs than this are cut by a histogram before they are sorted
BINS = 1 << 14
EPS = 1e-6
SCOPES = ("head", "query", "block", "all")


@dataclass(frozen=True)
class VMoBA(Selector):
    """Mixture of block attention for video: not causal, blocks of a grid, chosen query by query.

    With C blocks of `block` cells each (the last ones of an axis may be smaller), per query head:

    1. Gate. g_ic = q_i . kbar_c, kbar_c the mean of the keys of block c. Over the pool (`scope`) that competes:
       g' = (g - min g) / (max g - min g); a range of at most 1e-6 is not divided by.
    2. Own block. The block that holds the query is always chosen.
    3. mode "threshold": the other pairs, largest first, until the chosen ones together hold the share tau of the
       pool's sum of g': sum over chosen of g' >= tau (1e-6 + sum of all g'). At least one other pair is taken, and
       all are where the share is out of reach (tau >= 1, or no gate above the least).
       mode "topk": the largest others, until the pool holds topk pairs per query, its own block's among them.
    4. Attention over the blocks that a query chose is one exact softmax.

    Gate and choice carry no gradient.

    Args:
        shape: cells per axis: (frames, height, width), or fewer or more axes.
        block: cells of a block per axis. (f, height, width) cuts in time, (frames, h, w) in space, (f, h, w) in both;
            `vmoba_cycle` makes the three that layers take in turns.
        tau: share of the similarity, in threshold mode.
        mode: "threshold" or "topk".
        scope: which pairs compete: those of a "head", of one "query", of one "block" over all heads, or "all" of a
            batch row. "head" is the paper's, "query" with "topk" is plain mixture of block attention.
        topk: blocks per query on average, at least 1 (its own); scope "block" has no topk mode.
        text: tokens after the grid's, one block that every query chooses, and whose queries choose every block.
        order: token order of the grid, a name or an `Order`.

    Cost: 2 N C D per head for the gates. Gates of one head are held at once (N C), those of all heads for scopes
    "block" and "all"; the choice is bool (B, H, N, C).

    As a pattern of `attention` it runs on tiles, and a tile of 64 queries visits every block that one of them chose.
    `vmoba_attention` gathers the queries of each block instead and computes the chosen pairs only; it is the faster
    one unless queries that stand together agree.

    Source: VMoBA: Mixture-of-Block Attention for Video Diffusion Models (2025). Differs from the released code: the
    default scope is the paper's (there: "query"); each batch row is a pool by itself; sums are float64; equal gates
    are taken in the order of query and block; axes need not be divisible; where only own blocks are chosen the
    result is attention over them (there: full attention); text tokens.

    >>> q, k = torch.randn(1, 4, 8 * 6 * 10, 16), torch.randn(1, 2, 8 * 6 * 10, 16)
    >>> chosen = VMoBA((8, 6, 10), (4, 3, 5)).select(q, k)
    >>> tuple(chosen.shape), chosen[0, 0, 0, 0].item()
    ((1, 4, 480, 8), True)
    """

    shape: Any
    block: Any
    tau: float = 0.25
    mode: str = "threshold"
    scope: str = "head"
    topk: int = 3
    text: int = 0
    order: Any = "row_major"

    def __post_init__(self) -> None:
        shape = grid_shape("VMoBA", self.shape)
        block = per_axis("VMoBA", "block", self.block, shape, 1)
        for n, b in zip(shape, block, strict=True):
            integer("VMoBA", "block", b, 1, n)
        for name, accepted in (("mode", ("threshold", "topk")), ("scope", SCOPES)):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"VMoBA: {name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}"
                )
        if self.mode == "topk" and self.scope == "block":
            raise ValueError("VMoBA: mode topk has no scope block; accepted: head, query, all")
        if (
            isinstance(self.tau, bool)
            or not isinstance(self.tau, (int, float))
            or not 0 <= self.tau < math.inf
        ):
            raise ValueError(f"VMoBA: tau must be a finite number >= 0, got {self.tau!r}")
        for name, value in (
            ("shape", shape),
            ("block", block),
            ("topk", integer("VMoBA", "topk", self.topk, 1)),
            ("text", integer("VMoBA", "text", self.text, 0)),
            ("order", as_order("VMoBA", self.order, shape)),
        ):
            object.__setattr__(self, name, value)

    @cached_property
    def blocks(self) -> Tensor:
        """int64 (tokens,): the block of each token, in row-major order of blocks; text tokens come last."""
        counts = [-(-n // b) for n, b in zip(self.shape, self.block, strict=True)]
        cell = self.order.coordinates() // np.array(self.block)[:, None]  # (axes, N)
        own = np.ravel_multi_index(tuple(cell), counts)
        return torch.from_numpy(np.concatenate([own, np.full(self.text, prod(counts))]))

    def layout(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = False
    ) -> BlockLayout:
        """The layout for q (B, H, N, D) and k (B, Hkv, N, D), N = prod(shape) + text; see `select` for errors."""
        if is_causal:
            raise ValueError(
                "VMoBA is defined for bidirectional attention; got is_causal=True, accepted is False"
            )
        return choice_layout(self.select(q, k), self.blocks)

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor) -> Tensor:
        """bool (B, H, N, C), True where a query chose a block; with text, the last of the C blocks is the text.

        Raises:
            ValueError: q and k that do not fit each other or the grid.
        """
        self._check(q, k)
        batch, heads, n, _ = q.shape
        n -= self.text
        block = self.blocks[:n].to(q.device)
        means = self._means(k[:, :, :n], block)  # (B, Hkv, C, D)
        count, groups = means.shape[2], heads // k.shape[1]
        own = block[:, None] == torch.arange(count, device=q.device)  # (N, C)
        choice = torch.ones(
            batch, heads, n + self.text, count + bool(self.text), dtype=torch.bool, device=q.device
        )
        step = heads if self.scope in ("block", "all") else max(1, CHUNK // (n * count))
        for b in range(batch):
            for first in range(0, heads, step):
                mine = torch.arange(first, min(first + step, heads), device=q.device)
                gate = torch.matmul(q[b, mine, :n].to(means), means[b, mine // groups].mT)  # (h, N, C)
                gate = gate.nan_to_num_(0.0, 1e30, -1e30).clamp_(-1e30, 1e30)
                choice[b, mine, :n, :count] = self._chosen(gate, own) | own
        return choice

    def _means(self, k: Tensor, block: Tensor) -> Tensor:
        """Mean keys, (B, Hkv, C, D), in float32 or float64."""
        wide = torch.float64 if k.dtype == torch.float64 else torch.float32
        sorted_k = k.index_select(2, torch.argsort(block, stable=True)).permute(2, 0, 1, 3).to(wide)
        means = torch.segment_reduce(sorted_k.contiguous(), "mean", lengths=torch.bincount(block), axis=0)
        return means.permute(1, 2, 0, 3)

    def _chosen(self, gate: Tensor, own: Tensor) -> Tensor:
        """Which pairs besides own blocks are taken, bool (h, N, C), from the gates (h, N, C); `own` (N, C)."""
        pools, mine = self._pools(gate), self._pools(own.expand_as(gate))  # (pools, L)
        low, high = pools.amin(1, keepdim=True), pools.amax(1, keepdim=True)
        others = torch.where(mine, low, pools)  # own blocks come last and weigh nothing
        if self.mode == "topk":
            need = (self.topk - 1.0) * mine.sum(1, dtype=torch.float64)
            taken = largest(others, (~mine).to(gate.dtype), need)
        else:
            span = high - low
            share = (pools - low) / torch.where(span <= EPS, 1.0, span)  # g', in [0, 1]
            need = self.tau * (share.sum(1, dtype=torch.float64) + EPS)
            need -= torch.where(mine, share, 0.0).sum(1, dtype=torch.float64)
            taken = largest(others, share.masked_fill_(mine, 0.0), need, least=1)
        return (
            taken.view(gate.shape)
            if self.scope != "block"
            else taken.view(-1, *gate.shape[:2]).permute(1, 2, 0)
        )

    def _pools(self, x: Tensor) -> Tensor:
        """(h, N, C) -> (pools, pairs that compete in each)."""
        if self.scope == "block":
            return x.permute(2, 0, 1).flatten(1)
        return {"head": x.flatten(1), "query": x.flatten(0, 1), "all": x.flatten()[None]}[self.scope]

    def _check(self, q: Tensor, k: Tensor) -> None:
        for name, t in (("q", q), ("k", k)):
            if not isinstance(t, Tensor) or t.ndim != 4:
                got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
                raise ValueError(f"{name} must be a tensor (batch, heads, length, dim), got {got}")
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
            raise ValueError(
                "q (B, H, N, D) and k (B, Hkv, M, D) must share B and D, with H a multiple of Hkv; "
                f"got {tuple(q.shape)} and {tuple(k.shape)}"
            )
        want = prod(self.shape) + self.text
        if q.shape[2] != want or k.shape[2] != want:
            raise ValueError(
                f"VMoBA of {self.shape} and {self.text} text tokens needs {want} queries and keys, "
                f"got {q.shape[2]} and {k.shape[2]}"
            )


def largest(values: Tensor, weights: Tensor, need: Tensor, least: int = 0) -> Tensor:
    """In each row, the largest values until their weights add up to what is needed; bool, the shape of values.

    Equal values are taken from left to right; all are taken where the weights do not suffice.

    Args:
        values: (P, L), finite; weights: (P, L), >= 0; need: float64 (P,).
        least: 0, or 1 to take one where nothing is needed.

    >>> largest(torch.tensor([[3.0, 5.0, 4.0]]), torch.ones(1, 3), torch.tensor([1.5]).double()).tolist()
    [[False, True, True]]
    """
    if values.shape[1] > SORTED:
        rows = zip(values, weights, need.tolist(), strict=True)
        return torch.stack([_largest_of_many(v, w, float(n), least) for v, w, n in rows])
    order = values.argsort(dim=1, descending=True, stable=True)
    weights = weights.gather(1, order).double()
    taken = weights.cumsum(1) - weights < need[:, None]
    taken[:, :least] = True
    return torch.zeros_like(taken).scatter(1, order, taken)


def _largest_of_many(values: Tensor, weights: Tensor, need: float, least: int) -> Tensor:
    """`largest` of one row: whole bins of a histogram, and the bin that the cut falls into, sorted."""
    low, high = values.aminmax()
    bins = ((values - low) / (high - low).clamp_min(1e-30) * (BINS - 1)).long()
    down = torch.bincount(bins, weights.double(), BINS).flip(0).cumsum(0)  # weight of the highest bins
    cut = min(int((down < need).sum()), BINS - 1)  # bins that are taken whole
    taken = bins > BINS - 1 - cut
    inside = (bins == BINS - 1 - cut).nonzero().squeeze(1)
    inside = inside[values[inside].argsort(descending=True, stable=True)]
    weight = weights[inside].double()
    before = (float(down[cut - 1]) if cut else 0.0) + weight.cumsum(0) - weight
    taken[inside[before < need]] = True
    if least and need <= 0:
        taken[(values == high).nonzero()[0]] = True
    return taken


def vmoba_attention(
    q: Tensor, k: Tensor, v: Tensor, chooser: VMoBA, *, scale: float | None = None, engine: str = "auto"
) -> Tensor:
    """Attention over the blocks that `chooser` chooses, computed pair by pair: the queries of a block are gathered.

        out_i = softmax over the keys j of the blocks chosen by i of (scale q_i . k_j) v_j

    Equal to `attention(q, k, v, chooser)`, at a cost proportional to the chosen pairs; see
    `foveate.core.block_choice`.

    Args:
        q: (B, H, N, D); k: (B, Hkv, N, D); v: (B, Hkv, N, Dv), in the order of `chooser`.
        scale, engine: as in `attention`.

    >>> q, k, v = (torch.randn(1, 2, 4 * 6 * 6, 16) for _ in range(3))
    >>> layers = vmoba_cycle((4, 6, 6), frames=1, tile=(3, 3), cube=(2, 3, 3))
    >>> vmoba_attention(q, k, v, layers[5 % 3]).shape
    torch.Size([1, 2, 144, 16])
    """
    return choice_attention(
        q, k, v, chooser.select(q, k), chooser.blocks.to(q.device), scale=scale, engine=engine
    )


def vmoba_cycle(
    shape: tuple[int, int, int],
    *,
    frames: float,
    tile: tuple[int, int],
    cube: tuple[int, int, int],
    tau: float = 0.25,
    text: int = 0,
) -> tuple[VMoBA, VMoBA, VMoBA]:
    """The three choosers that layers take in turns: layer l of a model uses number l % 3.

    Args:
        shape: (frames, height, width) of the token grid, in row-major order.
        frames: frames per block of the first, which cuts in time; a fraction is allowed.
        tile: (h, w) of the second, which cuts in space; its blocks span all frames.
        cube: (f, h, w) of the third.
        tau, text: of `VMoBA`.

    >>> [len(chooser.blocks.unique()) for chooser in vmoba_cycle((8, 6, 10), frames=1.5, tile=(3, 5), cube=(4, 3, 5))]
    [6, 4, 8]
    """
    whole = grid_shape("vmoba_cycle", shape)
    if len(whole) != 3:
        raise ValueError(f"vmoba_cycle: shape must be (frames, height, width), got {shape!r}")
    run = int(frames * whole[1] * whole[2])
    if not 1 <= run <= prod(whole):
        raise ValueError(f"vmoba_cycle: frames must make blocks of 1 to {prod(whole)} tokens, got {frames!r}")
    return (
        VMoBA((prod(whole),), (run,), tau=tau, text=text),
        VMoBA(whole, (whole[0], *tile), tau=tau, text=text),
        VMoBA(whole, cube, tau=tau, text=text),
    )
