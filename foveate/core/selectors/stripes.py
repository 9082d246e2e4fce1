"""Stripes: single key columns, a list of them for every run of queries; as a layout, or gathered and attended."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from foveate.core.layout import TILE, BlockLayout, pack_bits, tail_word, tiles
from foveate.core.merge import State


@dataclass(frozen=True, eq=False, repr=False)
class Stripes:
    """Key positions that all queries of a group attend to, per batch row and list.

    Queries stand at positions M - N ... M - 1 (bottom-right); group g holds positions [g * group, (g + 1) * group).
    `lists` is H (one list per query head) or Hkv (its query heads share it).

    Attributes:
        q_len, k_len: N and M.
        group: positions per group, a multiple of 64.
        batch, heads, lists: batch rows, query heads, lists per batch row and group; heads is a multiple of lists.
        ptr: int64 (groups * batch * lists + 1,), where the list of (group, batch row, list) starts in `idx`; the
            first group is that of the first query.
        idx: int32 (nnz,), key positions, ascending in each list, before the group's first position.
    """

    q_len: int
    k_len: int
    group: int
    batch: int
    heads: int
    lists: int
    ptr: Tensor
    idx: Tensor

    @property
    def first(self) -> int:
        """Number of the first query's group."""
        return (self.k_len - self.q_len) // self.group

    @property
    def groups(self) -> int:
        return (self.k_len - 1) // self.group + 1 - self.first

    @cached_property
    def counts(self) -> Tensor:
        """int64 (batch, lists, groups): positions per list."""
        return self.ptr.diff().view(self.groups, self.batch, self.lists).permute(1, 2, 0)

    def rows(self, g: int) -> slice:
        """The queries of the g-th group that has queries."""
        offset, start = self.k_len - self.q_len, (self.first + g) * self.group
        return slice(max(start - offset, 0), min(start + self.group, self.k_len) - offset)

    @cached_property
    def area(self) -> int:
        """(query, key) pairs, summed over batch rows and query heads."""
        heights = torch.tensor([self.rows(g).stop - self.rows(g).start for g in range(self.groups)])
        return int((self.counts.cpu() * heights).sum()) * (self.heads // self.lists)

    # ------------------------------------------------------------------------------------ as a layout
    def layout(self) -> BlockLayout:
        """The set as tiles; a list that is scattered touches nearly every tile before its group.

        A tile whose rows lie in two groups (M - N not a multiple of 64) takes each row from its own group's list.
        """
        codes, words = self._words()  # (groups, batch, lists, k_tiles) number of the word, 0 = no key
        offset, nq = self.k_len - self.q_len, tiles(self.q_len)
        starts = np.arange(nq) * TILE + offset
        upper = starts // self.group - self.first
        lower = np.minimum(starts + TILE - 1, self.k_len - 1) // self.group - self.first
        share = np.arange(self.heads) // (self.heads // self.lists)
        above, below = (codes[g][:, :, share].transpose(1, 2, 0, 3) for g in (upper, lower))  # (B, H, nq, nk)
        b, h, i, j = np.nonzero(above | below)
        pair, which = np.unique(above[b, h, i, j] * len(words) + below[b, h, i, j], return_inverse=True)
        cut = -offset % TILE or TILE  # rows of a tile before a border between groups
        bitmaps = np.where(
            np.arange(TILE) < cut, words[pair // len(words), None], words[pair % len(words), None]
        )
        rows = (b * self.heads + h) * nq + i
        made = BlockLayout.from_tiles(
            self.q_len,
            self.k_len,
            rows,
            j,
            bitmaps,
            batch=self.batch,
            heads=self.heads,
            which=which.reshape(-1),
        )
        return made.to(self.ptr.device)

    def _words(self) -> tuple[np.ndarray, np.ndarray]:
        """(int64 (groups, batch, lists, k_tiles) numbers, the distinct 64-key words they name, word 0 empty)."""
        ptr, idx = self.ptr.cpu().numpy(), self.idx.cpu().numpy()
        per, nk = self.batch * self.lists, tiles(self.k_len)
        words = np.empty((self.groups, per, nk), np.int64)
        for g in range(self.groups):
            bits = np.zeros((per, nk * TILE), bool)
            ends = ptr[g * per : (g + 1) * per + 1]
            bits[np.repeat(np.arange(per), np.diff(ends)), idx[ends[0] : ends[-1]]] = True
            words[g] = pack_bits(bits.reshape(per, nk, TILE))
        distinct, codes = np.unique(np.append(words.reshape(-1), 0), return_inverse=True)
        empty = int(codes.reshape(-1)[-1])  # swap the empty word to the front
        swap = np.arange(len(distinct))
        swap[[0, empty]] = swap[[empty, 0]]
        return swap[codes.reshape(-1)[:-1]].reshape(self.groups, self.batch, self.lists, nk), distinct[swap]

    # -------------------------------------------------------------------------------------- attention
    def attend(self, q: Tensor, k: Tensor, v: Tensor, g: int, scale: float, engine: str) -> State | None:
        """Attention of the g-th group's queries to its gathered keys: (out, lse), or None where no list has any.

        Gathers only the lists: (batch, lists, longest list of the group, D). Lists that are shorter are padded and
        the padding is masked.
        """
        from foveate.core.attention import attention

        counts = self.counts[:, :, g]  # (batch, lists)
        most = int(counts.max())
        if most == 0:
            return None
        per = self.batch * self.lists
        ends = self.ptr[g * per], self.ptr[(g + 1) * per]
        slots = torch.arange(most, device=q.device)
        used = slots < counts.unsqueeze(-1)  # (batch, lists, most)
        at = torch.zeros(used.shape, dtype=torch.int64, device=q.device)
        at[used] = self.idx[int(ends[0]) : int(ends[1])].long()
        b = torch.arange(self.batch, device=q.device)[:, None, None]
        h = (torch.arange(self.lists, device=q.device) // (self.lists // k.shape[1]))[:, None]
        rows = self.rows(g)
        who = None if bool(used.all()) else self._leading(counts, rows.stop - rows.start, most)
        found = attention(
            q[:, :, rows], k[b, h, at], v[b, h, at], who, scale=scale, return_lse=True, engine=engine
        )
        assert isinstance(found, tuple)
        return found

    def _leading(self, counts: Tensor, n: int, m: int) -> BlockLayout:
        """Layout (batch, heads, n, m): every query sees the first counts[b, list] keys."""
        each = counts.cpu().numpy().repeat(self.heads // self.lists, axis=1)  # (batch, heads)
        nq, nk = tiles(n), tiles(m)
        needed = np.broadcast_to(each[:, :, None, None], (*each.shape, nq, nk))
        b, h, i, j = np.nonzero(np.arange(nk) * TILE < needed)
        inside = np.minimum(each[b, h] - j * TILE, TILE)  # keys of the tile that count
        words = np.array([tail_word(rest) for rest in range(TILE)]).astype(np.int64)
        return BlockLayout.from_tiles(
            n,
            m,
            (b * self.heads + h) * nq + i,
            j,
            words[:, None].repeat(TILE, 1),
            batch=self.batch,
            heads=self.heads,
            which=np.where(inside == TILE, -1, inside),
        ).to(counts.device)
