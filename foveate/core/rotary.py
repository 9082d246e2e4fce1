"""Rotary positions as a function of keys and positions, for mechanisms that place keys themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Rope = Callable[[Tensor, Tensor], Tensor]  # x (..., N, D), int positions -> rotated x


@dataclass(frozen=True)
class Rotary:
    """Rotates pairs of channels of a token by its position.

        (a, b) -> (a cos t - b sin t, a sin t + b cos t),   t = position base^(-2 i / D),   i = 0 .. D/2 - 1

    a and b are channels i and i + D/2, or 2 i and 2 i + 1 if interleaved. Any function of (x, positions) may stand in
    its place where a `rope` is taken, so that a model's own rotation can be used.

    Args:
        base: of the rates, > 0.
        interleaved: how channels are paired.

    Source: RoFormer: Enhanced Transformer with Rotary Position Embedding (2021).

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> Rotary()(x, torch.tensor([0, 1]))
    tensor([[1.0000, 0.0000],
            [0.5403, 0.8415]])
    """

    base: float = 10_000.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.base, bool) or not isinstance(self.base, (int, float)) or not self.base > 0:
            raise ValueError(f"Rotary: base must be a number > 0, got {self.base!r}")

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (..., N, D), D even; positions int (N,), (B, N) for x (B, H, N, D), or with one axis less than x."""
        if x.shape[-1] % 2:
            raise ValueError(f"Rotary: x must have an even last axis, got {tuple(x.shape)}")
        if positions.ndim == 2 and x.ndim == 4:
            positions = positions[:, None]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        rates = self.base ** (
            -torch.arange(0, x.shape[-1], 2, device=x.device, dtype=torch.float64) / x.shape[-1]
        )
        angles = positions.to(x.device).unsqueeze(-1) * rates  # (..., N, D/2) in float64
        cos, sin = angles.cos().to(wide), angles.sin().to(wide)
        if self.interleaved:
            a, b = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)
        a, b = x.to(wide).chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
