"""Attention to gathered keys: runs of queries that share a list of single key positions, besides a pattern.

A layout of scattered single keys saves nothing, because engines compute every tile of 64 x 64 that a key touches.
`KeyLists` holds such a choice; `gathered_attention` packs the keys of each list side by side and computes only those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from foveate.core.layout import TILE, BlockLayout, pack_bits, tail_word, tiles
from foveate.core.merge import State, merge

if TYPE_CHECKING:
    from foveate.core.request import Who

BUFFER = 1 << 22  # elements of k (and as many of v) that are gathered at once


@dataclass(frozen=True, eq=False, repr=False)
class KeyLists:
    """Key positions that all queries of a group attend to, per batch row and list.

    Queries stand at positions M - N ... M - 1 (bottom-right); group g holds positions [g * group, (g + 1) * group), and
    the first group here is that of the first query. `lists` is H (one list per query head), or fewer: each list then
    serves H / lists neighbouring query heads, which share one key/value head. Nothing is masked: who wants causal
    attention lists only keys that every query of the group may see.

    Attributes:
        q_len, k_len: N and M.
        group: positions per group: a multiple of 64, or a divisor of it.
        batch, heads, lists: batch rows, query heads, lists per batch row and group; heads is a multiple of lists.
        ptr: int64 (groups * batch * lists + 1,), where the list of (group, batch row, list) starts in `idx`.
        idx: int32 (nnz,), key positions in [0, M), distinct in each list, in any order.

    Raises:
        ValueError: on construction, when sizes or positions contradict each other.

    >>> import torch
    >>> lists = KeyLists.from_padded(torch.tensor([[[[0, 0], [5, 40]]]]), 128, 128, 64, counts=torch.tensor([[[0, 2]]]))
    >>> lists.counts.tolist(), lists.area
    ([[[0, 2]]], 128)
    """

    q_len: int
    k_len: int
    group: int
    batch: int
    heads: int
    lists: int
    ptr: Tensor
    idx: Tensor

    def __post_init__(self) -> None:
        if not 1 <= self.q_len <= self.k_len:
            raise ValueError(f"KeyLists needs 1 <= q_len <= k_len, got {self.q_len} and {self.k_len}")
        _check_group(self.group)
        if self.lists < 1 or self.heads % self.lists:
            raise ValueError(
                f"KeyLists: heads must be a multiple of lists, got {self.heads} and {self.lists}"
            )
        wanted = self.groups * self.batch * self.lists + 1
        if self.ptr.shape != (wanted,) or int(self.ptr[-1]) != len(self.idx):
            raise ValueError(
                f"KeyLists.ptr must have {wanted} entries that end in len(idx) = {len(self.idx)}, "
                f"got shape {tuple(self.ptr.shape)}"
            )
        if len(self.idx) and (int(self.idx.min()) < 0 or int(self.idx.max()) >= self.k_len):
            raise ValueError(
                f"KeyLists.idx must lie in [0, {self.k_len}), "
                f"got {int(self.idx.min())} to {int(self.idx.max())}"
            )

    @staticmethod
    def from_padded(
        positions: Tensor,
        q_len: int,
        k_len: int,
        group: int,
        *,
        counts: Tensor | None = None,
        heads: int | None = None,
    ) -> KeyLists:
        """Lists of at most C positions each.

        Args:
            positions: int (B, L, groups, C): key positions for each batch row, list and group, distinct in each list.
            q_len, k_len, group: as in the class; groups counts from the group of the first query.
            counts: int (B, L, groups), how many leading positions count; default: all C.
            heads: query heads, a multiple of L; default L.

        Raises:
            ValueError: shapes or positions that do not fit.
        """
        _check_group(group)
        groups = (k_len - 1) // group + 1 - (k_len - q_len) // group
        if positions.ndim != 4 or positions.shape[2] != groups:
            raise ValueError(f"positions must be (B, L, {groups}, C), got {tuple(positions.shape)}")
        batch, lists, _, most = positions.shape
        if counts is None:
            counts = torch.full((batch, lists, groups), most, device=positions.device)
        if counts.shape != positions.shape[:3]:
            raise ValueError(f"counts must be {tuple(positions.shape[:3])}, got {tuple(counts.shape)}")
        if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > most):
            raise ValueError(
                f"counts must lie in [0, {most}], got {int(counts.min())} to {int(counts.max())}"
            )
        first = counts.permute(2, 0, 1).reshape(-1).long()  # (groups * B * L,)
        used = torch.arange(most, device=positions.device) < first[:, None]
        idx = positions.permute(2, 0, 1, 3).reshape(-1, most)[used].int()
        ptr = torch.zeros(len(first) + 1, dtype=torch.int64, device=positions.device)
        torch.cumsum(first, 0, out=ptr[1:])
        return KeyLists(q_len, k_len, group, batch, lists if heads is None else heads, lists, ptr, idx)

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

    def rows(self, g: int, stop: int | None = None) -> slice:
        """The queries of the g-th group that has queries, or of groups g ... stop - 1."""
        offset, stop = self.k_len - self.q_len, g + 1 if stop is None else stop
        begin, end = (self.first + g) * self.group, (self.first + stop) * self.group
        return slice(max(begin - offset, 0), min(end, self.k_len) - offset)

    @cached_property
    def area(self) -> int:
        """(query, key) pairs, summed over batch rows and query heads."""
        heights = torch.tensor([self.rows(g).stop - self.rows(g).start for g in range(self.groups)])
        return int((self.counts.cpu() * heights).sum()) * (self.heads // self.lists)

    # ------------------------------------------------------------------------------------ as a layout
    def layout(self) -> BlockLayout:
        """The set as tiles; a list that is scattered touches nearly every tile of its range.

        A tile whose rows lie in several groups takes each row from its own group's list.
        """
        codes, words = self._words()  # (groups, batch, lists, k_tiles) number of the word, 0 = no key
        offset, nq = self.k_len - self.q_len, tiles(self.q_len)
        share = np.arange(self.heads) // (self.heads // self.lists)
        unit = min(self.group, TILE)  # no border between groups but at multiples of it
        piece = (np.arange(TILE) + offset) // unit - offset // unit  # of each row, in every tile
        starts = (np.arange(nq) * TILE + offset) // unit
        mine = [  # of each piece: the numbers of its words, (B, H, nq, nk)
            codes[np.minimum((starts + p) * unit // self.group - self.first, self.groups - 1)][
                :, :, share
            ].transpose(1, 2, 0, 3)
            for p in range(piece[-1] + 1)
        ]
        b, h, i, j = np.nonzero(np.logical_or.reduce(mine))
        which, bitmaps = np.zeros(len(b), np.int64), np.zeros((1, TILE), np.int64)
        for p, numbers in enumerate(mine):  # the distinct columns of words, one more piece at a time
            pair, which = np.unique(which * len(words) + numbers[b, h, i, j], return_inverse=True)
            which = which.reshape(-1)
            bitmaps = np.where(piece == p, words[pair % len(words), None], bitmaps[pair // len(words)])
        rows = (b * self.heads + h) * nq + i
        made = BlockLayout.from_tiles(
            self.q_len, self.k_len, rows, j, bitmaps, batch=self.batch, heads=self.heads, which=which
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
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, engine: str = "auto"
    ) -> Iterator[tuple[slice, State]]:
        """(queries, (out, lse)) of one run of groups after another; runs without any key are left out.

        A run gathers (groups * batch, lists, its longest list, D) keys; each group is a batch row of one call, and the
        padding of shorter lists is masked.
        """
        from foveate.core.attention import attention

        k_rows, v_rows = k.flatten(0, 2), v.flatten(0, 2)
        per, kv_heads = self.batch * self.lists, k.shape[1]
        number = torch.arange(per, device=q.device)
        kv = number // self.lists * kv_heads + number % self.lists // (self.lists // kv_heads)
        for start, stop in self._runs(k.shape[3]):
            counts = self.ptr[start * per : stop * per + 1].diff()  # of (group, batch row, list)
            most, rows = int(counts.max()), self.rows(start, stop)
            if most == 0:
                continue
            at = kv.repeat(stop - start)[:, None].mul(self.k_len).repeat(1, most)
            used = torch.arange(most, device=q.device) < counts[:, None]
            at[used] += self.idx[int(self.ptr[start * per]) : int(self.ptr[stop * per])]
            lead = ((stop - start) * self.batch, self.lists, most)
            keys, values = (t.index_select(0, at.flatten()).unflatten(0, lead) for t in (k_rows, v_rows))
            mine = q[:, :, rows].unflatten(2, (stop - start, -1)).permute(2, 0, 1, 3, 4)
            who = None if bool(used.all()) else self._leading(counts.view(lead[:2]), mine.shape[3], most)
            found = attention(
                mine.flatten(0, 1), keys, values, who, scale=scale, return_lse=True, engine=engine
            )
            out, lse = (
                t.unflatten(0, (stop - start, -1)).transpose(0, 1).transpose(1, 2).flatten(2, 3)
                for t in found
            )
            yield rows, (out, lse)

    def _runs(self, dim: int) -> list[tuple[int, int]]:
        """Neighbouring groups whose padded lists fit the buffer together; groups that are cut stay alone."""
        longest = self.counts.amax((0, 1)).cpu().tolist()
        whole = [self.rows(g).stop - self.rows(g).start == self.group for g in range(self.groups)]
        found, start, most = [], 0, 0
        for g, length in enumerate(longest):
            most = max(most, length)
            fits = (g + 1 - start) * most * self.batch * self.lists * dim <= BUFFER
            if g > start and not (fits and whole[g] and whole[start]):
                found.append((start, g))
                start, most = g, length
        return [*found, (start, self.groups)]

    def _leading(self, counts: Tensor, n: int, m: int) -> BlockLayout:
        """Layout (rows, heads, n, m): every query sees the first counts[row, list] keys; counts (rows, lists)."""
        each = counts.cpu().numpy().repeat(self.heads // self.lists, 1)  # (rows, heads)
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
            batch=len(each),
            heads=self.heads,
            which=np.where(inside == TILE, -1, inside),
        ).to(counts.device)


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: KeyLists,
    near: Who = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    engine: str = "auto",
) -> Tensor | State:
    """Softmax attention of each query over the keys of its group's list and those that `near` allows.

        out_i = sum_{j in near(i) + list(g(i))} softmax_j(scale q_i . k_j) v_j

    The two sets must not meet: a key in both would count twice. The keys of the lists are gathered, `BUFFER` elements
    at a time, so that cost and memory follow the lists and not N x M; the two states are merged. Gradients flow
    to q, k and v. Groups of 64 queries or more are the fast ones.

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv). H is a multiple of Hkv.
        lists: key positions for each group of queries; its number of lists is a multiple of Hkv.
        near: the other part, as in `attention`; None: only the lists.
        scale: factor on q k^T; default D ** -0.5.
        return_lse: also return log sum exp of each row's logits, (B, H, N).
        engine: as in `attention`; it runs both parts.

    Raises:
        ValueError, TypeError: shapes that do not fit each other or the lists.

    >>> import torch, foveate as fv
    >>> from foveate.patterns import Causal, SlidingWindow
    >>> q = torch.randn(1, 4, 256, 16); k = v = torch.randn(1, 2, 256, 16)
    >>> far = torch.tensor([0, 1, 17]).expand(1, 2, 2, 3)  # one list per key/value head and group of 128 queries
    >>> lists = KeyLists.from_padded(far, 256, 256, 128, counts=torch.tensor([[[0, 3]] * 2]), heads=4)
    >>> near = Causal() & SlidingWindow(100)
    >>> out = gathered_attention(q, k, v, lists, near)
    >>> want = fv.attention(q, k, v, near.layout(256) | lists.layout())
    >>> torch.allclose(out, want, atol=1e-5)
    True
    """
    from foveate.core.attention import attention

    _check(q, k, v, lists)
    if near is None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        state = q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    else:
        state = attention(q, k, v, near, scale=scale, return_lse=True, engine=engine)
    assert isinstance(state, tuple)
    out, lse = state
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))):
        for rows, far in lists.attend(q, k, v, scale=scale, engine=engine):
            _join(out[:, :, rows], lse[:, :, rows], *far)
        return (out, lse) if return_lse else out
    parts, at = [], 0
    for rows, far in lists.attend(q, k, v, scale=scale, engine=engine):
        parts.append((out[:, :, at : rows.start], lse[:, :, at : rows.start]))
        parts.append(merge([(out[:, :, rows], lse[:, :, rows]), far]))
        at = rows.stop
    parts.append((out[:, :, at:], lse[:, :, at:]))
    out, lse = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return (out, lse) if return_lse else out


def _join(out: Tensor, lse: Tensor, far_out: Tensor, far_lse: Tensor) -> None:
    """`merge` of two states, in the place of the first.

    out += weight (far_out - out),  weight = exp(far_lse) / (exp(lse) + exp(far_lse)) = sigmoid(far_lse - lse)
    """
    blank = torch.isneginf(far_lse)  # nothing to add, also where nothing was there before
    weight = torch.where(blank, 0.0, (far_lse - lse).sigmoid()).unsqueeze(-1)
    if out.dtype in (torch.float32, torch.float64):
        out.lerp_(far_out, weight)
    else:
        out.copy_(out.to(weight.dtype).lerp_(far_out.to(weight.dtype), weight))
    lse.copy_(torch.logaddexp(lse, far_lse))


def _check_group(group: int) -> None:
    if group < 1 or (group % TILE and TILE % group):
        raise ValueError(f"group must be a multiple or a divisor of {TILE}, got {group}")


def _check(q: Tensor, k: Tensor, v: Tensor, lists: KeyLists) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.ndim != 4:
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"{name} must be a tensor (batch, heads, length, dim), got {got}")
    if not isinstance(lists, KeyLists):
        raise TypeError(f"lists must be KeyLists, got {type(lists).__name__}")
    wanted = (lists.batch, lists.heads, lists.q_len), (lists.batch, k.shape[1], lists.k_len)
    if q.shape[:3] != wanted[0] or k.shape[:3] != wanted[1] or v.shape[:3] != wanted[1]:
        raise ValueError(
            f"lists are for q (B, H, N) = {wanted[0]} and k, v of {lists.k_len} tokens in {lists.batch} batch rows; "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    if lists.lists % k.shape[1]:
        raise ValueError(
            f"lists must hold a multiple of k's {k.shape[1]} heads per batch row, got {lists.lists}"
        )
