"""Norms of the last axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a learned scale where there is one.

    Args:
        dim: length of the last axis.
        scale: learn one number per channel, from 1; False is the SimpleRMSNorm of TransNormerLLM (2023).

    Source: Root Mean Square Layer Normalization (2019).

    >>> [round(x, 3) for x in RMSNorm(2, scale=False)(torch.tensor([3.0, 4.0])).tolist()]
    [0.849, 1.131]
    """

    def __init__(self, dim: int, *, scale: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        out = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return out if self.weight is None else out * self.weight
