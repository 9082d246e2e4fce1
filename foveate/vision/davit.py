"""DaViT: windows of pixels and groups of channels in turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from foveate.vision.backbone import Backbone
from foveate.vision.blocks import ConvPositionEncoding, DropPath, LayerNorm2d, Mlp, drop_path_rates, init_
from foveate.vision.windows import WindowAttention, attend, pad_to

SCALES = ("head", "tokens")


class ChannelGroupAttention(nn.Module):
    """Attention among the channels of a group, each described by its values at all tokens.

        A_g = softmax(Q_g^T K_g s)             rows: channels of the queries, C_g x C_g
        Y_g = (A_g V_g^T)^T,  out = concat(Y_g) W_O

    s is C_g^-0.5 for scale "head" and N^-0.5 for "tokens". The logits are sums over the tokens, so with "head" they
    grow as N: a model trained at one resolution is sharper at a larger one. With "tokens" they grow as the root of N.
    Costs 2 N C C_g multiply-adds, linear in N; no position enters.

    Args:
        dim: C, width of the tokens.
        groups: g, groups of C_g = C / g channels.
        scale: "head" (DaViT) or "tokens" (the towers of Florence-2).
        bias: of the query, key and value map; the output map always has one.

    Shape: (B, ..., C) -> the same; all axes between are tokens.

    Source: DaViT: Dual Attention Vision Transformers (2022). Differs: nothing in what is computed; the released weights
    call what is V, Q, K here q, k, v (`davit_state` sorts them).

    >>> ChannelGroupAttention(64, groups=2)(torch.randn(2, 5, 7, 64)).shape
    torch.Size([2, 5, 7, 64])
    """

    def __init__(self, dim: int, groups: int, *, scale: str = "head", bias: bool = True) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(
                f"ChannelGroupAttention: dim must be a multiple of groups, got {dim} and {groups}"
            )
        if scale not in SCALES:
            raise ValueError(
                f"ChannelGroupAttention: scale must be one of {', '.join(SCALES)}, got {scale!r}"
            )
        self.dim, self.groups, self.scale = dim, groups, scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[-1] != self.dim:
            raise ValueError(f"ChannelGroupAttention: x must be (B, ..., {self.dim}), got {tuple(x.shape)}")
        qkv = self.qkv(x.flatten(1, -2)).unflatten(2, (3, self.groups, -1))  # (B, N, 3, g, C_g)
        q, k, v = qkv.permute(2, 0, 3, 4, 1)  # each (B, g, C_g, N): channels are the tokens
        width = q.shape[2] if self.scale == "head" else q.shape[3]
        y = attend(q, k, v, scale=width**-0.5, engine="dense")  # (B, g, C_g, N); few rows, as wide as the map
        return self.proj(y.permute(0, 3, 1, 2).flatten(2)).view(x.shape)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, groups={self.groups}, scale={self.scale!r}"


class PaddedWindowAttention(WindowAttention):
    """`WindowAttention` without position bias; every window is whole, padded cells are zeros and are attended to.

    Maps smaller than the window are padded to it, too, as in the released code.
    """

    def __init__(self, dim: int, heads: int, window: int = 7, *, bias: bool = True) -> None:
        super().__init__(dim, heads, window, bias=bias, relative_bias=False, edge="zero")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad_to(x, self.window))[:, : x.shape[1], : x.shape[2]]


class DaViTBlock(nn.Module):
    """One attention and one MLP, each after a depthwise convolution that tells positions; on (B, H, W, C).

    x = x + DWC(x);  x = x + attention(LN(x));  x = x + DWC(x);  x = x + MLP(LN(x))
    """

    def __init__(
        self, dim: int, attention: nn.Module, *, mlp_ratio: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.position1, self.position2 = ConvPositionEncoding(dim), ConvPositionEncoding(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = attention
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.position1(x)
        x = x + self.drop_path(self.attention(self.norm1(x)))
        x = self.position2(x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DualAttentionLayer(nn.Module):
    """A block over windows of pixels, then a block over groups of channels: (B, H, W, C) -> the same.

    Windows do not overlap and are not shifted, there is no position bias; the map is padded with zeros at the right and
    below to whole windows after the norm, and the padding is attended to.

    Args:
        dim: C.
        heads: of the windows, and groups of the channels.
        window: side of a window.
        mlp_ratio: hidden width of both MLPs over C.
        scale, bias: see `ChannelGroupAttention`; bias also of the windows' queries, keys and values.
        drop_path: rates of the two blocks.

    Source: DaViT: Dual Attention Vision Transformers (2022).

    >>> DualAttentionLayer(32, 2, window=4)(torch.randn(1, 5, 7, 32)).shape
    torch.Size([1, 5, 7, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 7,
        mlp_ratio: float = 4.0,
        scale: str = "head",
        bias: bool = True,
        drop_path: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        spatial = PaddedWindowAttention(dim, heads, window, bias=bias)
        channel = ChannelGroupAttention(dim, heads, scale=scale, bias=bias)
        self.spatial = DaViTBlock(dim, spatial, mlp_ratio=mlp_ratio, drop_path=drop_path[0])
        self.channel = DaViTBlock(dim, channel, mlp_ratio=mlp_ratio, drop_path=drop_path[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.channel(self.spatial(x))


class Downsample(nn.Module):
    """LayerNorm and a convolution of stride 2: (B, C, H, W) -> (B, C', ceil(H / 2), ceil(W / 2)).

    An even kernel reads zeros beyond the right and lower border of odd sides; an odd one is padded all round.
    """

    def __init__(self, dim: int, out: int, kernel: int = 2) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim, eps=1e-5)
        self.conv = nn.Conv2d(dim, out, kernel, stride=2, padding=kernel // 2 if kernel % 2 else 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.conv.kernel_size[0] % 2 == 0:
            x = pad_to(x.permute(0, 2, 3, 1), 2).permute(0, 3, 1, 2)
        return self.conv(x)


class DaViT(Backbone):
    """Dual attention vision transformer: images to four maps of strides 4, 8, 16, 32, and class scores.

    Stem: convolution 7 x 7 of stride 4, LayerNorm. Head: mean over the map, LayerNorm, Linear. Any image size.

    Args:
        dims: C of each stage.
        depths: dual attention layers of each stage.
        heads: heads and channel groups of each stage.
        window: side of the windows.
        mlp_ratio: hidden width of the MLPs over C.
        scale: of channel attention, "head" or "tokens".
        down_kernel: of the convolutions between stages.
        bias: of queries, keys and values.
        drop_path: rate of the last block; it grows linearly from 0.
        num_classes, in_channels, features_only: see `Backbone`.

    Source: DaViT: Dual Attention Vision Transformers (2022); "tokens" and kernel 3 are those of Florence-2's towers
    (Florence-2: Advancing a Unified Representation for a Variety of Vision Tasks, 2023).

    >>> model = DaViT((16, 32), (1, 1), (2, 4), num_classes=10).eval()
    >>> model(torch.randn(2, 3, 37, 61)).shape, [m.shape[1:] for m in model.forward_features(torch.randn(1, 3, 37, 61))]
    (torch.Size([2, 10]), [torch.Size([16, 10, 16]), torch.Size([32, 5, 8])])
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        *,
        window: int = 7,
        mlp_ratio: float = 4.0,
        scale: str = "head",
        down_kernel: int = 2,
        bias: bool = True,
        drop_path: float = 0.1,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
    ) -> None:
        if not len(dims) == len(depths) == len(heads):
            raise ValueError(
                f"DaViT: dims, depths and heads must be of one length, got {dims}, {depths}, {heads}"
            )
        super().__init__(
            channels=dims,
            strides=[4 * 2**i for i in range(len(dims))],
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        rates = drop_path_rates(drop_path, [2 * depth for depth in depths])
        self.stem = nn.Conv2d(in_channels, dims[0], 7, stride=4, padding=3)
        self.stem_norm = LayerNorm2d(dims[0], eps=1e-5)
        self.stages = nn.ModuleList()
        for i, (dim, depth, h) in enumerate(zip(dims, depths, heads, strict=True)):
            layers: list[nn.Module] = [Downsample(dims[i - 1], dim, down_kernel)] if i else []
            for j in range(depth):
                pair = (rates[i][2 * j], rates[i][2 * j + 1])
                layers.append(
                    DualAttentionLayer(
                        dim,
                        h,
                        window=window,
                        mlp_ratio=mlp_ratio,
                        scale=scale,
                        bias=bias,
                        drop_path=pair,
                    )
                )
            self.stages.append(nn.ModuleList(layers))
        self.make_head(nn.LayerNorm(dims[-1]))
        init_(self)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        self.check(images)
        x, maps = self.stem_norm(self.stem(images)), []
        for stage in self.stages:
            for layer in stage:  # type: ignore[attr-defined]
                if isinstance(layer, Downsample):
                    x = layer(x)
                else:
                    x = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            maps.append(x)
        return maps

    def pool(self, maps: list[Tensor]) -> Tensor:
        """(B, C): the mean over the last map, then `norm`."""
        x = maps[-1].mean((2, 3))
        return x if self.norm is None else self.norm(x)


def davit_state(
    weights: Mapping[str, Tensor], *, depths: Sequence[int], scale: str = "head"
) -> dict[str, Tensor]:
    """State of a `DaViT` from the authors' release, from timm's or from transformers' (Florence2VisionBackbone).

    Args:
        weights: their state_dict; a tower without a head gives a state without one.
        depths: layers of each stage.
        scale: of the model that takes the state; with "head" the released channel attention's q, k, v become V, Q, K.
    """
    rules = [  # the authors' names, transformers', timm's
        (r"^(?:patch_embeds|convs)\.0\.(?:proj|conv)\.", "stem."),
        (r"^(?:patch_embeds|convs)\.0\.norm\.", "stem_norm."),
        (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.0.conv."),
        (r"^(?:patch_embeds|convs)\.(\d+)\.", r"stages.\1.0."),
        (r"^main_blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.cpe\.0\.", ".cpe1."),
        (r"\.cpe\.1\.", ".cpe2."),
        (r"^norms\.", "norm."),
        (r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.(?:window_attn|channel_attn|attn)\.", ".attention."),
        (r"\.ffn\.", ".mlp."),
        (r"^stem\.(?:conv|norm)\.", lambda m: "stem." if "conv" in m[0] else "stem_norm."),
        (r"^stages\.(\d+)\.downsample\.", r"stages.\1.0."),
        (r"\.(?:cpe|conv)([12])\.(?:proj\.)?", r".position\1.conv."),
        (r"\.blocks\.(\d+)\.0\.", r".blocks.\1.spatial."),
        (r"\.blocks\.(\d+)\.1\.", r".blocks.\1.channel."),
        (r"\.(spatial|channel)_block\.", r".\1."),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    ]
    made = {}
    for name, value in weights.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        if found := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.(.*)", name):
            stage, layer = int(found[1]), int(found[2])
            if layer >= depths[stage]:
                raise ValueError(
                    f"davit_state: depths must cover layer {layer} of stage {stage}, got {depths}"
                )
            name = f"stages.{stage}.{layer + (stage > 0)}.{found[3]}"
        if scale == "head" and ".channel.attention.qkv." in name:
            q, k, v = value.chunk(3)
            value = torch.cat([k, v, q])  # their weights are k^T v, applied to q
        made[name] = value
    return made


def davit_tiny(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.1, features_only: bool = False
) -> DaViT:
    """DaViT-Tiny: 28,360,168 parameters."""
    return _made((1, 1, 3, 1), 96, num_classes, in_channels, drop_path, features_only)


def davit_small(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.2, features_only: bool = False
) -> DaViT:
    """DaViT-Small: 49,745,896 parameters."""
    return _made((1, 1, 9, 1), 96, num_classes, in_channels, drop_path, features_only)


def davit_base(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.4, features_only: bool = False
) -> DaViT:
    """DaViT-Base: 87,954,408 parameters."""
    return _made((1, 1, 9, 1), 128, num_classes, in_channels, drop_path, features_only)


def davit_large(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.1, features_only: bool = False
) -> DaViT:
    """DaViT-Large: 196,811,752 parameters."""
    return _made((1, 1, 9, 1), 192, num_classes, in_channels, drop_path, features_only)


def davit_huge(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.1, features_only: bool = False
) -> DaViT:
    """DaViT-Huge: 348,922,856 parameters."""
    return _made((1, 1, 9, 1), 256, num_classes, in_channels, drop_path, features_only)


def davit_giant(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.1, features_only: bool = False
) -> DaViT:
    """DaViT-Giant: 1,406,470,120 parameters."""
    return _made((1, 1, 12, 3), 384, num_classes, in_channels, drop_path, features_only)


def davit_base_fl(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.1, features_only: bool = False
) -> DaViT:
    """The tower of Florence-2 base: windows of 12, kernels of 3, scale "tokens"; 90,370,048 without classes."""
    return _made((1, 1, 9, 1), 128, num_classes, in_channels, drop_path, features_only, florence=True)


def davit_huge_fl(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.1, features_only: bool = False
) -> DaViT:
    """The tower of Florence-2 large: windows of 12, kernels of 3, scale "tokens"."""
    return _made((1, 1, 9, 1), 256, num_classes, in_channels, drop_path, features_only, florence=True)


def _made(
    depths: tuple[int, ...],
    dim: int,
    num_classes: int,
    in_channels: int,
    drop_path: float,
    features_only: bool,
    florence: bool = False,
) -> DaViT:
    """A published size: widths double from stage to stage, heads are 32 wide."""
    dims = [dim * 2**i for i in range(4)]
    return DaViT(
        dims,
        depths,
        [d // 32 for d in dims],
        window=12 if florence else 7,
        scale="tokens" if florence else "head",
        down_kernel=3 if florence else 2,
        drop_path=drop_path,
        num_classes=num_classes,
        in_channels=in_channels,
        features_only=features_only,
    )
