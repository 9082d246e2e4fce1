"""Bands: sets that depend only on the distance d = position - key. Causal, sliding, dilated, strided."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foveate.core.patterns.base import FULL, Pattern, diagonal, distances, integer, verdict


@dataclass(frozen=True, repr=False)
class Full(Pattern):
    """Every query may attend to every key.

    >>> Full().layout(3, 5).area
    15
    """

    def contains(self, ext, b, h, q, k):
        return np.broadcast_to(np.True_, np.broadcast_shapes(np.shape(q), np.shape(k)))

    def classify(self, ext, b, h, q0, q1, k0, k1):
        return np.full(np.shape(q0), FULL, np.int8)


@dataclass(frozen=True, repr=False)
class Causal(Pattern):
    """No key after the query: d = position - key >= 0.

    With q_len != k_len the last query is aligned with the last key (bottom-right), as in decoding with a
    cache: query i stands at position i + (k_len - q_len). A query whose position is negative sees nothing.

    >>> Causal().layout(2, 4).to_dense()[0, 0].int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 1]]
    """

    def contains(self, ext, b, h, q, k):
        return q + ext.offset >= k

    def classify(self, ext, b, h, q0, q1, k0, k1):
        low, high = distances(ext, q0, q1, k0, k1)
        return verdict(high < 0, low >= 0)

    def signature(self, ext, b, h, qt, kt):
        return (diagonal(ext, qt, kt, 0, 0),)


def _sides(owner: str, window: int | None, before: int | None, after: int | None) -> tuple[int, int, int]:
    """(window, before, after) from either form; window = before + 1 + after."""
    if before is None and after is None:
        if window is None:
            raise ValueError(f"{owner}: give window=, or before= and after=; got neither")
        window = integer(owner, "window", window, 1)
        return window, window - 1, 0
    if before is None or after is None:
        missing = "before" if before is None else "after"
        raise ValueError(f"{owner}: before= and after= are given together; {missing} is missing")
    before, after = integer(owner, "before", before, 0), integer(owner, "after", after, 0)
    if window is not None and integer(owner, "window", window, 1) != before + 1 + after:
        raise ValueError(f"{owner}: window must be before + 1 + after = {before + 1 + after}, got {window}")
    return before + 1 + after, before, after


@dataclass(frozen=True, repr=False)
class SlidingWindow(Pattern):
    """Keys near the query: -after <= d <= before with d = position - key (bottom-right aligned).

    `SlidingWindow(w)` is the causal form: w keys *including the query's own*, looking back (d = 0 .. w - 1).
    `SlidingWindow(before=l, after=r)` looks l keys back and r ahead; `SlidingWindow.symmetric(w)` is w keys
    centred on the query (an even w has its extra key behind). Windows are cut at the ends of the sequence.

    Longformer (2020), Mistral 7B (2023). Libraries differ by one: here `window` counts keys, it is not a
    radius.

    Args:
        window: number of keys, >= 1.
        before, after: keys seen behind and ahead of the query's own, >= 0; instead of `window`.

    >>> SlidingWindow(2).layout(4).to_dense()[0, 0].int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    >>> SlidingWindow.symmetric(3) == SlidingWindow(before=1, after=1)
    True
    """

    window: int | None = None
    before: int | None = None
    after: int | None = None

    def __post_init__(self) -> None:
        window, before, after = _sides("SlidingWindow", self.window, self.before, self.after)
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "before", before)
        object.__setattr__(self, "after", after)

    @classmethod
    def symmetric(cls, window: int) -> SlidingWindow:
        """`window` keys centred on the query; an even window has its extra key behind."""
        window = integer("SlidingWindow.symmetric", "window", window, 1)
        return cls(before=window // 2, after=(window - 1) // 2)

    def contains(self, ext, b, h, q, k):
        d = (q + ext.offset) - k
        return (d >= -self.after) & (d <= self.before)  # pyright: ignore[reportOptionalOperand]

    def classify(self, ext, b, h, q0, q1, k0, k1):
        low, high = distances(ext, q0, q1, k0, k1)
        least, most = -self.after, self.before  # pyright: ignore[reportOptionalOperand]
        return verdict((high < least) | (low > most), (low >= least) & (high <= most))

    def signature(self, ext, b, h, qt, kt):
        return (
            diagonal(ext, qt, kt, -self.after, -self.after),  # pyright: ignore[reportOptionalOperand]
            diagonal(ext, qt, kt, self.before, self.before),  # pyright: ignore[reportArgumentType]
        )

    def __repr__(self) -> str:
        if self.after == 0:
            return f"SlidingWindow({self.window})"
        return f"SlidingWindow(before={self.before}, after={self.after})"


@dataclass(frozen=True, repr=False)
class Dilated(Pattern):
    """A sliding window with gaps: d = position - key = t * dilation with -after <= t <= before.

    `Dilated(w, s)` is causal and has w keys including the query's own, at distances 0, s, .., (w - 1) s.
    `before` and `after` count keys (not positions), as in `SlidingWindow`. Longformer (2020).

    >>> Dilated(3, 2).layout(6).to_dense()[0, 0, 5].int().tolist()
    [0, 1, 0, 1, 0, 1]
    """

    window: int | None = None
    dilation: int = 1
    before: int | None = None
    after: int | None = None

    def __post_init__(self) -> None:
        window, before, after = _sides("Dilated", self.window, self.before, self.after)
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "before", before)
        object.__setattr__(self, "after", after)
        object.__setattr__(self, "dilation", integer("Dilated", "dilation", self.dilation, 1))

    @property
    def _range(self) -> tuple[int, int]:
        assert self.before is not None
        assert self.after is not None
        return -self.after * self.dilation, self.before * self.dilation

    def contains(self, ext, b, h, q, k):
        d = (q + ext.offset) - k
        least, most = self._range
        return (d >= least) & (d <= most) & (d % self.dilation == 0)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        low, high = distances(ext, q0, q1, k0, k1)
        least, most = self._range
        top = np.minimum(high, most) // self.dilation * self.dilation  # the largest multiple that may occur
        empty = top < np.maximum(low, least)
        within = (low >= least) & (high <= most)
        exact = (high == low) & (low % self.dilation == 0) if self.dilation > 1 else True
        return verdict(empty, within & exact)

    def signature(self, ext, b, h, qt, kt):
        return (diagonal(ext, qt, kt, *self._range),)

    def __repr__(self) -> str:
        if self.after == 0:
            return f"Dilated({self.window}, dilation={self.dilation})"
        return f"Dilated(dilation={self.dilation}, before={self.before}, after={self.after})"


@dataclass(frozen=True, repr=False)
class Strided(Pattern):
    """Keys at a multiple of `stride` from the query, on both sides: (position - key) mod stride = 0.

    Not causal by itself. Sparse Transformers (2019), strided form: `Causal() & (SlidingWindow(s) |
    Strided(s))`.

    >>> Strided(3).layout(7).to_dense()[0, 0, 4].int().tolist()
    [0, 1, 0, 0, 1, 0, 0]
    """

    stride: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", integer("Strided", "stride", self.stride, 1))

    def contains(self, ext, b, h, q, k):
        return ((q + ext.offset) - k) % self.stride == 0

    def classify(self, ext, b, h, q0, q1, k0, k1):
        low, high = distances(ext, q0, q1, k0, k1)
        empty = high // self.stride * self.stride < low
        full = (low == high) & ~empty if self.stride > 1 else np.ones(np.shape(low), bool)
        return verdict(empty, full)

    def signature(self, ext, b, h, qt, kt):
        return ((64 * (qt - kt) + ext.offset) % self.stride,)
