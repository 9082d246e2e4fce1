"""Feature maps: phi(q) . phi(k) in place of exp(q . k)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 > 0, elementwise: the map of Transformers are RNNs (2020).

    >>> elu_plus_one(torch.tensor([-1.0, 0.0, 2.0])).tolist()
    [0.3678794503211975, 1.0, 3.0]
    """
    return torch.nn.functional.elu(x) + 1


@dataclass(frozen=True, eq=False)
class RandomFeatures:
    """Positive random features whose products estimate the softmax kernel: E[phi(q) . phi(k)] = exp(q . k).

        phi(x)_i = exp(w_i . x - |x|^2 / 2 - s) / sqrt(m),   w_i normal, orthogonal in blocks of D rows

    Scale q and k by D^(-1/4) each for the exp(q . k / sqrt D) of attention. s = max_i w_i . x of the queries cancels in
    the normalised result and is subtracted there (`queries=True`); keys must share one s, so they have none.

    Args:
        directions: W (m, D); `RandomFeatures.draw` makes one.

    Source: Rethinking Attention with Performers (2020), FAVOR+.

    >>> phi = RandomFeatures.draw(256, 4, seed=0)
    >>> q, k = torch.tensor([0.5, 0.0, -0.5, 0.2]), torch.tensor([0.3, 0.1, 0.0, -0.4])
    >>> round(float(phi(q) @ phi(k)), 2), round(float((q @ k).exp()), 2)
    (1.08, 1.07)
    """

    directions: Tensor

    @staticmethod
    def draw(features: int, dim: int, *, seed: int = 0) -> RandomFeatures:
        """m = features orthogonal directions in blocks of dim, with the norms of normal vectors."""
        if features < 1 or dim < 1:
            raise ValueError(f"RandomFeatures: features and dim must be >= 1, got {features} and {dim}")
        g = torch.Generator().manual_seed(seed)
        blocks = []
        for _ in range(math.ceil(features / dim)):
            q, _r = torch.linalg.qr(torch.randn(dim, dim, generator=g))
            blocks.append(q.T)
        norms = torch.randn(features, dim, generator=g).norm(dim=1, keepdim=True)
        return RandomFeatures(torch.cat(blocks)[:features] * norms)

    def __call__(self, x: Tensor, *, queries: bool = False) -> Tensor:
        """x (..., D) -> (..., m), positive."""
        w = self.directions.to(x)
        logits = x @ w.T - x.square().sum(-1, keepdim=True) / 2
        if queries:
            logits = logits - logits.detach().amax(-1, keepdim=True)
        return logits.exp() / math.sqrt(w.shape[0])
