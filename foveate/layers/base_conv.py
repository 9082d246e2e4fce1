"""BaseConv: a gated short convolution, the companion of recall mixers in the MQAR studies."""

from __future__ import annotations

from torch import Tensor, nn

from foveate.layers.short_conv import ShortConv


class BaseConv(nn.Module):
    """out = conv(x) * (x W + b) + x, with a depthwise causal convolution with bias.

    Args:
        dim: width of the tokens; kernel: of the convolution.

    Shape: (B, N, dim) -> (B, N, dim). State: the last kernel - 1 tokens.

    Source: Zoology: Measuring and Improving Recall in Efficient Language Models (2023); the short form of its code.

    >>> import torch
    >>> layer = BaseConv(8)
    >>> x = torch.randn(2, 10, 8)
    >>> layer(x).shape, layer.initial_state(x).shape
    (torch.Size([2, 10, 8]), torch.Size([2, 2, 8]))
    """

    def __init__(self, dim: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = ShortConv(dim, kernel, bias=True)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, state: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """out (B, N, dim); with the state of the tokens before, (out, state after these)."""
        mixed, after = self.conv(x, state=self.initial_state(x) if state is None else state)
        out = mixed * self.proj(x) + x
        return out if state is None else (out, after)

    def initial_state(self, x: Tensor) -> Tensor:
        """Zeros (B, kernel - 1, dim), for inputs like x (B, N, dim)."""
        return self.conv.initial_state(x)
