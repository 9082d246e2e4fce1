"""The ragged store: keys and values of one layer, a segment of its own length for each batch row and KV head."""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 32  # free slots that a segment gets when it is made or grows
FIELDS = ("keys", "values", "positions", "pinned", "mass")


class RaggedStore:
    """Slots (key, value, position) in one flat tensor; segment r = row * heads + head has ``count[r]`` of them.

    Within a segment the order of the slots means nothing: a token that goes leaves its slot to another one. What
    says where a token stands is its position.

    Attributes:
        keys: (T, D), values: (T, Dv), positions: (T,) int64: place in the sequence, padding counted.
        pinned: (T,) bool: not to be evicted by age. mass: (T,) float32: attention received so far.
        start, count, capacity: (R,) int64 on the CPU, R = batch * heads.

    >>> k = torch.arange(8.0).view(1, 2, 4, 1)
    >>> keep = torch.tensor([[[1, 0, 0, 1], [1, 1, 1, 1]]], dtype=torch.bool)
    >>> store = RaggedStore.of(k, k, torch.arange(4)[None, None].expand(1, 2, 4), keep)
    >>> store.count.tolist(), store.tokens(0).tolist()
    ([2, 4], [0, 3])
    """

    def __init__(self, batch: int, heads: int, keys: Tensor, values: Tensor, slack: int):
        self.batch, self.heads, self.slack = batch, heads, slack
        self.keys, self.values = keys, values
        self.positions = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        self.pinned = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
        self.mass = torch.zeros(len(keys), dtype=torch.float32, device=keys.device)
        self.start = torch.zeros(batch * heads, dtype=torch.int64)
        self.count, self.capacity = self.start.clone(), self.start.clone()

    @staticmethod
    def of(
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        keep: Tensor,
        *,
        pinned: Tensor | None = None,
        mass: Tensor | None = None,
        slack: int = SLACK,
    ) -> RaggedStore:
        """Store the tokens marked in ``keep``.

        Args:
            keys: (B, Hkv, N, D); values: (B, Hkv, N, Dv).
            positions, keep, pinned, mass: (B, Hkv, N).
            slack: free slots behind each segment.
        """
        batch, heads, n, dim = keys.shape
        store = RaggedStore(batch, heads, keys.new_empty(0, dim), values.new_empty(0, values.shape[3]), slack)
        count = keep.sum(2).reshape(-1).cpu()
        store._resize(count + slack)
        chosen = keep.reshape(-1).nonzero()[:, 0]  # (sum of counts,): segment by segment, in order
        store.count = count
        to = store._slots()
        store.keys[to] = keys.reshape(-1, dim)[chosen]
        store.values[to] = values.reshape(-1, values.shape[3])[chosen]
        store.positions[to] = positions.expand(batch, heads, n).reshape(-1)[chosen]
        if pinned is not None:
            store.pinned[to] = pinned.expand(batch, heads, n).reshape(-1)[chosen]
        if mass is not None:
            store.mass[to] = mass.reshape(-1)[chosen].float()
        return store

    # ------------------------------------------------------------------------------------ looking
    @property
    def nbytes(self) -> int:
        """Bytes of all that is held, free slots included."""
        return sum(getattr(self, name).nbytes for name in FIELDS)

    @property
    def even(self) -> bool:
        """All segments have one length and one capacity, so that the store reads as one rectangle."""
        return bool((self.count == self.count[0]).all() and (self.capacity == self.capacity[0]).all())

    def span(self, r: int) -> slice:
        """Where segment r lies in the flat tensors."""
        return slice(int(self.start[r]), int(self.start[r] + self.count[r]))

    def tokens(self, r: int) -> Tensor:
        """Positions held by segment r, in increasing order."""
        return self.positions[self.span(r)].sort().values

    def longest(self) -> int:
        return int(self.count.max()) if len(self.count) else 0

    def valid(self) -> Tensor:
        """Bool (B, Hkv, S), S = the longest segment: which entries of `padded` are real."""
        width = torch.arange(self.longest())
        return (width < self.count[:, None]).view(self.batch, self.heads, -1).to(self.keys.device)

    def padded(self, name: str) -> Tensor:
        """(B, Hkv, S, ...) of a field; entries behind the end of a segment repeat its first slot."""
        field = getattr(self, name)
        width = torch.arange(self.longest())
        at = self.start[:, None] + torch.where(width < self.count[:, None], width, 0)
        at = at.clamp(max=max(len(field) - 1, 0)).to(field.device)
        return field[at].view(self.batch, self.heads, -1, *field.shape[1:])

    def rectangle(self, name: str) -> Tensor:
        """(R, S, ...): a view, for an `even` store."""
        field = getattr(self, name)
        return field.view(len(self.count), int(self.capacity[0]), *field.shape[1:])[:, : int(self.count[0])]

    # ------------------------------------------------------------------------------------ changing
    def append(self, keys: Tensor, values: Tensor, positions: Tensor, real: Tensor | None = None) -> None:
        """Add new tokens to every segment of their row.

        Args:
            keys: (B, Hkv, Q, D); values: (B, Hkv, Q, Dv); positions: (B, Q) int64.
            real: bool (B, Q); tokens that are not (padding) are left out. Default: all are.
        """
        batch, heads, new, dim = keys.shape
        if real is None:
            add = torch.full((batch * heads,), new)
            rank = torch.arange(new).expand(batch * heads, new)
            chosen = None
        else:
            each = real.cpu().repeat_interleave(heads, 0)  # (R, Q)
            add, rank, chosen = each.sum(1), each.cumsum(1) - 1, each
        if bool((self.count + add > self.capacity).any()):
            room = self.count + add
            self._resize(room + torch.clamp(room // 8, min=self.slack))
        to = (self.start + self.count)[:, None] + rank  # (R, Q)
        rows = slice(None) if chosen is None else chosen.reshape(-1).to(keys.device)
        to = (to.reshape(-1) if chosen is None else to[chosen]).to(keys.device)
        self.keys[to] = keys.reshape(-1, dim)[rows]
        self.values[to] = values.reshape(-1, values.shape[3])[rows]
        self.positions[to] = positions.repeat_interleave(heads, 0).reshape(-1)[rows].to(keys.device)
        self.pinned[to] = False
        self.mass[to] = 0
        self.count = self.count + add

    def evict(self, drop: Tensor) -> None:
        """Take out the slots marked in bool (B, Hkv, S), entries as in `padded`; survivors from the end move into
        the holes."""
        width = drop.shape[2]
        drop = drop.reshape(-1, width).cpu() & (torch.arange(width) < self.count[:, None])
        gone = drop.sum(1)
        if not bool(gone.any()):
            return
        left = self.count - gone
        at = torch.arange(width)
        holes = drop & (at < left[:, None])  # (R, S)
        movers = ~drop & (at >= left[:, None]) & (at < self.count[:, None])
        to = (self.start[:, None] + at)[holes].to(self.keys.device)  # as many per segment as movers
        source = (self.start[:, None] + at)[movers].to(self.keys.device)
        for name in FIELDS:
            field = getattr(self, name)
            field[to] = field[source]
        self.count = left

    def shrink(self) -> None:
        """Give back free slots beyond the slack."""
        if bool((self.capacity > self.count + self.slack).any()):
            self._resize(self.capacity.minimum(self.count + self.slack))

    def select_rows(self, rows: Tensor) -> None:
        """Rows of the batch in another order, some more than once or not at all (beams)."""
        rows = rows.cpu().to(torch.int64)
        pick = (rows[:, None] * self.heads + torch.arange(self.heads)).reshape(-1)
        before_start, count = self.start[pick], self.count[pick]
        capacity = self.capacity[pick]
        source = _ranges(before_start, count).to(self.keys.device)
        old = {name: getattr(self, name) for name in FIELDS}
        self.batch, self.count, self.capacity = len(rows), count, capacity
        self.start = capacity.cumsum(0) - capacity
        to = self._slots()
        for name in FIELDS:
            fresh = old[name].new_zeros(int(capacity.sum()), *old[name].shape[1:])
            fresh[to] = old[name][source]
            setattr(self, name, fresh)

    def _slots(self) -> Tensor:
        """Flat places of all tokens, segment by segment."""
        return _ranges(self.start, self.count).to(self.keys.device)

    def _resize(self, capacity: Tensor) -> None:
        source = self._slots()
        self.capacity = capacity
        self.start = capacity.cumsum(0) - capacity
        to = self._slots()
        for name in FIELDS:
            old = getattr(self, name)
            fresh = old.new_zeros(int(capacity.sum()), *old.shape[1:])
            fresh[to] = old[source]
            setattr(self, name, fresh)


def _ranges(start: Tensor, count: Tensor) -> Tensor:
    """start[0] .. start[0] + count[0] - 1, start[1] .. , one after the other."""
    first = count.cumsum(0) - count
    return torch.arange(int(count.sum())) + (start - first).repeat_interleave(count)
