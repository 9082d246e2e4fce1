"""Short causal convolution of every channel by itself: what most linear mixers put before the state."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ShortConv(nn.Module):
    """out[t, c] = b[c] + sum_{i < K} w[c, i] x[t - K + 1 + i, c], zeros before the first token (depthwise, causal).

    Args:
        dim: channels; kernel: K; bias: learn b.
        activation: "silu" or None.

    Shape: (B, N, dim) -> (B, N, dim). The state of decoding is the last K - 1 tokens, (B, K - 1, dim).

    >>> conv = ShortConv(4, 3)
    >>> x = torch.randn(2, 10, 4)
    >>> out, state = conv(x[:, :7], state=conv.initial_state(x))
    >>> rest, state = conv(x[:, 7:], state=state)
    >>> torch.allclose(conv(x), torch.cat([out, rest], 1), atol=1e-6), state.shape
    (True, torch.Size([2, 2, 4]))
    """

    def __init__(
        self, dim: int, kernel: int = 4, *, bias: bool = False, activation: str | None = None
    ) -> None:
        super().__init__()
        if kernel < 1 or activation not in ("silu", None):
            raise ValueError(
                f"ShortConv: kernel must be >= 1 and activation 'silu' or None, got {kernel} and {activation!r}"
            )
        self.kernel, self.activation = kernel, activation
        self.weight = nn.Parameter(torch.empty(dim, kernel).uniform_(-(kernel**-0.5), kernel**-0.5))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor, *, state: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        before = self.initial_state(x) if state is None else state
        joined = torch.cat([before, x], 1)  # (B, K - 1 + N, dim)
        n = x.shape[1]
        out = sum(joined[:, i : i + n] * self.weight[:, i] for i in range(self.kernel))
        assert isinstance(out, Tensor)
        out = out if self.bias is None else out + self.bias
        out = torch.nn.functional.silu(out) if self.activation == "silu" else out
        return out if state is None else (out, joined[:, n:])

    def initial_state(self, x: Tensor) -> Tensor:
        """Zeros (B, K - 1, dim), for inputs like x (B, N, dim)."""
        return x.new_zeros(x.shape[0], self.kernel - 1, x.shape[2])

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel={self.kernel}, activation={self.activation}"
