"""AnchorAttention: every key column that comes within a fixed distance of the largest first or local logit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.gathered import KeyLists, gathered_attention
from foveate.core.layout import TILE, BlockLayout
from foveate.core.merge import State
from foveate.core.patterns.band import Causal
from foveate.core.patterns.base import EMPTY, FULL, Pattern, integer, verdict
from foveate.core.selectors.base import Selector
from foveate.core.selectors.flexprefill import block_means

CHUNK = 1 << 24  # logits of block means that are held at once
STRIP = 128  # queries whose anchors' logits are held at once


@dataclass(frozen=True, repr=False)
class Anchors(Pattern):
    """The anchors of a query: the first keys, and those from `block` before its group of `group` positions on.

        allowed  <=>  key <= position  and  (key < init  or  key >= floor(position / group) * group - block)

    Positions are bottom-right aligned.

    >>> Anchors(2, 4, 1).layout(8).to_dense()[0, 0, 5].int().tolist()
    [1, 0, 1, 1, 1, 1, 0, 0]
    """

    block: int
    group: int
    init: int

    def contains(self, ext, b, h, q, k):
        i = q + ext.offset
        return (k <= i) & ((k < self.init) | (k >= i // self.group * self.group - self.block))

    def classify(self, ext, b, h, q0, q1, k0, k1):
        low, high = q0 + ext.offset, q1 - 1 + ext.offset  # positions of the rectangle
        earliest, latest = (i // self.group * self.group - self.block for i in (low, high))
        seen = verdict((k0 >= self.init) & (k1 <= earliest), (k1 <= self.init) | (k0 >= latest))
        return verdict((k0 > high) | (seen == EMPTY), (k1 - 1 <= low) & (seen == FULL))


@dataclass(frozen=True)
class AnchorAttention(Selector):
    """Sparse causal prefill by single key columns (stripes), chosen by their distance to an anchor.

    Positions fall into query blocks of `block` and groups g of `step` blocks; s_g is a group's first position.

    1. Anchors of a query at position i: A_i = keys [0, init) and keys [s_g - block, i]. Its anchor is the largest
       of their logits, x_i = max_{j in A_i} scale q_i . k_j.
    2. Stripes of a group, from the means over each of its query blocks Q:
       S_g = {j : init <= j < s_g - block, some Q in g has scale mean(q_Q) . k_j + theta >= mean(x_Q)}.
    3. Exact softmax over A_i and S_g. Groups without a key between their anchors are dense.

    No budget, no sorting: how many columns a head keeps follows from the content. In a block of equal queries, a column
    that is dropped has less than exp(-theta) of the largest weight of the block's last query (whose anchors hold those
    of the others); in other blocks the means make theta a guide, not a bound.

    Cost of the selection: the anchors' logits, about N (init + block + group / 2), and N / block means against the keys
    before them; in chunks, nothing is N x M. `anchor_attention` gathers the stripes, so that it computes only these
    columns. As a layout (`layout`, `attention`, `foveate.hf.apply`) the set is the same, but engines compute every
    tile of 64 x 64 that a stripe touches, and the layout keeps a bitmap for each of these tiles that differs.

    Args:
        block: queries that are averaged (and keys added before the group), in tokens.
        step: blocks per group; block * step is a multiple of 64.
        theta: allowed distance below the anchor, in natural logits (after `scale`); inf keeps every column, -inf none.
        init: first keys, always kept.
        shared: one list per key/value head, the union over its query heads, in place of one per query head.

    A single query (decoding) attends to everything. Chunked prefill (fewer queries than keys) is bottom-right aligned;
    blocks and groups stay those of the whole sequence, and a block that the chunk cuts is averaged over the queries
    that are there. Which stripes a query gets depends on all queries of its group, later ones included; what it reads
    does not.

    Source: AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity (2025). Differs from the
    public kernels: any length, batches, chunks; init and the local keys are exactly what the search for stripes
    leaves out (there, keys 128 to 2047 can be counted twice); the maxima are computed apart from the attention to the
    anchors, which is an ordinary call whose state is merged with that of the stripes.

    >>> import torch
    >>> q, k = torch.randn(1, 4, 1000, 16), torch.randn(1, 2, 1000, 16)
    >>> stripes = AnchorAttention(block=32, step=4, theta=1.0, init=32).stripes(q, k)
    >>> stripes.counts.shape, bool((stripes.counts[..., 0] == 0).all())  # per head and group; the first is dense
    (torch.Size([1, 4, 8]), True)
    """

    block: int = 128
    step: int = 16
    theta: float = 12.0
    init: int = 128
    shared: bool = False

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("step", 1), ("init", 0)):
            object.__setattr__(self, name, integer("AnchorAttention", name, getattr(self, name), least))
        if self.group % TILE:
            raise ValueError(
                f"AnchorAttention: block * step must be a multiple of {TILE}, got {self.block} * {self.step}"
            )
        if isinstance(self.theta, bool) or not isinstance(self.theta, (int, float)) or math.isnan(self.theta):
            raise ValueError(f"AnchorAttention: theta must be a number, inf or -inf, got {self.theta!r}")
        if not isinstance(self.shared, bool):
            raise ValueError(f"AnchorAttention: shared must be True or False, got {self.shared!r}")

    @property
    def group(self) -> int:
        """Positions per group."""
        return self.block * self.step

    @property
    def anchors(self) -> Pattern:
        """The part that does not depend on the content: A_i."""
        return Anchors(self.block, self.group, self.init)

    def layout(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = True
    ) -> BlockLayout:
        """Anchors and stripes for q (B, H, N, D) and k (B, Hkv, M, D); see `stripes` for errors."""
        stripes = self.stripes(q, k, scale=scale, is_causal=is_causal)
        if q.shape[2] == 1:
            return Causal().layout(1, k.shape[2]).to(q.device)
        anchors = self.anchors.layout(q.shape[2], k.shape[2]).to(q.device)
        return anchors if len(stripes.idx) == 0 else anchors | stripes.layout()

    @torch.no_grad()
    def stripes(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = True
    ) -> KeyLists:
        """The columns besides the anchors. A single query has none (its attention is dense).

        Args:
            q: (B, H, N, D); k: (B, Hkv, M, D), H a multiple of Hkv, N <= M.
            scale: factor on q k^T; default D ** -0.5.
            is_causal: must be True: the method is defined for causal attention.

        Raises:
            ValueError: shapes that do not fit, or is_causal=False.
        """
        _check(q, k, is_causal)
        batch, heads, n, dim = q.shape
        kv_heads, m = k.shape[1:3]
        scale = float(dim**-0.5 if scale is None else scale)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        keys = k.to(wide).transpose(-1, -2)  # (B, Hkv, D, M)
        lists = kv_heads if self.shared else heads
        counts, found = [], []
        for g in range((m - n) // self.group, (m - 1) // self.group + 1):
            far = max(g * self.group - self.block, self.init) if n > 1 else self.init
            wanted = torch.zeros(
                batch, kv_heads, lists // kv_heads, far - self.init, dtype=torch.bool, device=q.device
            )
            if far > self.init:
                first = max(g * self.group - (m - n), 0)
                mine = q[:, :, first : (g + 1) * self.group - (m - n)].to(wide) * scale
                self._search(mine.unflatten(1, (kv_heads, -1)), keys, m - n + first, wanted)
            counts.append(wanted.sum(-1).flatten())
            found.append((wanted.nonzero()[:, -1] + self.init).int())
        ptr = torch.zeros(len(counts) * batch * lists + 1, dtype=torch.int64, device=q.device)
        torch.cumsum(torch.cat(counts), 0, out=ptr[1:])
        return KeyLists(n, m, self.group, batch, heads, lists, ptr, torch.cat(found))

    def _search(self, q: Tensor, keys: Tensor, start: int, wanted: Tensor) -> None:
        """Mark in `wanted` (B, Hkv, lists per Hkv, far keys) the columns that some query block of a group wants.

        q: (B, Hkv, G, n, D), scaled, one group's queries from position `start` on; keys: (B, Hkv, D, M).
        """
        offset = start % self.block
        means = block_means(q.flatten(1, 2), self.block, offset).unflatten(
            1, q.shape[1:3]
        )  # (B, Hkv, G, Q, D)
        tops = self._anchor_logits(q, keys, start)  # (B, Hkv, G, n)
        least = block_means(tops.flatten(1, 2).unsqueeze(-1), self.block, offset).unflatten(1, q.shape[1:3])
        least = least - self.theta  # (B, Hkv, G, Q, 1)
        flat = means.flatten(2, 3)  # (B, Hkv, G Q, D)
        width = max(TILE, CHUNK // (flat.shape[0] * flat.shape[1] * flat.shape[2]))
        for at in range(0, wanted.shape[-1], width):
            here = keys[..., self.init : self.init + wanted.shape[-1]][..., at : at + width]
            near = (torch.matmul(flat, here).unflatten(2, means.shape[2:4]) >= least).any(
                3
            )  # (B, Hkv, G, width)
            wanted[..., at : at + width] = near.any(2, keepdim=True) if self.shared else near

    def _anchor_logits(self, q: Tensor, keys: Tensor, start: int) -> Tensor:
        """x of every query of a group, (B, Hkv, G, n): strip after strip, so that few later keys are computed."""
        n = q.shape[3]
        local = start // self.group * self.group - self.block
        tops = q.new_empty(q.shape[:-1])
        later = torch.ones(min(n, STRIP), min(n, STRIP), dtype=torch.bool, device=q.device).triu(1)
        for lo in range(0, n, STRIP):
            hi = min(lo + STRIP, n)
            rows = q[:, :, :, lo:hi].flatten(2, 3)  # (B, Hkv, G rows, D)
            near = torch.matmul(rows, keys[..., local : start + hi]).unflatten(2, (-1, hi - lo))
            near[..., lo - hi :].masked_fill_(later[: hi - lo, : hi - lo], -torch.inf)
            top = near.amax(-1)  # (B, Hkv, G, rows)
            if self.init:
                begin = torch.matmul(rows, keys[..., : self.init]).amax(-1)
                top = torch.maximum(top, begin.unflatten(2, (-1, hi - lo)))
            tops[..., lo:hi] = top
        return tops


def anchor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int = 128,
    step: int = 16,
    theta: float = 12.0,
    init: int = 128,
    shared: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    engine: str = "auto",
) -> Tensor | State:
    """Causal attention over the anchors and stripes of `AnchorAttention`, which see for the settings.

    The stripes' keys and values are gathered group by group, so that only their columns are computed, and the two
    states are merged. Gradients flow through the attention, not through the choice.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv), H a multiple of Hkv, N <= M.
        scale: factor on q k^T; default D ** -0.5.
        return_lse: also return log sum exp of each row's logits, (B, H, N).
        engine: as in `attention`; it runs both parts.

    Raises:
        ValueError, TypeError: settings or shapes that do not fit.

    >>> import torch, foveate as fv
    >>> q = torch.randn(1, 4, 500, 16); k = v = torch.randn(1, 2, 500, 16)
    >>> out = anchor_attention(q, k, v, block=16, step=4, theta=float("inf"), init=16)
    >>> torch.allclose(out, fv.attention(q, k, v, is_causal=True), atol=1e-5)
    True
    """
    chosen = AnchorAttention(block, step, theta, init, shared)
    stripes = chosen.stripes(q, k, scale=scale)
    near = Causal() if q.shape[2] == 1 else chosen.anchors
    return gathered_attention(q, k, v, stripes, near, scale=scale, return_lse=return_lse, engine=engine)


def _check(q: Tensor, k: Tensor, is_causal: bool) -> None:
    if not is_causal:
        raise ValueError(
            "AnchorAttention is defined for causal attention; got is_causal=False, accepted is True"
        )
    for name, t in (("q", q), ("k", k)):
        if not isinstance(t, Tensor) or t.ndim != 4:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a tensor (batch, heads, length, dim), got {got}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q (B, H, N, D) and k (B, Hkv, M, D) must share B and D, with H a multiple of Hkv; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    n, m = q.shape[2], k.shape[2]
    if not 1 <= n <= m:
        raise ValueError(
            "AnchorAttention needs at least one query and at least as many keys as queries, "
            f"got {n} queries and {m} keys"
        )
