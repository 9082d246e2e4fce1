"""Selective self-attention: temperatures of queries, keys and values from the token and its position."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention
from foveate.core.patterns import Causal, Pattern, SlidingWindow
from foveate.core.rotary import Rotary
from foveate.core.scores import Temperature
from foveate.layers.self_attention import KeyValueState

if TYPE_CHECKING:
    from foveate.core.request import Who

STARTS = {"loglog": 2.0, "sigmoid": 0.0}  # of the position's scalar


def selective_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tau_q: Tensor | None = None,
    tau_k: Tensor | None = None,
    tau_v: Tensor | None = None,
    *,
    pattern: Who = None,
    is_causal: bool = True,
    scale: float | None = None,
    engine: str = "auto",
) -> Tensor:
    """Attention with a factor on every query, key and value.

        o_i = sum_j softmax_j(scale (tq_i q_i) . (tk_j k_j)) tv_j v_j

    Args:
        q: (B, H, N, D); k: (B, Hkv, M, D); v: (B, Hkv, M, Dv).
        tau_q: broadcastable to (B, H, N), None: 1. It multiplies the logits in their own precision.
        tau_k, tau_v: (B, Hkv, M) or broadcastable; None: 1.
        pattern, is_causal, scale, engine: as in `attention`.

    Returns:
        (B, H, N, Dv). The weights of a row add up to 1 whatever the factors; out is linear in tau_v.

    >>> q = k = v = torch.randn(1, 2, 5, 4)
    >>> sharp = selective_attention(q, k, v, tau_q=torch.full((1, 2, 5), 1e4))
    >>> torch.isin(sharp, v).all().item()  # every query copies one value
    True
    """
    for name, tau, lead in (
        ("tau_q", tau_q, q.shape[:3]),
        ("tau_k", tau_k, k.shape[:3]),
        ("tau_v", tau_v, v.shape[:3]),
    ):
        if tau is not None and not _fits(tau.shape, lead):
            raise ValueError(f"{name} must broadcast to {tuple(lead)}, got {tuple(tau.shape)}")
    score = None if tau_q is None else Temperature(tau_q)
    out = attention(
        q, _scaled(k, tau_k), _scaled(v, tau_v), pattern, is_causal=is_causal, score=score, scale=scale, engine=engine
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


class SelectiveTemperature(nn.Module):
    """One temperature for each token and head, from what the head already projects.

        tau = tanh(w_h . gelu(y_h) + b_h) + t(n),    n = position + 1
        t(n) = 1 + exp(-exp(b)) log n  ("loglog"),   1 + sigmoid(b) log n  ("sigmoid"),   1  (None)

    w and b_h start at 0, so that training starts from t(n) alone; tau > 0 always. "loglog" starts next to 1 and is for
    trained models (b = 2 gives 1.0043 at n = 1024), "sigmoid" is for training from scratch. The released code tunes b
    by an optimiser of its own (rate 1e-4, no weight decay).

    Args:
        heads, head_dim: of the features.
        token: with the part that reads the token.
        position: "loglog", "sigmoid" or None.
        init: start of the scalar b; default 2 for "loglog", 0 for "sigmoid".

    Shape: (B, H, N, D) -> (B, H, N), in at least float32.

    >>> tau = SelectiveTemperature(2, 4)
    >>> tau(torch.randn(1, 2, 1, 4), torch.tensor([1023])).flatten()
    tensor([1.0043, 1.0043], grad_fn=<ViewBackward0>)
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        token: bool = True,
        position: str | None = "loglog",
        init: float | None = None,
    ) -> None:
        super().__init__()
        if position is not None and position not in STARTS:
            raise ValueError(
                f"SelectiveTemperature: position must be one of {', '.join(STARTS)} or None, got {position!r}"
            )
        self.position = position
        self.weight = nn.Parameter(torch.zeros(heads, head_dim)) if token else None
        self.bias = nn.Parameter(torch.zeros(heads)) if token else None
        start = STARTS.get(position or "") if init is None else init
        self.b = None if position is None else nn.Parameter(torch.tensor(start))

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """tau (B, H, N) of features (B, H, N, D) at int positions (N,) or (B, N), counted from 0."""
        wide = torch.promote_types(features.dtype, torch.float32)
        tau = torch.ones(features.shape[:3], dtype=wide, device=features.device)
        if self.weight is not None and self.bias is not None:
            f = torch.einsum("bhnd,hd->bhn", F.gelu(features), self.weight.to(features.dtype)).to(wide)
            tau = tau + torch.tanh(f + self.bias.to(wide)[:, None])
        if self.b is not None:
            b = self.b.to(wide)
            rate = torch.exp(-torch.exp(b)) if self.position == "loglog" else torch.sigmoid(b)
            n = (positions.to(features.device).to(wide) + 1).log()
            tau = tau + rate * (n if n.ndim == 1 else n[:, None])  # (N,) or (B, 1, N)
        return tau

    def extra_repr(self) -> str:
        return f"token={self.weight is not None}, position={self.position!r}"


