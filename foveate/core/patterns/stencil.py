"""Stencils: the cells around a cell, as a convolution reads them; a window at the border of the grid is cut off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.core.patterns.base import integer
from foveate.core.patterns.boxes import Boxes
from foveate.core.patterns.grids import check_grid
from foveate.core.patterns.orders import as_order, grid_shape, per_axis


@dataclass(frozen=True, repr=False)
class Stencil(Boxes):
    """A key is seen iff on every axis it lies u * dilation cells from the query, |u| <= (kernel - 1) / 2.

    The keys of a convolution without its padding: fewer at the borders, where `Neighborhood` shifts its window
    inwards and keeps its size. TiC: Exploring Vision Transformer in Convolution (2023). Differs: any number of
    axes; cells outside the grid do not exist (see `foveate.vision.stencil_attention` for keys 0 there).

    Args:
        shape: cells per axis.
        kernel: odd, per axis (one int or one per axis).
        dilation: >= 1 per axis.
        order: token order, a name or an `Order`. The keys are all cells, the queries the last q_len of them.

    >>> Stencil(5, 3, 2).layout(5).to_dense()[0, 0].int().tolist()[:3]
    [[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
    """

    shape: Any
    kernel: Any
    dilation: Any = 1
    order: Any = "row_major"

    def __post_init__(self) -> None:
        shape = grid_shape("Stencil", self.shape)
        kernel = per_axis("Stencil", "kernel", self.kernel, shape, 1)
        for k in kernel:
            if integer("Stencil", "kernel", k, 1) % 2 == 0:
                raise ValueError(f"Stencil: kernel must be odd, got {k}")
        made: dict[str, Any] = {"shape": shape, "kernel": kernel}
        made["dilation"] = per_axis("Stencil", "dilation", self.dilation, shape, 1)
        made["order"] = as_order("Stencil", self.order, shape)
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def check(self, ext):
        check_grid("Stencil", self.shape, ext)

    def boxes(self, ext, b):
        low, high, at = [], [], []
        axes = zip(self.order.coordinates(), self.kernel, self.dilation, strict=True)
        for x, k, d in axes:
            reach = k // 2 * d
            low.append(x - reach)
            high.append(x + reach)
            at.append(x)
            if d > 1:
                low.append(x % d)
                high.append(x % d)
                at.append(x % d)
        return np.stack(low)[:, ext.offset :], np.stack(high)[:, ext.offset :], np.stack(at)
