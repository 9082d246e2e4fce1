"""What backbones are put together from: MLP, norms, drop path, depthwise position encoding, squeeze-and-excite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Padding = Literal["zeros", "reflect", "replicate", "circular"]


class Mlp(nn.Module):
    """Linear, activation, Linear on the last axis.

    Args:
        dim, hidden, out: widths; out: as dim.
        act: makes the activation.
        bias: of both maps.

    >>> Mlp(8, 32)(torch.randn(2, 5, 7, 8)).shape
    torch.Size([2, 5, 7, 8])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        out: int | None = None,
        *,
        act: Callable[[], nn.Module] = nn.GELU,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.act = act()
        self.fc2 = nn.Linear(hidden, dim if out is None else out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in train mode each row of the batch is zero with probability `rate`, else divided by 1 - rate.

    Deep Networks with Stochastic Depth (2016).

    >>> DropPath(0.5).eval()(torch.ones(2, 1)).tolist()
    [[1.0], [1.0]]
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"DropPath: rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept.to(x.dtype) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates that grow linearly from 0 to `rate` over all blocks, as one list per stage.

    >>> drop_path_rates(0.2, (2, 1))
    [[0.0, 0.1], [0.2]]
    """
    total = sum(depths)
    flat = iter([rate * i / max(total - 1, 1) for i in range(total)])
    return [[next(flat) for _ in range(depth)] for depth in depths]


class LayerScale(nn.Module):
    """x times a learned vector that starts at `init`, on the last axis. CaiT (2021)."""

    def __init__(self, dim: int, init: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate of their means: (B, C, H, W) -> the same. Squeeze-and-Excitation Networks (2017).

    Args:
        dim, hidden: widths of the two 1 x 1 maps.
        act, gate: make the activations after the first and the second.
        bias: of both maps.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        act: Callable[[], nn.Module] = nn.ReLU,
        gate: Callable[[], nn.Module] = nn.Sigmoid,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(dim, hidden, 1, bias=bias)
        self.act = act()
        self.expand = nn.Conv2d(hidden, dim, 1, bias=bias)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * self.gate(self.expand(self.act(self.reduce(means))))


class ConvPositionEncoding(nn.Module):
    """x + depthwise convolution of x on (B, H, W, C): positions from what lies around. CPVT (2021).

    Args:
        kernel: odd.
        padding_mode: "zeros", or "circular" for layers that must not see borders.

    >>> ConvPositionEncoding(4)(torch.randn(1, 5, 3, 4)).shape
    torch.Size([1, 5, 3, 4])
    """

    def __init__(
        self, dim: int, kernel: int = 3, *, bias: bool = True, padding_mode: Padding = "zeros"
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"ConvPositionEncoding: kernel must be odd, got {kernel}")
        self.conv = nn.Conv2d(
            dim, dim, kernel, padding=kernel // 2, groups=dim, bias=bias, padding_mode=padding_mode
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm, and an activation when one is given, on (B, C, H, W).

    Args:
        padding: kernel // 2 when not given.
        act: makes the activation; None: without.
        norm_init: first weight of the batch norm; 0 makes a residual branch start as nothing.

    >>> ConvNorm(3, 8, 3, stride=2)(torch.randn(2, 3, 7, 9)).shape
    torch.Size([2, 8, 4, 5])
    """

    def __init__(
        self,
        dim: int,
        out: int,
        kernel: int,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        *,
        act: Callable[[], nn.Module] | None = None,
        norm_init: float = 1.0,
        eps: float = 1e-5,
    ) -> None:
        padding = kernel // 2 if padding is None else padding
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out, eps=eps)
        self.norm_init = float(norm_init)
        nn.init.constant_(self.norm.weight, self.norm_init)
        if act is not None:
            self.act = act()

    @torch.no_grad()
    def fused(self) -> nn.Conv2d:
        """One convolution with bias that equals convolution and batch norm in eval mode (without the activation)."""
        norm, old = self.norm, self.conv
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)  # (C,)
        made = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size,  # type: ignore[arg-type]
            old.stride,  # type: ignore[arg-type]
            old.padding,  # type: ignore[arg-type]
            groups=old.groups,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        made.weight.copy_(old.weight * factor[:, None, None, None])
        assert made.bias is not None
        made.bias.copy_(norm.bias - norm.running_mean * factor)
        return made


def init_(module: nn.Module, std: float = 0.02) -> nn.Module:
    """Weights of linear maps and convolutions from a normal cut off at two deviations, biases 0, norms 1 and 0.

    Batch norms inside a `ConvNorm` keep their own first weight. In place; returns the module.
    """
    kept = {id(part.norm) for part in module.modules() if isinstance(part, ConvNorm)}
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)):
            if id(part) not in kept and part.weight is not None:
                nn.init.ones_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module


def interpolate_map(x: Tensor, grid: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """A learned map (1, h, w, C) at another size: (1, *grid, C). The same tensor when the size is the same."""
    if tuple(x.shape[1:3]) == tuple(grid):
        return x
    return F.interpolate(x.permute(0, 3, 1, 2), grid, mode=mode, align_corners=False).permute(0, 2, 3, 1)


def sincos_2d(dim: int, grid: tuple[int, int], base: float = 10000.0) -> Tensor:
    """Sines and cosines of columns, then of rows, (h, w, dim) float32; dim a multiple of 4.

    >>> sincos_2d(8, (3, 5)).shape
    torch.Size([3, 5, 8])
    """
    if dim % 4:
        raise ValueError(f"sincos_2d: dim must be a multiple of 4, got {dim}")
    rate = torch.exp(-math.log(base) * torch.arange(dim // 4) / (dim // 4))
    y, x = (torch.arange(n)[:, None] * rate for n in grid)  # (h, dim / 4), (w, dim / 4)
    parts = torch.cat([x.sin(), x.cos()], 1), torch.cat([y.sin(), y.cos()], 1)
    across = parts[0][None].expand(grid[0], -1, -1)
    return torch.cat([across, parts[1][:, None].expand(-1, grid[1], -1)], 2)
