"""Neighbourhood attention: windows that slide over a grid and keep their size at its borders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.core.patterns.base import integer
from foveate.core.patterns.boxes import Boxes
from foveate.core.patterns.grids import check_grid
from foveate.core.patterns.orders import as_order, grid_shape, per_axis


@dataclass(frozen=True, repr=False)
class Neighborhood(Boxes):
    """A key is a neighbour iff it is one on every axis of the grid.

    Per axis of N cells, with window k, stride s, dilation d and coordinate x: the dilation group is g = x
    mod d, the place in it c = floor(x / d), its length L = ceil((N - g) / d). Query and key must share g.
    Queries are grouped by floor(c / s); all of a group share the window of their leader.

        left = floor(k / 2),  right = floor(k / 2) - 1 + (k mod 2)
        not causal:  leader = min(floor(c / s) s + floor(s / 2), L - 1)
                     centre = clamp(leader, left, L - 1 - right)
                     keys c' in [centre - left, centre + right]: exactly k, shifted inwards at the borders
        causal:      leader = min(floor(c / s) s + s - 1, L - 1)
                     keys c' in [max(0, leader - k + 1), c]

    s = 1 is neighbourhood attention; s = k with k | L is blocked attention. "Faster Neighborhood Attention"
    (2024), "Generalized Neighborhood Attention" (2025). Differs from the papers: any number of
    axes, and window 1 is accepted.

    Args:
        shape: cells per axis.
        window: k per axis (one int or one per axis), with k * dilation <= cells.
        stride: s per axis, 1 <= s <= k.
        dilation: d per axis, >= 1.
        causal: per axis (one bool or one per axis).
        order: token order, a name or an `Order`. The keys are all cells, the queries the last q_len of them.

    >>> Neighborhood(8, 4).layout(8).to_dense()[0, 0, 3].int().tolist()
    [0, 1, 1, 1, 1, 0, 0, 0]
    >>> Neighborhood((16, 16), (5, 5), order="hilbert").layout(256).area == 256 * 25
    True
    """

    shape: Any
    window: Any
    stride: Any = 1
    dilation: Any = 1
    causal: Any = False
    order: Any = "row_major"

    def __post_init__(self) -> None:
        shape = grid_shape("Neighborhood", self.shape)
        window = per_axis("Neighborhood", "window", self.window, shape, 1)
        stride = per_axis("Neighborhood", "stride", self.stride, shape, 1)
        dilation = per_axis("Neighborhood", "dilation", self.dilation, shape, 1)
        causal = tuple(self.causal) if isinstance(self.causal, (tuple, list)) else (self.causal,) * len(shape)
        if len(causal) != len(shape) or not all(isinstance(c, (bool, np.bool_)) for c in causal):
            raise ValueError(f"Neighborhood: causal must be one bool or {len(shape)}, got {self.causal!r}")
        for n, k, s, d in zip(shape, window, stride, dilation, strict=True):
            integer("Neighborhood", "stride", s, 1, k)
            if k * d > n:
                raise ValueError(
                    f"Neighborhood: window * dilation must be at most the axis of {n}, got {k} * {d}"
                )
        made = {"shape": shape, "window": window, "stride": stride, "dilation": dilation}
        made |= {"causal": tuple(map(bool, causal)), "order": as_order("Neighborhood", self.order, shape)}
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def check(self, ext):
        check_grid("Neighborhood", self.shape, ext)

    def spans(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per axis, the first and the last neighbour of every coordinate, as coordinates: int64 (cells,) each.

        >>> [edge.tolist() for edge in Neighborhood(5, 3).spans()[0]]
        [[0, 0, 1, 2, 2], [2, 2, 3, 4, 4]]
        """
        axes = zip(self.shape, self.window, self.stride, self.dilation, self.causal, strict=True)
        return [_neighbours(*axis) for axis in axes]

    def boxes(self, ext, b):
        low, high, at = [], [], []
        place = self.order.coordinates()  # (axes, cells)
        for axis, (first, last) in enumerate(self.spans()):
            x, d = place[axis], self.dilation[axis]
            low.append(first[x])
            high.append(last[x])
            at.append(x)
            if d > 1:
                low.append(x % d)
                high.append(x % d)
                at.append(x % d)
        return np.stack(low)[:, ext.offset :], np.stack(high)[:, ext.offset :], np.stack(at)


def _neighbours(n: int, k: int, s: int, d: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """First and last neighbour of every coordinate of one axis, as coordinates of the axis."""
    x = np.arange(n)
    g, c = x % d, x // d
    length = -(-(n - g) // d)
    if causal:
        leader = np.minimum(c // s * s + s - 1, length - 1)
        first, last = np.maximum(0, leader - k + 1), c
    else:
        left, right = k // 2, k // 2 - 1 + k % 2
        leader = np.minimum(c // s * s + s // 2, length - 1)
        centre = np.clip(leader, left, length - 1 - right)
        first, last = centre - left, centre + right
    return first * d + g, last * d + g
