"""What a neighbourhood can gain from tiles: key tiles visited, the bound on its speed-up, strides that waste nothing.

A cost model after "Generalized Neighborhood Attention" (2025): nothing is run, the arithmetic is per axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np

from foveate.core.patterns import Neighborhood
from foveate.core.patterns.orders import per_axis


@dataclass(frozen=True)
class TileReport:
    """Tiles of a neighbourhood.

    visited, dense: pairs of a query tile and a key tile that are computed, and that dense attention computes.
    bound: dense / visited, the largest speed-up over dense attention with these tiles.
    flop_bound: all pairs of tokens / allowed pairs, the largest speed-up with any tiles.
    """

    visited: int
    dense: int
    flop_bound: float

    @property
    def bound(self) -> float:
        return self.dense / self.visited

    @property
    def waste(self) -> float:
        """Share of the computed pairs that the mask hides."""
        return 1 - self.bound / self.flop_bound

    @property
    def perfect(self) -> bool:
        """Whether nothing is wasted: perfectly block-sparse."""
        return abs(self.waste) < 1e-9


def simulate(pattern: Neighborhood, tile_q: Any, tile_k: Any = None) -> TileReport:
    """Count the tiles that a neighbourhood visits when queries and keys are cut into tiles of the grid.

    Per axis of X cells, query tile u holds the cells [u Q, (u + 1) Q); it visits every key tile of K cells between
    the smallest and the largest neighbour of its cells:

        n_u = floor(last / K) - floor(first / K) + 1        visited = prod_axes sum_u n_u
        dense = prod_axes ceil(X / Q) ceil(X / K)

    With tiles of 64 cells that divide the grid, `visited` is `pattern.layout(...).nnz` in that tile-major order.

    Args:
        pattern: a neighbourhood without dilation; its order does not matter.
        tile_q, tile_k: cells of a tile per axis (one int or one per axis); keys as queries by default. Where a tile
            does not divide the axis the last one is cut short, and counts as a whole one.

    Raises:
        ValueError: a dilated neighbourhood (simulate the one of a dilation group), a tile below 1.

    >>> shape, window, tile = (256, 256), (80, 80), (16, 8)
    >>> round(simulate(Neighborhood(shape, window), tile).bound, 2)
    7.51
    >>> report = simulate(Neighborhood(shape, window, stride=16), tile)
    >>> round(report.bound, 2), report.perfect
    (10.24, True)
    """
    if not isinstance(pattern, Neighborhood):
        raise TypeError(f"simulate: pattern must be a Neighborhood, got {type(pattern).__name__}")
    if any(d > 1 for d in pattern.dilation):
        raise ValueError(
            f"simulate: dilation must be 1, got {pattern.dilation}; simulate the grid of one dilation group"
        )
    tile_q = per_axis("simulate", "tile_q", tile_q, pattern.shape, 1)
    tile_k = per_axis("simulate", "tile_k", tile_q if tile_k is None else tile_k, pattern.shape, 1)
    visited, dense, flop_bound = 1, 1, 1.0
    for (first, last), cells, q, k in zip(pattern.spans(), pattern.shape, tile_q, tile_k, strict=True):
        starts = np.arange(0, cells, q)
        low, high = np.minimum.reduceat(first, starts), np.maximum.reduceat(last, starts)
        visited *= int((high // k - low // k + 1).sum())
        dense *= -(-cells // q) * -(-cells // k)
        flop_bound *= cells**2 / int((last - first + 1).sum())
    return TileReport(visited, dense, flop_bound)


def strides(
    shape: Any, window: Any, tile_q: Any, tile_k: Any = None, *, causal: Any = False
) -> list[tuple[tuple[int, ...], TileReport]]:
    """Every stride a window may have, with its report: the largest bound first, then the smallest stride.

    >>> best, report = strides((64, 64), 24, 8)[0]
    >>> best, report.perfect
    ((8, 8), True)
    """
    unit = Neighborhood(shape, window, causal=causal)
    made = []
    for stride in product(*(range(1, k + 1) for k in unit.window)):
        pattern = Neighborhood(unit.shape, unit.window, stride, causal=unit.causal)
        made.append((stride, simulate(pattern, tile_q, tile_k)))
    return sorted(made, key=lambda pair: (-pair[1].bound, prod(pair[0]), pair[0]))
