"""A multi-head layer around local linear attention, with a ridge strength learned for each head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.rotary import Rotary
from foveate.layers.norms import RMSNorm
from foveate.layers.self_attention import KeyValueState
from foveate.linear.local_linear import SOLVERS, local_linear_attention


class LocalLinearAttention(nn.Module):
    """Multi-head attention whose heads fit values on keys linearly around each query.

        q, k = norm(W_q x), norm(W_k x),  v = W_v x,  reg_h = softplus(r_h),  out = merge(local_linear(q, k, v)) W_o

    Queries and keys are RMS-normalised with learned scales, so that reg keeps its meaning during training.

    Args:
        dim: width of the tokens.
        heads, kv_heads: query heads, and key/value heads that they share; kv_heads None: as many as heads.
        reg: what the ridge strengths start from, > 0.
        causal: a token sees itself and what came before; False has no state.
        rotary: rotate queries and keys (base 10,000) after the norm.
        bias: of the four maps.
        solver, cg_iters, tol: as in `foveate.linear.local_linear_attention`.

    Shape: (B, N, dim) -> (B, N, dim). The state is the cache of keys and values.

    Source: Local Linear Attention (2025). Norms and learned strengths are choices of this library.

    >>> layer = LocalLinearAttention(32, heads=4)
    >>> x = torch.randn(1, 20, 32)
    >>> out, state = layer(x[:, :19], state=layer.initial_state(x))
    >>> last, state = layer(x[:, 19:], state=state)
    >>> torch.allclose(layer(x)[:, 19:], last, atol=1e-5), state.k.shape
    (True, torch.Size([1, 4, 20, 8]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        reg: float = 0.1,
        causal: bool = True,
        rotary: bool = False,
        bias: bool = False,
        solver: str = "dense",
        cg_iters: int = 16,
        tol: float = 1e-4,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads or dim % heads:
            raise ValueError(
                "LocalLinearAttention: dim must be a multiple of heads, and heads of kv_heads; "
                f"got dim={dim}, heads={heads}, kv_heads={kv_heads}"
            )
        if not reg > 0:
            raise ValueError(f"LocalLinearAttention: reg must be > 0, got {reg}")
        if solver not in SOLVERS:
            raise ValueError(
                f"LocalLinearAttention: solver must be one of {', '.join(SOLVERS)}, got {solver!r}"
            )
        self.heads, self.kv_heads, self.head_dim, self.causal = heads, kv_heads, dim // heads, causal
        self.solver, self.cg_iters, self.tol = solver, cg_iters, tol
        self.rotary = Rotary() if rotary else None
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)
        self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        self.raw_reg = nn.Parameter(torch.full((heads,), reg + math.log(-math.expm1(-reg))))  # softplus^-1

    @property
    def reg(self) -> Tensor:
        """The ridge strengths, (heads,); at least 1e-6."""
        return F.softplus(self.raw_reg).clamp_min(1e-6)

    def forward(
        self, x: Tensor, *, state: KeyValueState | None = None
    ) -> Tensor | tuple[Tensor, KeyValueState]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        q, k, v = (
            proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, N, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        seen = 0 if state is None else state.position
        if self.rotary is not None:
            at = torch.arange(seen, seen + x.shape[1], device=x.device)
            q, k = self.rotary(q, at), self.rotary(k, at)
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        out = local_linear_attention(
            q, k, v, reg=self.reg, causal=self.causal, solver=self.solver, cg_iters=self.cg_iters, tol=self.tol
        )  # fmt: skip
        assert isinstance(out, Tensor)
        out = self.o_proj(out.transpose(1, 2).flatten(2))
        return out if state is None else (out, KeyValueState(k, v, k.shape[2]))

    def initial_state(self, x: Tensor) -> KeyValueState:
        """The state before the first token, for inputs like x (B, N, dim).

        Raises:
            ValueError: the layer is not causal.
        """
        if not self.causal:
            raise ValueError("LocalLinearAttention: a state needs causal=True")
        none = self.k_proj(x[:, :0]).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        return KeyValueState(none, none, 0)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, causal={self.causal}, solver={self.solver}"
