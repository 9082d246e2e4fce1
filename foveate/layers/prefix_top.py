"""The w best keys of every prefix: how long each key stays among them, as a layout and as gathered attention.

A key joins when it appears, and once w keys rank before it, it never returns. So the sets of all queries are one number
per key, the position at which it has dropped out:

    S_i = {j : j <= i < leaves_j}
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from foveate.core.attention import attention
from foveate.core.layout import TILE, BlockLayout, pack_bits, tiles
from foveate.core.scores import Bias
from foveate.layers.intervals import interval_layout

STEP = 64  # positions whose thresholds are found at once
ROWS = 1 << 17  # gathered keys held per call of the engine


@dataclass(frozen=True, eq=False, repr=False)
class KeptKeys:
    """The keys that every query keeps, per key/value head. Queries stand at positions M - N ... M - 1 (bottom-right).

    Attributes:
        leaves: int64 (B, Hkv, M): query i sees key j when j <= i < leaves[j]; leaves[j] = j: no query ever does.
        q_len: N.
        keep: w, the most keys of a query.
    """

    leaves: Tensor
    q_len: int
    keep: int

    @property
    def k_len(self) -> int:
        return self.leaves.shape[2]

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.k_len - self.q_len

    def at(self, i: int) -> Tensor:
        """bool (B, Hkv, M): the keys that the query at position i keeps."""
        here = torch.arange(self.k_len, device=self.leaves.device)
        return (here <= i) & (self.leaves > i)

    @cached_property
    def area(self) -> int:
        """Kept (query, key) pairs, summed over batch rows and key/value heads."""
        here = torch.arange(self.k_len, device=self.leaves.device).clamp_min(self.offset)
        return int((self.leaves - here).clamp_min(0).sum())

    # ----------------------------------------------------------------------------------------- as a layout
    def layout(self, heads: int) -> BlockLayout:
        """The exact set as tiles, for `heads` query heads.

        Keys that last are scattered, so nearly every tile holds one and little is skipped: `attend` is the fast form.

        Raises:
            ValueError: heads that are no multiple of the key/value heads.
        """
        batch, kv_heads, m = self.leaves.shape
        if heads < 1 or heads % kv_heads:
            raise ValueError(
                f"KeptKeys.layout: heads must be a multiple of {kv_heads} key/value heads, got {heads}"
            )
        nq, nk = tiles(self.q_len), tiles(m)
        position = np.arange(nk * TILE)
        rows, columns, words, which, made = [], [], [], [], 0
        for plane, leaves in enumerate(self.leaves.flatten(0, 1).cpu().numpy()):
            until = np.concatenate([leaves, np.zeros(nk * TILE - m, np.int64)])
            i, j = self._touched(until, nq, nk)
            table = np.empty((len(i), TILE), np.int64)
            for at in range(0, len(i), 1 << 10):
                part = slice(at, at + (1 << 10))
                q = (i[part, None] * TILE + np.arange(TILE) + self.offset)[:, :, None]  # (tiles, 64, 1)
                cell = (j[part, None] * TILE + np.arange(TILE))[:, None, :]
                table[part] = pack_bits((position[cell] <= q) & (q < until[cell]))
            b, h = divmod(plane, kv_heads)
            for head in range(h * (heads // kv_heads), (h + 1) * (heads // kv_heads)):
                rows.append((b * heads + head) * nq + i)
                columns.append(j)
                which.append(made + np.arange(len(i)))
            words.append(table)
            made += len(i)
        parts = [np.concatenate(x) for x in (rows, columns, words, which)]
        return BlockLayout.from_tiles(self.q_len, m, *parts[:3], batch=batch, heads=heads, which=parts[3]).to(
            self.leaves.device
        )

    def _touched(self, until: np.ndarray, nq: int, nk: int) -> tuple[np.ndarray, np.ndarray]:
        """Query tiles and key tiles that may share a pair, by query tile."""
        first = np.maximum(np.arange(nk) * TILE - self.offset, 0) // TILE
        last = (until.reshape(nk, TILE).max(1) - 1 - self.offset) // TILE
        query = np.arange(nq)[:, None]
        i, j = np.nonzero((query >= first) & (query <= last))
        return i, j

    # -------------------------------------------------------------------------------------- gathered attention
    @property
    def block(self) -> int:
        """Queries that share gathered keys: about w / 8, a multiple of 64."""
        return min(max(self.keep // 8 // TILE, 1) * TILE, 512, tiles(self.q_len) * TILE)

    @cached_property
    def members(self) -> tuple[Tensor, Tensor]:
        """The keys that some query of a block keeps.

        Returns:
            keys: int64 (L,), positions, block after block; in each those that all its queries keep come first.
            ptr: int64 (B * Hkv * blocks + 1,): where the keys of (batch row, head, block) start.
        """
        leaves = self.leaves.flatten(0, 1)  # (R, M)
        rows, m, block, device = len(leaves), self.k_len, self.block, leaves.device
        blocks = -(-self.q_len // block)
        start = torch.arange(m, device=device).sub(self.offset).clamp_min(0).expand(rows, m)  # of queries
        end = leaves - self.offset
        first, count = start // block, ((end - 1) // block - start // block + 1)
        count = torch.where(end > start, count, 0).flatten()
        which = torch.repeat_interleave(count)  # of the (row, key) cells, one for each of its blocks
        step = torch.arange(len(which), device=device) - (count.cumsum(0) - count)[which]
        at = first.flatten()[which] + step  # block
        begin, stop = at * block, ((at + 1) * block).clamp_max(self.q_len)
        partial = (start.flatten()[which] > begin) | (end.flatten()[which] < stop)
        group = which // m * blocks + at
        order = torch.argsort((group * 2 + partial) * m + which % m)
        ptr = torch.zeros(rows * blocks + 1, dtype=torch.int64, device=device)
        torch.cumsum(torch.bincount(group, minlength=rows * blocks), 0, out=ptr[1:])
        return (which % m)[order], ptr

    @property
    def gathered(self) -> int:
        """(query, key) pairs that `attend` computes, summed over batch rows and key/value heads."""
        counts = self.members[1].diff().view(-1, -(-self.q_len // self.block))
        heights = torch.full((counts.shape[1],), self.block, device=counts.device)
        heights[-1] = self.q_len - (counts.shape[1] - 1) * self.block
        return int((counts * heights).sum())

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        *,
        scale: float | None = None,
        engine: str = "auto",
    ) -> Tensor:
        """Attention of every query to the keys that it keeps.

            out_i = sum_{j in S_i} softmax_j(scale q_i . k_j + b_j) v_j

        The keys of a block of queries, at most w + block, are gathered and attended to at once.

        Args:
            q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv); bias: (B, Hkv, M), added to the logits.
            scale, engine: as in `attention`.

        Returns:
            (B, H, N, Dv), with gradients of q, k, v and bias.
        """
        batch, n, kv_heads, m = q.shape[0], q.shape[2], k.shape[1], k.shape[2]
        if (batch, kv_heads, m) != tuple(self.leaves.shape) or n != self.q_len or bias.shape != k.shape[:3]:
            raise ValueError(
                f"KeptKeys of {self.q_len} queries and {tuple(self.leaves.shape)} (batch, key/value heads, keys) "
                f"got q {tuple(q.shape)}, k {tuple(k.shape)}, bias {tuple(bias.shape)}"
            )
        block, (keys, ptr) = self.block, self.members
        blocks = -(-n // block)
        most = ptr.diff().view(batch, kv_heads, blocks).amax((0, 1)).tolist()  # longest list of each block
        flat = [t.reshape(-1, t.shape[-1]) for t in (k, v, bias.unsqueeze(-1))]  # (B Hkv M, .)
        parts, at = [], 0
        while at < blocks:
            stop, width = at + 1, most[at]
            while stop < blocks and batch * kv_heads * (stop + 1 - at) * max(width, most[stop]) <= ROWS:
                width, stop = max(width, most[stop]), stop + 1
            rows = slice(at * block, min(stop * block, n))
            parts.append(self._some(q[:, :, rows], flat, keys, ptr, at, stop, width, scale, engine))
            at = stop
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def _some(
        self, q: Tensor, flat: list[Tensor], keys: Tensor, ptr: Tensor, at: int, stop: int, width: int,
        scale: float | None, engine: str,
    ) -> Tensor:  # fmt: skip
        """`attend` for the blocks at ... stop - 1, whose queries are q; lists are padded to `width` and masked."""
        (batch, kv_heads, m), block, device = self.leaves.shape, self.block, q.device
        heads, n, many = q.shape[1], q.shape[2], stop - at
        blocks = -(-self.q_len // block)
        starts = ptr[:-1].view(batch, kv_heads, blocks)[:, :, at:stop].transpose(1, 2)  # (B, blocks, Hkv)
        counts = ptr.diff().view(batch, kv_heads, blocks)[:, :, at:stop].transpose(1, 2)
        slot = torch.arange(width, device=device)
        used = slot < counts.unsqueeze(-1)  # (B, blocks, Hkv, width)
        key = keys[torch.where(used, starts.unsqueeze(-1) + slot, 0)]
        own = torch.arange(batch, device=device).view(-1, 1, 1, 1) * kv_heads
        own = (own + torch.arange(kv_heads, device=device).view(-1, 1)) * m + key
        zero = (self.offset + block * torch.arange(at, stop, device=device)).view(-1, 1, 1)
        enter = (key - zero).clamp_min(0)
        leave = torch.where(used, self.leaves.flatten()[own] - zero, 0).clamp(0, block)
        layout = interval_layout(enter.flatten(0, 1), leave.flatten(0, 1), block, heads)
        k, v, bias = (t.index_select(0, own.flatten()).view(batch * many, kv_heads, width, -1) for t in flat)
        if n < many * block:
            q = torch.cat([q, q.new_zeros(*q.shape[:2], many * block - n, q.shape[3])], 2)
        q = q.unflatten(2, (many, block)).transpose(1, 2).flatten(0, 1)  # (B blocks, H, block, D)
        shift = Bias(
            bias.squeeze(-1).repeat_interleave(heads // kv_heads, 1).unsqueeze(2)
        )  # (.., H, 1, width)
        out = attention(q, k, v, layout, score=shift, scale=scale, engine=engine)
        assert isinstance(out, Tensor)
        return out.unflatten(0, (batch, many)).transpose(1, 2).flatten(2, 3)[:, :, :n]


def prefix_threshold(rank: Tensor, w: int) -> Tensor:
    """The w-th largest rank of every prefix, or -1 where the prefix is shorter than w; not decreasing.

    Args:
        rank: int64 (R, M), distinct and not negative in each row.

    Time and memory: R M (w / STEP + STEP), without a loop over rows.

    >>> prefix_threshold(torch.tensor([[3, 0, 4, 1, 2]]), 2).tolist()
    [[-1, 0, 3, 3, 3]]
    """
    rows, m = rank.shape
    found = torch.full_like(rank, -1)
    if w > m:
        return found
    best = rank[:, :w]  # the w best so far, in any order
    found[:, w - 1] = best.amin(1)
    for at in range(w, m, STEP):
        new = rank[:, at : at + STEP]
        # of the best, the STEP + 1 least at most can become the threshold
        near = min(w, new.shape[1] + 1)
        low = best.topk(near, 1, largest=False).values
        pool, order = torch.cat([low, new], 1).sort(1, descending=True)
        arrives = (order - near).clamp_min(-1)  # step at which it is there; -1: before
        steps = torch.arange(new.shape[1], device=rank.device)
        there = arrives.unsqueeze(1) <= steps[:, None]  # (R, steps, pool)
        place = (there.cumsum(2, dtype=torch.int32) < near).sum(2)  # of the near-th best that is there
        found[:, at : at + STEP] = pool.gather(1, place)
        both = torch.cat([best, new], 1)
        best = both[both >= found[:, at + new.shape[1] - 1, None]].view(rows, w)
    return found


@torch.no_grad()
def topw_prefix_selector(bias: Tensor, w: int, offset: int = 0) -> KeptKeys:
    """For every query the w keys of largest bias among those up to it; equal ones newest first.

        S_i = top-w of {b_j : j <= i}

    Args:
        bias: (B, Hkv, M), floating point; -inf: the key is never kept (padding).
        w: keys a query keeps, >= 1; queries with at most w keys before and at them keep all.
        offset: position of the first query: keys that come before all queries (a cache).

    Returns:
        `KeptKeys` of M - offset queries.

    Raises:
        TypeError, ValueError: a bias, w or offset of another kind or size.

    Cost: a sort, then M (w / 64 + 64) per row; 32,768 keys and w = 2,048 take some 0.1 s per row on a CPU.

    Source: Trainable Dynamic Mask Sparse Attention (2025). The released code calls torch.topk on every row of an N x M
    mask, which says nothing about equal biases; with equal biases throughout this is a sliding window of w.

    >>> kept = topw_prefix_selector(torch.tensor([[[5.0, 1.0, 2.0, 2.0, 0.0]]]), 2)
    >>> [kept.at(i)[0, 0].nonzero().flatten().tolist() for i in range(5)]
    [[0], [0, 1], [0, 2], [0, 3], [0, 3]]
    """
    if not isinstance(bias, Tensor) or not bias.is_floating_point() or bias.ndim != 3:
        got = f"{bias.dtype} {tuple(bias.shape)}" if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"bias must be a floating point tensor (batch, key/value heads, length), got {got}")
    m = bias.shape[2]
    if isinstance(w, bool) or not isinstance(w, int) or w < 1:
        raise ValueError(f"w must be an int >= 1, got {w!r}")
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < m:
        raise ValueError(f"offset must be an int, 0 <= offset < {m} keys, got {offset!r}")
    here = torch.arange(m, device=bias.device)
    flat = bias.detach().flatten(0, 1).contiguous()  # (R, M)
    if w < m:
        order = torch.argsort(flat, dim=1, stable=True)  # of equal ones the older is less
        rank = torch.empty_like(order).scatter_(1, order, here.expand_as(order))
        leaves = torch.searchsorted(prefix_threshold(rank, w), rank, right=True).maximum(here)
    else:
        leaves = torch.full(flat.shape, m, device=bias.device)
    leaves = torch.where(flat == -torch.inf, here, leaves)
    return KeptKeys(leaves.view(bias.shape), m - offset, w)
