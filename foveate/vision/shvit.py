"""SHViT: one head on a part of the channels, three coarse stages, batch norms that fold into convolutions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from foveate.vision.backbone import Backbone
from foveate.vision.blocks import ConvNorm, DropPath, SqueezeExcite, drop_path_rates
from foveate.vision.windows import attend


class SingleHeadPartialAttention(nn.Module):
    """Full attention by a single head on the first p channels; the other channels pass by to the output map.

        [x1; x2] = x;  q, k, v = BN(W GN(x1)), d, d and p channels
        y = BN(W_O ReLU([softmax(q^T k / sqrt(d)) v; x2]))

    GN: group norm with one group, over the channels and cells of x1. Nothing has a bias but the norms; the last one
    starts with weight 0. Costs N^2 (d + p) multiply-adds for N cells, where full attention needs 2 N^2 C.

    Args:
        dim: C.
        partial_dim: p, channels that take part, 1 to C; about C / 4.67 in the paper.
        qk_dim: d, channels of queries and keys.

    Shape: (B, H, W, C) -> the same; `forward_maps` takes and returns (B, C, H, W).

    Source: SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design (2024).

    >>> import torch
    >>> SingleHeadPartialAttention(48, 12)(torch.randn(2, 5, 7, 48)).shape
    torch.Size([2, 5, 7, 48])
    """

    def __init__(self, dim: int, partial_dim: int, *, qk_dim: int = 16) -> None:
        super().__init__()
        if not 1 <= partial_dim <= dim:
            raise ValueError(f"SingleHeadPartialAttention: partial_dim must be 1 to {dim}, got {partial_dim}")
        if qk_dim < 1:
            raise ValueError(f"SingleHeadPartialAttention: qk_dim must be >= 1, got {qk_dim}")
        self.dim, self.partial_dim, self.qk_dim = dim, partial_dim, qk_dim
        self.norm = nn.GroupNorm(1, partial_dim)
        self.qkv = ConvNorm(partial_dim, 2 * qk_dim + partial_dim, 1)
        self.proj = ConvNorm(dim, dim, 1, norm_init=0.0)

    def mixed(self, x: Tensor) -> Tensor:
        """[attention on x1; x2] before the output map, (B, C, H, W)."""
        h, w = x.shape[2:]
        x1, x2 = x[:, : self.partial_dim], x[:, self.partial_dim :]
        parts = self.qkv(self.norm(x1)).flatten(2).mT[:, None]  # (B, 1, N, 2 d + p)
        q, k, v = parts.split([self.qk_dim, self.qk_dim, self.partial_dim], 3)
        y1 = attend(q, k, v)[:, 0].mT.unflatten(2, (h, w))  # (B, p, H, W)
        return torch.cat([y1, x2], 1)

    def forward_maps(self, x: Tensor) -> Tensor:
        return self.proj(torch.relu(self.mixed(x)))

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ValueError(
                f"SingleHeadPartialAttention: x must be (B, H, W, {self.dim}), got {tuple(x.shape)}"
            )
        return self.forward_maps(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, partial_dim={self.partial_dim}, qk_dim={self.qk_dim}"


class ResidualConv(nn.Module):
    """x + BN(DWConv3x3(x)) on (B, C, H, W); `fuse_` makes it one convolution."""

    def __init__(self, dim: int, *, norm_init: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv: nn.Module = ConvNorm(dim, dim, 3, groups=dim, norm_init=norm_init)
        self.drop_path = DropPath(drop_path)
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.fused else x + self.drop_path(self.conv(x))

    @torch.no_grad()
    def fuse_(self) -> None:
        assert isinstance(self.conv, ConvNorm)
        made = self.conv.fused()
        made.weight[:, :, 1, 1] += 1  # the identity
        self.conv, self.fused = made, True


class ResidualFeedForward(nn.Module):
    """x + BN(W2 ReLU(BN(W1 x))) with 2 C hidden channels, on (B, C, H, W); the last norm starts with weight 0."""

    def __init__(self, dim: int, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = ConvNorm(dim, 2 * dim, 1), ConvNorm(2 * dim, dim, 1, norm_init=0.0)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.down(torch.relu(self.up(x))))


class SHViTBlock(nn.Module):
    """A residual depthwise convolution, attention where partial_dim is given, a feed-forward, on (B, C, H, W).

    All three branches start as nothing, so that a new block is the identity.
    """

    def __init__(
        self, dim: int, partial_dim: int | None, *, qk_dim: int = 16, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.conv = ResidualConv(dim, drop_path=drop_path)
        self.attention = (
            None if partial_dim is None else SingleHeadPartialAttention(dim, partial_dim, qk_dim=qk_dim)
        )
        self.drop_path = DropPath(drop_path)
        self.feed = ResidualFeedForward(dim, drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.attention is not None:
            x = x + self.drop_path(self.attention.forward_maps(x))
        return self.feed(x)


class SHViTMerging(nn.Module):
    """Between stages, (B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2)).

    Residual convolution and feed-forward; 1 x 1 to 4 C, ReLU, depthwise 3 x 3 of stride 2, ReLU, squeeze-and-excite,
    1 x 1 to C'; residual convolution and feed-forward.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        wide = 4 * dim
        self.before = nn.Sequential(ResidualConv(dim, norm_init=1.0), ResidualFeedForward(dim))
        self.up = ConvNorm(dim, wide, 1)
        self.pool = ConvNorm(wide, wide, 3, 2, groups=wide)
        self.gate = SqueezeExcite(wide, max(8, (dim + 4) // 8 * 8))  # a quarter, rounded to a multiple of 8
        self.down = ConvNorm(wide, out, 1)
        self.after = nn.Sequential(ResidualConv(out, norm_init=1.0), ResidualFeedForward(out))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.pool(torch.relu(self.up(self.before(x)))))
        return self.after(self.down(self.gate(x)))


class SHViT(Backbone):
    """Single-head vision transformer: images to three maps of strides 16, 32, 64, and class scores.

    Stem: four convolutions 3 x 3 of stride 2 with batch norm, ReLU between. The first stage has no attention. Head:
    mean, batch norm, Linear. Any image size. `fuse_` folds the batch norms for inference.

    Args:
        dims: C of each stage; the first a multiple of 8.
        depths: blocks of each stage.
        partial_dims: channels that attend, per stage; None: no attention.
        qk_dim: channels of queries and keys.
        drop_path: rate of the last block; it grows linearly from 0.
        num_classes, in_channels, features_only: see `Backbone`.

    Source: SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design (2024).

    >>> import torch
    >>> model = SHViT((16, 24, 32), (1, 1, 1), (None, 6, 8), num_classes=10).eval()
    >>> images = torch.randn(2, 3, 70, 101)
    >>> model(images).shape, [m.shape[1:] for m in model.forward_features(images)]
    (torch.Size([2, 10]), [torch.Size([16, 5, 7]), torch.Size([24, 3, 4]), torch.Size([32, 2, 2])])
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        partial_dims: Sequence[int | None],
        *,
        qk_dim: int = 16,
        drop_path: float = 0.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
    ) -> None:
        if not len(dims) == len(depths) == len(partial_dims):
            raise ValueError(
                f"SHViT: dims, depths and partial_dims must be of one length, got {dims}, {depths}, {partial_dims}"
            )
        if dims[0] % 8:
            raise ValueError(f"SHViT: dims must begin with a multiple of 8, got {dims}")
        super().__init__(
            channels=dims,
            strides=[16 * 2**i for i in range(len(dims))],
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        first = dims[0]
        widths = (in_channels, first // 8, first // 4, first // 2, first)
        self.stem = nn.ModuleList(ConvNorm(a, b, 3, 2) for a, b in pairwise(widths))
        self.merging = nn.ModuleList(SHViTMerging(a, b) for a, b in pairwise(dims))
        rates = drop_path_rates(drop_path, depths)
        self.stages = nn.ModuleList(
            nn.Sequential(*(SHViTBlock(dim, p, qk_dim=qk_dim, drop_path=rate) for rate in stage))
            for dim, p, stage in zip(dims, partial_dims, rates, strict=True)
        )
        self.make_head(nn.BatchNorm1d(dims[-1]) if num_classes else None)
        if self.head is not None:
            nn.init.trunc_normal_(self.head.weight, std=0.02, a=-0.04, b=0.04)  # type: ignore[arg-type]
            nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward_features(self, images: Tensor) -> list[Tensor]:
        self.check(images)
        x = images
        for i, layer in enumerate(self.stem):
            x = layer(torch.relu(x) if i else x)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(self.merging[i - 1](x) if i else x)
            maps.append(x)
        return maps

    def pool(self, maps: list[Tensor]) -> Tensor:
        """(B, C): the mean over the last map, then `norm`."""
        x = maps[-1].mean((2, 3))
        return x if self.norm is None else self.norm(x)

    @torch.no_grad()
    def fuse_(self) -> SHViT:
        """Fold every batch norm, and the residual of depthwise convolutions, into convolutions with bias, in place.

        Results in eval mode stay the same but for rounding; the model is in eval mode afterwards and cannot be trained
        as before. Returns it.
        """
        for part in list(self.modules()):
            if isinstance(part, ResidualConv) and not part.fused:
                part.fuse_()
        for part in list(self.modules()):
            for name, child in list(part.named_children()):
                if isinstance(child, ConvNorm):
                    part.add_module(name, child.fused())
        if isinstance(self.norm, nn.BatchNorm1d) and isinstance(self.head, nn.Linear):
            norm, head = self.norm, self.head
            assert norm.running_mean is not None
            assert norm.running_var is not None
            factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)  # (C,)
            head.bias += head.weight @ (norm.bias - norm.running_mean * factor)  # type: ignore[assignment]
            head.weight *= factor
            self.norm = None
        return self.eval()


def shvit_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of an `SHViT` (not fused) from the state_dict of the authors' release or of timm's shvit_s1, ..."""
    rules = [  # the authors' names become timm's, then ours
        (r"^blocks1\.", "stages.0.blocks."),
        (r"^blocks([23])\.0\.([01])\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.{m[2]}."),
        (r"^blocks([23])\.1\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.2."),
        (r"^blocks([23])\.2\.([01])\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.{int(m[2]) + 3}."),
        (r"^blocks([23])\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 3}."),
        (r"^patch_embed\.(\d)\.", lambda m: f"stem.{int(m[1]) // 2}."),
        (r"^(stages\.\d+)\.blocks\.", r"\1."),
        (r"^stages\.(\d+)\.downsample\.", lambda m: f"merging.{int(m[1]) - 1}."),
        (r"^(merging\.\d+)\.0\.m\.", r"\1.before.0.conv."),
        (r"^(merging\.\d+)\.1\.m\.", r"\1.before.1."),
        (r"^(merging\.\d+)\.2\.conv1\.", r"\1.up."),
        (r"^(merging\.\d+)\.2\.conv2\.", r"\1.pool."),
        (r"^(merging\.\d+)\.2\.conv3\.", r"\1.down."),
        (r"^(merging\.\d+)\.2\.se\.(?:fc1|conv_reduce)\.", r"\1.gate.reduce."),
        (r"^(merging\.\d+)\.2\.se\.(?:fc2|conv_expand)\.", r"\1.gate.expand."),
        (r"^(merging\.\d+)\.3\.m\.", r"\1.after.0.conv."),
        (r"^(merging\.\d+)\.4\.m\.", r"\1.after.1."),
        (r"\.conv\.m\.", ".conv.conv."),
        (r"\.mixer\.m\.pre_norm\.", ".attention.norm."),
        (r"\.mixer\.m\.proj\.1\.", ".attention.proj."),
        (r"\.mixer\.m\.", ".attention."),
        (r"\.ffn\.m\.", ".feed."),
        (r"\.pw1\.", ".up."),
        (r"\.pw2\.", ".down."),
        (r"^head\.bn\.", "norm."),
        (r"^head\.l\.", "head."),
        (r"\.c\.weight$", ".conv.weight"),
        (r"\.bn\.(\w+)$", r".norm.\1"),
    ]
    made = {}
    for name, value in weights.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        made[name] = value
    return made


def shvit_s1(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.0, features_only: bool = False
) -> SHViT:
    """SHViT-S1: 6,330,808 parameters."""
    return SHViT(
        (128, 224, 320),
        (2, 4, 5),
        (None, 48, 68),
        drop_path=drop_path,
        num_classes=num_classes,
        in_channels=in_channels,
        features_only=features_only,
    )


def shvit_s2(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.0, features_only: bool = False
) -> SHViT:
    """SHViT-S2: 11,483,072 parameters."""
    return SHViT(
        (128, 308, 448),
        (2, 4, 5),
        (None, 66, 96),
        drop_path=drop_path,
        num_classes=num_classes,
        in_channels=in_channels,
        features_only=features_only,
    )


def shvit_s3(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.0, features_only: bool = False
) -> SHViT:
    """SHViT-S3: 14,245,273 parameters."""
    return SHViT(
        (192, 352, 448),
        (3, 5, 5),
        (None, 75, 96),
        drop_path=drop_path,
        num_classes=num_classes,
        in_channels=in_channels,
        features_only=features_only,
    )


def shvit_s4(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.0, features_only: bool = False
) -> SHViT:
    """SHViT-S4, for images of 256 x 256: 16,588,484 parameters."""
    return SHViT(
        (224, 336, 448),
        (4, 7, 6),
        (None, 72, 96),
        drop_path=drop_path,
        num_classes=num_classes,
        in_channels=in_channels,
        features_only=features_only,
    )
