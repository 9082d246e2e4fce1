"""TopBlocks: for each block of queries the best-scored blocks of keys. The plain selector, and the oracle above it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.layout import TILE, BlockLayout
from foveate.core.patterns.base import integer
from foveate.core.selectors.base import Selector
from foveate.core.selectors.flexprefill import block_means

CHUNK = 1 << 24  # scores, or logits of the oracle, that are held at once
SCORES = ("mean", "bounds", "peak", "mass")


@dataclass(frozen=True)
class TopBlocks(Selector):
    """Causal block-sparse attention with a fixed number of key blocks per query block.

    Queries and keys are cut into blocks I and J of `block` tokens. Every query block keeps its first `first` key
    blocks, the `local` last ones it may see (its own among them), and of the others those with the highest score,
    `keep` in all (or fewer, where there are fewer; the first and the local ones are always kept). With qbar_I the mean
    query of a block:

        mean     s_IJ = qbar_I . mean of k_j over J
        bounds   s_IJ = sum_d max(qbar_Id max_j k_jd, qbar_Id min_j k_jd), at least every qbar_I . k_j of J
        peak     s_IJ = max over j in J of qbar_I . k_j
        mass     s_IJ = sum over i in I, j in J of softmax_i(scale q_i . k_j): the attention itself

    "mass" is an oracle: the blocks it keeps hold the largest share of attention that this many blocks of this
    size can hold (besides the first and the local ones). It is an upper bound to compare with and costs
    quadratic time.

    Cost: reading q and k, and for the scores of a head (N / block) (M / block) D, for "peak" (N / block) M D, for
    "mass" N M D. In chunks of rows; nothing is N x M.

    Args:
        block: tokens per block, a multiple of 64.
        keep: key blocks per query block.
        score: "mean", "bounds", "peak" or "mass".
        first: first key blocks, always kept.
        local: last key blocks, always kept; at least 1, the query block's own. Where M - N is not a multiple of
            `block` a query block stands in two key blocks, which both count as its own.

    Positions are bottom-right aligned. Which keys a query gets depends on all queries of its block, later ones
    included; what it reads does not.

    Source: "mean" is the gate of MoBA: Mixture of Block Attention for Long-Context LLMs (2025), "bounds" that of Quest:
    Query-Aware Sparsity for Efficient Long-Context LLM Inference (2024), both for whole blocks of queries here.

    >>> q, k = torch.randn(1, 4, 1000, 16), torch.randn(1, 2, 1000, 16)
    >>> TopBlocks(keep=4).layout(q, k).heads
    4
    """

    block: int = TILE
    keep: int = 16
    score: str = "mean"
    first: int = 1
    local: int = 1

    def __post_init__(self) -> None:
        for name, least in (("block", TILE), ("keep", 1), ("first", 0), ("local", 1)):
            object.__setattr__(self, name, integer("TopBlocks", name, getattr(self, name), least))
        if self.block % TILE:
            raise ValueError(f"TopBlocks: block must be a multiple of {TILE}, got {self.block}")
        if self.score not in SCORES:
            raise ValueError(f"TopBlocks: score must be one of {', '.join(SCORES)}, got {self.score!r}")

    def layout(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = True
    ) -> BlockLayout:
        """The layout for q (B, H, N, D) and k (B, Hkv, M, D); see `select` for errors."""
        blocks = self.select(q, k, scale=scale, is_causal=is_causal)
        return BlockLayout.from_blocks(blocks, q.shape[2], k.shape[2], block=self.block, causal=True)

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = True) -> Tensor:
        """bool (B, H, ceil(N / block), ceil(M / block)): the key blocks of every query block.

        Args:
            q: (B, H, N, D); k: (B, Hkv, M, D), H a multiple of Hkv, N <= M.
            scale: factor on q k^T, default D ** -0.5; all choices but that by "mass" depend on its sign only.
            is_causal: must be True.

        Raises:
            ValueError: shapes that do not fit, or is_causal=False.
        """
        _check(q, k, is_causal)
        batch, heads, n, dim = q.shape
        kv_heads, m = k.shape[1:3]
        c, groups = self.block, heads // kv_heads
        nq, nk = -(-n // c), -(-m // c)
        scale = float(dim**-0.5 if scale is None else scale)
        starts = torch.arange(nq, device=q.device) * c + (m - n)  # positions
        own, last = starts // c, (starts + c - 1).clamp(max=m - 1) // c
        column = torch.arange(nk, device=q.device)
        allowed = column <= last[:, None]  # (nq, nk)
        fixed = allowed & ((column < self.first) | (column > own[:, None] - self.local))
        out = fixed.expand(batch, heads, nq, nk).clone()
        keep = min(self.keep, nk)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        wide_q, wide_k = q.to(wide), k.to(wide)
        means = block_means(wide_q, c, 0) * scale  # (B, H, nq, D)
        sums = None if self.score in ("peak", "mass") else self._summaries(means, wide_k)
        width = groups * {"peak": m, "mass": c * m // 2}.get(self.score, nk)
        step = max(1, CHUNK // width)
        for b in range(batch):
            for h in range(kv_heads):
                mine = slice(h * groups, (h + 1) * groups)
                for low in range(0, nq, step):
                    high = min(low + step, nq)
                    if sums is not None:
                        scores = torch.matmul(sums[0][b, mine, low:high], sums[1][b, h].mT)
                    elif self.score == "peak":
                        scores = self._peaks(
                            means[b, mine, low:high], wide_k[b, h, : (int(last[high - 1]) + 1) * c]
                        )
                        scores = torch.nn.functional.pad(scores, (0, nk - scores.shape[2]))
                    else:
                        scores = self._masses(wide_q[b, mine], wide_k[b, h], low, high, scale)
                    scores.masked_fill_(~allowed[low:high], -torch.inf)
                    scores.masked_fill_(fixed[low:high], torch.inf)
                    best = scores.topk(keep, -1).indices  # (G, rows, keep)
                    out[b, mine, low:high].scatter_(-1, best, True)
        return out & allowed

    def _peaks(self, means: Tensor, k: Tensor) -> Tensor:
        """(G, rows, blocks) from mean queries (G, rows, D) and k (M, D)."""
        logits = torch.nn.functional.pad(
            torch.matmul(means, k.T), (0, -len(k) % self.block), value=-torch.inf
        )
        return logits.unflatten(2, (-1, self.block)).amax(3)

    def _summaries(self, means: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, nq, E) and (B, Hkv, nk, E), whose products are the scores; means (B, H, nq, D)."""
        if self.score == "mean":
            return means, block_means(k, self.block, 0)
        rest = -k.shape[2] % self.block
        ends = [
            torch.nn.functional.pad(k, (0, 0, 0, rest), value=x).unflatten(2, (-1, self.block))
            for x in (-torch.inf, torch.inf)
        ]
        bounds = torch.cat([ends[0].amax(3), ends[1].amin(3)], -1)
        return torch.cat([means.clamp(min=0), means.clamp(max=0)], -1), bounds

    def _masses(self, q: Tensor, k: Tensor, low: int, high: int, scale: float) -> Tensor:
        """(G, high - low, nk) from q (G, N, D) and k (M, D): attention that query blocks low ... high - 1 pay."""
        (_, n, _), m, c = q.shape, len(k), self.block
        rows = torch.arange(low * c, min(high * c, n), device=q.device)
        seen = min(int(rows[-1]) + m - n + 1, m)  # keys after these are later than all rows
        mass = torch.matmul(q[:, rows], k[:seen].T).mul_(scale)  # (G, rows, seen)
        mass.masked_fill_(torch.arange(seen, device=q.device) > (rows + (m - n))[:, None], -torch.inf)
        mass.sub_(mass.amax(-1, keepdim=True)).exp_()
        sums = torch.nn.functional.pad(mass, (0, -seen % c)).unflatten(2, (-1, c)).sum(3)  # (G, rows, blocks)
        sums = sums / sums.sum(-1, keepdim=True)
        pad = (0, -(-m // c) - sums.shape[2], 0, -len(rows) % c)
        return torch.nn.functional.pad(sums, pad).unflatten(1, (-1, c)).sum(2)


def _check(q: Tensor, k: Tensor, is_causal: bool) -> None:
    if not is_causal:
        raise ValueError("TopBlocks is defined for causal attention; got is_causal=False, accepted is True")
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
            "TopBlocks needs at least one query and at least as many keys as queries, "
            f"got {n} queries and {m} keys"
        )
