"""Blocks with a halo: the queries of a block of a grid share the keys of the block and of a margin around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.core.patterns.base import integer
from foveate.core.patterns.boxes import Boxes
from foveate.core.patterns.grids import check_grid
from foveate.core.patterns.orders import as_order, grid_shape, per_axis


@dataclass(frozen=True, repr=False)
class Halo(Boxes):
    """A key is seen iff on every axis it lies in the query's block or at most `halo` cells beside it.

        y sees t  <=>  Y - h <= t < Y + b + h,   Y = b floor(y / b)

    Halo 0 is `Windows`; a halo of the whole axis is full attention. Scaling Local Self-Attention for Parameter
    Efficient Visual Backbones (2021). Differs: any number of axes; cells outside the grid do not exist (the
    paper's have key 0 and value 0: see `foveate.vision.HaloAttention`).

    Args:
        shape: cells per axis.
        block: b per axis (one int or one per axis), 1 <= b <= cells; a smaller block is left at the end.
        halo: h >= 0 per axis.
        order: token order, a name or an `Order`. The keys are all cells, the queries the last q_len of them.

    >>> Halo(6, 3, 1).layout(6).to_dense()[0, 0, ::3].int().tolist()
    [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    """

    shape: Any
    block: Any
    halo: Any
    order: Any = "row_major"

    def __post_init__(self) -> None:
        shape = grid_shape("Halo", self.shape)
        block = per_axis("Halo", "block", self.block, shape, 1)
        for n, b in zip(shape, block, strict=True):
            integer("Halo", "block", b, 1, n)
        halo = per_axis("Halo", "halo", self.halo, shape, 0)
        made: dict[str, Any] = {"shape": shape, "block": block, "halo": halo}
        made["order"] = as_order("Halo", self.order, shape)
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def check(self, ext):
        check_grid("Halo", self.shape, ext)

    def boxes(self, ext, b):
        place = self.order.coordinates()  # (axes, cells)
        block, halo = np.array(self.block)[:, None], np.array(self.halo)[:, None]
        first = place[:, ext.offset :] // block * block
        return first - halo, first + block + halo - 1, place
