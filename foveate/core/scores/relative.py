"""Learned biases by relative position: one table, on a line or on a grid of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.core.scores.base import Relative, Shape, distance_codes, floating, heads_fit, widened


@dataclass(frozen=True, eq=False)
class RelativeBias(Relative):
    """s_ij -> s_ij + table[h, R + clip(position_i - position_j, -R, R)], on every axis of the token grid.

    Without `shape` the tokens stand on a line and the last query is aligned with the last key (bottom-right):
    query i stands at i + M - N. With `shape` they are the cells of a grid, stored in `order`, and M is the number of
    cells; the queries are the last N of them. Distances beyond the table take its last entry.

    Self-Attention with Relative Position Representations (2018) clips so; Swin Transformer (2021) has tables of
    (2h - 1, 2w - 1) for windows of (h, w), which are never clipped inside a window. Swin stores its parameter as
    ((2h - 1) (2w - 1), H): pass `parameter.T.unflatten(1, (2 * h - 1, 2 * w - 1))`.

    Args:
        table: floating point (Ht, 2R + 1), or (Ht, 2R_1 + 1, 2R_2 + 1, ...) with one axis per axis of `shape`; Ht is
            the number of heads or 1 for all; entry R is distance 0, greater entries are keys further behind.
        shape: cells per axis, e.g. (h, w); None for a line.
        order: in which order the cells are stored: "row_major", "hilbert", "morton" or an `Order` such as
            `tile_major(shape, tile)`.

    Raises:
        TypeError, ValueError: a table that is no floating point tensor, or has an even axis or the wrong number of
            axes; an order of another grid. At the call: heads or lengths that do not fit.

    >>> import torch
    >>> RelativeBias(torch.tensor([[-1.0, 0.0, 1.0]])).apply(torch.zeros(1, 1, 2, 3))[0, 0].tolist()
    [[1.0, 0.0, -1.0], [1.0, 1.0, 0.0]]
    >>> RelativeBias(torch.zeros(4, 13, 13), shape=(7, 7)).apply(torch.zeros(1, 4, 49, 49)).shape
    torch.Size([1, 4, 49, 49])
    """

    table: Tensor
    shape: Any = None
    order: Any = "row_major"

    def __post_init__(self) -> None:
        from foveate.core.patterns.orders import as_order, grid_shape

        floating("RelativeBias", "table", self.table)
        axes = 1
        if self.shape is None:
            if self.order != "row_major":
                raise ValueError("RelativeBias: order is given with shape= only")
        else:
            object.__setattr__(self, "shape", grid_shape("RelativeBias", self.shape))
            object.__setattr__(self, "order", as_order("RelativeBias", self.order, self.shape))
            axes = len(self.shape)
            if prod([2 * cells - 1 for cells in self.shape]) > (1 << 31) - 1:
                raise ValueError(
                    f"RelativeBias: a grid of shape {self.shape} has too many distances for 32 bits"
                )
        if self.table.ndim != axes + 1 or any(size % 2 == 0 for size in self.table.shape[1:]):
            wanted = "(heads or 1" + ", odd" * axes + ")"
            raise ValueError(f"RelativeBias.table must have shape {wanted}, got {tuple(self.table.shape)}")

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"table": self.table}

    def check(self, shape: Shape) -> None:
        """Raise ValueError unless heads and lengths fit `shape` = (B, H, N, M)."""
        heads_fit("RelativeBias", "table", self.table.shape[0], shape)
        if self.shape is not None and not (shape[2] <= shape[3] == prod(self.shape)):
            raise ValueError(
                f"RelativeBias: a grid of shape {self.shape} has {prod(self.shape)} cells; q and k have lengths "
                f"{shape[2]} and {shape[3]} (k must have one key per cell, the queries are the last of them)"
            )

    def codes(self, n, m, device=None):
        table = widened(self.table)
        if self.shape is None:
            distances, q_code, k_code = distance_codes(n, m, device)
            return table.index_select(1, _entries(distances, table.shape[1])), q_code, k_code
        for axis, cells in enumerate(self.shape, 1):
            distances = torch.arange(1 - cells, cells, device=device)
            table = table.index_select(axis, _entries(distances, table.shape[axis]))
        k_code = _cell_codes(self.order.name, self.order.shape, self.order.tile).to(device)
        return table.flatten(1), k_code[m - n :] + table[0].numel() // 2, k_code


def _entries(distances: Tensor, size: int) -> Tensor:
    """The places of distances in a table axis of 2R + 1 entries."""
    reach = size // 2
    return distances.clamp(-reach, reach) + reach


def _cell_codes(name: str, shape: tuple[int, ...], tile: tuple[int, ...] | None) -> Tensor:
    """int32 (cells,): differences of these and the table's middle number the distances in row-major order.

    Takes the parts of an order: those `torch.compile` knows as constants even where the order was made while tracing.
    """
    return torch.from_numpy(_made(name, shape, tile))


@lru_cache(maxsize=64)
def _made(name: str, shape: tuple[int, ...], tile: tuple[int, ...] | None) -> np.ndarray:
    from foveate.core.patterns.orders import Order

    order = Order(name, shape, tile)
    code = np.zeros(order.size, np.int64)
    for cells, place in zip(shape, order.coordinates(), strict=True):
        code = code * (2 * cells - 1) + place
    return code.astype(np.int32)


# what torch.compiler.assume_constant_result sets, without its import of the compiler, which takes over a second
_cell_codes._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
