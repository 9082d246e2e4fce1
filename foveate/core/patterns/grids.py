"""Grids of one, two, three or more axes: windows (Swin), dilated grids (MaxViT), axial attention.

Token i of the sequence is the cell `order.permutation[i]` of the grid. The keys are all cells; the queries
are the last q_len of them (bottom-right alignment), usually all.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from foveate.core.patterns.base import Extent, integer
from foveate.core.patterns.boxes import Boxes
from foveate.core.patterns.orders import Order, as_order, grid_shape, per_axis


def check_grid(owner: str, shape: tuple[int, ...], ext: Extent) -> None:
    """Raise unless the keys are the cells of the grid and the queries the last of them."""
    if ext.k_len != prod(shape):
        raise ValueError(f"{owner}: k_len must be {prod(shape)} for a grid of shape {shape}, got {ext.k_len}")
    if ext.q_len > ext.k_len:
        raise ValueError(f"{owner}: q_len must be at most k_len = {ext.k_len}, got {ext.q_len}")


class _Labels(Boxes):
    """Base: a query sees the keys that have equal labels on every axis."""

    shape: tuple[int, ...]
    order: Order

    def labels(self, place: np.ndarray) -> np.ndarray:
        """Coordinates (axes, n) -> labels (any number of rows, n)."""
        raise NotImplementedError

    def check(self, ext):
        check_grid(type(self).__name__, self.shape, ext)

    def boxes(self, ext, b):
        at = self.labels(self.order.coordinates())
        own = at[:, ext.offset :]
        return own, own, at


@dataclass(frozen=True, repr=False)
class Windows(_Labels):
    """Windows of a grid: a query sees its own window. Swin Transformer (2021).

    With `shift` the grid is rolled by -shift before it is cut, as in Swin's shifted blocks, and cells that
    the roll brought together from opposite borders do not see each other (Swin's mask); `cyclic=True`
    leaves that mask out. A window that does not divide the axis leaves a smaller one at the end (Swin pads;
    the padding is left out here).

    Args:
        shape: cells per axis.
        window: cells of a window per axis (one int or one per axis), at most the axis; where the grid
            is not larger than the window, give the axis itself and shift 0, as Swin does.
        shift: 0 <= shift < window per axis.
        cyclic: windows wrap around the border.
        order: token order, a name or an `Order`.

    >>> Windows(4, 2).layout(4).to_dense()[0, 0].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    >>> Windows(4, 2, shift=1).layout(4).to_dense()[0, 0].int().tolist()
    [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    """

    shape: Any
    window: Any
    shift: Any = 0
    cyclic: bool = False
    order: Any = "row_major"

    def __post_init__(self) -> None:
        shape = grid_shape("Windows", self.shape)
        window = per_axis("Windows", "window", self.window, shape, 1)
        shift = per_axis("Windows", "shift", self.shift, shape, 0)
        for n, w, s in zip(shape, window, shift, strict=True):
            integer("Windows", "window", w, 1, n)
            integer("Windows", "shift", s, 0, w - 1)
            if self.cyclic and n % w:
                raise ValueError(f"Windows: window must divide shape when cyclic, got {w} for an axis of {n}")
        for name, value in (("shape", shape), ("window", window), ("shift", shift)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "order", as_order("Windows", self.order, shape))

    def labels(self, place):
        window, shift, shape = (np.array(x)[:, None] for x in (self.window, self.shift, self.shape))
        moved = place - shift
        return (moved % shape if self.cyclic else moved) // window


@dataclass(frozen=True, repr=False)
class Grid(_Labels):
    """Dilated grid attention: `grid` cells per axis, spread evenly over the whole axis. MaxViT (2022).

    An axis of n cells and `grid` g is cut into g parts of n / g cells; a query sees the cells that stand at
    its own place in each part, that is those with equal coordinate mod (n / g). The counterpart of
    `Windows`.

    Args:
        shape: cells per axis.
        grid: cells seen per axis; divides the axis.
        order: token order, a name or an `Order`.

    >>> Grid(4, 2).layout(4).to_dense()[0, 0].int().tolist()
    [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """

    shape: Any
    grid: Any
    order: Any = "row_major"

    def __post_init__(self) -> None:
        shape = grid_shape("Grid", self.shape)
        grid = per_axis("Grid", "grid", self.grid, shape, 1)
        for n, g in zip(shape, grid, strict=True):
            if n % g:
                raise ValueError(f"Grid: grid must divide shape, got {g} for an axis of {n}")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "order", as_order("Grid", self.order, shape))

    def labels(self, place):
        return place % np.array([n // g for n, g in zip(self.shape, self.grid, strict=True)])[:, None]


@dataclass(frozen=True, repr=False)
class Axial(_Labels):
    """Axial attention: a query sees the cells that differ from it only along `axis` (2019).

    Args:
        shape: cells per axis.
        axis: the axis (or axes) along which a query looks; negative ones count from the last.
        order: token order, a name or an `Order`.

    >>> Axial((2, 2), axis=0).layout(4).to_dense()[0, 0].int().tolist()
    [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """

    shape: Any
    axis: Any
    order: Any = "row_major"

    def __post_init__(self) -> None:
        shape = grid_shape("Axial", self.shape)
        axes = self.axis if isinstance(self.axis, (tuple, list)) else (self.axis,)
        axes = tuple(
            sorted({integer("Axial", "axis", a, -len(shape), len(shape) - 1) % len(shape) for a in axes})
        )
        if not axes:
            raise ValueError("Axial: axis must name at least one axis, got ()")
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "axis", axes)
        object.__setattr__(self, "order", as_order("Axial", self.order, shape))

    def labels(self, place):
        fixed = [a for a in range(len(self.shape)) if a not in self.axis]
        return place[fixed] if fixed else np.zeros_like(place[:1])
