"""MaxViT: in every block a convolution, attention inside windows, and attention across a grid spread over the map."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from math import ceil, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.vision import windows
from foveate.vision.backbone import Backbone
from foveate.vision.blocks import DropPath, Mlp, SqueezeExcite, drop_path_rates

GELU = partial(nn.GELU, approximate="tanh")
BatchNorm = partial(nn.BatchNorm2d, eps=1e-3)


@lru_cache(maxsize=64)
def _inside(
    split: Callable[[Tensor, windows.Pair], Tensor],
    shape: windows.Pair,
    size: windows.Pair,
    device: torch.device,
) -> Tensor:
    """Keys that are on the map, bool (groups, n, n), for a map of (H, W) that is padded before it is split."""
    with torch.inference_mode(False), torch.device("cpu"):  # kept for others, whoever asks first
        real = (
            split(windows.pad_to(torch.ones(1, *shape, 1), size), size)[:, None, :, 0] > 0
        )  # (groups, 1, n)
        return real.repeat(1, real.shape[2], 1).to(device)


class _PartitionAttention(nn.Module):
    """Softmax attention among the tokens of each group; subclasses say which tokens are a group."""

    split: Callable[[Tensor, windows.Pair], Tensor]  # (B, H, W, C), size -> (B groups, n, C)
    join: Callable[[Tensor, windows.Pair, windows.Pair], Tensor]  # its inverse: cells, size, (H, W)

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        size: int | tuple[int, int] = 7,
        bias: bool = True,
        relative_bias: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if heads < 1 or dim % heads:
            raise ValueError(f"{name}: dim must be a multiple of heads, got {dim} and {heads}")
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.size = windows.pair(name, "size", size)
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)
        self.position = windows.RelativePositionBias2d(self.size, heads) if relative_bias else None
        if self.position is not None:
            nn.init.normal_(self.position.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ValueError(f"{type(self).__name__}: x must be (B, H, W, {self.dim}), got {tuple(x.shape)}")
        h, w = x.shape[1:3]
        padded = windows.pad_to(x, self.size)
        shape = (padded.shape[1], padded.shape[2])
        mask = None
        if shape != (h, w):  # cells beyond the map are no keys
            mask = _inside(self.split, (h, w), self.size, x.device)
        cells = self.split(padded, self.size)  # (G, n, C)
        q, k, v = self.qkv(cells).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (G, heads, n, d)
        bias = None if self.position is None else self.position.score()
        out = windows.attend(q, k, v, bias=bias, mask=mask)
        out = self.join(self.proj(out.transpose(1, 2).flatten(2)), self.size, shape)
        return out[:, :h, :w]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, size={self.size}"


class BlockAttention(_PartitionAttention):
    """Attention inside windows of P x P neighbouring tokens.

        group(y, x) = (floor(y / P), floor(x / P))
        o = softmax(q k^T / sqrt(d) + b) v   within a group,  out = o W_O

    b is looked up per head by the offset of the tokens. A token reads P^2 tokens, whatever the size of the map.

    Args:
        dim: C, width of the tokens.
        heads: heads of width d = C / heads (32 in the paper's models).
        size: P, or rows and columns of a window.
        bias: of the two linear maps.
        relative_bias: with b.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W: windows that the map does not fill have fewer tokens.
    Errors: ValueError for dim, size and shapes that do not fit.

    Source: MaxViT: Multi-Axis Vision Transformer (2022). Differs: maps that P does not divide.

    >>> BlockAttention(32, heads=2, size=4)(torch.randn(2, 8, 13, 32)).shape
    torch.Size([2, 8, 13, 32])
    """

    split = staticmethod(windows.partition)
    join = staticmethod(windows.merge)


class GridAttention(_PartitionAttention):
    """Attention among G x G tokens that are spread evenly over the whole map.

        group(y, x) = (y mod (H / G), x mod (W / G))
        o = softmax(q k^T / sqrt(d) + b) v   within a group,  out = o W_O

    b is looked up per head by the offset of the tokens in steps of the grid: floor(y / (H / G)) of the key and of the
    query. A token reads G^2 tokens, whatever the size of the map; after `BlockAttention` with windows of at least
    H / G tokens a side it has read all. The set of pairs is `foveate.patterns.Grid((H, W), G)`.

    Args:
        dim: C, width of the tokens.
        heads: heads of width d = C / heads (32 in the paper's models).
        size: G, or rows and columns of the grid.
        bias: of the two linear maps.
        relative_bias: with b.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W: the step is ceil(H / G), and groups have fewer tokens where the
    grid reaches beyond the map. Errors: ValueError for dim, size and shapes that do not fit.

    Source: MaxViT: Multi-Axis Vision Transformer (2022). Differs: maps that G does not divide.

    >>> GridAttention(32, heads=2, size=4)(torch.randn(2, 8, 13, 32)).shape
    torch.Size([2, 8, 13, 32])
    """

    split = staticmethod(windows.grid_partition)
    join = staticmethod(windows.grid_merge)


def same_pad(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around (B, C, H, W) so that a convolution gives ceil(n / stride) per axis; the odd one goes to the end."""
    need = [max((ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:]]
    return F.pad(x, (need[1] // 2, need[1] - need[1] // 2, need[0] // 2, need[0] - need[0] // 2))


class MBConv(nn.Module):
    """The inverted bottleneck of MaxViT, normalised first.

        y = BN(x) -> 1 x 1 to 4 C' -> BN, GELU -> depthwise 3 x 3 (stride) -> BN, GELU -> squeeze-excite -> 1 x 1 to C'
        out = shortcut(x) + y

    The shortcut is x; with stride 2 its means over 2 x 2, and a 1 x 1 convolution where C' is not C.

    Args:
        dim_in, dim_out: C and C'; equal when stride is 1.
        stride: 1 or 2.
        expand: widening; squeeze: hidden width of squeeze-excite over C'.
        drop_path: rate at which y is left out per image in train mode.

    Shape: (B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride)).

    Source: MaxViT: Multi-Axis Vision Transformer (2022).

    >>> MBConv(8, 16, stride=2)(torch.randn(2, 8, 7, 6)).shape
    torch.Size([2, 16, 4, 3])
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        stride: int = 1,
        expand: int = 4,
        squeeze: float = 0.25,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if stride not in (1, 2) or (stride == 1 and dim_in != dim_out):
            raise ValueError(
                f"MBConv: stride must be 2, or 1 with dim_out = dim_in, got {stride} with {dim_in} and {dim_out}"
            )
        self.stride, hidden = stride, expand * dim_out
        self.shortcut = nn.Conv2d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()
        self.norm0 = BatchNorm(dim_in)
        self.conv1 = nn.Conv2d(dim_in, hidden, 1, bias=False)
        self.norm1 = BatchNorm(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, groups=hidden, bias=False)
        self.norm2 = BatchNorm(hidden)
        self.squeeze = SqueezeExcite(hidden, int(squeeze * dim_out), act=nn.SiLU)
        self.conv3 = nn.Conv2d(hidden, dim_out, 1)
        self.act, self.drop = GELU(), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        kept = (
            F.avg_pool2d(x, 2, ceil_mode=True) if self.stride == 2 else x
        )  # means of the pixels that are there
        y = self.act(self.norm1(self.conv1(self.norm0(x))))
        y = self.act(self.norm2(self.conv2(same_pad(y, 3, self.stride))))
        return self.shortcut(kept) + self.drop(self.conv3(self.squeeze(y)))


class _Transformer(nn.Module):
    """x + attention(LN x), then x + MLP(LN x), on (B, H, W, C)."""

    def __init__(self, attention: nn.Module, dim: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = attention
        self.mlp = Mlp(dim, int(mlp_ratio * dim), act=GELU)
        self.drop = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class MaxViTBlock(nn.Module):
    """MBConv, then attention in windows with an MLP, then attention across the grid with an MLP.

    Args:
        dim_in, dim_out: widths; equal when stride is 1.
        heads: default: as many as have width 32.
        stride: 1 or 2, of the convolution.
        partition: side of the windows and of the grid, or rows and columns.
        mlp_ratio: hidden width of the MLPs over dim_out.
        drop_path: rate of all three parts.

    Shape: (B, H, W, dim_in) -> (B, ceil(H / stride), ceil(W / stride), dim_out).

    Source: MaxViT: Multi-Axis Vision Transformer (2022).

    >>> MaxViTBlock(16, 32, stride=2, partition=3)(torch.randn(2, 11, 12, 16)).shape
    torch.Size([2, 6, 6, 32])
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        heads: int | None = None,
        stride: int = 1,
        partition: int | tuple[int, int] = 7,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if heads is None:
            if dim_out % 32:
                raise ValueError(
                    f"MaxViTBlock: dim_out must be a multiple of 32 without heads, got {dim_out}"
                )
            heads = dim_out // 32
        self.conv = MBConv(dim_in, dim_out, stride=stride, drop_path=drop_path)
        near, far = (kind(dim_out, heads, size=partition) for kind in (BlockAttention, GridAttention))
        self.block = _Transformer(near, dim_out, mlp_ratio, drop_path)
        self.grid = _Transformer(far, dim_out, mlp_ratio, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.grid(self.block(x))


def _init(module: nn.Module) -> None:
    """Convolutions normal by fan-out, linear maps uniform (Xavier), biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
            nn.init.normal_(part.weight, std=sqrt(2 / fan_out))
        elif isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
        else:
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)


class MaxViT(Backbone):
    """A stem of two 3 x 3 convolutions (stride 2), then stages of `MaxViTBlock`s, each of which begins with stride 2.

    Args:
        stem: width of the stem.
        dims, depths: width and blocks per stage.
        partition: side of windows and grids, or rows and columns; the paper has the image's side / 32, so that it
            divides the maps of all stages and the last one attends fully.
        head_dim: width of a head.
        mlp_ratio: of the MLPs.
        num_classes, in_channels, drop_path, features_only: as for every backbone.

    Shape: (B, in_channels, H, W) -> (B, num_classes), any H and W. Maps at strides 4, 8, 16 and 32.

    Source: MaxViT: Multi-Axis Vision Transformer (2022). Differs: sizes that the partition does not divide.

    >>> model = MaxViT(8, (16, 32), (1, 1), partition=2, head_dim=8, num_classes=3).eval()
    >>> images = torch.randn(2, 3, 31, 40)
    >>> model(images).shape, [tuple(m.shape) for m in model.forward_features(images)]
    (torch.Size([2, 3]), [(2, 16, 8, 10), (2, 32, 4, 5)])
    """

    def __init__(
        self,
        stem: int = 64,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 5, 2),
        *,
        partition: int | tuple[int, int] = 7,
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.0,
        features_only: bool = False,
    ) -> None:
        if len(dims) != len(depths) or not depths or min(depths) < 1:
            raise ValueError(
                f"MaxViT: dims and depths must be as many, each depth >= 1, got {dims} and {depths}"
            )
        super().__init__(
            channels=tuple(dims),
            strides=tuple(4 * 2**i for i in range(len(dims))),
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        if any(dim % head_dim for dim in dims):
            raise ValueError(f"MaxViT: dims must be multiples of head_dim, got {tuple(dims)} and {head_dim}")
        self.partition = windows.pair("MaxViT", "partition", partition)
        self.stem1 = nn.Conv2d(in_channels, stem, 3, 2)
        self.stem_norm, self.stem_act = BatchNorm(stem), GELU()
        self.stem2 = nn.Conv2d(stem, stem, 3)
        stages, width = [], stem
        for dim, rates in zip(dims, drop_path_rates(drop_path, depths), strict=True):
            blocks = []
            for i, rate in enumerate(rates):
                blocks.append(
                    MaxViTBlock(
                        width,
                        dim,
                        heads=dim // head_dim,
                        stride=1 if i else 2,
                        partition=self.partition,
                        mlp_ratio=mlp_ratio,
                        drop_path=rate,
                    )
                )
                width = dim
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.make_head(nn.LayerNorm(width))
        self.hidden = None if self.head is None else nn.Linear(width, width)
        _init(self)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """One map (B, dims[i], H / s, W / s) per stage, s = 4, 8, ..., rounded up."""
        self.check(images)
        x = self.stem_act(self.stem_norm(self.stem1(same_pad(images, 3, 2))))
        x = self.stem2(same_pad(x, 3, 1)).permute(0, 2, 3, 1)  # (B, H / 2, W / 2, C)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def forward_head(self, maps: list[Tensor]) -> Tensor:
        """Means of the last map, normalised; then a hidden layer with tanh and the logits, if there are classes."""
        pooled = maps[-1].mean((2, 3))  # (B, C)
        if self.norm is not None:
            pooled = self.norm(pooled)
        if self.head is None or self.hidden is None:
            return pooled
        return self.head(torch.tanh(self.hidden(pooled)))


_TIMM = (
    (r"^stem\.conv", "stem"),
    (r"^stem\.norm1", "stem_norm"),
    (r"\.blocks\.", "."),
    (r"\.shortcut\.expand\.", ".shortcut."),
    (r"\.pre_norm\.", ".norm0."),
    (r"\.conv(\d)_(1x1|kxk)\.", r".conv\1."),
    (r"\.se\.fc1\.", ".squeeze.reduce."),
    (r"\.se\.fc2\.", ".squeeze.expand."),
    (r"\.attn_(block|grid)\.", r".\1."),
    (r"\.attn\.", ".attention."),
    (r"\.rel_pos\.relative_position_bias_table$", ".position.table"),
    (r"^head\.norm\.", "norm."),
    (r"^head\.pre_logits\.fc\.", "hidden."),
    (r"^head\.fc\.", "head."),
)


def maxvit_from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `MaxViT` from that of a maxvit_*_tf_* model of timm.

    Names change; bias tables (heads, rows, columns), which are indexed by the key's place less the query's, turn round.

    >>> list(maxvit_from_timm({"stages.0.blocks.1.conv.conv2_kxk.weight": torch.zeros(1)}))
    ['stages.0.1.conv.conv2.weight']
    """
    made = {}
    for name, value in state.items():
        for old, new in _TIMM:
            name = re.sub(old, new, name)
        made[name] = value.flip(1, 2).flatten(1).T if name.endswith(".position.table") else value
    return made


def _sized(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """The partition for an image: a 32nd of its sides."""
    rows, columns = windows.pair("maxvit", "img_size", img_size)
    if rows % 32 or columns % 32:
        raise ValueError(f"maxvit: img_size must be multiples of 32, got {img_size!r}")
    return rows // 32, columns // 32


def maxvit_tiny(
    *,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    features_only: bool = False,
) -> MaxViT:
    """MaxViT-T: 30,916,528 parameters at 224 x 224. img_size / 32 is the partition; other sizes run, too."""
    return MaxViT(
        64,
        (64, 128, 256, 512),
        (2, 2, 5, 2),
        partition=_sized(img_size),
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def maxvit_small(
    *,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.3,
    features_only: bool = False,
) -> MaxViT:
    """MaxViT-S: 68,927,956 parameters at 224 x 224. img_size / 32 is the partition; other sizes run, too."""
    return MaxViT(
        64,
        (96, 192, 384, 768),
        (2, 2, 5, 2),
        partition=_sized(img_size),
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def maxvit_base(
    *,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.4,
    features_only: bool = False,
) -> MaxViT:
    """MaxViT-B: 119,467,708 parameters at 224 x 224. img_size / 32 is the partition; other sizes run, too."""
    return MaxViT(
        64,
        (96, 192, 384, 768),
        (2, 6, 14, 2),
        partition=_sized(img_size),
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def maxvit_large(
    *,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.6,
    features_only: bool = False,
) -> MaxViT:
    """MaxViT-L: 211,785,560 parameters at 224 x 224. img_size / 32 is the partition; other sizes run, too."""
    return MaxViT(
        128,
        (128, 256, 512, 1024),
        (2, 6, 14, 2),
        partition=_sized(img_size),
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def maxvit_xlarge(
    *,
    img_size: int | tuple[int, int] = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.6,
    features_only: bool = False,
) -> MaxViT:
    """MaxViT-XL: 475,323,472 parameters at 384 x 384. img_size / 32 is the partition; other sizes run, too."""
    return MaxViT(
        192,
        (192, 384, 768, 1536),
        (2, 6, 14, 2),
        partition=_sized(img_size),
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )
