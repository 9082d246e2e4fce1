"""Token lists: equally many single keys for every block of queries; as a layout, or gathered and attended."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from foveate.core.layout import TILE, BlockLayout, pack_bits, tiles
from foveate.core.merge import State
from foveate.core.patterns.band import Causal, SlidingWindow
from foveate.core.patterns.base import Pattern

GATHERED = 1 << 24  # elements of keys and values that are gathered at once


@dataclass(frozen=True, eq=False, repr=False)
class TokenLists:
    """Causal attention in which queries [dense, rows) see listed keys up to themselves, and the others see all.

    Attributes:
        q_len, k_len: N and M; bottom-right aligned.
        heads: query heads.
        block: queries per list, from query `dense` on; the last block may be shorter.
        tokens: int64 (B, L, blocks, T), ascending key positions. The last of them are those of the block's own
            queries. L divides the query heads: 1, Hkv or H.
        window: keys that any query may see, its own included; None: all.
    """

    q_len: int
    k_len: int
    heads: int
    block: int
    dense: int
    rows: int
    tokens: Tensor
    window: int | None = None

    @property
    def pattern(self) -> Pattern:
        """What a query without a list sees."""
        return Causal() if self.window is None else SlidingWindow(self.window)

    @cached_property
    def area(self) -> int:
        """(query, key) pairs, summed over batch rows and query heads."""
        if self.window is not None:
            return self.layout().expand(self.tokens.shape[0], self.heads).area
        causal = lambda a, b: (a + b + 1) * (b - a) // 2  # noqa: E731  pairs of queries at positions [a, b)
        offset, listed = self.k_len - self.q_len, self.rows - self.dense
        whole, rest = divmod(listed, self.block)
        own = [self.block] * whole + [rest] * (rest > 0)
        pairs = sum(n * self.tokens.shape[3] - n * (n - 1) // 2 for n in own)
        pairs += causal(offset, offset + self.dense) + causal(offset + self.rows, self.k_len)
        return pairs * self.tokens.shape[0] * self.heads

    # ------------------------------------------------------------------------------------ as a layout
    def layout(self) -> BlockLayout:
        """The set as tiles; lists that are scattered touch nearly every tile."""
        causal = self.pattern.layout(self.q_len, self.k_len)
        tokens = self._per_head(self.tokens)
        batch, lists, blocks, _ = tokens.shape
        if not blocks:
            return causal.to(tokens.device)
        nq, nk = tiles(self.q_len), tiles(self.k_len)
        query = np.arange(nq * TILE)
        number = np.where(
            (query < self.dense) | (query >= self.rows), blocks, (query - self.dense) // self.block
        )
        words, rows, idx = [], [], []
        for b in range(batch):
            for h in range(lists):
                seen = np.zeros((blocks + 1, nk * TILE), bool)
                seen[np.arange(blocks)[:, None], tokens[b, h].cpu().numpy()] = True
                seen[blocks] = True
                bits = pack_bits(seen.reshape(blocks + 1, nk, TILE))
                for i in range(nq):
                    found = bits[number[i * TILE : (i + 1) * TILE]].T  # (nk, 64)
                    found = found[
                        : (min((i + 1) * TILE, self.q_len) - self.q_len + self.k_len - 1) // TILE + 1
                    ]
                    some = np.flatnonzero(found.any(1))
                    words.append(found[some])
                    idx.append(some)
                    rows.append(np.full(len(some), (b * lists + h) * nq + i))
        joined = (np.concatenate(x) for x in (rows, idx, words))
        made = BlockLayout.from_tiles(self.q_len, self.k_len, *joined, batch=batch, heads=lists) & causal
        return made.to(tokens.device)

    def _per_head(self, listed: Tensor) -> Tensor:
        """(B, L, ...) -> (B, 1 or H, ...)"""
        lists = listed.shape[1]
        return listed if lists in (1, self.heads) else listed.repeat_interleave(self.heads // lists, 1)

    # -------------------------------------------------------------------------------------- attention
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        engine: str = "auto",
    ) -> Tensor | State:
        """Attention over the set for q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv); the lists are gathered.

        Every list ends with its block's own keys, so bottom-right causal attention to the gathered keys is exact. The
        blocks are rows of a batch, as many at once as `GATHERED` allows.
        """
        from foveate.core.attention import attention

        def part(q: Tensor, k: Tensor, v: Tensor, who: Pattern | BlockLayout) -> State:
            found = attention(q, k, v, who, scale=scale, return_lse=True, engine=engine)
            assert isinstance(found, tuple)
            return found

        offset = self.k_len - self.q_len
        parts: list[State] = []
        if self.dense:
            seen = slice(0, offset + self.dense)
            parts.append(part(q[:, :, : self.dense], k[:, :, seen], v[:, :, seen], self.pattern))
        flat = k.reshape(-1, k.shape[3]), v.reshape(-1, v.shape[3])  # (B Hkv M, D)
        whole, rest = divmod(self.rows - self.dense, self.block)
        each = self.tokens.shape[0] * max(self.tokens.shape[1], k.shape[1]) * self.tokens.shape[3]
        step = max(1, GATHERED // (each * (k.shape[3] + v.shape[3])))
        runs = [(at, min(at + step, whole), self.block) for at in range(0, whole, step)]
        for first, last, size in runs + [(whole, whole + 1, rest)] * (rest > 0):
            begin = self.dense + first * self.block
            mine = q[:, :, begin : begin + (last - first) * size].unflatten(2, (-1, size))
            mine = mine.transpose(1, 2).flatten(0, 1)  # (B blocks, H, size, D)
            at = self._places(first, last, k.shape[1])  # (B blocks, L', T)
            keys, values = (t.index_select(0, at.flatten()).view(*at.shape, -1) for t in flat)
            found = part(mine, keys, values, self._within(first, last, size))
            out, lse = (t.unflatten(0, (-1, last - first)).transpose(1, 2).flatten(2, 3) for t in found)
            parts.append((out, lse))
        if self.rows < self.q_len:
            parts.append(part(q[:, :, self.rows :], k, v, self.pattern))
        out, lse = (torch.cat(tensors, 2) for tensors in zip(*parts, strict=True))
        return (out, lse) if return_lse else out

    def _places(self, first: int, last: int, kv_heads: int) -> Tensor:
        """int64 (B blocks, L', T): rows of the flattened keys; L' lists or key heads, whichever are more."""
        batch, lists = self.tokens.shape[:2]
        count = max(lists, kv_heads)
        head = torch.arange(count, device=self.tokens.device) // (count // kv_heads)
        base = torch.arange(batch, device=self.tokens.device)[:, None] * kv_heads + head  # (B, L')
        places = self.tokens[:, :, first:last] + base[..., None, None] * self.k_len
        return places.transpose(1, 2).flatten(0, 1)

    def _within(self, first: int, last: int, size: int) -> Pattern | BlockLayout:
        """Which of the gathered keys the queries of these blocks see."""
        if self.window is None:
            return Causal()
        offset = self.k_len - self.q_len + self.dense
        block = torch.arange(first, last, device=self.tokens.device)[:, None]
        position = (
            offset + block * self.block + torch.arange(size, device=self.tokens.device)
        )  # (blocks, size)
        distance = position[..., None] - self.tokens[:, :, first:last, None]  # (B, L, blocks, size, T)
        seen = self._per_head((distance >= 0) & (distance < self.window)).transpose(1, 2)
        return BlockLayout.from_mask(seen.flatten(0, 1))
