"""Rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Halves (a, b) of x (B, heads, N, D) -> (a cos - b sin, a sin + b cos), by angles (N, D / 2).

    >>> rotated(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[torch.pi / 2]])).round().tolist()
    [[[[-0.0, 1.0]]]]
    """
    if angles.shape != (x.shape[2], x.shape[3] // 2) or x.shape[3] % 2:
        raise ValueError(
            f"rope must have shape {(x.shape[2], x.shape[3] // 2)}, (tokens, head_dim / 2) with an even head_dim; "
            f"got {tuple(angles.shape)}"
        )
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
