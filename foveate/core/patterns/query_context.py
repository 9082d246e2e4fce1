"""Query windows of a grid that see the larger square around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.core.patterns.base import integer
from foveate.core.patterns.boxes import Boxes
from foveate.core.patterns.grids import check_grid
from foveate.core.patterns.orders import as_order, grid_shape, per_axis


@dataclass(frozen=True, repr=False)
class QueryContextWindows(Boxes):
    """A query sees a context `ratio` times as wide as its window, centred on it and moved inwards at the borders.

    Per axis of N cells, windows of p cells and ratio R, the queries of window i see

        [c, c + R p),  c = clip(i p - ceil((R - 1) p / 2), 0, N - R p)

    ratio 1 is `Windows`; R p = N is full attention. Varying window attention (2024).

    Args:
        shape: cells per axis, multiples of window.
        window: p per axis (one int or one per axis).
        ratio: R per axis (one int or one per axis), R p at most the axis.
        order: token order, a name or an `Order`. The keys are all cells, the queries the last q_len of them.

    >>> QueryContextWindows(8, 2, 2).layout(8).to_dense()[0, 0, ::2].int().tolist()[1:3]
    [[0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]]
    """

    shape: Any
    window: Any
    ratio: Any = 2
    order: Any = "row_major"

    def __post_init__(self) -> None:
        shape = grid_shape("QueryContextWindows", self.shape)
        window = per_axis("QueryContextWindows", "window", self.window, shape, 1)
        ratio = per_axis("QueryContextWindows", "ratio", self.ratio, shape, 1)
        for n, p, r in zip(shape, window, ratio, strict=True):
            integer("QueryContextWindows", "window", p, 1, n)
            if n % p:
                raise ValueError(f"QueryContextWindows: window must divide shape, got {p} for an axis of {n}")
            if r * p > n:
                raise ValueError(
                    f"QueryContextWindows: ratio * window must be at most the axis, got {r} * {p} for an axis of {n}"
                )
        for name, value in (("shape", shape), ("window", window), ("ratio", ratio)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "order", as_order("QueryContextWindows", self.order, shape))

    def check(self, ext):
        check_grid("QueryContextWindows", self.shape, ext)

    def boxes(self, ext, b):
        at = self.order.coordinates()  # (axes, cells)
        p, r, n = (np.array(t)[:, None] for t in (self.window, self.ratio, self.shape))
        low = np.clip(at // p * p - ((r - 1) * p + 1) // 2, 0, n - r * p)
        return low[:, ext.offset :], (low + r * p - 1)[:, ext.offset :], at
