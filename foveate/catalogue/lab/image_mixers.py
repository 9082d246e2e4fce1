"""Mixers of a small vision transformer to compare others with: softmax, and linear attention that is normalised."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

import foveate as fv

KINDS = ("softmax", "linear")


class ImageMixer(nn.Module):
    """(B, h w, dim) -> the same: four maps without bias but the last, no positions, every token reads all.

        softmax: o_i = softmax_j(q_i . k_j / sqrt(D)) v_j
        linear:  o_i = sum_j relu(q_i) . relu(k_j) v_j / (sum_j relu(q_i) . relu(k_j) + 1e-6)

    Args:
        kind: one of the two.
        grid: (h, w): adds a depthwise 3 x 3 convolution of the values as a map; None: without.
    """

    def __init__(self, dim: int, heads: int, kind: str, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"ImageMixer: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.heads, self.kind, self.grid = heads, kind, grid
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(dim, dim)
        self.dwc = None if grid is None else nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        split = lambda t: t.unflatten(2, (self.heads, -1)).transpose(1, 2)  # noqa: E731  (B, H, N, D)
        v = self.v_proj(x)
        q, k, values = split(self.q_proj(x)), split(self.k_proj(x)), split(v)
        if self.kind == "softmax":
            out = cast(Tensor, fv.attention(q, k, values))
        else:
            q, k = torch.relu(q), torch.relu(k)
            out = q @ (k.mT @ values) / (q @ k.sum(2).unsqueeze(3) + 1e-6)
        out = out.transpose(1, 2).flatten(2)
        if self.dwc is not None and self.grid is not None:
            out = out + self.dwc(v.mT.unflatten(2, self.grid)).flatten(2).mT
        return self.o_proj(out)
