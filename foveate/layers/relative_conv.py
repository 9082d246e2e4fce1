"""Relative convolutional attention: a short causal convolution of queries, keys and values, and learned offsets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from foveate.core.attention import attention
from foveate.core.patterns import Causal, Pattern, SlidingWindow
from foveate.core.scores import Bias
from foveate.layers.short_conv import ShortConv

BUFFER = 1 << 22  # elements of the relative logits that are held at a time


def relative_shift(scores: Tensor, keys: int) -> Tensor:
    """From logits by table row to logits by key: out[..., i, j] = scores[..., i, j + N - 1 - i].

    With rows P - M + 1 ... P + N - 1 of a table whose row P - o belongs to the offset o = (i + M - N) - j, the
    result is each query's logit with its own row for every key; the last query is aligned with the last key.

    Args:
        scores: (..., N, N + M - 1).
        keys: M.

    Returns:
        (..., N, M).

    >>> relative_shift(torch.tensor([[0, 1, 2], [0, 1, 2]]), 2)  # rows of the offsets 1, 0, -1
    tensor([[1, 2],
            [0, 1]])
    """
    n, width = scores.shape[-2:]
    if keys < 1 or width != n + keys - 1:
        raise ValueError(
            f"relative_shift: scores must be (..., N, N + keys - 1), got {tuple(scores.shape)}, {keys}"
        )
    padded = F.pad(scores, (0, 1)).flatten(-2)  # one column more: a row further is one column less
    return padded[..., n - 1 : n - 1 + n * width].unflatten(-1, (n, width))[..., :keys]


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    bias: Tensor,
    content: Tensor,
    *,
    pattern: Pattern | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    engine: str = "auto",
) -> Tensor:
    """Causal attention with a learned vector and scalar for every offset.

        e_ij = scale ((q_i + u_h) . k_j + q_i . R_{h, i-j} + b_{h, i-j}),   out_i = sum_{j <= i} softmax_j(e_ij) v_j

    The logits of the offsets are made for a block of queries at a time, `BUFFER` elements or one query; in training
    they are made again in the backward pass. So memory grows with M, not with N M.

    Args:
        q: (B, H, N, D); k: (B, H, M, D); v: (B, H, M, Dv), N <= M; the last query stands at the last key.
        table: R, (2P, H, D), row P - o for the offset o; N <= P and M <= P + 1.
        bias: b, (2P, H). content: u, (H, D).
        pattern: which pairs count besides causality; None: all.
        scale, dropout_p, engine: as in `attention`; the scale is on all three terms.

    Returns:
        (B, H, N, Dv).

    Raises:
        ValueError: shapes that do not fit, or more tokens than the table has offsets.

    >>> q = k = v = torch.randn(1, 2, 5, 4)
    >>> zero = torch.zeros(16, 2, 4), torch.zeros(16, 2), torch.zeros(2, 4)
    >>> torch.allclose(relative_attention(q, k, v, *zero), attention(q, k, v, is_causal=True), atol=1e-6)
    True
    """
    heads, n, dim = q.shape[1:]
    m, reach = k.shape[2], len(table) // 2
    if (
        table.shape != (2 * reach, heads, dim)
        or bias.shape != table.shape[:2]
        or content.shape != (heads, dim)
    ):
        raise ValueError(
            f"table must be (2 P, {heads}, {dim}), bias (2 P, {heads}) and content ({heads}, {dim}); "
            f"got {tuple(table.shape)}, {tuple(bias.shape)} and {tuple(content.shape)}"
        )
    if k.shape[1] != heads or n > m or n > reach or m > reach + 1:
        raise ValueError(
            f"k must have {heads} heads and {n} to {reach + 1} keys, q at most {reach} tokens (the table has {reach} "
            f"offsets); got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    factor = dim**-0.5 if scale is None else scale

    def rows(q: Tensor, k: Tensor, v: Tensor, table: Tensor, bias: Tensor, content: Tensor) -> Tensor:
        """The last queries among the keys up to them."""
        near = slice(reach - k.shape[2] + 1, reach + q.shape[2])  # N + M - 1 offsets, the furthest first
        wide = torch.promote_types(q.dtype, torch.float32)
        by_row = torch.einsum("bhnd,rhd->bhnr", q, table[near].to(q.dtype)).to(wide)
        by_row = by_row + bias[near].to(wide).t()[:, None]
        score = Bias(factor * relative_shift(by_row, k.shape[2]))  # (B, H, N, M)
        out = attention(
            q + content.to(q.dtype)[:, None], k, v, pattern, is_causal=True, score=score, scale=factor,
            dropout_p=dropout_p, engine=engine,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    block, past, parts = max(1, BUFFER // (q.shape[0] * heads * 2 * m)), m - n, []
    if n <= block:
        return rows(q, k, v, table, bias, content)
    for start in range(0, n, block):
        stop = min(n, start + block)
        given = q[:, :, start:stop], k[:, :, : past + stop], v[:, :, : past + stop], table, bias, content
        parts.append(
            checkpoint(rows, *given, use_reentrant=False) if torch.is_grad_enabled() else rows(*given)
        )
    return torch.cat(parts, 2)


@dataclass(frozen=True, eq=False)
class RelativeConvState:
    """What decoding keeps: the last kernel - 1 projected tokens of q, k and v, and the keys and values so far.

    Attributes:
        before: three tensors (B, kernel - 1, H D), or None without a convolution.
        k, v: (B, H, L, D), convolved; with a window the last window - 1 of them.
        position: tokens seen.
    """

    before: tuple[Tensor, ...] | None
    k: Tensor
    v: Tensor
    position: int

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return sum(t.nbytes for t in (self.k, self.v, *(self.before or ())))


class RelativeConvAttention(nn.Module):
    """Causal multi-head attention on convolved projections, with learned relative positions in the logits.

        q = DW(x W_q), k = DW(x W_k), v = DW(x W_v),   DW(y)_t = beta + sum_{s < kernel} w_s * y_{t-s}
        e_ij = ((q_i + u_h) . k_j + q_i . R_{h, i-j} + b_{h, i-j}) / sqrt(D)

    R, b and u start at 0. The four ablations of the paper: conv and relative both False are plain attention (MHA),
    conv alone MDHA, relative alone RMHA, both RCMHA.

    Args:
        dim, heads: width of the tokens; heads of dim / heads.
        conv, relative: with the convolutions; with R, b and u. Without `relative` the layer knows no positions.
        kernel: taps of the convolutions.
        share_conv: one filter per channel of a head, the same for all heads (the paper); False: one per channel.
        max_offset: P, the greatest distance; at most P tokens.
        window: each query sees this many keys including its own; None: all before it.
        dropout: on the weights, in train mode.

    Shape: (B, N, dim) -> (B, N, dim). W_q and W_k have no bias, W_v and the output have one.

    Source: RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling (2023); convolutions after
    Primer (2021), offsets after Transformer-XL (2019).

    >>> layer = RelativeConvAttention(32, heads=4, max_offset=64)
    >>> x = torch.randn(1, 20, 32)
    >>> out, state = layer(x[:, :19], state=layer.initial_state(x))
    >>> last, state = layer(x[:, 19:], state=state)
    >>> torch.allclose(layer(x)[:, 19:], last, atol=1e-6), [t.shape[1] for t in state.before]
    (True, [2, 2, 2])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        conv: bool = True,
        relative: bool = True,
        kernel: int = 3,
        share_conv: bool = True,
        max_offset: int = 4096,
        window: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(
                f"RelativeConvAttention: dim must be a multiple of heads, got dim={dim}, heads={heads}"
            )
        if max_offset < 1 or not 0 <= dropout < 1:
            raise ValueError(
                "RelativeConvAttention: max_offset must be >= 1 and dropout in [0, 1), "
                f"got {max_offset} and {dropout}"
            )
        self.heads, self.head_dim, self.window, self.dropout = heads, dim // heads, window, dropout
        self.pattern: Pattern = Causal() if window is None else Causal() & SlidingWindow(window)
        self.q_proj, self.k_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.v_proj, self.o_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        channels = self.head_dim if share_conv else dim
        self.convs = nn.ModuleList(ShortConv(channels, kernel, bias=True) for _ in range(3)) if conv else None
        self.table = self.bias = self.content = None
        if relative:
            self.table = nn.Parameter(torch.zeros(2 * max_offset, heads, self.head_dim))  # R
            self.bias = nn.Parameter(torch.zeros(2 * max_offset, heads))  # b
            self.content = nn.Parameter(torch.zeros(heads, self.head_dim))  # u

    def forward(
        self, x: Tensor, *, state: RelativeConvState | None = None
    ) -> Tensor | tuple[Tensor, RelativeConvState]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        projected = [proj(x) for proj in (self.q_proj, self.k_proj, self.v_proj)]  # (B, N, H D) each
        before = None
        if self.convs is not None:
            old = [None] * 3 if state is None or state.before is None else state.before
            mixed = [self._convolved(*each) for each in zip(self.convs, projected, old, strict=True)]
            projected, before = [y for y, _ in mixed], tuple(after for _, after in mixed)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in projected)  # (B, H, N, D)
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        dropout = self.dropout if self.training else 0.0
        if self.table is not None and self.bias is not None and self.content is not None:
            pattern = None if self.window is None else self.pattern
            out = relative_attention(
                q, k, v, self.table, self.bias, self.content, pattern=pattern, dropout_p=dropout
            )
        else:
            out = attention(q, k, v, self.pattern, dropout_p=dropout)
        assert isinstance(out, Tensor)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        if state is None:
            return out
        keep = k.shape[2] if self.window is None else min(k.shape[2], self.window - 1)
        k, v = k[:, :, k.shape[2] - keep :], v[:, :, v.shape[2] - keep :]
        return out, RelativeConvState(before, k, v, state.position + x.shape[1])

    def initial_state(self, x: Tensor) -> RelativeConvState:
        """The state before the first token, for inputs like x (B, N, dim)."""
        none = self.v_proj(x[:, :0]).unflatten(2, (self.heads, -1)).transpose(1, 2)
        before = None
        if self.convs is not None:
            y = self.q_proj(x[:, :0])  # (B, 0, H D)
            before = tuple(self._convolved(conv, y, None)[1] for conv in self.convs)
        return RelativeConvState(before, none, none, 0)

    def _convolved(self, conv: nn.Module, y: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor]:
        """(convolved (B, N, H D), the last kernel - 1 of y); heads are batch rows where they share filters."""
        shared = conv.weight.shape[0] != y.shape[2]  # pyright: ignore

        def fold(t: Tensor) -> Tensor:  # (B, N, H D) -> (B H, N, D)
            return t.unflatten(2, (self.heads, -1)).transpose(1, 2).flatten(0, 1) if shared else t

        def unfold(t: Tensor) -> Tensor:
            return t.unflatten(0, (y.shape[0], -1)).transpose(1, 2).flatten(2) if shared else t

        out, after = conv(fold(y), state=conv.initial_state(fold(y)) if old is None else fold(old))  # pyright: ignore
        return unfold(out), unfold(after)

    def extra_repr(self) -> str:
        offsets = None if self.table is None else len(self.table) // 2
        return (
            f"heads={self.heads}, conv={self.convs is not None}, max_offset={offsets}, window={self.window}"
        )
