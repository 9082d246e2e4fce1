"""Causal multi-head softmax attention with a pattern and rotary positions: the yardstick of all mixers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.core.attention import attention
from foveate.core.patterns import Causal, Pattern, SlidingWindow
from foveate.core.rotary import Rotary


@dataclass(frozen=True, eq=False)
class KeyValueState:
    """Keys (rotated) and values seen so far, (B, Hkv, L, D); with a window the last window - 1 of them. Immutable.

    Attributes:
        position: tokens seen, of which L are held.
    """

    k: Tensor
    v: Tensor
    position: int

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.k.nbytes + self.v.nbytes


class SelfAttention(nn.Module):
    """Causal multi-head attention: out = merge(softmax(q k^T / sqrt(D)) v) W_o over the pairs of a pattern.

    Args:
        dim: width of the tokens.
        heads, kv_heads: query heads, and key/value heads that they share; kv_heads None: as many as heads.
        window: each query sees this many keys including its own; None: all before it.
        rotary: rotate queries and keys (base 10,000); False for models with positions of their own.
        bias: of the four maps.
        dropout: of the weights, in train mode.

    Shape: (B, N, dim) -> (B, N, dim).

    Source: Attention Is All You Need (2017).

    >>> layer = SelfAttention(32, heads=4, window=8)
    >>> x = torch.randn(1, 20, 32)
    >>> out, state = layer(x[:, :19], state=layer.initial_state(x))
    >>> last, state = layer(x[:, 19:], state=state)
    >>> torch.allclose(layer(x)[:, 19:], last, atol=1e-6), state.k.shape
    (True, torch.Size([1, 4, 7, 8]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        window: int | None = None,
        rotary: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads or dim % heads:
            raise ValueError(
                "SelfAttention: dim must be a multiple of heads, and heads of kv_heads; "
                f"got dim={dim}, heads={heads}, kv_heads={kv_heads}"
            )
        self.heads, self.kv_heads, self.window, self.head_dim = heads, kv_heads, window, dim // heads
        self.dropout = dropout
        self.pattern: Pattern = Causal() if window is None else Causal() & SlidingWindow(window)
        self.rotary = Rotary() if rotary else None
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)

    def forward(
        self, x: Tensor, *, state: KeyValueState | None = None
    ) -> Tensor | tuple[Tensor, KeyValueState]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        q, k, v = (
            proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, N, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = 0 if state is None else state.position
        if self.rotary is not None:
            at = torch.arange(seen, seen + x.shape[1], device=x.device)
            q, k = self.rotary(q, at), self.rotary(k, at)
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        out = attention(q, k, v, self.pattern, dropout_p=self.dropout if self.training else 0.0)
        assert isinstance(out, Tensor)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        if state is None:
            return out
        keep = k.shape[2] if self.window is None else min(k.shape[2], self.window - 1)
        return out, KeyValueState(
            k[:, :, k.shape[2] - keep :], v[:, :, v.shape[2] - keep :], seen + x.shape[1]
        )

    def initial_state(self, x: Tensor) -> KeyValueState:
        """The state before the first token, for inputs like x (B, N, dim)."""
        none = self.k_proj(x[:, :0]).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        return KeyValueState(none, none, 0)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, window={self.window}"
