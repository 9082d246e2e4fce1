"""Multi-head hierarchical self-attention as a layer."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor, nn

from foveate.compress.hierarchical import Hierarchy, hierarchical_attention
from foveate.core.patterns.base import integer

_windows = lru_cache(maxsize=32)(Hierarchy.from_windows)


class HierarchicalSelfAttention(nn.Module):
    """Queries, keys and values of the tokens, `foveate.compress.hierarchical_attention` over a tree, and a projection.

    Takes the place of a multi-head softmax layer with the same parameters; around it the usual residual and norm.

    Args:
        dim: width of the tokens. heads: a divisor of dim. kv_heads: a divisor of heads, default heads.
        branching: of the tree of windows that is used where `forward` is given none.
        bias: of the projections. energy: "dot" or "sqdist".

    Raises:
        TypeError, ValueError: numbers that do not divide each other.

    Source: Hierarchical Self-Attention: Generalizing Neural Attention Mechanics to Multi-Scale Problems (2025).

    >>> import torch
    >>> layer = HierarchicalSelfAttention(32, 4)
    >>> tokens = torch.randn(2, 10, 32)
    >>> layer(tokens, Hierarchy.from_modalities([4, 6])).shape, layer(tokens).shape
    (torch.Size([2, 10, 32]), torch.Size([2, 10, 32]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        branching: int = 8,
        bias: bool = False,
        energy: str = "dot",
    ) -> None:
        super().__init__()
        owner = "HierarchicalSelfAttention"
        self.dim, self.heads = integer(owner, "dim", dim, 1), integer(owner, "heads", heads, 1)
        self.kv_heads = self.heads if kv_heads is None else integer(owner, "kv_heads", kv_heads, 1)
        self.branching, self.energy = integer(owner, "branching", branching, 2), energy
        if self.dim % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"{owner}: heads must divide dim, and kv_heads heads; got dim {dim}, heads {heads}, kv_heads {kv_heads}"
            )
        width = self.dim // self.heads * self.kv_heads
        self.q = nn.Linear(self.dim, self.dim, bias=bias)
        self.kv = nn.Linear(self.dim, 2 * width, bias=bias)
        self.out = nn.Linear(self.dim, self.dim, bias=bias)

    def forward(self, x: Tensor, tree: Hierarchy | None = None, sibling_bias: Tensor | None = None) -> Tensor:
        """x (batch, tokens, dim) -> the same shape; `tree` and `sibling_bias` as in `hierarchical_attention`."""
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x must be (batch, tokens, {self.dim}), got {tuple(x.shape)}")
        if tree is None:
            tree = _windows(x.shape[1], self.branching)
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D)
        k, v = self.kv(x).unflatten(2, (2, self.kv_heads, -1)).permute(2, 0, 3, 1, 4)
        out = hierarchical_attention(q, k, v, tree, sibling_bias=sibling_bias, energy=self.energy)
        return self.out(out.transpose(1, 2).flatten(2))
