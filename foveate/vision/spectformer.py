"""SpectFormer: early blocks filter the map in the Fourier domain, later ones attend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention
from foveate.vision.backbone import Backbone
from foveate.vision.blocks import ConvNorm, DropPath, Mlp, drop_path_rates, init_, interpolate_map
from foveate.vision.tokens import PatchEmbed, TokenAttention
from foveate.vision.windows import pair


class SpectralGate(nn.Module):
    """A learned filter per channel, multiplied in the Fourier domain: a circular convolution over the whole map.

        y = irfft2(K * rfft2(x)),  over the H rows and W columns, orthonormal

    Args:
        dim: C.
        grid: (H, W) that the filter is learned for; on another map it is interpolated (bilinear with aligned corners,
            real and imaginary parts apart).
        std: of the normal that real and imaginary parts start from.

    `weight` (H, W // 2 + 1, C, 2): real and imaginary part of each frequency. The transform runs in float32 at least,
    also under autocast.

    Shape: (B, H, W, C) -> (B, H, W, C).

    Source: SpectFormer: Frequency and Attention is what you need in a Vision Transformer (2023), as in Global Filter
    Networks (2021). Differs: any grid.

    >>> SpectralGate(8, (5, 6))(torch.randn(2, 5, 6, 8)).shape
    torch.Size([2, 5, 6, 8])
    """

    def __init__(self, dim: int, grid: int | tuple[int, int], *, std: float = 0.02) -> None:
        super().__init__()
        self.dim, self.grid = dim, pair("SpectralGate", "grid", grid)
        self.weight = nn.Parameter(std * torch.randn(self.grid[0], self.grid[1] // 2 + 1, dim, 2))

    def filter(self, grid: tuple[int, int]) -> Tensor:
        """K (H, W // 2 + 1, C), complex, for a grid."""
        parts = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        shape = (grid[0], grid[1] // 2 + 1)
        if parts.shape[:2] != shape:
            image = parts.flatten(2).permute(2, 0, 1)[None]  # corners aligned: frequency 0 stays frequency 0
            image = F.interpolate(image, shape, mode="bilinear", align_corners=True)
            parts = image[0].permute(1, 2, 0).unflatten(2, (-1, 2))
        return torch.view_as_complex(parts.contiguous())

    @torch.no_grad()
    def resize_(self, grid: int | tuple[int, int]) -> SpectralGate:
        """The filter interpolated for another grid, in place."""
        made = pair("SpectralGate", "grid", grid)
        self.weight = nn.Parameter(torch.view_as_real(self.filter(made)).to(self.weight.dtype).clone())
        self.grid = made
        return self

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ValueError(f"SpectralGate: x must be (B, H, W, {self.dim}), got {tuple(x.shape)}")
        grid = (x.shape[1], x.shape[2])
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        frequencies = torch.fft.rfft2(wide, dim=(1, 2), norm="ortho")  # (B, H, W // 2 + 1, C)
        out = torch.fft.irfft2(frequencies * self.filter(grid), s=grid, dim=(1, 2), norm="ortho")
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, grid={self.grid}"


class SpectralBlock(nn.Module):
    """x + MLP(LN(gate(LN x))): one residual around filter and MLP, on (B, H, W, C)."""

    def __init__(
        self, dim: int, grid: int | tuple[int, int], *, mlp_ratio: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.gate = SpectralGate(dim, grid)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)
        init_(self)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.mlp(self.norm2(self.gate(self.norm1(x)))))


class AttentionBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x), on (B, H, W, C)."""

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attention = TokenAttention(dim, heads, bias=True)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)
        init_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class SpectFormer(Backbone):
    """The vanilla model: patches, learned positions, `alpha` spectral blocks, then attention; the mean is read out.

    Args:
        dim, depth; heads: default dim / 64.
        alpha: spectral blocks, the first ones.
        patch: side of a patch; size: side of the images that filters and positions are learned for; others
            interpolate both. Sides that are not multiples of the patch are padded with zeros, right and bottom.
        mlp_ratio: of all blocks.
        num_classes, in_channels, drop_path, features_only: see `Backbone`.

    Source: SpectFormer (2023). Differs: heads of width 64, where the released code has 6 heads at every width; any
    size of image.
    """

    def __init__(
        self,
        *,
        dim: int = 256,
        depth: int = 12,
        heads: int | None = None,
        alpha: int = 4,
        patch: int = 16,
        size: int = 224,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.1,
        features_only: bool = False,
    ) -> None:
        super().__init__(
            channels=(dim,),
            strides=(patch,),
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        if not 0 <= alpha <= depth:
            raise ValueError(f"SpectFormer: alpha must be in [0, depth = {depth}], got {alpha}")
        heads, side = max(1, dim // 64) if heads is None else heads, -(-size // patch)
        self.embed = PatchEmbed(in_channels, dim, patch)
        self.positions = nn.Parameter(torch.empty(1, side, side, dim))
        nn.init.trunc_normal_(self.positions, std=0.02)
        rates = drop_path_rates(drop_path, [depth])[0]
        self.blocks = nn.ModuleList(
            SpectralBlock(dim, side, mlp_ratio=mlp_ratio, drop_path=rate)
            if i < alpha
            else AttentionBlock(dim, heads, mlp_ratio=mlp_ratio, drop_path=rate)
            for i, rate in enumerate(rates)
        )
        self.make_head(nn.LayerNorm(dim, eps=1e-6))
        if self.head is not None:
            init_(self.head)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        self.check(images)
        x = self.embed(images)  # (B, H, W, C)
        x = x + interpolate_map(self.positions, (x.shape[1], x.shape[2]))
        for block in self.blocks:
            x = block(x)
        return [x.permute(0, 3, 1, 2)]


class ConvMlp(nn.Module):
    """Linear, depthwise 3 x 3 convolution, GELU, Linear on (B, H, W, C)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(F.gelu(x))


class MixBlock(nn.Module):
    """x + mix(LN x), then x + `ConvMlp`(LN x), on (B, H, W, C)."""

    def __init__(self, mix: nn.Module, dim: int, *, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mix = mix
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.mix(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ClassAttention(nn.Module):
    """One query reads all tokens: (B, N, C) -> (B, 1, C); the first token asks. CaiT (2021).

    >>> ClassAttention(32, 2)(torch.randn(3, 10, 32)).shape
    torch.Size([3, 1, 32])
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"ClassAttention: dim must be a multiple of heads, got {dim} and {heads}")
        self.dim, self.heads = dim, heads
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x[:, :1]).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, 1, D)
        k, v = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(cast(Tensor, attention(q, k, v)).transpose(1, 2).flatten(2))


class ClassBlock(nn.Module):
    """(B, N, C) -> (B, C): a class token, the mean of the tokens, reads itself and them, and passes an MLP.

    c = mean(x);  c <- c + ClassAttention(LN [c, x]);  c <- c + MLP(LN c)
    """

    def __init__(self, dim: int, heads: int, *, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attention = ClassAttention(dim, heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        token = x.mean(1, keepdim=True)  # (B, 1, C)
        token = token + self.attention(self.norm1(torch.cat([token, x], 1)))
        return (token + self.mlp(self.norm2(token)))[:, 0]


class Downsample(nn.Module):
    """A 3 x 3 convolution of stride 2 and LayerNorm: (B, C, H, W) -> (B, H / 2, W / 2, out)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class SpectFormerH(Backbone):
    """The hierarchical model: four stages, the first `spectral` of them with spectral gates, the others attend.

    A stem of convolutions (stride 4), `MixBlock`s, a `Downsample` before each later stage; then a `ClassBlock`, whose
    token is read out.

    Args:
        dims, heads, depths, mlp_ratios: per stage; stem: width of the stem.
        spectral: how many stages have spectral gates.
        size: side of the images that filters are learned for; others interpolate them. Any side works.
        token_labels: an auxiliary head on all tokens, as token labelling trains it. In eval mode the scores are those
            of the class token and half of the largest of the tokens'; in train mode `forward` gives the pair (scores,
            token scores (B, H W, num_classes)). Mixing tokens of two images is left to the training loop.
        num_classes, in_channels, drop_path, features_only: see `Backbone`. Maps are normed, but for the last.

    Source: SpectFormer (2023).
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 320, 448),
        heads: Sequence[int] = (2, 4, 10, 14),
        depths: Sequence[int] = (3, 4, 6, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        stem: int = 32,
        spectral: int = 2,
        size: int = 224,
        token_labels: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.1,
        features_only: bool = False,
    ) -> None:
        super().__init__(
            channels=tuple(dims),
            strides=tuple(4 * 2**i for i in range(len(dims))),
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        if not len(dims) == len(heads) == len(depths) == len(mlp_ratios):
            raise ValueError(
                f"SpectFormerH: dims, heads, depths and mlp_ratios must be equally many, got {len(dims)}, "
                f"{len(heads)}, {len(depths)} and {len(mlp_ratios)}"
            )
        if token_labels and (features_only or not num_classes):
            raise ValueError("SpectFormerH: token_labels needs classes and features_only=False")
        self.stem = nn.Sequential(
            ConvNorm(in_channels, stem, 7, 2, act=nn.ReLU),
            ConvNorm(stem, stem, 3, act=nn.ReLU),
            ConvNorm(stem, stem, 3, act=nn.ReLU),
        )
        self.down = nn.ModuleList(
            Downsample(stem if i == 0 else dims[i - 1], dim) for i, dim in enumerate(dims)
        )
        rates = drop_path_rates(drop_path, depths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    MixBlock(
                        SpectralGate(dim, -(-size // (4 * 2**i)))
                        if i < spectral
                        else TokenAttention(dim, heads[i], bias=True),
                        dim,
                        mlp_ratio=mlp_ratios[i],
                        drop_path=rate,
                    )
                    for rate in rates[i]
                )
            )
            for i, dim in enumerate(dims)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for dim in dims[:-1])
        self.post = None if features_only else ClassBlock(dims[-1], heads[-1], mlp_ratio=mlp_ratios[-1])
        self.make_head(nn.LayerNorm(dims[-1], eps=1e-6))
        self.token_head = nn.Linear(dims[-1], num_classes) if token_labels else None
        init_(self)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):  # by the fan out
                fan = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
                nn.init.normal_(part.weight, std=math.sqrt(2 / fan))

    def forward_features(self, images: Tensor) -> list[Tensor]:
        self.check(images)
        x, maps = self.stem(images), []
        for i, (down, stage) in enumerate(zip(self.down, self.stages, strict=True)):
            x = stage(down(x))  # (B, H, W, C)
            x = (x if i == len(self.norms) else self.norms[i](x)).permute(0, 3, 1, 2)
            maps.append(x)
        return maps

    def pool(self, maps: list[Tensor]) -> Tensor:
        """(B, C): the class token that reads the last map, normed."""
        tokens = maps[-1].flatten(2).mT
        token = tokens.mean(1) if self.post is None else self.post(tokens)
        return token if self.norm is None else self.norm(token)

    def token_scores(self, maps: list[Tensor]) -> Tensor:
        """(B, H W, num_classes): the auxiliary head on the tokens of the last map, row-major."""
        if self.token_head is None or self.norm is None:
            raise ValueError("SpectFormerH: made without token_labels")
        return self.token_head(self.norm(maps[-1].flatten(2).mT))

    def forward_head(self, maps: list[Tensor]) -> Tensor:
        scores = super().forward_head(maps)
        if self.token_head is None or self.training:
            return scores
        return scores + 0.5 * self.token_scores(maps).amax(1)

    def forward(self, images: Tensor) -> Tensor | list[Tensor] | tuple[Tensor, Tensor]:  # type: ignore[override]
        maps = self.forward_features(images)
        if self.features_only:
            return maps
        if self.token_head is not None and self.training:
            return self.forward_head(maps), self.token_scores(maps)
        return self.forward_head(maps)


def spectformer_tiny(
    *,
    alpha: int = 4,
    size: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> SpectFormer:
    """SpectFormer-T: width 256, 12 blocks, the first `alpha` of them spectral."""
    return SpectFormer(
        dim=256,
        depth=12,
        alpha=alpha,
        size=size,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def spectformer_xsmall(
    *,
    alpha: int = 4,
    size: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.0,
    features_only: bool = False,
) -> SpectFormer:
    """SpectFormer-XS: width 384, 12 blocks, the first `alpha` of them spectral."""
    return SpectFormer(
        dim=384,
        depth=12,
        alpha=alpha,
        size=size,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def spectformer_small(
    *,
    alpha: int = 4,
    size: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.15,
    features_only: bool = False,
) -> SpectFormer:
    """SpectFormer-S: width 384, 19 blocks, the first `alpha` of them spectral."""
    return SpectFormer(
        dim=384,
        depth=19,
        alpha=alpha,
        size=size,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def spectformer_base(
    *,
    alpha: int = 4,
    size: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.25,
    features_only: bool = False,
) -> SpectFormer:
    """SpectFormer-B: width 512, 19 blocks, the first `alpha` of them spectral."""
    return SpectFormer(
        dim=512,
        depth=19,
        alpha=alpha,
        size=size,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def spectformer_h_small(
    *,
    token_labels: bool = False,
    size: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.1,
    features_only: bool = False,
) -> SpectFormerH:
    """SpectFormer-H-S, hierarchical."""
    return SpectFormerH(
        dims=(64, 128, 320, 448),
        heads=(2, 4, 10, 14),
        depths=(3, 4, 6, 3),
        stem=32,
        token_labels=token_labels,
        size=size,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def spectformer_h_base(
    *,
    token_labels: bool = False,
    size: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.1,
    features_only: bool = False,
) -> SpectFormerH:
    """SpectFormer-H-B, hierarchical."""
    return SpectFormerH(
        dims=(64, 128, 320, 512),
        heads=(2, 4, 10, 16),
        depths=(3, 4, 12, 3),
        stem=64,
        token_labels=token_labels,
        size=size,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def spectformer_h_large(
    *,
    token_labels: bool = False,
    size: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.3,
    features_only: bool = False,
) -> SpectFormerH:
    """SpectFormer-H-L, hierarchical."""
    return SpectFormerH(
        dims=(96, 192, 384, 512),
        heads=(3, 6, 12, 16),
        depths=(3, 6, 18, 3),
        stem=64,
        token_labels=token_labels,
        size=size,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )
