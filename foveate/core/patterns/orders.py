"""Token orders: in which sequence the cells of a grid are stored. Locality is what makes tiles full."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.core.patterns.base import integer

NAMES = ("row_major", "tile_major", "hilbert", "morton")


@dataclass(frozen=True)
class Order:
    """A bijection between sequence indices and the cells of a grid of 1 to 3 axes (or more).

    `permutation[i]` is the row-major number of the cell that stands at index i; `inverse[cell]` is its index.

    * `row_major(shape)`: the last axis runs fastest.
    * `tile_major(shape, tile)`: tiles of `tile` cells in row-major order, row-major inside each; tiles at
      the end of an axis that `tile` does not divide are smaller.
    * `hilbert(shape)`: along a Hilbert curve (Skilling's transform, 2004) of the smallest enclosing
      power-of-two cube; cells outside the grid are skipped. Consecutive cells touch when it is that cube.
    * `morton(shape)`: by interleaved bits of the coordinates (Z-order), for any grid; the last axis is
      least significant.

    >>> tile_major((2, 4), (2, 2)).permutation.tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    >>> morton((2, 4)).permutation.tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    >>> hilbert((2, 2)).permutation.tolist()
    [0, 1, 3, 2]
    """

    name: str
    shape: tuple[int, ...]
    tile: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"Order: name must be one of {', '.join(NAMES)}, got {self.name!r}")
        object.__setattr__(self, "shape", grid_shape("Order", self.shape))
        if (self.tile is None) != (self.name != "tile_major"):
            raise ValueError(
                f"Order: tile is given with tile_major and only with it, got {self.name}, {self.tile}"
            )
        if self.tile is not None:
            object.__setattr__(self, "tile", per_axis("Order", "tile", self.tile, self.shape, 1))

    @property
    def size(self) -> int:
        """Number of cells."""
        return prod(self.shape)

    @cached_property
    def _cells(self) -> np.ndarray:
        """Row-major number of the cell at each index, int64 (size,)."""
        if self.name == "row_major":
            return np.arange(self.size)
        place = np.indices(self.shape).reshape(len(self.shape), -1)  # (axes, size)
        if self.name == "tile_major":
            assert self.tile is not None
            tile = np.array(self.tile)[:, None]
            keys = (*(place % tile)[::-1], *(place // tile)[::-1])  # lexsort: the last key decides first
            return np.lexsort(keys)
        bits = max(1, (max(self.shape) - 1).bit_length())
        if bits * len(self.shape) > 62:
            raise ValueError(f"Order: {self.name} of shape {self.shape} needs more than 62 bits")
        return np.argsort(_interleave(_hilbert_axes(place, bits) if self.name == "hilbert" else place, bits))

    @property
    def permutation(self) -> Tensor:
        """int64 (size,): the row-major number of the cell at each index."""
        return torch.from_numpy(self._cells.copy())

    @property
    def inverse(self) -> Tensor:
        """int64 (size,): the index of each cell."""
        return torch.from_numpy(np.argsort(self._cells))

    def coordinates(self) -> np.ndarray:
        """int64 (axes, size): the coordinates of the cell at each index."""
        return np.stack(np.unravel_index(self._cells, self.shape)).astype(np.int64)

    def apply(self, x: Tensor, dim: int = -2) -> Tensor:
        """Row-major tokens along `dim`, put into this order.

        >>> x = torch.arange(8)
        >>> order = hilbert((2, 4))
        >>> torch.equal(order.undo(order.apply(x, 0), 0), x)
        True
        """
        return self._moved(x, dim, self.permutation)

    def undo(self, x: Tensor, dim: int = -2) -> Tensor:
        """Tokens in this order along `dim`, put back into row-major order; the inverse of `apply`."""
        return self._moved(x, dim, self.inverse)

    def _moved(self, x: Tensor, dim: int, to: Tensor) -> Tensor:
        if x.shape[dim] != self.size:
            raise ValueError(
                f"Order: x must have {self.size} tokens along dimension {dim} (grid {self.shape}), "
                f"got {x.shape[dim]}"
            )
        return x.index_select(dim, to.to(x.device))

    def __repr__(self) -> str:
        return f"{self.name}({self.shape}{'' if self.tile is None else f', {self.tile}'})"


def row_major(shape: Any) -> Order:
    """The last axis runs fastest; the order of `x.flatten()`."""
    return Order("row_major", shape)


def tile_major(shape: Any, tile: Any) -> Order:
    """Tile after tile; 8 x 8 tiles make one tile of 64 tokens."""
    return Order("tile_major", shape, tile)


def hilbert(shape: Any) -> Order:
    """Along a Hilbert curve."""
    return Order("hilbert", shape)


def morton(shape: Any) -> Order:
    """By interleaved bits (Z-order)."""
    return Order("morton", shape)


def _interleave(place: np.ndarray, bits: int) -> np.ndarray:
    """Bits of the coordinates (axes, n), the first axis most significant, as one number (n,)."""
    code = np.zeros(place.shape[1], np.int64)
    for bit in range(bits - 1, -1, -1):
        for axis in place:
            code = (code << 1) | ((axis >> bit) & 1)
    return code


def _hilbert_axes(place: np.ndarray, bits: int) -> np.ndarray:
    """Coordinates -> transposed Hilbert number (Skilling, "Programming the Hilbert curve", 2004)."""
    x = [axis.copy() for axis in place]
    for bit in range(bits - 1, 0, -1):  # undo the excess work, from the top bit down
        low = (1 << bit) - 1
        for i in range(len(x)):
            on = (x[i] >> bit) & 1 == 1
            swap = np.where(on, 0, (x[0] ^ x[i]) & low)
            x[0] = np.where(on, x[0] ^ low, x[0]) ^ swap
            x[i] = x[i] ^ swap  # nothing for i = 0
    for i in range(1, len(x)):  # Gray encode
        x[i] = x[i] ^ x[i - 1]
    flip = np.zeros_like(x[0])
    for bit in range(bits - 1, 0, -1):
        flip = np.where((x[-1] >> bit) & 1 == 1, flip ^ ((1 << bit) - 1), flip)
    return np.stack([axis ^ flip for axis in x])


# ------------------------------------------------------------------------- arguments of grid patterns
def grid_shape(owner: str, shape: Any) -> tuple[int, ...]:
    """`shape` as a tuple of ints >= 1."""
    axes = shape if isinstance(shape, (tuple, list, torch.Size)) else (shape,)
    if not axes:
        raise ValueError(f"{owner}: shape must have at least one axis, got {shape!r}")
    return tuple(integer(owner, "shape", n, 1) for n in axes)


def per_axis(owner: str, name: str, value: Any, shape: tuple[int, ...], least: int) -> tuple[int, ...]:
    """`value`, one int or one per axis, as a tuple of ints >= `least`."""
    parts = tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(shape)
    if len(parts) != len(shape):
        raise ValueError(
            f"{owner}: {name} must be one int or {len(shape)} for a grid of shape {shape}, got {value!r}"
        )
    return tuple(integer(owner, name, n, least) for n in parts)


def as_order(owner: str, order: Any, shape: tuple[int, ...]) -> Order:
    """An `Order` of this grid from an `Order` or from "row_major", "hilbert" or "morton"."""
    if isinstance(order, str):
        if order == "tile_major" or order not in NAMES:
            raise ValueError(
                f"{owner}: order must be 'row_major', 'hilbert', 'morton' or an Order such as "
                f"tile_major(shape, tile), got {order!r}"
            )
        return Order(order, shape)
    if not isinstance(order, Order):
        raise TypeError(f"{owner}: order must be a name or an Order, got {type(order).__name__}")
    if order.shape != shape:
        raise ValueError(f"{owner}: order must be of grid {shape}, got one of {order.shape}")
    return order
