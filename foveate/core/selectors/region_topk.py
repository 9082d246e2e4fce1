"""RegionTopK: regions of a map choose the regions whose mean key is most like their own mean query."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.core.block_choice import choice_layout
from foveate.core.layout import BlockLayout
from foveate.core.patterns.base import integer
from foveate.core.patterns.orders import as_order, grid_shape, per_axis
from foveate.core.selectors.base import Selector


@dataclass(frozen=True)
class RegionTopK(Selector):
    """Bi-level routing: a token sees all tokens of the k regions that its own region chose.

        R(r) = the k regions s of largest  qbar_r . kbar_s,   qbar_r, kbar_s the means over the tokens of a region

    An axis of n cells is cut into regions of ceil(n / S) cells, the last one smaller where they do not divide n, so
    that there may be fewer than S. The choice carries no gradient; whether a region chooses itself is up to its means.
    Equal affinities are taken in the order of the regions.

    Args:
        shape: cells per axis, usually (height, width); the tokens are the cells, row by row, or in `order`.
        regions: S, regions per axis (one int or one per axis).
        k: regions that each region chooses; all of them where there are fewer.
        shared: one choice for all heads, by the affinities summed over them; False: each head chooses.
        order: token order of the grid, a name or an `Order`. `tile_major(shape, selector.cells)` puts regions one
            after another, so that regions of a multiple of 64 tokens are whole tiles of the layout.

    Cost: the means, and 2 S^4 C for the affinities of a map of width C.

    Source: BiFormer: Vision Transformer with Bi-Level Routing Attention (2023). Differs: sizes that S does not divide.

    >>> q = k = torch.randn(1, 2, 12 * 12, 8)
    >>> chooser = RegionTopK((12, 12), regions=4, k=3)
    >>> chooser.select(q, k).shape, chooser.layout(q, k).area == 144 * 3 * 9
    (torch.Size([1, 1, 16, 3]), True)
    """

    shape: Any
    regions: Any = 7
    k: int = 4
    shared: bool = True
    order: Any = "row_major"

    def __post_init__(self) -> None:
        shape = grid_shape("RegionTopK", self.shape)
        for name, value in (
            ("shape", shape),
            ("regions", per_axis("RegionTopK", "regions", self.regions, shape, 1)),
            ("k", integer("RegionTopK", "k", self.k, 1)),
            ("order", as_order("RegionTopK", self.order, shape)),
        ):
            object.__setattr__(self, name, value)

    @property
    def cells(self) -> tuple[int, ...]:
        """Cells of a region per axis; the last regions of an axis may have fewer."""
        return tuple(-(-n // s) for n, s in zip(self.shape, self.regions, strict=True))

    @property
    def counts(self) -> tuple[int, ...]:
        """Regions per axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.cells, strict=True))

    @cached_property
    def blocks(self) -> Tensor:
        """int64 (tokens,): the region of each token, regions in row-major order."""
        cell = self.order.coordinates() // np.array(self.cells)[:, None]  # (axes, N)
        return torch.from_numpy(np.ravel_multi_index(tuple(cell), self.counts))

    def layout(
        self, q: Tensor, k: Tensor, *, scale: float | None = None, is_causal: bool = False
    ) -> BlockLayout:
        """The layout for q (B, H, N, D) and k (B, Hkv, N, D), N = prod(shape); see `select` for errors."""
        if is_causal:
            raise ValueError(
                "RegionTopK is defined for bidirectional attention; got is_causal=True, accepted is False"
            )
        chosen = self.select(q, k)  # (B, 1 or H, R, k)
        seen = torch.zeros(*chosen.shape[:3], prod(self.counts), dtype=torch.bool, device=q.device)
        seen.scatter_(-1, chosen, True)
        blocks = self.blocks.to(q.device)
        return choice_layout(seen[:, :, blocks], blocks)

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor) -> Tensor:
        """int64 (B, 1 or H, R, min(k, R)): the regions that each region chooses, the best first.

        Raises:
            ValueError: q and k that do not fit each other or the grid.
        """
        self._check(q, k)
        queries, keys = self._means(q), self._means(k)  # (B, H, R, D), (B, Hkv, R, D)
        keys = keys.repeat_interleave(q.shape[1] // k.shape[1], 1)
        affinity = torch.matmul(queries, keys.mT)  # (B, H, R, R)
        if self.shared:
            affinity = affinity.sum(1, keepdim=True)
        return affinity.nan_to_num_(0.0).argsort(dim=-1, descending=True, stable=True)[..., : self.k]

    def _means(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> (B, H, R, D) in float32 or float64."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        blocks = self.blocks.to(x.device)
        sums = torch.zeros(*x.shape[:2], prod(self.counts), x.shape[3], dtype=wide, device=x.device)
        sums.index_add_(2, blocks, x.to(wide))
        sizes = torch.zeros(prod(self.counts), dtype=wide, device=x.device)
        sizes.index_add_(0, blocks, torch.ones_like(blocks, dtype=wide))
        return sums / sizes[:, None]

    def _check(self, q: Tensor, k: Tensor) -> None:
        for name, t in (("q", q), ("k", k)):
            if not isinstance(t, Tensor) or t.ndim != 4:
                got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
                raise ValueError(f"{name} must be a tensor (batch, heads, length, dim), got {got}")
        if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
            raise ValueError(
                "q (B, H, N, D) and k (B, Hkv, M, D) must share B and D, with H a multiple of Hkv; "
                f"got {tuple(q.shape)} and {tuple(k.shape)}"
            )
        if q.shape[2] != prod(self.shape) or k.shape[2] != prod(self.shape):
            raise ValueError(
                f"RegionTopK of a grid {self.shape} needs {prod(self.shape)} queries and keys, "
                f"got {q.shape[2]} and {k.shape[2]}"
            )
