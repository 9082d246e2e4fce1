"""Varied-size windows: every head of every window moves and scales the rectangle that its keys and values come from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.vision.blocks import ConvPositionEncoding, DropPath, Mlp, init_
from foveate.vision.swin import Swin, Window
from foveate.vision.windows import RelativePositionBias2d, attend, merge, pad_to, pair, partition


class VariedSizeWindowAttention(nn.Module):
    """Queries of a fixed window read w x w keys and values sampled from a rectangle that the window's content chooses.

        z = LeakyReLU(mean of the window's cells),  s = W_s z + b_s,  o = W_o z + b_o     per head, (x, y)
        p_u = m + u (1 + s) + o (N - 1) / (2 n)                                        of slot u, in cells
        out = softmax(q k(p_u)^T / sqrt(d) + T[slots]) v(p_u) W

    m: centre of the window; u: place of a slot relative to it; N: cells of the padded axis; n: whole windows on the
    axis, at least 1. k(p) and v(p) are bilinear, zero outside the map. W_s, W_o and their biases start at zero:
    attention inside fixed windows. T belongs to slots, not to distances, so that it is bent with the window. Costs w^2
    pairs per query and head.

    Args:
        dim: C, a multiple of heads.
        heads: H.
        window: w, one int or (rows, columns). Maps are padded at the right and bottom; keys and values there are zero.
        bias: of the query, key and value maps; the output map always has one.
        relative_bias: with T.
        count_padding: n counts windows that padding completes, too; not so in the released code.

    Shape: (B, h, w, C) -> the same, any h and w.

    Source: VSA: Learning Varied-Size Window Attention in Vision Transformers (2022). Differs: any size at each call;
    n is at least 1; sampling is done in float32 at least. The position convolution is part of `VSABlock`.

    >>> layer = VariedSizeWindowAttention(32, heads=2, window=4)
    >>> layer(torch.randn(2, 13, 11, 32)).shape
    torch.Size([2, 13, 11, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Window = 7,
        *,
        bias: bool = True,
        relative_bias: bool = True,
        count_padding: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(
                f"VariedSizeWindowAttention: dim must be a multiple of heads, got {dim} and {heads}"
            )
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.window = pair("VariedSizeWindowAttention", "window", window)
        self.count_padding = count_padding
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.position = RelativePositionBias2d(self.window, heads) if relative_bias else None
        self.offset = nn.Linear(dim, 2 * heads)
        self.scale = nn.Linear(dim, 2 * heads)
        self.proj = nn.Linear(dim, dim)
        init_(self)
        for part in (self.offset, self.scale):
            nn.init.zeros_(part.weight)

    def predict_windows(self, x: Tensor) -> dict[str, Tensor]:
        """The rectangles of a map, each (B, H, rows, columns, 2) with (x, y) last.

        "center": their centres, in cells; "offset": how far these are from the windows' own, in cells; "scale": s, so
        that slots are 1 + s cells apart. In float32 at least.
        """
        self._check(x)
        (h, w), window = x.shape[1:3], self.window
        work = torch.promote_types(x.dtype, torch.float32)
        x = pad_to(x, window)
        rows, columns = x.shape[1] // window[0], x.shape[2] // window[1]
        z = F.leaky_relu(partition(x, window).mean(1))  # (B rows columns, C)
        found = [
            part(z).view(-1, rows, columns, self.heads, 2).permute(0, 3, 1, 2, 4).to(work)
            for part in (self.offset, self.scale)
        ]
        whole = (columns, rows) if self.count_padding else (max(w // window[1], 1), max(h // window[0], 1))
        unit = [(size - 1) / (2 * n) for size, n in zip((x.shape[2], x.shape[1]), whole, strict=True)]
        offset = found[0] * found[0].new_tensor(unit)
        mid = [
            side * torch.arange(n, device=x.device, dtype=work) + (side - 1) / 2
            for side, n in zip(window, (rows, columns), strict=True)
        ]
        own = torch.stack(torch.meshgrid(*mid, indexing="ij")[::-1], 2)  # (rows, columns, 2) of (x, y)
        return {"center": own + offset, "offset": offset, "scale": found[1]}

    def _places(self, x: Tensor) -> Tensor:
        """Where keys and values come from, in cells: (B, H, rows, columns, w, w, 2) with (x, y) last."""
        found = self.predict_windows(x)
        at = [torch.arange(n, device=x.device) - (n - 1) / 2 for n in self.window]
        slots = torch.stack(torch.meshgrid(*at, indexing="ij")[::-1], 2)  # (wh, ww, 2) of (x, y)
        return found["center"][..., None, None, :] + slots.to(found["scale"]) * (
            1 + found["scale"][..., None, None, :]
        )

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ValueError(
                f"VariedSizeWindowAttention: x must be (B, h, w, {self.dim}), got {tuple(x.shape)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        (b, h, w, _), heads, d = x.shape, self.heads, self.head_dim
        qkv = pad_to(self.qkv(x), self.window)  # (B, h', w', 3 C), zeros where x is padded
        grid = (qkv.shape[1], qkv.shape[2])
        q = partition(qkv[..., : self.dim], self.window).unflatten(2, (heads, d)).transpose(1, 2)

        places = self._places(x)
        last = places.new_tensor([max(n - 1, 1) for n in reversed(grid)])
        places = (
            (2 * places / last - 1).flatten(5, 6).flatten(2, 4)
        )  # (B, H, slots of all windows, 2) in [-1, 1]
        maps = (
            qkv[..., self.dim :].unflatten(3, (2, heads, d)).permute(0, 4, 3, 5, 1, 2)
        )  # (B, H, 2, d, h', w')
        maps = maps.reshape(b * heads, 2 * d, *grid).to(places.dtype)
        read = F.grid_sample(
            maps, places.reshape(b * heads, -1, 1, 2), "bilinear", "zeros", align_corners=True
        )
        n = self.window[0] * self.window[1]
        read = (
            read.to(x.dtype).view(b, heads, 2, d, -1, n).permute(2, 0, 4, 1, 5, 3)
        )  # (2, B, windows, H, n, d)
        k, v = read.flatten(1, 2)

        out = attend(q, k, v, bias=None if self.position is None else self.position())
        return self.proj(merge(out.transpose(1, 2).flatten(2), self.window, grid)[:, :h, :w])

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}"


class VSABlock(nn.Module):
    """x + depthwise convolution of x, then x + VSA(LN x), then x + MLP(LN x).

    The convolution is as large as the window (one more where that is even), since slots no longer tell distances.

    Args:
        dim, heads, window, bias: of `VariedSizeWindowAttention`; window an int.
        mlp_ratio, drop_path: as of `SwinBlock`.
        position_encoding: with the convolution.

    Shape: (B, h, w, C) -> the same.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int = 7,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        bias: bool = True,
        position_encoding: bool = True,
    ) -> None:
        super().__init__()
        self.position = ConvPositionEncoding(dim, window + 1 - window % 2) if position_encoding else None
        self.norm1 = nn.LayerNorm(dim)
        self.attention = VariedSizeWindowAttention(dim, heads, window, bias=bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        init_(self.mlp)

    def forward(self, x: Tensor) -> Tensor:
        if self.position is not None:
            x = self.position(x)
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SwinVSA(Swin):
    """Swin with `VSABlock` in every place: no shifts, windows that vary.

    Args:
        dim, depths, heads, window, patch, mlp_ratio, drop_path, num_classes, in_channels, features_only: of `Swin`;
            window an int.

    Source: VSA: Learning Varied-Size Window Attention in Vision Transformers (2022).

    >>> model = SwinVSA(dim=16, depths=(1, 1), heads=(1, 2), window=4, num_classes=10)
    >>> model(torch.randn(2, 3, 61, 47)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        *,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        patch: int = 4,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.2,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
    ) -> None:
        super().__init__(
            dim=dim,
            depths=depths,
            heads=heads,
            window=window,
            patch=patch,
            drop_path=drop_path,
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
            block=lambda width, h, _, rate: VSABlock(width, h, window, mlp_ratio=mlp_ratio, drop_path=rate),
        )

    def resize_window_(self, window: Window) -> Swin:
        raise ValueError(
            f"SwinVSA: windows cannot be changed, got {window}: its convolutions have their size"
        )


def swin_vsa_tiny(
    *,
    window: int = 7,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    features_only: bool = False,
) -> SwinVSA:
    """Swin-T with varied-size windows: 28,779,274 parameters."""
    return SwinVSA(
        window=window,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def swin_vsa_small(
    *,
    window: int = 7,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.3,
    features_only: bool = False,
) -> SwinVSA:
    """Swin-S with varied-size windows."""
    return SwinVSA(
        depths=(2, 2, 18, 2),
        window=window,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )
