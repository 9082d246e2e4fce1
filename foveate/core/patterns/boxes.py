"""Boxes: every key is a point, every query a box of points it may see, on one or several axes.

    query q may see key k   <=>   for every axis a:  low[a, q] <= at[a, k] <= high[a, q]

Equal labels (documents, windows, grids) are boxes of one point; neighbourhoods are boxes of `window`
points. Rectangles are classified from the range of low, high and at over their queries and keys, looked up
in logarithmic tables over blocks of 64 tokens, so the order of the tokens is free.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np

from foveate.core.layout import TILE
from foveate.core.patterns.base import Extent, Pattern, verdict

FAR = 1 << 40  # beyond every coordinate; the box [FAR, -FAR] is empty


class RangeTable:
    """Smallest and largest of `values[a, start:stop]`, for many ranges at once; (A, n) int64.

    Ranges are widened to whole blocks of 64, so the answer is a bound; it is exact for ranges of whole tiles.
    Level l holds the extremes of 2**l consecutive blocks: O(n / 64 * log n) memory, two look-ups per range.
    """

    def __init__(self, values: np.ndarray):
        axes, n = values.shape
        padded = np.pad(values, ((0, 0), (0, -n % TILE)), mode="edge").reshape(axes, -1, TILE)
        all_least, all_most = [padded.min(axis=2)], [padded.max(axis=2)]
        width = 1
        while 2 * width <= padded.shape[1]:
            for levels, pick in ((all_least, np.minimum), (all_most, np.maximum)):
                before = levels[-1]
                after = before.copy()
                after[:, :-width] = pick(before[:, :-width], before[:, width:])
                levels.append(after)
            width *= 2
        self._least, self._most = np.stack(all_least), np.stack(all_most)  # (levels, A, blocks)

    def __call__(self, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, last = start // TILE, (stop - 1) // TILE
        level = np.frexp(last - first + 1)[1] - 1  # floor(log2(number of blocks))
        second = last + 1 - (1 << level)
        least = np.minimum(self._least[level, :, first], self._least[level, :, second])
        most = np.maximum(self._most[level, :, first], self._most[level, :, second])
        return least.T, most.T  # (A, n)


class Boxes(Pattern):
    """Base of patterns made of boxes: subclasses define `boxes`, everything else follows."""

    def boxes(self, ext: Extent, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(low (A, q_len), high (A, q_len), at (A, k_len)), int64."""
        raise NotImplementedError(f"{type(self).__name__} does not define boxes()")

    def _tables(self, ext: Extent, b: int) -> _Tables:
        return _tables(self, ext, b if self.batch > 1 else 0)

    def contains(self, ext, b, h, q, k):
        return self._tables(ext, b).contains(q, k)

    def classify(self, ext, b, h, q0, q1, k0, k1):
        return self._tables(ext, b).classify(q0, q1, k0, k1)

    def signature(self, ext, b, h, qt, kt):
        return self._tables(ext, b).signature(qt, kt)


@lru_cache(maxsize=32)
def _tables(pattern: Boxes, ext: Extent, b: int) -> _Tables:
    return _Tables(*pattern.boxes(ext, b))


class _Tables:
    def __init__(self, low: np.ndarray, high: np.ndarray, at: np.ndarray):
        self.low, self.high, self.at = (np.ascontiguousarray(x, np.int64) for x in (low, high, at))
        self.points = (self.low == self.high).all(axis=1).tolist()  # axes on which every box is one point
        self.low_range, self.high_range, self.at_range = map(RangeTable, (self.low, self.high, self.at))

    def contains(self, q: np.ndarray, k: np.ndarray) -> np.ndarray:
        seen = None
        for low, high, at, point in zip(self.low, self.high, self.at, self.points, strict=True):
            place = at[k]
            inside = low[q] == place if point else (low[q] <= place) & (place <= high[q])
            seen = inside if seen is None else seen & inside
        assert seen is not None
        return seen

    def classify(self, q0, q1, k0, k1) -> np.ndarray:
        low_least, low_most = self.low_range(q0, q1)
        high_least, high_most = self.high_range(q0, q1)
        at_least, at_most = self.at_range(k0, k1)
        empty = np.any((at_most < low_least) | (at_least > high_most), axis=0)
        full = np.all((low_most <= at_least) & (at_most <= high_least), axis=0)
        return verdict(empty, full & ~empty)

    @cached_property
    def _queries(self) -> tuple[np.ndarray, np.ndarray]:
        return _shapes(self.low, self.high)

    @cached_property
    def _keys(self) -> tuple[np.ndarray, np.ndarray]:
        return _shapes(self.at)

    def signature(self, qt: np.ndarray, kt: np.ndarray) -> tuple[np.ndarray, ...]:
        q_shape, q_base = self._queries
        k_shape, k_base = self._keys
        return q_shape[qt], k_shape[kt], *(k_base[:, kt] - q_base[:, qt])


def _shapes(*arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per tile: a number, equal where the coordinates are equal up to a shift, and that shift (A, tiles)."""
    axes, n = arrays[0].shape
    cut = [np.pad(x, ((0, 0), (0, -n % TILE)), mode="edge").reshape(axes, -1, TILE) for x in arrays]
    base = cut[0].min(axis=2)  # (A, tiles)
    moved = np.stack([x - base[:, :, None] for x in cut])  # (arrays, A, tiles, 64)
    rows = np.ascontiguousarray(moved.transpose(2, 0, 1, 3)).reshape(base.shape[1], -1)
    known: dict[bytes, int] = {}
    number = np.array([known.setdefault(row.tobytes(), len(known)) for row in rows], np.int64)
    return number, base
