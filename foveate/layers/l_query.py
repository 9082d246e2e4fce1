"""MQSA-TED: histories of items read with the last item and with the mean of the last few as queries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention
from foveate.core.patterns import Causal, KeyPadding


def windowed_mean_query(x: Tensor, mask: Tensor, window: int) -> Tensor:
    """The mean of the last `window` items at every place, its own among them; padding does not count.

        qbar_t = sum_{l<L} m_{t-l} x_{t-l} / sum_{l<L} m_{t-l},   0 where there is no item

    Args:
        x: (B, N, dim).
        mask: bool (B, N), True for items.
        window: L, >= 1; 1 gives x itself.

    Returns:
        (B, N, dim).

    >>> x, mask = torch.tensor([[[9.0], [2.0], [4.0], [6.0]]]), torch.tensor([[False, True, True, True]])
    >>> windowed_mean_query(x, mask, 2).flatten().tolist()
    [0.0, 2.0, 3.0, 5.0]
    """
    if window < 1 or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise ValueError(
            f"windowed_mean_query: window must be >= 1 and mask bool {tuple(x.shape[:2])}, got {window} and "
            f"{mask.dtype} {tuple(mask.shape)}"
        )
    count = mask.unsqueeze(2).to(x.dtype)
    x = x.masked_fill(~mask.unsqueeze(2), 0.0)
    total, items = x, count
    for back in range(
        1, min(window, x.shape[1])
    ):  # sums of few terms; differences of prefix sums would cancel
        total = total + F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
        items = items + F.pad(count, (0, 0, back, 0))[:, : x.shape[1]]
    return total / items.clamp_min(1.0)


class LQueryBlock(nn.Module):
    """Causal self-attention that asks with the mean of the last items, and a ReLU network: SASRec's block at window 1.

        q = LN(qbar),   y = q + attend(q W_q, x W_k, x W_v),   out = y' + W_2 ReLU(W_1 y'),   y' = LN(y)

    Keys and values come from x without a norm; the residual adds the normalised query.

    Args:
        dim: width; heads: H, each with scale (dim / H)^-1/2.
        window: L, items averaged.
        dropout: on the attention weights and in the network.

    Source: Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for Sequential
    Recommendation (2023). All maps have a bias.

    >>> LQueryBlock(16, 2, window=4)(torch.randn(2, 9, 16)).shape
    torch.Size([2, 9, 16])
    """

    def __init__(self, dim: int, heads: int, window: int = 1, dropout: float = 0.2) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"LQueryBlock: dim must be a multiple of heads, got {dim} and {heads}")
        if window < 1:
            raise ValueError(f"LQueryBlock: window must be >= 1, got {window}")
        self.heads, self.window, self.dropout = heads, window, dropout
        self.query_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.inner, self.outer = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, dim), 0 at padding; mask bool (B, N), True for items, None: all."""
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        query = self.query_norm(windowed_mean_query(x, mask, self.window))
        q, k, v = (
            proj(y).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D)
            for proj, y in ((self.q_proj, query), (self.k_proj, x), (self.v_proj, x))
        )
        p = self.dropout if self.training else 0.0
        pattern = Causal() if bool(mask.all()) else Causal() & KeyPadding(mask)
        mixed = attention(q, k, v, pattern, dropout_p=p)
        assert isinstance(mixed, Tensor)
        y = self.norm(query + mixed.transpose(1, 2).flatten(2))
        inner = F.dropout(self.inner(y).relu(), p)
        y = y + F.dropout(self.outer(inner), p)
        return y.masked_fill(~mask.unsqueeze(2), 0.0)


