"""Varying window attention: small query windows that read contexts many times as large, packed into as few keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.vision import windows

EDGES = ("clamped", "copy-shift")


@lru_cache(maxsize=64)
def context_places(cells: int, window: int, ratio: int, edge: str = "clamped") -> Tensor:
    """Where the contexts of one axis read: int64 (windows, ratio * window), -1 where there is padding.

        clamped: ratio * window places from clip(i window - ceil((ratio - 1) window / 2), 0, cells - ratio window) on
        copy-shift: the same places in another order at the borders: those that the shift inwards adds come first at the
            left border and last at the right one, as the released code gets them by padding with copies

    Where ratio * window exceeds the axis, it is surrounded by padding first: clamped contexts are all of it, those of
    copy-shift what the released code reads then.

    Args:
        cells: of the axis, a multiple of window.
        window: p, cells of a query window; ratio: R.
        edge: "clamped" or "copy-shift".

    >>> context_places(8, 2, 2).tolist()
    [[0, 1, 2, 3], [1, 2, 3, 4], [3, 4, 5, 6], [4, 5, 6, 7]]
    >>> context_places(8, 2, 2, "copy-shift").tolist()
    [[3, 0, 1, 2], [1, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7, 4]]
    """
    if edge not in EDGES:
        raise ValueError(f"context_places: edge must be one of {', '.join(EDGES)}, got {edge!r}")
    side = ratio * window
    around = -(-(ratio - 1) * window // 2)  # places before the window, rounded up
    with torch.inference_mode(False), torch.device("cpu"):  # kept for others, whoever asks first
        return _places(cells, window, side, around, edge)


def _places(cells: int, window: int, side: int, around: int, edge: str) -> Tensor:
    place = torch.arange(cells)
    if side > cells:  # zeros around the map, more of them at its end
        before = (side - cells) // 2
        place = F.pad(place, (before, side - cells - before), value=-1)
    if edge == "clamped":
        own = torch.arange(cells // window) * window
        first = (own - around).clamp(0, len(place) - side)
        return place[first[:, None] + torch.arange(side)]
    left, right = place[side - around : side], place[len(place) - side :][:around]
    return torch.cat([left, place[place >= 0], right]).unfold(0, side, window)


class VaryingWindowAttention(nn.Module):
    """Query windows of p x p tokens that read the R p x R p tokens around them.

        E = ReLU(BN(conv_{R x R}(x)))  C -> C / R^2 channels, the same size
        K_w = S2D_R(E[context of w])   p x p keys of C channels: R x R cells of E side by side
        o = softmax(q k(K_w)^T / sqrt(C / h)) v(K_w)   for the queries of window w,  out = o W_O (+ x)

    q, k and v are linear maps, without positions. The context is the square around the window, moved inwards at the
    borders of the map. A query has p^2 keys whatever R is, and the convolution costs C^2 per token whatever R is. With
    `rescale=False` the keys are the (R p)^2 tokens themselves: R^2 times as many.

    Args:
        dim: C; with rescale a multiple of R^2.
        heads: h (1 in the released models).
        windows: windows per column and row of the map, or one int for both; p = side / windows.
        ratio: R; 1 is plain window attention.
        rescale: with the convolution; False: the naive form.
        shortcut: adds x.
        edge: order of the context's tokens at the borders. "clamped": as in the map. "copy-shift": as the released code
            pads, with the columns from beyond the border at the other end; S2D then packs tokens together that are not
            neighbours where (R - 1) p / 2 is not a multiple of R. Without rescale both are the same up to rounding.
        output_norm: a batch norm in place of the output's bias, which starts at 0 (the released ADE20K models).

    Shape: (B, H, W, C) -> (B, H, W, C). Errors: ValueError unless the windows divide H and W.

    Source: Multi-Scale Representations by Varying Window Attention for Semantic Segmentation (2024). Differs: windows
    in the natural order by default. Where R p exceeds the map, zeros surround it, as in the released code.

    >>> layer = VaryingWindowAttention(32, windows=4, ratio=2)
    >>> layer(torch.randn(1, 8, 16, 32)).shape
    torch.Size([1, 8, 16, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        windows: int | tuple[int, int] = 8,
        ratio: int = 4,
        rescale: bool = True,
        shortcut: bool = True,
        edge: str = "clamped",
        output_norm: bool = False,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(
                f"VaryingWindowAttention: dim must be a multiple of heads, got {dim} and {heads}"
            )
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio < 1:
            raise ValueError(f"VaryingWindowAttention: ratio must be an int >= 1, got {ratio!r}")
        if rescale and dim % ratio**2:
            raise ValueError(
                f"VaryingWindowAttention: dim must be a multiple of ratio^2 = {ratio**2}, got {dim}"
            )
        if edge not in EDGES:
            raise ValueError(f"VaryingWindowAttention: edge must be one of {', '.join(EDGES)}, got {edge!r}")
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.windows = _pair(windows)
        self.ratio, self.rescale, self.shortcut, self.edge = ratio, rescale, shortcut, edge
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.o_proj = nn.Linear(dim, dim, bias=not output_norm)
        self.norm = nn.BatchNorm2d(dim) if output_norm else None
        if self.norm is not None:
            nn.init.zeros_(self.norm.weight)
        self.scaling = _ConvNormAct(dim, dim // ratio**2, ratio) if rescale else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ValueError(f"VaryingWindowAttention: x must be (B, H, W, {self.dim}), got {tuple(x.shape)}")
        _, h, w, _ = x.shape
        nh, nw = self.windows
        ph, pw = h // nh, w // nw
        if h % nh or w % nw or not ph * pw:
            raise ValueError(
                f"VaryingWindowAttention: H and W must be multiples of the {nh} x {nw} windows, got {h} x {w}"
            )
        context = x
        if self.scaling is not None:
            r = self.ratio
            pad = (r // 2 - 1, r // 2) if r % 2 == 0 else (r // 2, r // 2)
            context = self.scaling(F.pad(x.permute(0, 3, 1, 2), pad + pad)).permute(
                0, 2, 3, 1
            )  # (B, H, W, C / R^2)
        rows, columns = (
            context_places(n, p, self.ratio, self.edge).to(x.device) for n, p in ((h, ph), (w, pw))
        )  # (nh, R ph), (nw, R pw)
        cells = context[
            :, rows.clamp(min=0)[:, :, None, None], columns.clamp(min=0)
        ]  # (B, nh, R ph, nw, R pw, C')
        if self.ratio * ph > h or self.ratio * pw > w:
            real = (rows >= 0)[:, :, None, None] & (columns >= 0)  # zeros around the map are keys, too
            cells = cells * real[..., None].to(cells.dtype)
        cells = cells.permute(0, 1, 3, 2, 4, 5)  # (B, nh, nw, R ph, R pw, C')
        if self.scaling is not None:  # space to depth: R x R cells side by side, then their channels
            r = self.ratio
            cells = cells.unflatten(4, (pw, r)).unflatten(3, (ph, r))  # (B, nh, nw, ph, R, pw, R, C')
            cells = cells.permute(0, 1, 2, 3, 5, 4, 6, 7).flatten(5)  # (B, nh, nw, ph, pw, C)
        cells = cells.flatten(3, 4).flatten(0, 2)  # (G, keys, C)
        split = lambda t: t.unflatten(2, (self.heads, -1)).transpose(1, 2)  # noqa: E731  (G, heads, n, d)
        own = windows.partition(x, (ph, pw))  # (G, ph pw, C)
        out = windows.attend(split(self.q_proj(own)), split(self.k_proj(cells)), split(self.v_proj(cells)))
        out = windows.merge(self.o_proj(out.transpose(1, 2).flatten(2)), (ph, pw), (h, w))
        if self.norm is not None:
            out = self.norm(out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + out if self.shortcut else out

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, windows={self.windows}, ratio={self.ratio}, rescale={self.rescale}"


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return windows.pair("VaryingWindowAttention", "windows", value)


class _ConvNormAct(nn.Sequential):
    """Convolution without bias, batch norm, ReLU on (B, C, H, W)."""

    def __init__(self, dim: int, out: int, kernel: int = 1) -> None:
        super().__init__(nn.Conv2d(dim, out, kernel, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class VWFormerDecoder(nn.Module):
    """A decoder for segmentation: contexts of several sizes around every token of a fused map.

        X = ConvBN([up(W4 c4); up(W3 c3); W2 c2])
        Z = ConvBN([ConvBN(X); pool(X); VWA_R(X) for R in ratios]),  scores = W ConvBN([up(Z); W1 c1])

    Args:
        in_channels: of the four maps c1 .. c4 of a backbone, fine to coarse.
        dim: width of the decoder (512 in the released models); low: of the finest map (48).
        ratios: R of the branches.
        windows, heads, edge, output_norm: as of `VaryingWindowAttention`.
        num_classes: of the scores.
        image_pool: with the branch of the pooled map (ADE20K); the Cityscapes models have none.
        shortcut: of the attention (ADE20K).
        dropout: of whole channels before the scores in train mode.

    Shape: maps (B, C_i, H_i, W_i) -> (B, num_classes, H_1, W_1). c2 must have sides as `VaryingWindowAttention` takes
    them.

    Source: Multi-Scale Representations by Varying Window Attention for Semantic Segmentation (2024).

    >>> decoder = VWFormerDecoder((4, 8, 8, 8), dim=16, low=4, ratios=(2, 4), windows=2, num_classes=5).eval()
    >>> maps = [torch.randn(1, c, s, s) for c, s in ((4, 16), (8, 8), (8, 4), (8, 2))]
    >>> decoder(maps).shape
    torch.Size([1, 5, 16, 16])
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (96, 192, 384, 768),
        *,
        dim: int = 512,
        low: int = 48,
        ratios: Sequence[int] = (2, 4, 8),
        windows: int | tuple[int, int] = 8,
        heads: int = 1,
        num_classes: int = 150,
        image_pool: bool = True,
        shortcut: bool = True,
        edge: str = "clamped",
        output_norm: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if len(in_channels) != 4:
            raise ValueError(f"VWFormerDecoder: in_channels must be four, got {tuple(in_channels)}")
        self.low = nn.Linear(in_channels[0], low)
        self.lateral = nn.ModuleList(nn.Linear(width, dim) for width in in_channels[1:])
        self.fuse = _ConvNormAct(3 * dim, dim)
        self.short = _ConvNormAct(dim, dim)
        self.pooled = _ConvNormAct(dim, dim) if image_pool else None
        self.attentions = nn.ModuleList(
            VaryingWindowAttention(
                dim, heads, windows=windows, ratio=r, shortcut=shortcut, edge=edge, output_norm=output_norm
            )
            for r in ratios
        )
        self.join = _ConvNormAct((1 + image_pool + len(ratios)) * dim, dim)
        self.refine = _ConvNormAct(dim + low, dim)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Scores (B, num_classes, H_1, W_1) of the maps of a backbone."""
        if len(maps) != 4:
            raise ValueError(f"VWFormerDecoder: maps must be four, got {len(maps)}")
        size = maps[1].shape[2:]
        resize = lambda t, to: F.interpolate(t, to, mode="bilinear", align_corners=False)  # noqa: E731
        linear = lambda f, t: f(t.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # noqa: E731  (B, C, H, W)
        fine = [resize(linear(f, t), size) for f, t in zip(self.lateral, maps[1:], strict=True)]
        x = self.fuse(torch.cat(fine[::-1], 1))  # coarse first
        branches = [self.short(x)]
        if self.pooled is not None:
            branches.append(self.pooled(x.mean((2, 3), keepdim=True)).expand_as(x))
        branches += [linear(attention, x) for attention in self.attentions]
        x = resize(self.join(torch.cat(branches, 1)), maps[0].shape[2:])
        x = self.refine(torch.cat([x, linear(self.low, maps[0])], 1))
        return self.head(self.dropout(x))