class SelectiveSelfAttention(nn.Module):
    """Causal multi-head attention whose queries and values, and keys if asked, have temperatures of their own.

        o_i = sum_{j <= i} softmax_j(tq_i q_i . tk_j k_j / sqrt(D)) tv_j v_j,   tq, tk, tv: `SelectiveTemperature`

    They read the projections before rotation; only the query's knows the position.

    Args:
        dim, heads, kv_heads, window, rotary, bias: as in `SelfAttention`; one group of parameters more per temperature.
        query, key, value: which have a temperature.
        token: the part that reads the token; without it keys and values have none.
        position: "loglog", "sigmoid" or None, of the queries.
        init: start of the position's scalar.

    Shape: (B, N, dim) -> (B, N, dim).

    Source: Selective Attention: Enhancing Transformer through Principled Context Control (2024). Its release holds the
    position's "loglog" form; how the token is read (w_h . gelu of the projection) is this library's choice.

    >>> layer = SelectiveSelfAttention(32, heads=4)
    >>> x = torch.randn(1, 20, 32)
    >>> out, state = layer(x[:, :19], state=layer.initial_state(x))
    >>> last, state = layer(x[:, 19:], state=state)
    >>> torch.allclose(layer(x)[:, 19:], last, atol=1e-6)
    True
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
        query: bool = True,
        key: bool = False,
        value: bool = True,
        token: bool = True,
        position: str | None = "loglog",
        init: float | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads or dim % heads:
            raise ValueError(
                "SelectiveSelfAttention: dim must be a multiple of heads, and heads of kv_heads; "
                f"got dim={dim}, heads={heads}, kv_heads={kv_heads}"
            )
        self.window, self.head_dim = window, dim // heads
        self.pattern: Pattern = Causal() if window is None else Causal() & SlidingWindow(window)
        self.rotary = Rotary() if rotary else None
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)
        d = self.head_dim
        self.tau_q = (
            SelectiveTemperature(heads, d, token=token, position=position, init=init) if query else None
        )
        self.tau_k = SelectiveTemperature(kv_heads, d, position=None) if key and token else None
        self.tau_v = SelectiveTemperature(kv_heads, d, position=None) if value and token else None

    def forward(
        self, x: Tensor, *, state: KeyValueState | None = None
    ) -> Tensor | tuple[Tensor, KeyValueState]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        q, k, v = (
            proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, N, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        seen = 0 if state is None else state.position
        at = torch.arange(seen, seen + x.shape[1], device=x.device)
        tq, tk, tv = (
            None if tau is None else tau(y, at)
            for tau, y in ((self.tau_q, q), (self.tau_k, k), (self.tau_v, v))
        )
        k, v = _scaled(k, tk), _scaled(v, tv)  # rotation keeps factors, and the cache holds them
        if self.rotary is not None:
            q, k = self.rotary(q, at), self.rotary(k, at)
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        out = selective_attention(q, k, v, tq, pattern=self.pattern, is_causal=False)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        if state is None:
            return out
        keep = k.shape[2] if self.window is None else min(k.shape[2], self.window - 1)
        return out, KeyValueState(
            k[:, :, k.shape[2] - keep :], v[:, :, v.shape[2] - keep :], seen + x.shape[1]
        )

    def initial_state(self, x: Tensor) -> KeyValueState:
        """The state before the first token, for inputs like x (B, N, dim)."""
        none = self.v_proj(x[:, :0]).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        return KeyValueState(none, none, 0)


def _scaled(x: Tensor, tau: Tensor | None) -> Tensor:
    """tau x, in x's dtype."""
    return x if tau is None else (x * tau.unsqueeze(-1)).to(x.dtype)


def _fits(shape: torch.Size, lead: torch.Size) -> bool:
    """Whether a shape broadcasts to (B, H, N)."""
    return len(shape) <= 3 and all(a in (1, b) for a, b in zip(reversed(shape), reversed(lead), strict=False))
