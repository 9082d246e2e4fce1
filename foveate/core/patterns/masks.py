"""Masks given as they are: a bool tensor, or a function of indices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from foveate.core.layout import TILE, tiles
from foveate.core.patterns.base import Pattern, integer, values, verdict


@dataclass(frozen=True, repr=False)
class Mask(Pattern):
    """A bool tensor, True = may attend; (N, M), (H, N, M) or (B, H, N, M), where sizes of 1 broadcast.

    The data are copied and compared by content. The tensor is N x M already; the layout keeps only what is
    allowed.

    >>> import torch
    >>> Mask(torch.eye(3, dtype=torch.bool)).layout(3).area
    3
    """

    mask: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", values("Mask", "mask", self.mask, (2, 3, 4), "bool"))

    @cached_property
    def _bits(self) -> np.ndarray:
        array = self.mask.array
        return array.reshape((1,) * (4 - array.ndim) + array.shape)

    @property
    def batch(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._bits.shape[0]

    @property
    def heads(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._bits.shape[1]

    def check(self, ext):
        got = self._bits.shape[2:]
        if got[0] not in (1, ext.q_len) or got[1] not in (1, ext.k_len):
            raise ValueError(
                f"Mask: mask must end in ({ext.q_len}, {ext.k_len}) or 1 where it broadcasts, got {got}"
            )

    def _plane(self, b: int, h: int) -> np.ndarray:
        return self._bits[b if self.batch > 1 else 0, h if self.heads > 1 else 0]

    def contains(self, ext, b, h, q, k):
        plane = self._plane(b, h)
        return plane[q if plane.shape[0] > 1 else 0 * q, k if plane.shape[1] > 1 else 0 * k]

    def classify(self, ext, b, h, q0, q1, k0, k1):
        any_before, all_before = self._counts(b, h)
        rows, columns = any_before.shape[0] - 1, any_before.shape[1] - 1
        r0, r1 = (0 * q0, 0 * q0 + 1) if rows == 1 else (q0 // TILE, (q1 - 1) // TILE + 1)
        c0, c1 = (0 * k0, 0 * k0 + 1) if columns == 1 else (k0 // TILE, (k1 - 1) // TILE + 1)

        def inside(before):
            return before[r1, c1] - before[r0, c1] - before[r1, c0] + before[r0, c0]

        return verdict(inside(any_before) == 0, inside(all_before) == (r1 - r0) * (c1 - c0))

    def _counts(self, b: int, h: int) -> tuple[np.ndarray, np.ndarray]:
        """Two-dimensional running counts of the tiles with any and with only allowed pairs."""
        key = (b if self.batch > 1 else 0, h if self.heads > 1 else 0)
        if key not in self._held:
            plane = self._plane(b, h)
            n, m = plane.shape
            heights = np.minimum(TILE, n - TILE * np.arange(tiles(n)))
            widths = np.minimum(TILE, m - TILE * np.arange(tiles(m)))
            ones = np.add.reduceat(plane, np.arange(0, m, TILE), axis=1, dtype=np.int32)
            ones = np.add.reduceat(ones, np.arange(0, n, TILE), axis=0)
            kinds = (ones > 0, ones == heights[:, None] * widths)
            self._held[key] = tuple(np.pad(x.cumsum(0).cumsum(1), ((1, 0), (1, 0))) for x in kinds)
        return self._held[key]

    @cached_property
    def _held(self) -> dict:
        return {}


@dataclass(frozen=True, repr=False)
class MaskMod(Pattern):
    """Any function `f(b, h, q_idx, kv_idx) -> bool tensor`, as FlexAttention's `mask_mod`.

    The function is called with int64 tensors on `device`: scalars b, h and index tensors that broadcast
    (queries (n, 64, 1), keys (n, 1, 64)), and must work elementwise on them. It gets raw indices: q_idx
    runs from 0 to q_len - 1. The layout is found by evaluation, chunk by chunk of tiles in bounded memory;
    only tiles that the rest of an expression leaves open are evaluated, so `Causal() & SlidingWindow(512) &
    MaskMod(f)` is cheap.

    Two are equal when they wrap the same function object. The function must give the same answer every
    time, because layouts are cached; give `cache=False` when it reads state that changes.

    Args:
        function: f(b, h, q_idx, kv_idx) -> bool tensor, True = may attend.
        batch, heads: how many batch rows and heads it tells apart; along an axis of 1 it is called with 0.
        cache: whether its layouts may be cached.
        device: where the index tensors live.

    >>> MaskMod(lambda b, h, q, k: (q + k) % 2 == 0).layout(3).to_dense()[0, 0].int().tolist()
    [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """

    function: Callable[..., Any]
    batch: int = 1
    heads: int = 1
    cache: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"MaskMod: function must be callable, got {type(self.function).__name__}")
        object.__setattr__(self, "batch", integer("MaskMod", "batch", self.batch, 1))
        object.__setattr__(self, "heads", integer("MaskMod", "heads", self.heads, 1))
        object.__setattr__(self, "device", str(self.device))

    @property
    def cacheable(self) -> bool:
        return self.cache

    def contains(self, ext, b, h, q, k):
        shape = np.broadcast_shapes(np.shape(q), np.shape(k))
        b, h = b if self.batch > 1 else 0, h if self.heads > 1 else 0
        with torch.no_grad():
            made = self.function(
                *(torch.as_tensor(x, dtype=torch.int64, device=self.device) for x in (b, h, q, k))
            )
        if isinstance(made, (bool, np.bool_)):
            made = torch.tensor(bool(made))
        if not isinstance(made, torch.Tensor) or made.dtype != torch.bool:
            got = made.dtype if isinstance(made, torch.Tensor) else type(made).__name__
            raise TypeError(f"MaskMod: function must return a bool tensor, got {got}")
        try:
            return np.broadcast_to(made.cpu().numpy(), shape)
        except ValueError:
            raise ValueError(
                f"MaskMod: function must work elementwise and return a shape that broadcasts to {shape}, "
                f"got {tuple(made.shape)}"
            ) from None
