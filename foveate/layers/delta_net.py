"""DeltaNet: a linear memory that writes the difference to what it would have read, with or without forgetting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from foveate.layers.norms import RMSNorm
from foveate.layers.short_conv import ShortConv
from foveate.linear.scan import LinearState, linear_attention


@dataclass(frozen=True, eq=False)
class DeltaNetState:
    """Last tokens of the three convolutions, each (B, kernel - 1, dim) (none without convolution), and the memory."""

    convs: tuple[Tensor, ...]
    memory: LinearState


class DeltaNet(nn.Module):
    """Causal linear attention with the delta rule.

        q, k = norm2(silu(conv(x W_q))), norm2(silu(conv(x W_k))),   v = silu(conv(x W_v)),   beta_t = sigmoid(x_t W_b)
        S_t = S' + beta_t k_t^T (v_t - k_t S'),   S' = a_t S_{t-1},   o_t = D^-1/2 q_t S_t,   out = rmsnorm(o) W_o

    Writing a key anew replaces its value. a_t = 1; with `gated` a_t = exp(-exp(A) softplus(x_t W_a + b)), one number
    per head.

    Args:
        dim: width of the tokens; heads: of q, k, v.
        conv: kernel of the short convolutions; 0: none.
        gated: decay with the delta rule (Gated DeltaNet); here without the paper's output gate.

    Shape: (B, N, dim) -> (B, N, dim). State: heads x D x D numbers and the convolutions' last tokens.

    Sources: Linear Transformers Are Secretly Fast Weight Programmers (2021); Parallelizing Linear Transformers with the
    Delta Rule over Sequence Length (2024); Gated Delta Networks (2024).

    >>> layer = DeltaNet(32, heads=2)
    >>> x = torch.randn(1, 20, 32)
    >>> out, state = layer(x[:, :19], state=layer.initial_state(x))
    >>> last, state = layer(x[:, 19:], state=state)
    >>> torch.allclose(layer(x)[:, 19:], last, atol=1e-5), state.memory.kv.shape
    (True, torch.Size([1, 2, 16, 16]))
    """

    def __init__(self, dim: int, heads: int, *, conv: int = 4, gated: bool = False) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"DeltaNet: dim must be a multiple of heads, got {dim} and {heads}")
        self.heads = heads
        self.projections = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(3))  # q, k, v
        self.convs = nn.ModuleList(ShortConv(dim, conv, activation="silu") for _ in range(3 if conv else 0))
        self.b_proj = nn.Linear(dim, heads, bias=False)
        if gated:
            self.a_proj = nn.Linear(dim, heads)
            self.A = nn.Parameter(torch.zeros(heads))
        else:
            self.a_proj = None
        self.norm = RMSNorm(dim // heads, eps=1e-5)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, *, state: DeltaNetState | None = None
    ) -> Tensor | tuple[Tensor, DeltaNetState]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        before = self.initial_state(x) if state is None else state
        given, after = [], []
        for i, proj in enumerate(self.projections):
            y = proj(x)
            if self.convs:
                y, last = self.convs[i](y, state=before.convs[i])
                after.append(last)
            else:
                y = nn.functional.silu(y)
            given.append(y.unflatten(2, (self.heads, -1)).transpose(1, 2))  # (B, heads, N, D)
        q, k, v = given
        q, k = nn.functional.normalize(q, dim=-1, eps=1e-6), nn.functional.normalize(k, dim=-1, eps=1e-6)
        beta = torch.sigmoid(self.b_proj(x)).transpose(1, 2)  # (B, heads, N)
        decay = None
        if self.a_proj is not None:
            decay = -self.A.exp().view(-1, 1) * nn.functional.softplus(self.a_proj(x)).transpose(1, 2)
        got = linear_attention(
            q,
            k,
            v,
            beta=beta,
            log_decay=decay,
            scale=q.shape[-1] ** -0.5,
            state=before.memory,
            return_state=True,
        )
        assert isinstance(got, tuple)
        out = self.o_proj(self.norm(got[0].transpose(1, 2)).flatten(2))
        return out if state is None else (out, DeltaNetState(tuple(after), got[1]))

    def initial_state(self, x: Tensor) -> DeltaNetState:
        """The state before the first token, for inputs like x (B, N, dim)."""
        none = x[:, :0].unflatten(2, (self.heads, -1)).transpose(1, 2)
        convs = tuple(conv.initial_state(x) for conv in self.convs)  # pyright: ignore
        return DeltaNetState(convs, LinearState.empty(none, none))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, gated={self.a_proj is not None}"
