"""LAMA: a text pooled by several heads, all scored by one thin bilinear form between tokens and a context vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXTS = ("learned", "mean")


class LowRankMultiHeadPool(nn.Module):
    """Weighted means of token states, one per head, by a low-rank bilinear score against one context vector.

        f_ti = sum_{s<r} (P^T h_t)_{ir+s} (Q^T c)_{ir+s} = h_t^T P_i Q_i^T c,   A_i = softmax_t(f_i),   R = A H

    The work is linear in the number of tokens, and P and Q are all that is learned besides c.

    Args:
        dim: width of the states.
        heads: m.
        rank: r, of the form of each head.
        context: "learned": c is a parameter; "mean": the mean of the states of the valid tokens.
        normalize: divide the scores of a token by their Euclidean norm over the heads (as bilinear pooling often is).

    Source: Low Rank Factorization for Compact Multi-Head Self-Attention (2019). Rank, context and normalisation are
    choices that agree with its abstract.

    >>> pooled, weights = LowRankMultiHeadPool(64, heads=4)(torch.randn(2, 50, 64))
    >>> pooled.shape, weights.shape
    (torch.Size([2, 4, 64]), torch.Size([2, 4, 50]))
    """

    def __init__(
        self, dim: int, heads: int = 8, rank: int = 1, context: str = "learned", normalize: bool = False
    ) -> None:
        super().__init__()
        if heads < 1 or rank < 1:
            raise ValueError(f"LowRankMultiHeadPool: heads and rank must be >= 1, got {heads} and {rank}")
        if context not in CONTEXTS:
            raise ValueError(
                f"LowRankMultiHeadPool: context must be one of {', '.join(CONTEXTS)}, got {context!r}"
            )
        self.heads, self.rank, self.normalize = heads, rank, normalize
        self.P = nn.Parameter(dim**-0.5 * torch.randn(dim, heads * rank))
        self.Q = nn.Parameter(dim**-0.5 * torch.randn(dim, heads * rank))
        self.c = nn.Parameter(torch.randn(dim)) if context == "learned" else None

    def scores(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        """f (B, m, n) of states (B, n, dim); in at least float32."""
        wide = torch.promote_types(h.dtype, torch.float32)
        if self.c is not None:
            c = self.c.expand(len(h), -1)  # (B, dim)
        elif mask is None:
            c = h.mean(1)
        else:
            c = h.masked_fill(~mask.unsqueeze(2), 0.0).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        left = (h @ self.P.to(h.dtype)).to(wide)  # (B, n, m r)
        right = (c.to(h.dtype) @ self.Q.to(h.dtype)).to(wide)  # (B, m r)
        f = (left * right.unsqueeze(1)).unflatten(2, (self.heads, self.rank)).sum(3)  # (B, n, m)
        return (F.normalize(f, dim=2) if self.normalize else f).transpose(1, 2)

    def forward(self, h: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(R (B, m, dim), A (B, m, n)).

        Args:
            h: (B, n, dim).
            mask: bool (B, n), True for tokens that count; None: all. A row of none gives weights and means of 0.
        """
        if mask is not None and (mask.dtype != torch.bool or mask.shape != h.shape[:2]):
            raise ValueError(
                f"LowRankMultiHeadPool: mask must be bool {tuple(h.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
            )
        f = self.scores(h, mask)
        if mask is None:
            weights = f.softmax(-1)
        else:
            out = ~mask.unsqueeze(1)
            weights = f.masked_fill(out, torch.finfo(f.dtype).min).softmax(-1).masked_fill(out, 0.0)
            h = h.masked_fill(~mask.unsqueeze(2), 0.0)  # whatever padding holds
        return weights.to(h.dtype) @ h, weights

    def extra_repr(self) -> str:
        return f"heads={self.heads}, rank={self.rank}, normalize={self.normalize}"


class GRULamaClassifier(nn.Module):
    """Classes of a text: embedding, bidirectional GRU, the pool above, one linear map of all pooled vectors.

    Args:
        vocab: number of tokens; token 0 is padding, at the end of a row.
        classes: how many.
        dim: width of embeddings and, both directions together, of the states.
        heads, rank, context, normalize: as in `LowRankMultiHeadPool`.
        dropout: on embeddings and on the pooled vectors.

    Shape: ids (B, n) -> logits (B, classes).

    Source: Low Rank Factorization for Compact Multi-Head Self-Attention (2019).

    >>> GRULamaClassifier(100, 6, dim=32)(torch.randint(1, 100, (2, 12))).shape
    torch.Size([2, 6])
    """

    def __init__(
        self,
        vocab: int,
        classes: int,
        dim: int = 64,
        heads: int = 8,
        rank: int = 1,
        context: str = "learned",
        normalize: bool = False,
        *,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"GRULamaClassifier: dim must be even (two directions), got {dim}")
        self.embed = nn.Embedding(vocab, dim, padding_idx=0)
        self.encoder = nn.GRU(dim, dim // 2, batch_first=True, bidirectional=True)
        self.pool = LowRankMultiHeadPool(dim, heads, rank, context, normalize)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(heads * dim, classes)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """States (B, n, dim), which padding does not reach, and the mask of tokens (B, n)."""
        mask = ids != 0
        lengths = mask.sum(1)
        if bool((lengths == 0).any()) or not torch.equal(
            mask, torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        ):
            raise ValueError(
                "GRULamaClassifier: ids must have a token in every row, and padding (0) at its end"
            )
        packed = nn.utils.rnn.pack_padded_sequence(
            self.dropout(self.embed(ids)), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(
            self.encoder(packed)[0], batch_first=True, total_length=ids.shape[1]
        )
        return states, mask

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, classes)."""
        pooled, _ = self.pool(*self.encode(ids))
        return self.out(self.dropout(pooled.flatten(1)))

    def weights(self, ids: Tensor) -> Tensor:
        """How much each token counts in each head, (B, heads, n)."""
        return self.pool(*self.encode(ids))[1]
