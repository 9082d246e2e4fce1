"""Gated linear attention: every channel of the state forgets at a rate that the token chooses."""

from __future__ import annotations

from torch import Tensor, nn

from foveate.layers.norms import RMSNorm
from foveate.linear.scan import LinearState, linear_attention


class GatedLinearAttention(nn.Module):
    """Causal linear attention with a data-dependent decay per channel and an output gate.

        a_t = sigmoid(x_t W_a1 W_a2 + b)^(1/16),    S_t = diag(a_t) S_{t-1} + k_t^T v_t,    o_t = D_k^-1/2 q_t S_t
        out = (rmsnorm(o) * silu(x W_g)) W_o

    Args:
        dim: width of the tokens.
        heads: of q, k and v.
        expand_k, expand_v: widths of all keys and of all values, in units of dim.
        rank: of the decay's projection.
        slow: the gate's logarithm is divided by this, 16 in the paper: most of the state survives a token.

    Shape: (B, N, dim) -> (B, N, dim). State: `foveate.linear.LinearState`, heads x D_k x D_v numbers.

    Source: Gated Linear Attention Transformers with Hardware-Efficient Training (2023).

    >>> import torch
    >>> layer = GatedLinearAttention(32, heads=2)
    >>> x = torch.randn(1, 20, 32)
    >>> out, state = layer(x[:, :19], state=layer.initial_state(x))
    >>> last, state = layer(x[:, 19:], state=state)
    >>> torch.allclose(layer(x)[:, 19:], last, atol=1e-6), state.kv.shape
    (True, torch.Size([1, 2, 8, 16]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        rank: int = 16,
        slow: float = 16.0,
    ) -> None:
        super().__init__()
        keys, values = round(dim * expand_k), round(dim * expand_v)
        if heads < 1 or keys % heads or values % heads or not keys:
            raise ValueError(
                "GatedLinearAttention: dim * expand_k and dim * expand_v must be multiples of heads, got "
                f"{keys}, {values} and {heads}"
            )
        self.heads, self.slow = heads, slow
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.a_proj = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, keys))
        self.g_proj = nn.Linear(dim, values, bias=False)
        self.norm = RMSNorm(values // heads, eps=1e-5)
        self.o_proj = nn.Linear(values, dim, bias=False)

    def forward(self, x: Tensor, *, state: LinearState | None = None) -> Tensor | tuple[Tensor, LinearState]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        q, k, v, a = (
            proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D)
            for proj in (self.q_proj, self.k_proj, self.v_proj, self.a_proj)
        )
        decay = nn.functional.logsigmoid(a) / self.slow
        got = linear_attention(
            q, k, v, log_decay=decay, scale=q.shape[-1] ** -0.5, state=state, return_state=True
        )
        assert isinstance(got, tuple)
        out = self.norm(got[0].transpose(1, 2)).flatten(2)  # (B, N, values)
        out = self.o_proj(out * nn.functional.silu(self.g_proj(x)))
        return out if state is None else (out, got[1])

    def initial_state(self, x: Tensor) -> LinearState:
        """The state before the first token, for inputs like x (B, N, dim)."""
        k, v = (
            proj(x[:, :0]).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for proj in (self.k_proj, self.v_proj)
        )
        return LinearState.empty(k, v)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, slow={self.slow}"
