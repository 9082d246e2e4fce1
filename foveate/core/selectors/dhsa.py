"""DHSA: chunks of varying length are scored for each block of queries, which keeps single tokens of the best chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.layout import BlockLayout
from foveate.core.merge import State
from foveate.core.patterns.base import integer
from foveate.core.selectors.base import Selector
from foveate.core.selectors.boundaries import fixed_boundaries, select_boundaries
from foveate.core.selectors.flexprefill import block_means
from foveate.core.selectors.token_lists import TokenLists

CHUNK = 1 << 22  # scores of chunks that are held at once
POOLINGS = ("avgpool_norm", "avgpool")


@dataclass(frozen=True)
class DHSA(Selector):
    """Dynamic hierarchical sparse attention: causal prefill with a fixed budget of single keys per query block.

    1. Chunks. Boundaries cut the keys into chunks of varying length: where `predictor` sees attention change
       (`select_boundaries` of its logits, at most beta * floor(M / block) of them), or every `chunk` keys.
    2. Scores. For query block b with n_b queries and chunk c with n_c keys

           score_bc = qbar_b . kbar_c,   qbar_b = sqrt(n_b) mean_{i in b} q_i,   kbar_c = sqrt(n_c) mean_{j in c} k_j

       of queries and keys averaged over the heads. The square root keeps the noise of a mean alike for all lengths, so
       that long chunks are not put last. Every key has the score of its chunk.
    3. Each query block keeps `budget` keys of those before its end (and within `window`): the first `sink`, the last
       `local`, and of the others those with the largest scores; of the chunk that the budget cuts, the first ones.
    4. Exact softmax over the kept keys up to the query (and within `window`). The last `instruction` queries, and a
       single query (decoding), are dense.

    `dhsa_attention` gathers the kept keys and computes only them. As a layout (`layout`, `attention`,
    `foveate.hf.apply`) the set is the same, but engines compute every tile of 64 x 64 that a kept key touches.

    Args:
        block: queries per block.
        budget: keys per query block, at least sink + local.
        local: last keys that a block keeps, its own among them: at least `block`.
        sink: first keys that a block keeps.
        predictor: (B, Hkv * D, M) keys, heads one after another, -> (B, M) logits: a boundary comes after key t. See
            `foveate.layers.BoundaryPredictor`. None: a boundary every `chunk` keys, no training needed.
        chunk: keys per chunk where there is no predictor.
        theta, nms, beta: of `select_boundaries`; beta is the most boundaries per `block` keys.
        pooling: "avgpool_norm", or "avgpool" without the square roots.
        per_head: False: one list for all heads (the paper's); True: one per query head, "kv": one per key/value head,
            scored without the average over the others.
        instruction: last queries that attend densely; a chunk starts at the first of them.
        window: keys that a query of a sliding-window layer may see, its own included; None: all.

    Cost of the selection: 2 N D C / block for C chunks (and per list), and sorting them; in chunks of query blocks.
    Chunked prefill (fewer queries than keys) is bottom-right aligned, blocks start at its first query. Which keys are
    kept depends on all queries of the block and on chunks that reach beyond it; what a query reads lies before it.

    Source: Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs (2025). Differs from
    the released code: no key is kept twice; the first keys have places of their own instead of overwriting the
    earliest chosen ones; local is at least a block; a forced chunk starts at the instruction's first key (there: one
    later); lists per head.

    >>> q, k = torch.randn(1, 4, 1000, 16), torch.randn(1, 2, 1000, 16)
    >>> lists = DHSA(block=50, budget=200, local=50, sink=10, instruction=0).select(q, k)
    >>> lists.tokens.shape, lists.dense  # (batch, lists, blocks, budget); blocks with at most 200 keys keep them all
    (torch.Size([1, 1, 16, 200]), 200)
    """

    block: int = 64
    budget: int = 2048
    local: int = 128
    sink: int = 128
    predictor: Callable[[Tensor], Tensor] | None = None
    chunk: int = 16
    theta: float = 1.1
    nms: int = 8
    beta: int = 8
    pooling: str = "avgpool_norm"
    per_head: bool | str = False
    instruction: int = 64
    window: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("budget", 1), ("local", 1), ("sink", 0), ("chunk", 1), ("nms", 0),
                            ("beta", 1), ("instruction", 0)):  # fmt: skip
            object.__setattr__(self, name, integer("DHSA", name, getattr(self, name), least))
        if self.window is not None:
            object.__setattr__(self, "window", integer("DHSA", "window", self.window, 1))
        if self.local < self.block:
            raise ValueError(f"DHSA: local must be at least block = {self.block}, got {self.local}")
        if self.budget < self.sink + self.local:
            raise ValueError(
                f"DHSA: budget must be at least sink + local = {self.sink + self.local}, got {self.budget}"
            )
        if self.predictor is not None and not callable(self.predictor):
            raise TypeError(f"DHSA: predictor must be None or callable, got {type(self.predictor).__name__}")
        if isinstance(self.theta, bool) or not isinstance(self.theta, (int, float)) or math.isnan(self.theta):
            raise ValueError(f"DHSA: theta must be a number, got {self.theta!r}")
        if self.pooling not in POOLINGS:
            raise ValueError(f"DHSA: pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if not any(self.per_head is x for x in (False, True)) and self.per_head != "kv":
            raise ValueError(f"DHSA: per_head must be False, True or 'kv', got {self.per_head!r}")

    def layout(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = True
    ) -> BlockLayout:
        """The layout for q (B, H, N, D) and k (B, Hkv, M, D); see `select` for errors. `scale` changes nothing."""
        return self.select(q, k, is_causal=is_causal).layout()

    @torch.no_grad()
    def boundaries(self, k: Tensor) -> Tensor:
        """int64 (B, C + 1) for k (B, Hkv, M, D); layers may share those of one of them (`select(boundaries=)`)."""
        batch, _, m, _ = k.shape
        forced = max(m - self.instruction, 0)
        if self.predictor is None:
            return fixed_boundaries(m, self.chunk, forced=forced).to(k.device).expand(batch, -1)
        score = self.predictor(k.transpose(2, 3).flatten(1, 2))
        if tuple(score.shape) != (batch, m):
            raise ValueError(
                f"DHSA: predictor must return logits {(batch, m)} for {m} keys, got {tuple(score.shape)}"
            )
        most = max(1, self.beta * (m // self.block))
        return select_boundaries(score, self.theta, most, self.nms, forced)

    @torch.no_grad()
    def select(
        self, q: Tensor, k: Tensor, *, boundaries: Tensor | None = None, is_causal: bool = True
    ) -> TokenLists:
        """The kept keys of every query block.

        Args:
            q: (B, H, N, D); k: (B, Hkv, M, D), H a multiple of Hkv, N <= M.
            boundaries: int64 (B or 1, C + 1), not decreasing from 0 to M; default: those of `boundaries(k)`.
            is_causal: must be True: the method is defined for causal attention.

        Raises:
            ValueError: shapes that do not fit, boundaries that do not cut M keys, or is_causal=False.
        """
        _check(q, k, is_causal)
        batch, heads, n, _ = q.shape
        kv_heads, m = k.shape[1:3]
        lists = {False: 1, True: heads, "kv": kv_heads}[self.per_head]
        rows = 0 if n == 1 else max(n - self.instruction, 0)  # queries in blocks
        starts = torch.arange(0, rows, self.block) + m - n  # positions of the blocks' first queries
        ends = (starts + self.block).clamp(max=m - n + rows)
        lows = torch.zeros_like(starts) if self.window is None else (starts - self.window + 1).clamp_min(0)
        dense = int((ends - lows <= self.budget).logical_not().to(torch.uint8).argmax()) if len(starts) else 0
        if not len(starts) or int(ends[dense] - lows[dense]) <= self.budget:
            dense = len(starts)  # no block has more than the budget
        starts, ends, lows = starts[dense:], ends[dense:], lows[dense:]
        lows = torch.minimum(lows, ends - self.budget)  # a short last block; its window is cut key by key
        tokens = torch.empty(batch, lists, 0, self.budget, dtype=torch.int64, device=q.device)
        if len(starts):
            boundaries = self.boundaries(k) if boundaries is None else boundaries
            some = q[:, :, dense * self.block : rows]
            tokens = self._tokens(some, k, _checked(boundaries, batch, m).to(q.device), starts, ends, lows)
        return TokenLists(
            n, m, heads, self.block, min(dense * self.block, rows), rows, tokens, window=self.window
        )

    def _tokens(
        self, q: Tensor, k: Tensor, boundaries: Tensor, starts: Tensor, ends: Tensor, lows: Tensor
    ) -> Tensor:
        """(B, lists, blocks, budget) of the queries q, whose blocks have these positions and first keys."""
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        means = block_means(q.to(wide), self.block, 0)  # (B, H, blocks, D)
        if self.pooling == "avgpool_norm":
            means = means * (ends - starts).to(means).sqrt()[:, None]
        keys = k.to(wide)
        if self.per_head is False:
            means, keys = means.mean(1, keepdim=True), keys.mean(1, keepdim=True)
        elif self.per_head == "kv":
            means = means.unflatten(1, (k.shape[1], -1)).mean(2)
        chunks = chunk_means(keys, boundaries, norm=self.pooling == "avgpool_norm")  # (B, 1 or Hkv, C, D)
        batch, lists = means.shape[:2]
        middle = self.budget - self.sink - self.local
        most = _most_chunks(boundaries, middle)
        edges = torch.stack([lows + self.sink, ends - self.local]).to(
            q.device
        )  # of what the scores choose from
        step, parts = max(1, CHUNK // (batch * lists * chunks.shape[2])), []
        for at in range(0, len(starts), step):
            some = slice(at, at + step)
            scores = means[:, :, some].unflatten(1, (chunks.shape[1], -1)) @ chunks.mT.unsqueeze(2)
            parts.append(_best(scores.flatten(1, 2), boundaries, edges[:, some], middle, most))
        first = (lows[:, None] + torch.arange(self.sink)).to(q.device).expand(batch, lists, -1, -1)
        last = (ends[:, None] + torch.arange(-self.local, 0)).to(q.device).expand(batch, lists, -1, -1)
        return torch.cat([first, torch.cat(parts, 2), last], 3)


def chunk_means(k: Tensor, boundaries: Tensor, *, norm: bool = True) -> Tensor:
    """Mean of the keys of each chunk, times the square root of its length with `norm`; 0 for empty chunks.

    Args:
        k: (B, H, M, D); boundaries: int64 (B, C + 1), from 0 to M.

    Returns:
        (B, H, C, D)

    >>> k = torch.tensor([[[[1.0], [3.0], [5.0], [5.0], [5.0], [5.0]]]])
    >>> chunk_means(k, torch.tensor([[0, 2, 6]]), norm=False).flatten().tolist()
    [2.0, 5.0]
    """
    batch, heads, m, dim = k.shape
    count = boundaries.shape[1] - 1
    place = torch.arange(m, device=k.device).expand(batch, -1).contiguous()
    chunk = torch.searchsorted(boundaries.contiguous(), place, right=True) - 1  # (B, M)
    chunk += torch.arange(batch, device=k.device)[:, None] * count
    sums = k.new_zeros(batch * count, heads * dim)
    sums.index_add_(0, chunk.flatten(), k.transpose(1, 2).flatten(2).flatten(0, 1))
    length = boundaries.diff(dim=1).clamp_min(1).to(k).flatten()
    sums /= (length.sqrt() if norm else length)[:, None]
    return sums.view(batch, count, heads, dim).transpose(1, 2)


def _most_chunks(boundaries: Tensor, tokens: int) -> int:
    """How many chunks may be needed to hold this many tokens: the shortest ones, and the two that are cut."""
    lengths = boundaries.diff(dim=1)
    lengths = torch.where(lengths == 0, int(boundaries[0, -1]), lengths).sort(1).values
    needed = (lengths.cumsum(1) < tokens).sum(1).max()
    return min(int(needed) + 3, lengths.shape[1])


def _best(scores: Tensor, boundaries: Tensor, edges: Tensor, tokens: int, most: int) -> Tensor:
    """The tokens between the edges whose chunks have the largest scores, ascending: int64 (B, lists, blocks, tokens).

    scores: (B, lists, blocks, C); edges: (2, blocks), first token and end of the choice, which holds at least `tokens`.
    """
    starts = torch.maximum(boundaries[:, None, :-1], edges[0][:, None])  # (B, blocks, C)
    sizes = torch.minimum(boundaries[:, None, 1:], edges[1][:, None]).sub_(starts).clamp_min_(0)
    scores = scores.masked_fill(sizes.unsqueeze(1) == 0, -torch.inf)
    chosen = scores.topk(most, -1).indices  # (B, lists, blocks, most)
    size = sizes.unsqueeze(1).expand_as(scores).gather(-1, chosen)
    taken = (tokens - (size.cumsum(-1) - size)).clamp_min_(0).minimum(size)
    order = chosen.argsort(-1)
    chosen, taken = chosen.gather(-1, order), taken.gather(-1, order)
    start = starts.unsqueeze(1).expand_as(scores).gather(-1, chosen)
    shift = start - (taken.cumsum(-1) - taken)
    rows = shift[..., 0].numel()
    picked = torch.repeat_interleave(shift.flatten(), taken.flatten(), output_size=rows * tokens)
    return picked.view(*shift.shape[:-1], tokens) + torch.arange(tokens, device=scores.device)


def dhsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chooser: DHSA,
    *,
    boundaries: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    engine: str = "auto",
) -> Tensor | State:
    """Causal attention over the keys that `chooser` keeps, which are gathered for each block of queries.

    Equal to `attention(q, k, v, chooser, is_causal=True)`, at a cost proportional to the kept pairs. Gradients flow
    through the attention, not through the choice.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv), H a multiple of Hkv, N <= M.
        chooser: the settings.
        boundaries: of another layer, say; default: those of `chooser.boundaries(k)`.
        scale, engine: as in `attention`.
        return_lse: also return log sum exp of each row's logits, (B, H, N).

    Raises:
        ValueError: shapes that do not fit.

    >>> import foveate as fv
    >>> q, k, v = torch.randn(1, 4, 500, 16), torch.randn(1, 2, 500, 16), torch.randn(1, 2, 500, 16)
    >>> out = dhsa_attention(q, k, v, DHSA(block=32, budget=500, local=32, sink=4))
    >>> torch.allclose(out, fv.attention(q, k, v, is_causal=True), atol=1e-5)
    True
    """
    lists = chooser.select(q, k, boundaries=boundaries)
    return lists.attend(q, k, v, scale=scale, return_lse=return_lse, engine=engine)


def _checked(boundaries: Tensor, batch: int, m: int) -> Tensor:
    if not isinstance(boundaries, Tensor) or boundaries.dtype != torch.int64 or boundaries.ndim != 2:
        got = (
            f"{boundaries.dtype} {tuple(boundaries.shape)}" if isinstance(boundaries, Tensor) else boundaries
        )
        raise ValueError(f"boundaries must be int64 (batch, chunks + 1), got {got}")
    sound = boundaries.shape[0] in (1, batch) and boundaries.shape[1] >= 2
    sound = sound and bool((boundaries[:, 0] == 0).all() and (boundaries[:, -1] == m).all())
    if not sound or bool((boundaries.diff(dim=1) < 0).any()):
        raise ValueError(
            f"boundaries must rise from 0 to {m} in each of {batch} rows (or in one for all), "
            f"got shape {tuple(boundaries.shape)}, ends {boundaries[:, [0, -1]].tolist()}"
        )
    return boundaries.expand(batch, -1)


def _check(q: Tensor, k: Tensor, is_causal: bool) -> None:
    if not is_causal:
        raise ValueError("DHSA is defined for causal attention; got is_causal=False, accepted is True")
    for name, t in (("q", q), ("k", k)):
        if not isinstance(t, Tensor) or t.ndim != 4:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a tensor (batch, heads, length, dim), got {got}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            "q (B, H, N, D) and k (B, Hkv, M, D) must share B and D, with H a multiple of Hkv; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ValueError(
            "DHSA needs at least one query and at least as many keys as queries, "
            f"got {q.shape[2]} queries and {k.shape[2]} keys"
        )
