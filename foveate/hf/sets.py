"""Patterns that only make sense inside a model: token groups per row, selected heads, moved origins, model
functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from foveate.core.patterns import EMPTY, FULL, PARTIAL, Extent, Full, Pattern
from foveate.core.patterns.base import Values, values, verdict


@dataclass(frozen=True)
class SameGroup(Pattern):
    """Query i and key j carry the same group number; a negative number belongs to no group.

    Args:
        q_ids: int (B, N) or (N,); k_ids: int (B, M) or (M,), with the same B.

    >>> SameGroup([0, 1], [0, 0, 1]).layout(2, 3).to_dense()[0, 0].int().tolist()
    [[1, 1, 0], [0, 0, 1]]
    """

    q_ids: Any
    k_ids: Any

    def __post_init__(self) -> None:
        for name in ("q_ids", "k_ids"):
            object.__setattr__(self, name, values("SameGroup", name, getattr(self, name), (1, 2)))
        rows = [len(np.atleast_2d(ids.array)) for ids in (self.q_ids, self.k_ids)]
        if rows[0] != rows[1]:
            raise ValueError(
                f"SameGroup: q_ids and k_ids must have equal batch sizes, got {rows[0]} and {rows[1]}"
            )

    @cached_property
    def _ids(self) -> tuple[np.ndarray, np.ndarray]:
        return np.atleast_2d(self.q_ids.array), np.atleast_2d(self.k_ids.array)

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self._ids[0])

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """(B, N) and (B, M): number of the constant run of each place; whether all ids are >= 0 and never
        fall."""
        counts, ordered = [], True
        for ids in self._ids:
            step = np.diff(ids, axis=1)
            ordered &= bool((step >= 0).all() and (ids >= 0).all())
            counts.append(np.pad((step != 0).cumsum(axis=1), ((0, 0), (1, 0))))
        return counts[0], counts[1], ordered

    def check(self, ext):
        have = self._ids[0].shape[1], self._ids[1].shape[1]
        if have != (ext.q_len, ext.k_len):
            raise ValueError(
                f"SameGroup holds {have[0]} queries and {have[1]} keys, not {ext.q_len} and {ext.k_len}"
            )

    def at(self, b, h):
        return SameGroup(self._ids[0][b], self._ids[1][b]) if self.batch > 1 else self

    def contains(self, ext, b, h, q, k):
        b = b if self.batch > 1 else 0
        mine, theirs = self._ids[0][b][q], self._ids[1][b][k]
        return (mine == theirs) & (mine >= 0)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        b = b if self.batch > 1 else 0
        q_ids, k_ids = self._ids[0][b], self._ids[1][b]
        one_q = self._runs[0][b][q0] == self._runs[0][b][q1 - 1]
        one_k = self._runs[1][b][k0] == self._runs[1][b][k1 - 1]
        low_q, high_q, low_k, high_k = q_ids[q0], q_ids[q1 - 1], k_ids[k0], k_ids[k1 - 1]
        full = one_q & one_k & (low_q == low_k) & (low_q >= 0)
        empty = (one_q & one_k & ~full) | (one_q & (low_q < 0)) | (one_k & (low_k < 0))
        if self._runs[2]:
            empty = empty | (high_q < low_k) | (high_k < low_q)
        return verdict(empty, full)


@dataclass(frozen=True, eq=False)
class RuleFunction(Pattern):
    """A mask function of a model for which no closed form is known, evaluated element by element.

    Args:
        function: `f(b, h, q, kv) -> bool` on torch tensors of absolute positions; query i sits at i +
            q_offset, key j at j + kv_offset. transformers evaluates its rules for one head, so h is 0.
        rows: batch size.
        vmap: call through `torch.vmap` with scalars (for functions that do not broadcast).
    """

    function: Callable[..., Any]
    q_offset: int
    kv_offset: int
    rows: int
    vmap: bool = False
    device: str = "cpu"

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rows

    @property
    def cacheable(self) -> bool:
        return False  # the function may close over anything

    def contains(self, ext, b, h, q, k):
        shape = np.broadcast_shapes(np.shape(q), np.shape(k))
        q = torch.as_tensor(np.asarray(q) + self.q_offset, device=self.device)
        k = torch.as_tensor(np.asarray(k) + self.kv_offset, device=self.device)
        row, head = (torch.tensor(i, device=self.device) for i in (b, 0))
        if self.vmap:
            from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

            flat = [t.expand(shape).reshape(-1) for t in (q, k)]
            with TransformGetItemToIndex():
                seen = torch.vmap(self.function, in_dims=(None, None, 0, 0))(row, head, *flat).view(shape)
        else:
            seen = torch.as_tensor(self.function(row, head, q, k), device=self.device)
        return np.broadcast_to(seen.to(torch.bool).cpu().numpy(), shape)


@dataclass(frozen=True)
class HeadSet(Pattern):
    """Every pair on the heads in `chosen`, no pair on the others, of `total` heads."""

    total: int
    chosen: frozenset[int]

    @property
    def heads(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.total

    def at(self, b, h):
        return Full() if h in self.chosen else ~Full()

    def contains(self, ext, b, h, q, k):
        return np.broadcast_to(np.bool_(h in self.chosen), np.broadcast_shapes(np.shape(q), np.shape(k)))

    def classify(self, ext, b, h, q0, q1, k0, k1):
        return np.full(np.shape(q0), FULL if h in self.chosen else EMPTY, np.int8)


@dataclass(frozen=True)
class PerRow(Pattern):
    """One pattern per batch row: row b follows `parts[b]`."""

    parts: tuple[Pattern, ...]

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.parts)

    @property
    def heads(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return max(p.heads for p in self.parts)

    @property
    def cacheable(self) -> bool:
        return all(p.cacheable for p in self.parts)

    def check(self, ext):
        for part in self.parts:
            part.check(ext)

    def at(self, b, h):
        return self.parts[b].at(0, h)

    def contains(self, ext, b, h, q, k):
        return self.parts[b].contains(ext, 0, h, q, k)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        return self.parts[b].classify(ext, 0, h, q0, q1, k0, k1)

    def signature(self, ext, b, h, qt, kt):
        return self.parts[b].signature(ext, 0, h, qt, kt)


@dataclass(frozen=True)
class Moved(Pattern):
    """A pattern with another origin: inner query = query - q_shift, inner key = key - k_shift; nothing
    outside `inner`.

    So the first real token of a left-padded row has position 0, and the key that a cache kept at index 0 its
    true one.

    >>> from foveate.core.patterns import Sinks
    >>> Moved(Sinks(1), 1, 1, Extent(2, 2)).layout(3).to_dense()[0, 0].int().tolist()
    [[0, 0, 0], [0, 1, 0], [0, 1, 0]]
    """

    inner: Pattern
    q_shift: int
    k_shift: int
    extent: Extent
    row: int | None = None  # the inner pattern's batch row, when this one stands for a single row

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.batch if self.row is None else 1

    @property
    def heads(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.heads

    @property
    def cacheable(self) -> bool:
        return self.inner.cacheable

    def _row(self, b: int) -> int:
        return b if self.row is None else self.row

    def check(self, ext):
        self.inner.check(self.extent)

    def at(self, b, h):
        inner = self.inner.at(self._row(b), h)
        return Moved(
            inner, self.q_shift, self.k_shift, self.extent, self._row(b) if inner.batch > 1 else None
        )

    def contains(self, ext, b, h, q, k):
        q, k = q - self.q_shift, k - self.k_shift
        n, m = self.extent.q_len, self.extent.k_len
        inside = (q >= 0) & (k >= 0) & (q < n) & (k < m)
        b = self._row(b)
        return inside & self.inner.contains(self.extent, b, h, np.clip(q, 0, n - 1), np.clip(k, 0, m - 1))

    def classify(self, ext, b, h, q0, q1, k0, k1):
        q0, q1, k0, k1 = q0 - self.q_shift, q1 - self.q_shift, k0 - self.k_shift, k1 - self.k_shift
        n, m = self.extent.q_len, self.extent.k_len
        outside = (q1 <= 0) | (k1 <= 0) | (q0 >= n) | (k0 >= m)
        cut = (q0 < 0) | (k0 < 0) | (q1 > n) | (k1 > m)
        q0, k0 = np.clip(q0, 0, n - 1), np.clip(k0, 0, m - 1)
        c = self.inner.classify(
            self.extent, self._row(b), h, q0, np.clip(q1, q0 + 1, n), k0, np.clip(k1, k0 + 1, m)
        )
        return np.where(outside, EMPTY, np.where(cut, np.minimum(c, PARTIAL), c)).astype(np.int8)


@dataclass(frozen=True, eq=False)
class Placed(Pattern):
    """The pairs of a layout, as a pattern (one batch row of it): `Moved(Placed(layout), ...)` puts it
    elsewhere."""

    layout_: Any  # BlockLayout

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.layout_.batch

    @property
    def heads(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.layout_.heads

    @property
    def cacheable(self) -> bool:
        return False

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sorted (row, key tile) numbers, ids, bitmaps."""
        keys = self.layout_.rows.cpu().numpy() * self.layout_.k_tiles + self.layout_.tile_idx.cpu().numpy()
        words = self.layout_.dictionary.cpu().numpy()
        return keys, self.layout_.tile_id.cpu().numpy(), words

    def _ids(self, b: int, h: int, qt: np.ndarray, kt: np.ndarray) -> np.ndarray:
        """Tile ids, -1 where no tile is listed."""
        keys, ids, _ = self._arrays
        one = self.layout_
        row = ((b if one.batch > 1 else 0) * one.heads + (h if one.heads > 1 else 0)) * one.q_tiles + qt
        wanted = row * one.k_tiles + kt
        if not len(keys):
            return np.full(np.shape(wanted), -1)
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, ids[at], -1)

    def check(self, ext):
        if (ext.q_len, ext.k_len) != (self.layout_.q_len, self.layout_.k_len):
            raise ValueError(f"the layout is for {self.layout_.q_len} x {self.layout_.k_len}, not {ext}")

    def contains(self, ext, b, h, q, k):
        q, k = np.broadcast_arrays(q, k)
        ids = self._ids(b, h, q // 64, k // 64)
        words = self._arrays[2]
        seen = ids == 0
        if len(words):
            bit = (words[np.maximum(ids, 1) - 1, q % 64] >> (k % 64)) & 1
            seen = seen | ((ids > 0) & (bit == 1))
        return seen

    def classify(self, ext, b, h, q0, q1, k0, k1):
        small = (q1 - q0 <= 64) & (k1 - k0 <= 64)
        corners = [self._ids(b, h, q // 64, k // 64) for q in (q0, q1 - 1) for k in (k0, k1 - 1)]
        empty = np.logical_and.reduce([c == -1 for c in corners])
        full = np.logical_and.reduce([c == 0 for c in corners])
        return verdict(small & empty, small & full)


__all__ = ["HeadSet", "Moved", "PerRow", "Placed", "RuleFunction", "SameGroup", "Values"]
