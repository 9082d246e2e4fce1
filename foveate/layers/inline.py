"""InLine attention as a layer for maps: injective linear attention, and a convolution predicted from the mean token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.linear.inline import FEATURES, inline_attention


class PredictedDepthwiseConv(nn.Module):
    """A depthwise convolution whose kernels are predicted for each sample from one token.

        kernels = W2 gelu(W1 xbar),  W1: C -> C and W2: C -> C kernel^2, both in groups;  out = values * kernels

    Args:
        dim: C, channels.
        groups: of the two maps: the heads.
        kernel: side of the kernels, odd.

    Source: Bridging the Divide: Reconsidering Softmax and Linear Attention (2024).

    >>> conv = PredictedDepthwiseConv(8, groups=2)
    >>> conv(torch.randn(3, 8, 5, 6), torch.randn(3, 8)).shape
    torch.Size([3, 8, 5, 6])
    """

    def __init__(self, dim: int, groups: int, kernel: int = 3) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(
                f"PredictedDepthwiseConv: dim must be a multiple of groups, got {dim} and {groups}"
            )
        if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"PredictedDepthwiseConv: kernel must be an odd int >= 1, got {kernel!r}")
        self.kernel = kernel
        self.predictor = nn.Sequential(
            nn.Conv1d(dim, dim, 1, groups=groups),
            nn.GELU(),
            nn.Conv1d(dim, dim * kernel**2, 1, groups=groups),
        )

    def forward(self, values: Tensor, token: Tensor) -> Tensor:
        """(B, C, h, w) from values (B, C, h, w) and the token (B, C) that the kernels are predicted from."""
        b, c = token.shape
        if values.ndim != 4 or values.shape[:2] != (b, c):
            raise ValueError(
                f"PredictedDepthwiseConv: values must be ({b}, {c}, h, w), got {tuple(values.shape)}"
            )
        kernels = self.predictor(token.unsqueeze(2)).view(b * c, 1, self.kernel, self.kernel)
        out = F.conv2d(values.flatten(0, 1).unsqueeze(0), kernels, padding=self.kernel // 2, groups=b * c)
        return out.view(values.shape)


class InLineAttention2d(nn.Module):
    """Injective linear attention on a grid of tokens, and a predicted convolution of the values.

        out = (merge(O) + V * kernels(xbar)) W_O,   O = `inline_attention`(Q, K, V),   xbar = mean of the tokens

    Args:
        dim: C, width of the tokens.
        heads: H.
        resolution: (h, w), rows and columns of the tokens in row-major order; None: a square.
        class_token: the tokens begin with one more, which takes part in the attention and in xbar, but is not
            convolved.
        feature: phi, see `inline_attention`.
        local: with the convolution.
        bias: of the query, key and value maps; the output map always has one.

    Shape: (B, N, C) -> (B, N, C), N = h w, one more with a class token. Windows go into the batch: then xbar is the
    mean of a window and the convolution stays inside.

    Source: Bridging the Divide: Reconsidering Softmax and Linear Attention (2024).

    >>> layer = InLineAttention2d(32, heads=4)
    >>> layer(torch.randn(2, 196, 32)).shape, layer(torch.randn(2, 96, 32), resolution=(8, 12)).shape
    (torch.Size([2, 196, 32]), torch.Size([2, 96, 32]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        resolution: tuple[int, int] | None = None,
        *,
        class_token: bool = False,
        feature: str = "identity",
        local: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"InLineAttention2d: dim must be a multiple of heads, got {dim} and {heads}")
        if feature not in FEATURES:
            raise ValueError(
                f"InLineAttention2d: feature must be one of {', '.join(FEATURES)}, got {feature!r}"
            )
        self.heads, self.resolution, self.feature, self.lead = heads, resolution, feature, int(class_token)
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim)
        self.near = PredictedDepthwiseConv(dim, heads) if local else None

    def forward(self, x: Tensor, *, resolution: tuple[int, int] | None = None) -> Tensor:
        """out (B, N, C) for tokens on `resolution` (h, w); default: the layer's, or a square."""
        if x.ndim != 3:
            raise ValueError(f"InLineAttention2d: x must be (B, N, C), got {tuple(x.shape)}")
        split = lambda t: t.unflatten(2, (self.heads, -1)).transpose(1, 2)  # noqa: E731  (B, H, N, D)
        v = self.v_proj(x)
        out = inline_attention(split(self.q_proj(x)), split(self.k_proj(x)), split(v), feature=self.feature)
        out = out.transpose(1, 2).flatten(2)  # (B, N, C)
        if self.near is not None:
            grid = self._grid(x.shape[1] - self.lead, resolution or self.resolution)
            near = self.near(v[:, self.lead :].mT.unflatten(2, grid), x.mean(1)).flatten(2).mT
            out = torch.cat([out[:, : self.lead], out[:, self.lead :] + near], 1)
        return self.o_proj(out)

    def _grid(self, tokens: int, resolution: tuple[int, int] | None) -> tuple[int, int]:
        side = math.isqrt(tokens)
        h, w = (side, side) if resolution is None else resolution
        if h * w != tokens:
            what = "a square" if resolution is None else f"{h} x {w}"
            raise ValueError(
                f"InLineAttention2d: {tokens} tokens without the class token do not make {what}; pass resolution=(h, w)"
            )
        return h, w

    def extra_repr(self) -> str:
        token = bool(self.lead)
        # fmt: off
        return f"heads={self.heads}, resolution={self.resolution}, feature={self.feature}, class_token={token}"
