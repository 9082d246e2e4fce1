"""HiP: the best key blocks of each block of queries, found by halving ranges of keys and keeping the best halves."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from foveate.core.gathered import KeyLists, gathered_attention
from foveate.core.layout import TILE, BlockLayout
from foveate.core.merge import State
from foveate.core.patterns.base import EMPTY, FULL, Extent, Pattern, integer, verdict
from foveate.core.selectors.base import Selector

BUFFER = 1 << 21  # elements of keys that are gathered at once for scoring


@dataclass(frozen=True, repr=False)
class HiPNear(Pattern):
    """What the search leaves out: sinks, window, and everything where no search is needed.

        allowed  <=>  key <= position  and  (key < sink  or  key >= edge),
        edge = sink + b n_b,  n_b = floor((p - window - sink) / b),  or 0 where p - window - sink <= keys

    with p the end of the position's query block and b = block_k. Positions are bottom-right aligned.

    >>> HiPNear(keys=2, block_q=2, block_k=2, sink=1, window=2).layout(8).to_dense()[0, 0, 6].int().tolist()
    [1, 0, 0, 0, 0, 1, 1, 0]
    """

    keys: int
    block_q: int
    block_k: int
    sink: int
    window: int

    def region(self, end: int | np.ndarray) -> np.ndarray:
        """Key blocks that are searched by a query block whose last position is end - 1; 0 = no search."""
        length = np.asarray(end) - self.window - self.sink
        return np.where(length > self.keys, length // self.block_k, 0)

    def edge(self, ext: Extent, position: np.ndarray) -> np.ndarray:
        """First key of the window of the query block of each position."""
        n_b = self.region(np.minimum((position // self.block_q + 1) * self.block_q, ext.k_len))
        return np.where(n_b > 0, self.sink + n_b * self.block_k, 0)

    def contains(self, ext, b, h, q, k):
        i = q + ext.offset
        return (k <= i) & ((k < self.sink) | (k >= self.edge(ext, i)))

    def classify(self, ext, b, h, q0, q1, k0, k1):
        low, high = q0 + ext.offset, q1 - 1 + ext.offset  # positions of the rectangle
        earliest, latest = self.edge(ext, low), self.edge(ext, high)
        seen = verdict((k0 >= self.sink) & (k1 <= earliest), (k1 <= self.sink) | (k0 >= latest))
        return verdict((k0 > high) | (seen == EMPTY), (k1 - 1 <= low) & (seen == FULL))


@dataclass(frozen=True)
class HiP(Selector):
    """Sparse causal attention to key blocks that a beam search over a tree of key ranges finds in O(log M) rounds.

    A query block Q ends at position p (its last query stands at p - 1). The region of the search are the keys
    [sink, p - window), cut into n_b blocks of block_k keys; M = keys / block_k. If the region has more than `keys`:

    1. It is split evenly into M ranges (start, size) of key blocks: range i starts at floor(i n_b / M).
    2. Until every range is one block, each is split into (start, floor(size / 2)) and the rest, and the M of the 2 M
       halves with the highest scores are kept:
       score(range) = max of q_i . k_j over sampled queries i of Q and the keys j of the range's representative block,
       which is start + floor(size / 2) ("center") or start ("first").
    3. Exact softmax over sinks, the M blocks that are left, and the window from the region's end on.

    These are ceil(log2(n_b / M)) rounds of 2 M blocks each. Nothing is pruned wrongly where neighbouring keys have
    similar scores; a single high key whose range is represented by another may be missed.

    Cost of the selection per query block and head: 2 keys ceil(log2(n_b / M)) scored keys, times the sampled queries;
    in chunks, nothing is N x M. A block_q of 256 with stride_q 16 computes an eighth of the scores that the defaults
    compute, and gathers a quarter of the keys; a block_k of 8 gathers in longer runs. `hip_attention` gathers the
    chosen keys and computes only those; as a layout (`layout`, `attention`, `foveate.hf.apply`) the set is the same,
    but engines compute every tile of 64 x 64 that a chosen block touches.

    Args:
        keys: keys that the search chooses, a multiple of block_k.
        block_q: queries that share a choice; a multiple or a divisor of 64.
        stride_q: one query in stride_q is scored, counted back from the block's last.
        block_k: keys per key block.
        sink: first keys, always kept.
        window: last keys before the end of the query block, always kept (a query sees those up to itself); at least
            block_q. Keys that do not fill a key block at the region's end belong to the window.
        representative: "center" or "first".
        shared: one search per key/value head, over the queries of all its query heads, in place of one per query head.

    A single query (decoding) searches for itself; `HiPDecodeState` reuses its choice for some steps. Chunked
    prefill (fewer queries than keys) is bottom-right aligned; query blocks stay those of the whole sequence. What a
    query gets depends on all queries of its block, later ones included; what it reads does not.

    Source: HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning (2024). Differs from the
    released code: the plain arithmetic of the paper (no relative positions, no ranges aligned to powers of two); keys
    that fill no block; any length; which layers stay dense is the caller's (`foveate.hf.apply(layers=...)`).

    >>> import torch
    >>> q, k = torch.randn(1, 4, 1000, 16), torch.randn(1, 2, 1000, 16)
    >>> lists, scored = HiP(keys=64, block_q=64, sink=16, window=64).search(q, k)
    >>> lists.counts[0, 0].unique().tolist(), scored.max().item()  # 460 key blocks in 32 ranges: 4 rounds of 64
    ([0, 64], 256)
    """

    keys: int = 512
    block_q: int = 64
    stride_q: int = 2
    block_k: int = 2
    sink: int = 16
    window: int = 256
    representative: str = "center"
    shared: bool = False

    def __post_init__(self) -> None:
        for name, least in (("keys", 1), ("block_q", 1), ("stride_q", 1), ("block_k", 1), ("sink", 0)):
            object.__setattr__(self, name, integer("HiP", name, getattr(self, name), least))
        object.__setattr__(self, "window", integer("HiP", "window", self.window, 1))
        if self.keys % self.block_k:
            raise ValueError(f"HiP: keys must be a multiple of block_k = {self.block_k}, got {self.keys}")
        if self.block_q % TILE and TILE % self.block_q:
            raise ValueError(f"HiP: block_q must be a multiple or a divisor of {TILE}, got {self.block_q}")
        if self.window < self.block_q:
            raise ValueError(f"HiP: window must be at least block_q = {self.block_q}, got {self.window}")
        if self.representative not in ("center", "first"):
            raise ValueError(f"HiP: representative must be 'center' or 'first', got {self.representative!r}")
        if not isinstance(self.shared, bool):
            raise ValueError(f"HiP: shared must be True or False, got {self.shared!r}")

    @property
    def ranges(self) -> int:
        """M, the number of ranges and of chosen blocks."""
        return self.keys // self.block_k

    @property
    def near(self) -> HiPNear:
        """The part that does not depend on the content."""
        return HiPNear(self.keys, self.block_q, self.block_k, self.sink, self.window)

    def layout(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = True
    ) -> BlockLayout:
        """Sinks, chosen blocks and window for q (B, H, N, D) and k (B, Hkv, M, D); see `search` for errors.

        `scale` does not matter, unless it is negative, which is not accepted.
        """
        if scale is not None and scale < 0:
            raise ValueError(f"HiP: scale must be at least 0, got {scale}")
        lists, _ = self.search(q, k, is_causal=is_causal)
        near = self.near.layout(q.shape[2], k.shape[2]).to(q.device)
        return near if len(lists.idx) == 0 else near | lists.layout()

    @torch.no_grad()
    def search(self, q: Tensor, k: Tensor, *, is_causal: bool = True) -> tuple[KeyLists, Tensor]:
        """The chosen keys of every query block, and how many key blocks were scored for it.

        Args:
            q: (B, H, N, D); k: (B, Hkv, M, D), H a multiple of Hkv, N <= M.
            is_causal: must be True: the method is defined for causal attention.

        Returns:
            lists of `keys` positions, ascending (none for query blocks that see everything), and int64 (groups,), the
            scored blocks per head.

        Raises:
            ValueError: shapes that do not fit, or is_causal=False.
        """
        _check(q, k, is_causal)
        batch, heads, n, _ = q.shape
        kv_heads, m = k.shape[1:3]
        first, last = (m - n) // self.block_q, (m - 1) // self.block_q
        ends = np.minimum((np.arange(first, last + 1) + 1) * self.block_q, m)
        regions = self.near.region(ends)  # (groups,) key blocks; rises
        lists = kv_heads if self.shared else heads
        scored = torch.zeros(len(ends), dtype=torch.int64)
        counts = torch.zeros(batch, lists, len(ends), dtype=torch.int64, device=q.device)
        positions = torch.zeros(batch, lists, len(ends), self.keys, dtype=torch.int32, device=q.device)
        if regions[-1] == 0:
            return KeyLists.from_padded(positions, n, m, self.block_q, counts=counts, heads=heads), scored
        blocks = self._blocks(k, int(regions[-1]))
        rows = self._sampled(ends, n, m).to(q.device)  # (groups, R)
        inside = torch.arange(self.block_k, device=q.device)
        begin = int(np.flatnonzero(regions)[0])
        counts[:, :, begin:] = self.keys
        per = batch * lists * 2 * self.keys * k.shape[3]
        step = max(1, BUFFER // per)
        for lo in range(begin, len(ends), step):
            hi = min(lo + step, len(ends))
            mine = q[:, :, rows[lo:hi].flatten()].unflatten(2, (hi - lo, -1))  # (B, H, g, R, D)
            mine = mine.unflatten(1, (kv_heads, -1))
            if self.shared:
                mine = mine.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).unsqueeze(2)  # (B, Hkv, 1, g, G R, D)
            found = self._beam(mine.contiguous(), blocks, regions[lo:hi], scored[lo:hi])
            keys = self.sink + (found.sort(-1).values.unsqueeze(-1) * self.block_k + inside).flatten(-2)
            positions[:, :, lo:hi] = keys.flatten(1, 2).int()
        return KeyLists.from_padded(positions, n, m, self.block_q, counts=counts, heads=heads), scored

    def _blocks(self, k: Tensor, count: int) -> Tensor:
        """The key blocks after the sinks, (B Hkv, count, block_k D): one gathered row is a block."""
        region = k[:, :, self.sink : self.sink + count * self.block_k]
        return region.reshape(k.shape[0] * k.shape[1], count, -1)

    def _sampled(self, ends: np.ndarray, n: int, m: int) -> Tensor:
        """Query numbers that are scored, (groups, R): every stride_q-th back from the last; repeated where few."""
        rows = np.arange(0, min(self.block_q, n), self.stride_q)
        at = ends[:, None] - 1 - rows
        starts = np.maximum((ends - 1) // self.block_q * self.block_q, m - n)[:, None]
        return torch.from_numpy(np.where(at >= starts, at, ends[:, None] - 1) - (m - n))

    def _beam(self, q: Tensor, blocks: Tensor, regions: np.ndarray, scored: Tensor) -> Tensor:
        """Numbers of the chosen key blocks, (B, Hkv, l, g, M).

        q: (B, Hkv, l, g, R, D), the sampled queries; blocks: (B Hkv, count, block_k D); regions: (g,), rising, n_b;
        scored: (g,), to which the scored blocks are added.
        """
        many = self.ranges
        n_b = torch.from_numpy(regions).to(q.device)  # (g,)
        edges = torch.arange(many + 1, device=q.device) * n_b[:, None] // many  # (g, M + 1)
        lead = q.shape[:3]
        start = edges[:, :-1].expand(*lead, -1, -1).clone()  # (B, Hkv, l, g, M)
        size = edges.diff().expand(*lead, -1, -1).clone()
        left = -(-regions // many)  # largest size in each group
        while left[-1] > 1:
            active = int(np.flatnonzero(left > 1)[0])  # the first group that is not finished
            s, n = start[..., active:, :], size[..., active:, :]
            halves = torch.cat([s, s + n // 2], -1), torch.cat([n // 2, n - n // 2], -1)  # (..., 2 M)
            score = self._scores(q[..., active:, :, :], blocks, *halves)
            scored[active:] += 2 * many
            best = score.topk(many, -1, sorted=False).indices
            start[..., active:, :], size[..., active:, :] = (t.gather(-1, best) for t in halves)
            left = -(-left // 2)
        return start

    def _scores(self, q: Tensor, blocks: Tensor, start: Tensor, size: Tensor) -> Tensor:
        """Scores of ranges (B, Hkv, l, g, C); -inf where the range is empty."""
        batch, kv_heads, each, groups, _, dim = q.shape
        block = start + size // 2 if self.representative == "center" else start
        base = (
            torch.arange(batch * kv_heads, device=q.device).view(batch, kv_heads, 1, 1, 1) * blocks.shape[1]
        )
        # an empty range at the region's end has no block: any will do
        at = (block.clamp_max(blocks.shape[1] - 1) + base).flatten()
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        keys = (
            blocks.flatten(0, 1).index_select(0, at).to(wide).view(batch * kv_heads * each * groups, -1, dim)
        )
        dots = torch.bmm(q.to(wide).flatten(0, 3), keys.transpose(1, 2))  # (.., R, C block_k)
        score = dots.amax(1).view(*start.shape, self.block_k).amax(-1)
        return score.masked_fill(size == 0, -torch.inf)


def hip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hip: HiP | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    engine: str = "auto",
) -> Tensor | State:
    """Causal attention over the sinks, the window and the key blocks that `hip` finds; the chosen keys are gathered.

    Equal to `attention(q, k, v, hip)` at a cost proportional to the chosen keys. Gradients flow through the
    attention, not through the choice.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv), H a multiple of Hkv, N <= M.
        hip: the settings; default `HiP()`.
        scale: factor on q k^T, at least 0; default D ** -0.5.
        return_lse: also return log sum exp of each row's logits, (B, H, N).
        engine: as in `attention`.

    Raises:
        ValueError, TypeError: shapes that do not fit.

    >>> import torch, foveate as fv
    >>> q = torch.randn(1, 4, 300, 16); k = v = torch.randn(1, 2, 300, 16)
    >>> out = hip_attention(q, k, v, HiP(keys=220, window=64))  # 220 + 16 + 64 keys are all there are
    >>> torch.allclose(out, fv.attention(q, k, v, is_causal=True), atol=1e-5)
    True
    """
    hip = HiP() if hip is None else hip
    if scale is not None and scale < 0:
        raise ValueError(f"hip_attention: scale must be at least 0, got {scale}")
    lists, _ = hip.search(q, k)
    return gathered_attention(q, k, v, lists, hip.near, scale=scale, return_lse=return_lse, engine=engine)


@dataclass
class HiPDecodeState:
    """HiP while a model generates: a choice is searched once and reused for `refresh` steps.

    Each step has one query per head, or a few (the new tokens, which make one query block). The sinks, the chosen keys
    and the window are gathered and attended to; the window moves on at every step, so that between two searches the
    keys it has left are read only once the next search finds them. While the region has at most `keys` keys, all are
    read and nothing is searched. With refresh = 1 every step is `hip_attention` with block_q = 1.

    Args:
        hip: the settings; its block_q is not used.
        refresh: steps between two searches, >= 1.

    Attributes:
        age: steps since the last search; None: the next step searches.
        chosen: the chosen key positions, (B, lists, keys), or None before the first search.
        length: keys of the cache at the last step; one that has not grown is another sequence, and is searched.

    >>> import torch
    >>> k = v = torch.randn(1, 2, 600, 16)
    >>> state = HiPDecodeState(HiP(keys=64, window=64), refresh=4)
    >>> for length in range(500, 506):
    ...     out = state.step(torch.randn(1, 4, 1, 16), k[:, :, :length], v[:, :, :length])
    >>> out.shape, state.age
    (torch.Size([1, 4, 1, 16]), 2)
    """

    hip: HiP
    refresh: int = 8
    age: int | None = field(default=None, init=False)
    chosen: Tensor | None = field(default=None, init=False)
    length: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.hip, HiP):
            raise TypeError(f"HiPDecodeState: hip must be a HiP, got {type(self.hip).__name__}")
        self.refresh = integer("HiPDecodeState", "refresh", self.refresh, 1)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, engine: str = "auto"
    ) -> Tensor:
        """Attention of the new queries q (B, H, n, D) to the cache k, v (B, Hkv, M, ...), whose last keys are theirs.

        Raises:
            ValueError: shapes that do not fit, or more queries than the window holds.
        """
        from foveate.core.attention import attention

        _check(q, k, True)
        n, m = q.shape[2], k.shape[2]
        if n > self.hip.window:
            raise ValueError(f"HiPDecodeState.step takes at most window = {self.hip.window} queries, got {n}")
        count = int(self.hip.near.region(m))
        if count == 0:
            self.age = None
            out = attention(q, k, v, is_causal=True, scale=scale, engine=engine)
            assert isinstance(out, Tensor)
            return out
        if self.age is None or self.age >= self.refresh or m <= self.length or self.chosen is None:
            self.age, self.chosen = 0, self._search(q, k, count)
        self.age, self.length = self.age + 1, m
        batch, lists, _ = self.chosen.shape
        edge = self.hip.sink + count * self.hip.block_k
        sinks, window = (
            torch.arange(*ends, device=q.device).expand(batch, lists, -1)
            for ends in ((0, self.hip.sink), (edge, m))
        )
        at = torch.cat([sinks, self.chosen, window], -1)  # (B, lists, keys read)
        b = torch.arange(batch, device=q.device)[:, None, None]
        h = (torch.arange(lists, device=q.device) // (lists // k.shape[1]))[:, None]
        out = attention(q, k[b, h, at], v[b, h, at], is_causal=True, scale=scale, engine=engine)
        assert isinstance(out, Tensor)
        return out

    @torch.no_grad()
    def _search(self, q: Tensor, k: Tensor, count: int) -> Tensor:
        """(B, lists, keys), ascending."""
        hip = self.hip
        rows = q[:, :, torch.arange(q.shape[2] - 1, -1, -hip.stride_q, device=q.device)]
        mine = rows.unflatten(1, (k.shape[1], -1)).unsqueeze(3)  # (B, Hkv, G, 1, R, D)
        if hip.shared:
            mine = mine.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).unsqueeze(2)
        scored = torch.zeros(1, dtype=torch.int64)
        found = hip._beam(mine, hip._blocks(k, count), np.array([count]), scored).sort(-1).values
        inside = torch.arange(hip.block_k, device=q.device)
        keys = hip.sink + (found.unsqueeze(-1) * hip.block_k + inside).flatten(-2)
        return keys.flatten(1, 3)


def _check(q: Tensor, k: Tensor, is_causal: bool) -> None:
    if not is_causal:
        raise ValueError("HiP is defined for causal attention; got is_causal=False, accepted is True")
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
            f"HiP needs at least one query and at least as many keys as queries, got {n} queries and {m} keys"
        )