class MultiQueryRecommender(nn.Module):
    """Scores of the next item from two towers over the history, one asking with the last item, one with the last few.

        y = (alpha s_short + (1 - alpha) s_long) E^T

    Args:
        num_items: items are numbered from 1; 0 is padding, at the left.
        dim, heads, dropout: of the blocks.
        max_len: longest history; positions count back from its end, so padding moves nothing.
        window: L of the long tower.
        alpha: of the short tower, in [0, 1].
        blocks: of each tower.

    Shape: ids (B, N) -> logits (B, N, num_items + 1); column 0 is padding and -inf.

    Source: Collaboration and Transition: Distilling Item Transitions into Multi-Query Self-Attention for Sequential
    Recommendation (2023).

    >>> MultiQueryRecommender(100)(torch.tensor([[0, 0, 5, 7]])).shape
    torch.Size([1, 4, 101])
    """

    def __init__(
        self,
        num_items: int,
        dim: int = 64,
        max_len: int = 50,
        window: int = 4,
        alpha: float = 0.5,
        blocks: int = 1,
        heads: int = 1,
        *,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        if num_items < 1 or blocks < 1 or not 0 <= alpha <= 1:
            raise ValueError(
                "MultiQueryRecommender: num_items and blocks must be >= 1 and alpha in [0, 1], got "
                f"{num_items}, {blocks} and {alpha}"
            )
        self.max_len, self.alpha, self.dropout = max_len, alpha, dropout
        self.items = nn.Embedding(num_items + 1, dim, padding_idx=0)
        self.positions = nn.Embedding(max_len, dim)
        nn.init.normal_(self.items.weight, std=dim**-0.5)
        nn.init.normal_(self.positions.weight, std=dim**-0.5)
        self.items.weight.data[0] = 0
        self.short, self.long = (
            nn.ModuleList(LQueryBlock(dim, heads, w, dropout) for _ in range(blocks)) for w in (1, window)
        )
        self.short_norm, self.long_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def towers(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """s_short and s_long, each (B, N, dim)."""
        n = ids.shape[1]
        if n > self.max_len:
            raise ValueError(f"MultiQueryRecommender: ids must have at most {self.max_len} columns, got {n}")
        mask = ids != 0
        e = self.items.embedding_dim**0.5 * self.items(ids) + self.positions.weight[self.max_len - n :]
        e = F.dropout(e, self.dropout, self.training).masked_fill(~mask.unsqueeze(2), 0.0)
        short = long = e
        for a, b in zip(self.short, self.long, strict=True):
            short, long = a(short, mask), b(long, mask)
        return self.short_norm(short), self.long_norm(long)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, N, num_items + 1) of the item after each place; left padding (0) changes nothing."""
        short, long = self.towers(ids)
        logits = (self.alpha * short + (1 - self.alpha) * long) @ self.items.weight.T
        none = torch.zeros(logits.shape[-1], dtype=torch.bool, device=ids.device)
        none[0] = True
        return logits.masked_fill(none, -torch.inf)

    @torch.no_grad()
    def recommend(self, ids: Tensor, k: int = 10) -> Tensor:
        """The k best next items (B, k) that are not in the history."""
        logits = self(ids)[:, -1]
        return logits.scatter(1, ids, -torch.inf).topk(k, 1).indices


def transition_matrix(sequences: Iterable[Sequence[int]], num_items: int, hops: int = 1) -> Tensor:
    """How often each item follows each other one within `hops` steps: sparse (num_items + 1, num_items + 1), float32.

    >>> transition_matrix([[1, 2, 3], [2, 3]], 3).to_dense()[1:, 1:].tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]
    """
    if hops < 1:
        raise ValueError(f"transition_matrix: hops must be >= 1, got {hops}")
    pairs: list[tuple[int, int]] = []
    for items in sequences:
        row = [int(i) for i in items if i]  # 0 is padding
        for hop in range(1, hops + 1):
            pairs += zip(row[:-hop], row[hop:], strict=True)
    at = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    if at.numel() and not 0 < int(at.min()) <= int(at.max()) <= num_items:
        raise ValueError(
            f"transition_matrix: items must be 1 to {num_items}, got {int(at.min())} to {int(at.max())}"
        )
    size = (num_items + 1, num_items + 1)
    return torch.sparse_coo_tensor(at, torch.ones(at.shape[1]), size, check_invariants=True).coalesce()


def transition_targets(counts: Tensor, items: Tensor, tau: float = 1.0) -> Tensor:
    """p_i = softmax(T_i / (tau max T_i)) over items 1 .. num_items, (n, num_items); even where nothing followed."""
    rows = counts.index_select(0, items)
    rows = (rows.to_dense() if rows.is_sparse else rows)[:, 1:].float()
    return (rows / rows.amax(1, keepdim=True).clamp_min(1e-12) / tau).softmax(1)


def transition_distillation_loss(
    emb: Tensor, counts: Tensor, items: Tensor, tau: float = 1.0, *, dropout: float = 0.0
) -> Tensor:
    """Embeddings learn which items follow which: the mean cross-entropy of the targets and

        phat_i = softmax(sqrt(dim) E_i E^T / tau)

    Args:
        emb: E (num_items + 1, dim), row 0 padding, which takes no part.
        counts: of `transition_matrix`, sparse or dense.
        items: (n,) items that the loss asks.
        tau: temperature of both, > 0.
        dropout: on E_i.

    >>> counts = transition_matrix([[1, 2, 3]], 3)
    >>> float(transition_distillation_loss(torch.zeros(4, 8), counts, torch.tensor([1, 2])))  # log 3
    1.0986...
    """
    if not tau > 0:
        raise ValueError(f"transition_distillation_loss: tau must be > 0, got {tau}")
    head = F.dropout(emb[items], dropout)
    logits = emb.shape[1] ** 0.5 / tau * head @ emb[1:].T
    return F.cross_entropy(logits, transition_targets(counts, items, tau).to(logits.dtype))
