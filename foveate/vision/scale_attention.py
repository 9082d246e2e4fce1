"""DuoFormer: regions of a convolutional pyramid, attention over the scales inside each, then over the regions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foveate.vision.backbone import Backbone
from foveate.vision.blocks import drop_path_rates, init_, interpolate_map
from foveate.vision.resnet import resnet18, resnet50
from foveate.vision.shifted_ensemble import ViTLayer
from foveate.vision.windows import Pair, attend, pair, partition


def tokens_of(scales: int) -> int:
    """T = 1 + 4 + 16 + ...: tokens of a region without the scale token.

    >>> [tokens_of(n) for n in (1, 2, 3, 4)]
    [1, 5, 21, 85]
    """
    if isinstance(scales, bool) or not isinstance(scales, int) or scales < 1:
        raise ValueError(f"DuoFormer: scales must be an int >= 1, got {scales!r}")
    return (4**scales - 1) // 3


class ScaleTokens(nn.Module):
    """The levels of a pyramid as one set of tokens per cell of the coarsest: 1, 4, 16, 64, ... aligned ones.

        u_r = [s; P_3 f3_r; P_2 f2_r; P_1 f1_r; P_0 f0_r],   P_l: a 1 x 1 convolution to dim

    Args:
        channels: of the levels, fine to coarse; as many as scales, or more, whose finest are then left out.
        dim: D, width of the tokens.
        scales: levels used.
        scale_token: s: "learned", one vector; "channel": made from the content, all levels averaged to the coarsest
            grid, side by side, through two 3 x 3 convolutions.

    Shape: maps (B, C_i, h 2^(n-i), w 2^(n-i)), fine to coarse -> (B, h, w, T + 1, D), T = 1 + 4 + ... + 4^(scales-1):
    the scale token, then coarse to fine, each level in row-major order. ValueError where a level is not twice the next.

    Source: DuoFormer (2025). Differs: the convolutions of "channel" (with a ReLU between) are our reading.

    >>> maps = [torch.randn(1, 4, 8, 12), torch.randn(1, 8, 4, 6), torch.randn(1, 16, 2, 3)]
    >>> ScaleTokens((4, 8, 16), 32, scales=3)(maps).shape
    torch.Size([1, 2, 3, 22, 32])
    """

    def __init__(
        self,
        channels: Sequence[int] = (256, 512, 1024, 2048),
        dim: int = 768,
        scales: int = 4,
        *,
        scale_token: str = "learned",
    ) -> None:
        super().__init__()
        self.tokens = tokens_of(scales)
        if scales > len(channels):
            raise ValueError(f"ScaleTokens: scales must be at most {len(channels)} for {tuple(channels)} channels, "
                             f"got {scales}")  # fmt: skip
        if scale_token not in ("learned", "channel"):
            raise ValueError(f"ScaleTokens: scale_token must be 'learned' or 'channel', got {scale_token!r}")
        self.scales, self.dim = scales, dim
        used = tuple(channels)[len(channels) - scales :]
        self.project = nn.ModuleList(nn.Conv2d(c, dim, 1) for c in used)
        self.token = nn.Parameter(torch.empty(dim)) if scale_token == "learned" else None
        self.content = None
        if scale_token == "channel":
            self.content = nn.Sequential(
                nn.Conv2d(sum(used), dim, 3, padding=1), nn.ReLU(), nn.Conv2d(dim, dim, 3, padding=1)
            )
        for conv in self.project:
            nn.init.kaiming_normal_(conv.weight)  # type: ignore[arg-type]
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        if self.token is not None:
            nn.init.normal_(self.token, std=0.036)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        if len(maps) < self.scales:
            raise ValueError(f"ScaleTokens: maps must be at least {self.scales}, got {len(maps)}")
        levels = list(maps)[len(maps) - self.scales :]  # fine to coarse
        b, _, h, w = levels[-1].shape
        for i, level in enumerate(levels):
            step = 2 ** (self.scales - 1 - i)
            if tuple(level.shape[2:]) != (h * step, w * step):
                raise ValueError(
                    f"ScaleTokens: maps must halve from level to level, got {[tuple(m.shape[2:]) for m in levels]}"
                )
        if self.content is not None:
            pooled = [
                nn.functional.avg_pool2d(level, 2 ** (self.scales - 1 - i)) for i, level in enumerate(levels)
            ]
            first = self.content(torch.cat(pooled, 1)).permute(0, 2, 3, 1)  # (B, h, w, D)
        else:
            assert self.token is not None
            first = self.token.expand(b, h, w, -1)
        parts = [first[..., None, :]]
        for i in reversed(range(self.scales)):
            side = 2 ** (self.scales - 1 - i)
            cells = partition(self.project[i](levels[i]).permute(0, 2, 3, 1), side)  # (B h w, side^2, D)
            parts.append(cells.view(b, h, w, side * side, self.dim))
        return torch.cat(parts, 3)  # (B, h, w, T + 1, D)


class PlainAttention(nn.Module):
    """Multi-head attention among all tokens, without residual, norm or MLP: (B, n, C) -> (B, n, C)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"PlainAttention: dim must be a multiple of heads, got {dim} and {heads}")
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, n, D) each
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class ScalePatchAttention(nn.Module):
    """Attention over the scales inside each region, and over the regions' scale tokens and a class token.

        u_r <- Transformer_scale(u_r + e),   s_r = (u_r)_0
        [c; s_1; ...; s_R] <- Transformer_patch([c; s_1; ...; s_R] + p)

    Costs R (T + 1)^2 + (R + 1)^2 pairs per layer and head, where attention among all R T tokens costs (R T)^2.

    Args:
        dim, heads, depth: D, H, and layers of either kind.
        scales: levels of the pyramid, for the width of the table e (T + 1, D), shared by all regions.
        regions: (h, w) or one side of the table p, resized bicubically to other grids.
        order: "separate": all layers over scales, then all over regions; "alternate": in turn, the regions' results
            being the scale tokens of the next layer.
        patch_block: "block": pre-norm attention and MLP, also over regions; "attn": attention alone over regions,
            without residual, norm and MLP.
        mlp_ratio: width of the MLPs over dim; drop_path: of the last layer, growing from 0.

    Shape: (B, h, w, T + 1, D) -> ((B, D), (B, h, w, D)): the class token and the regions', normed.

    Source: DuoFormer (2025). Differs: pre-norm blocks over regions by default, where a re-implementation has "attn".

    >>> layer = ScalePatchAttention(16, heads=2, depth=1, scales=2, regions=3)
    >>> top, regions = layer(torch.randn(2, 3, 4, 6, 16))
    >>> top.shape, regions.shape
    (torch.Size([2, 16]), torch.Size([2, 3, 4, 16]))
    """

    def __init__(
        self,
        dim: int = 768,
        heads: int = 12,
        depth: int = 12,
        *,
        scales: int = 4,
        regions: int | Pair = 7,
        order: str = "separate",
        patch_block: str = "block",
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if order not in ("separate", "alternate"):
            raise ValueError(f"ScalePatchAttention: order must be 'separate' or 'alternate', got {order!r}")
        if patch_block not in ("block", "attn"):
            raise ValueError(
                f"ScalePatchAttention: patch_block must be 'block' or 'attn', got {patch_block!r}"
            )
        if depth < 1:
            raise ValueError(f"ScalePatchAttention: depth must be >= 1, got {depth}")
        grid = pair("ScalePatchAttention", "regions", regions)
        self.dim, self.tokens, self.order = dim, tokens_of(scales), order
        (rates,) = drop_path_rates(drop_path, (depth,))
        layer = lambda rate: ViTLayer(dim, heads, mlp_ratio=mlp_ratio, drop_path=rate)  # noqa: E731
        self.scale_layers = nn.ModuleList(layer(rate) for rate in rates)
        self.patch_layers = nn.ModuleList(
            layer(rate) if patch_block == "block" else PlainAttention(dim, heads) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        init_(self)
        self.scale_table = nn.Parameter(torch.empty(self.tokens + 1, dim))
        self.class_token = nn.Parameter(torch.empty(dim))
        self.class_position = nn.Parameter(torch.empty(dim))
        self.region_positions = nn.Parameter(torch.empty(1, *grid, dim))
        for table in (self.scale_table, self.class_token, self.class_position, self.region_positions):
            nn.init.trunc_normal_(table, std=0.036, a=-0.072, b=0.072)

    def over_scales(self, x: Tensor, layer: nn.Module) -> Tensor:
        """One layer inside each region: (B, h, w, T + 1, D) -> the same."""
        return layer(x.flatten(0, 2)).view(x.shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 5 or x.shape[3:] != (self.tokens + 1, self.dim):
            raise ValueError(
                f"ScalePatchAttention: x must be (B, h, w, {self.tokens + 1}, {self.dim}), got {tuple(x.shape)}"
            )
        b, h, w = x.shape[:3]
        x = x + self.scale_table
        places = interpolate_map(self.region_positions, (h, w)).flatten(1, 2)  # (1, h w, D)
        start = (self.class_token + self.class_position).expand(b, 1, -1)
        if self.order == "separate":
            for layer in self.scale_layers:
                x = self.over_scales(x, layer)
            z = torch.cat([start, x[:, :, :, 0].flatten(1, 2) + places], 1)  # (B, 1 + h w, D)
            for layer in self.patch_layers:
                z = layer(z)
        else:
            z = start
            for i, (scale, patch) in enumerate(zip(self.scale_layers, self.patch_layers, strict=True)):
                x = self.over_scales(x, scale)
                cells = x[:, :, :, 0].flatten(1, 2)  # (B, h w, D)
                z = patch(torch.cat([z[:, :1], cells if i else cells + places], 1))
                x = torch.cat([z[:, 1:].view(b, h, w, 1, self.dim), x[:, :, :, 1:]], 3)
        z = self.norm(z)
        return z[:, 0], z[:, 1:].view(b, h, w, self.dim)

    def extra_repr(self) -> str:
        return f"tokens={self.tokens} + 1, order={self.order!r}"


class _Maps(list):
    """Maps of a DuoFormer, and the class token that its head reads."""

    class_token: Tensor


class DuoFormer(Backbone):
    """A convolutional pyramid, its tokens by region, attention over scales and regions, a head on the class token.

    Args:
        cnn: a `Backbone` made with features_only, whose maps halve from level to level.
        dim, heads, depth, scales, regions, order, patch_block, mlp_ratio: of `ScalePatchAttention`.
        scale_token: of `ScaleTokens`.
        num_classes, drop_path: as of every `Backbone`; images have the cnn's channels.
        features_only: `forward` gives [(B, dim, h, w)], the regions' tokens, normed.

    Shape: (B, C, H, W) -> (B, num_classes). Sides must be multiples of the cnn's coarsest stride (32 for a ResNet),
    else a ValueError: finer levels could not be aligned.

    Source: DuoFormer: Leveraging Hierarchical Representations by Local and Global Attention Vision Transformer (2025).

    >>> from foveate.vision import ResNet
    >>> cnn = ResNet((1, 1, 1, 1), width=4, features_only=True)
    >>> DuoFormer(cnn, dim=16, heads=2, depth=1, num_classes=3)(torch.randn(2, 3, 64, 96)).shape
    torch.Size([2, 3])
    """

    def __init__(
        self,
        cnn: Backbone,
        *,
        dim: int = 768,
        heads: int = 12,
        depth: int = 12,
        scales: int = 4,
        scale_token: str = "learned",
        regions: int | Pair = 7,
        order: str = "separate",
        patch_block: str = "block",
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        features_only: bool = False,
    ) -> None:
        if not cnn.features_only:
            raise ValueError("DuoFormer: cnn must be made with features_only=True")
        super().__init__(
            channels=(dim,),
            strides=cnn.strides[-1:],
            num_classes=num_classes,
            in_channels=cnn.in_channels,
            features_only=features_only,
        )
        self.cnn = cnn
        self.tokens = ScaleTokens(cnn.channels, dim, scales, scale_token=scale_token)
        self.attention = ScalePatchAttention(
            dim,
            heads,
            depth,
            scales=scales,
            regions=regions,
            order=order,
            patch_block=patch_block,
            mlp_ratio=mlp_ratio,
            drop_path=drop_path,
        )
        self.make_head()
        if self.head is not None:
            init_(self.head)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """[(B, dim, h, w)]: the regions' tokens, normed; the list carries the class token besides."""
        self.check(images)
        multiple = self.strides[0]
        if images.shape[2] % multiple or images.shape[3] % multiple:
            raise ValueError(
                f"DuoFormer: image sides must be multiples of {multiple}, got {tuple(images.shape[2:])}"
            )
        top, regions = self.attention(self.tokens(self.cnn(images)))
        found = _Maps([regions.permute(0, 3, 1, 2)])
        found.class_token = top
        return found

    def pool(self, maps: list[Tensor]) -> Tensor:
        """(B, dim): the class token of maps from `forward_features`."""
        if not isinstance(maps, _Maps):
            raise TypeError(
                f"DuoFormer: maps must come from its forward_features, got a {type(maps).__name__}"
            )
        return maps.class_token


def duoformer(
    *,
    backbone: str = "resnet50",
    scales: int = 4,
    depth: int = 12,
    scale_token: str = "learned",
    order: str = "separate",
    patch_block: str = "block",
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> DuoFormer:
    """DuoFormer of width 768 and 12 heads on a ResNet: 49 regions for images of 224 x 224.

    >>> with torch.device("meta"):
    ...     model = duoformer(backbone="resnet18", scales=3)
    >>> model.tokens.tokens, model.cnn.channels
    (21, (64, 128, 256, 512))
    """
    makers = {"resnet18": resnet18, "resnet50": resnet50}
    if backbone not in makers:
        raise ValueError(f"duoformer: backbone must be one of {', '.join(makers)}, got {backbone!r}")
    return DuoFormer(
        makers[backbone](in_channels=in_channels, features_only=True),
        depth=depth,
        scales=scales,
        scale_token=scale_token,
        order=order,
        patch_block=patch_block,
        num_classes=num_classes,
        drop_path=drop_path,
        features_only=features_only,
    )
