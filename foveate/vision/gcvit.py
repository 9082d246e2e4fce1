"""GC ViT: windows that are asked by one summary of the whole image."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import log2

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.vision.backbone import Backbone
from foveate.vision.blocks import (
    DropPath,
    LayerNorm2d,
    LayerScale,
    Mlp,
    SqueezeExcite,
    drop_path_rates,
)
from foveate.vision.windows import RelativePositionBias2d, attend, merge, pad_to, pair, partition

RATIOS = (32, 32, 16, 32)  # side of the image over side of a window, per stage
Pair = tuple[int, int]


class FusedMBConv(nn.Module):
    """x + Conv1x1(SE(GELU(DWConv3x3(x)))) on (B, C, H, W), nothing with a bias; the gate has C / 4 hidden channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.gate = SqueezeExcite(dim, dim // 4, act=nn.GELU, bias=False)
        self.pointwise = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pointwise(self.gate(F.gelu(self.depthwise(x))))


class GlobalQueryGenerator(nn.Module):
    """The queries that all windows of an image share: the map, made as small as one window.

        g = (MaxPool3x3,s2 FusedMBConv)^levels (X);  levels 0: one FusedMBConv, not pooled

    Args:
        dim: C.
        levels: halvings; the paper's is log2(side / window).
        window: (rows, columns) or one int that the result has; where halving gives another size, cells are averaged
            (or repeated) to it. None: what halving gives.

    Shape: (B, C, H, W) -> (B, w, w, C).

    Source: Global Context Vision Transformers (2022). Differs: any H and W through `window`.

    >>> import torch
    >>> GlobalQueryGenerator(16, levels=2)(torch.randn(1, 16, 28, 28)).shape
    torch.Size([1, 7, 7, 16])
    >>> GlobalQueryGenerator(16, levels=2, window=7)(torch.randn(1, 16, 31, 50)).shape
    torch.Size([1, 7, 7, 16])
    """

    def __init__(self, dim: int, levels: int, *, window: int | Pair | None = None) -> None:
        super().__init__()
        if isinstance(levels, bool) or not isinstance(levels, int) or levels < 0:
            raise ValueError(f"GlobalQueryGenerator: levels must be an int >= 0, got {levels!r}")
        self.levels = levels
        self.window = None if window is None else pair("GlobalQueryGenerator", "window", window)
        self.blocks = nn.ModuleList(FusedMBConv(dim) for _ in range(max(1, levels)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.levels:
                x = F.max_pool2d(x, 3, stride=2, padding=1)
        if self.window is not None and x.shape[2:] != self.window:
            x = F.adaptive_avg_pool2d(x, self.window)
        return x.permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, window={self.window}"


class GlobalWindowAttention(nn.Module):
    """Attention inside windows whose queries are the window's own, or the image's.

        local:   q, k, v = W x of the window
        global:  k, v = W x of the window;  q = g, unprojected, the same for all windows of an image
        out = softmax(q k^T / sqrt(d) + b) v W_O,  b: one learned bias per head and distance

    Cell i of a window takes query i of g. Maps are padded at the right and below to whole windows; padded cells are not
    attended to.

    Args:
        dim, heads: C, and into how many heads it is cut.
        window: (rows, columns) or one int.
        use_global: queries come from `q_global`.
        bias: of the query, key and value map; the output map always has one.

    Shape: x (B, H, W, C), q_global (B, rows, columns, C) -> (B, H, W, C).

    Source: Global Context Vision Transformers (2022). Differs: sides that the window does not divide.

    >>> import torch
    >>> layer = GlobalWindowAttention(32, heads=2, window=7, use_global=True)
    >>> layer(torch.randn(2, 15, 21, 32), torch.randn(2, 7, 7, 32)).shape
    torch.Size([2, 15, 21, 32])
    """

    def __init__(
        self, dim: int, heads: int, window: int | Pair = 7, *, use_global: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"GlobalWindowAttention: dim must be a multiple of heads, got {dim} and {heads}")
        self.dim, self.heads, self.use_global = dim, heads, use_global
        self.qkv = nn.Linear(dim, (2 if use_global else 3) * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.relative = RelativePositionBias2d(pair("GlobalWindowAttention", "window", window), heads)

    @property
    def window(self) -> Pair:
        return self.relative.window

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ValueError(f"GlobalWindowAttention: x must be (B, H, W, {self.dim}), got {tuple(x.shape)}")
        b, h, w, c = x.shape
        n = self.window[0] * self.window[1]
        padded = pad_to(x, self.window)
        grid = padded.shape[1], padded.shape[2]
        cells = self.qkv(partition(padded, self.window)).unflatten(2, (-1, self.heads, c // self.heads))
        parts = cells.permute(2, 0, 3, 1, 4)  # (2 or 3, G, heads, n, d), G = B windows
        if self.use_global:
            if q_global is None or q_global.shape != (b, *self.window, c):
                got = None if q_global is None else tuple(q_global.shape)
                raise ValueError(
                    f"GlobalWindowAttention: q_global must be {(b, *self.window, c)} for x {tuple(x.shape)}, got {got}"
                )
            shared = q_global.reshape(b, n, self.heads, -1).transpose(1, 2)  # (B, heads, n, d)
            q = shared.repeat_interleave(parts.shape[1] // b, 0)  # windows of one image lie together
            k, v = parts
        else:
            q, k, v = parts
        mask = None if grid == (h, w) else _cells_of_the_map((h, w), self.window).to(x.device)
        out = attend(q, k, v, bias=self.relative.score(), mask=mask).transpose(1, 2).flatten(2)
        return self.proj(merge(out, self.window, grid)[:, :h, :w])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, use_global={self.use_global}"


@lru_cache(maxsize=32)
def _cells_of_the_map(size: Pair, window: Pair) -> Tensor:
    """bool (W, n, n): which keys of each window lie on a map that was padded to whole windows. Kept for its layout."""
    with torch.inference_mode(False), torch.device("cpu"):
        real = partition(pad_to(torch.ones(1, *size, 1), window), window)[:, None, :, 0] > 0  # (W, 1, n)
        return real.repeat(1, real.shape[2], 1)


class GCViTBlock(nn.Module):
    """x + s1 Attention(LN(x)), then x + s2 MLP(LN(x)), on (B, H, W, C); s1 and s2 are layer scales or absent."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int | Pair,
        *,
        use_global: bool,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = GlobalWindowAttention(dim, heads, window, use_global=use_global, bias=bias)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.scale1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.scale2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, q_global: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.scale1(self.attention(self.norm1(x), q_global)))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class GCDownsample(nn.Module):
    """LayerNorm, FusedMBConv, convolution 3 x 3 of stride 2, LayerNorm; on (B, C, H, W)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = LayerNorm2d(dim, eps=1e-5), LayerNorm2d(out, eps=1e-5)
        self.block = FusedMBConv(dim)
        self.conv = nn.Conv2d(dim, out, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv(self.block(self.norm1(x))))


class GCViTStage(nn.Module):
    """Blocks with own and with shared queries in turn, the shared ones made once: (B, C, H, W) -> the same."""

    def __init__(self, dim: int, heads: int, window: Pair, levels: int, blocks: list[GCViTBlock]) -> None:
        super().__init__()
        self.queries = GlobalQueryGenerator(dim, levels, window=window)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.queries(x)
        x = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            x = block(x, shared)
        return x.permute(0, 3, 1, 2)


class GCViT(Backbone):
    """Global context vision transformer: images to four maps of strides 4, 8, 16, 32, and class scores.

    Even blocks attend inside windows, odd ones ask the windows with the image's shared queries.

    Args:
        dim: C of the first stage; each later one doubles it.
        depths, heads: of each stage.
        mlp_ratio: hidden width of the MLPs over C.
        layer_scale: first value, or None for none.
        image_size: side or (height, width) that the windows are laid out for: the image over (32, 32, 16, 32), so
            multiples of 32. Other images run with the same windows; see also `resize_`.
        bias: of queries, keys and values.
        drop_path: rate of the last block; it grows linearly from 0.
        num_classes, in_channels, features_only: see `Backbone`.

    Source: Global Context Vision Transformers (2022). Differs: images of any size. Where the windows do not divide a
    map it is padded and masked, and queries of another size than a window are averaged to it.

    >>> import torch
    >>> model = GCViT(16, (2, 2), (2, 4), image_size=64, num_classes=10).eval()
    >>> model(torch.randn(2, 3, 50, 71)).shape, [m.shape[1:] for m in model.forward_features(torch.randn(1, 3, 64, 64))]
    (torch.Size([2, 10]), [torch.Size([16, 16, 16]), torch.Size([32, 8, 8])])
    """

    def __init__(
        self,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        *,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        image_size: int | Pair = 224,
        bias: bool = True,
        drop_path: float = 0.2,
        num_classes: int = 1000,
        in_channels: int = 3,
        features_only: bool = False,
    ) -> None:
        if len(depths) != len(heads) or not 1 <= len(depths) <= 4:
            raise ValueError(
                f"GCViT: depths and heads must be of one length, 1 to 4, got {depths} and {heads}"
            )
        dims = [dim * 2**i for i in range(len(depths))]
        super().__init__(
            channels=dims,
            strides=[4 * 2**i for i in range(len(dims))],
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        windows = _windows(image_size)
        rates = drop_path_rates(drop_path, depths)
        self.stem = nn.Conv2d(in_channels, dim, 3, stride=2, padding=1)
        self.downs, self.stages = nn.ModuleList([GCDownsample(dim, dim)]), nn.ModuleList()
        for i, (width, depth, h) in enumerate(zip(dims, depths, heads, strict=True)):
            if i:
                self.downs.append(GCDownsample(dims[i - 1], width))
            blocks = [
                GCViTBlock(
                    width,
                    h,
                    windows[i],
                    use_global=j % 2 == 1,
                    mlp_ratio=mlp_ratio,
                    layer_scale=layer_scale,
                    drop_path=rates[i][j],
                    bias=bias,
                )
                for j in range(depth)
            ]
            levels = int(log2(RATIOS[i] // self.strides[i]))
            self.stages.append(GCViTStage(width, h, windows[i], levels, blocks))
        self.make_head(nn.LayerNorm(dims[-1]))
        for part in self.modules():  # convolutions keep torch's own first values
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02, a=-0.04, b=0.04)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        self.check(images)
        x, maps = self.stem(images), []
        for down, stage in zip(self.downs, self.stages, strict=True):
            x = stage(down(x))
            maps.append(x)
        return maps

    def resize_(self, image_size: int | Pair) -> GCViT:
        """Lay the windows out for another image size in place; the tables of the bias are interpolated bicubically."""
        for stage, window in zip(self.stages, _windows(image_size), strict=False):
            assert isinstance(stage, GCViTStage)
            stage.queries.window = window
            for block in stage.blocks:
                assert isinstance(block, GCViTBlock)
                block.attention.relative.resize_(window)
        return self


def _windows(image_size: int | Pair) -> list[Pair]:
    height, width = pair("GCViT", "image_size", image_size)
    if height % 32 or width % 32:
        raise ValueError(
            f"GCViT: image_size must be a multiple of 32 (images may have any), got {image_size}"
        )
    return [(height // ratio, width // ratio) for ratio in RATIOS]


def gcvit_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of a `GCViT` from the state_dict of the authors' release or of timm's gcvit_xxtiny, ..."""
    rules = [  # the authors' names, then timm's
        (r"^patch_embed\.proj\.", "stem."),
        (r"^patch_embed\.conv_down\.", "downs.0."),
        (r"^levels\.(\d+)\.downsample\.", lambda m: f"downs.{int(m[1]) + 1}."),
        (r"^levels\.(\d+)\.q_global_gen\.to_q_global\.(\d+)\.conv\.", r"stages.\1.queries.blocks.\2."),
        (r"^levels\.", "stages."),
        (r"^(downs\.\d+)\.conv\.(?=\d)", r"\1.block."),
        (r"\.2\.fc\.0\.weight$", ".gate.reduce.weight"),
        (r"\.2\.fc\.2\.weight$", ".gate.expand.weight"),
        (r"(\.block|\.blocks\.\d+)\.0\.weight$", r"\1.depthwise.weight"),
        (r"(\.block|\.blocks\.\d+)\.3\.weight$", r"\1.pointwise.weight"),
        (r"\.reduction\.", ".conv."),
        (r"\.gamma([12])$", r".scale\1.gamma"),
        (r"^stem\.conv1\.", "stem."),
        (r"^stem\.down\.", "downs.0."),
        (r"^stages\.(\d+)\.downsample\.", r"downs.\1."),
        (
            r"^stages\.(\d+)\.global_block\.blocks\.conv(\d+)\.",
            lambda m: f"stages.{m[1]}.queries.blocks.{int(m[2]) - 1}.",
        ),
        (r"\.conv_block\.", ".block."),
        (r"\.conv_dw\.", ".depthwise."),
        (r"\.conv_pw\.", ".pointwise."),
        (r"\.se\.fc1\.", ".gate.reduce."),
        (r"\.se\.fc2\.", ".gate.expand."),
        (r"\.ls([12])\.", r".scale\1."),
        (r"\.attn\.(?:rel_pos\.)?relative_position_bias_table$", ".attention.relative.table"),
        (r"\.attn\.", ".attention."),
        (r"^stages\.\d+\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    ]
    made = {}
    for name, value in weights.items():
        if name.endswith("relative_position_index"):
            continue
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        if ".gate." in name and value.ndim == 2:
            value = value[:, :, None, None]
        made[name] = value
    return made


def gcvit_xxtiny(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    features_only: bool = False,
    image_size: int | Pair = 224,
) -> GCViT:
    """GC ViT-XXT: 11,995,428 parameters."""
    depths = (2, 2, 6, 2)
    return _made(64, depths, 3.0, None, num_classes, in_channels, drop_path, features_only, image_size)


def gcvit_xtiny(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    features_only: bool = False,
    image_size: int | Pair = 224,
) -> GCViT:
    """GC ViT-XT: 19,981,294 parameters."""
    depths = (3, 4, 6, 5)
    return _made(64, depths, 3.0, None, num_classes, in_channels, drop_path, features_only, image_size)


def gcvit_tiny(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    features_only: bool = False,
    image_size: int | Pair = 224,
) -> GCViT:
    """GC ViT-T: 28,221,974 parameters."""
    return _made(64, DEPTHS, 3.0, None, num_classes, in_channels, drop_path, features_only, image_size)


def gcvit_small(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.3,
    features_only: bool = False,
    image_size: int | Pair = 224,
) -> GCViT:
    """GC ViT-S: 51,092,173 parameters."""
    return _made(96, DEPTHS, 2.0, 1e-5, num_classes, in_channels, drop_path, features_only, image_size)


def gcvit_base(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.5,
    features_only: bool = False,
    image_size: int | Pair = 224,
) -> GCViT:
    """GC ViT-B: 90,320,836 parameters."""
    return _made(128, DEPTHS, 2.0, 1e-5, num_classes, in_channels, drop_path, features_only, image_size)


def gcvit_large(
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.5,
    features_only: bool = False,
    image_size: int | Pair = 224,
) -> GCViT:
    """GC ViT-L: 202,075,570 parameters."""
    return _made(192, DEPTHS, 2.0, 1e-5, num_classes, in_channels, drop_path, features_only, image_size)


DEPTHS = (3, 4, 19, 5)


def _made(
    dim: int,
    depths: tuple[int, ...],
    mlp_ratio: float,
    layer_scale: float | None,
    num_classes: int,
    in_channels: int,
    drop_path: float,
    features_only: bool,
    image_size: int | Pair,
) -> GCViT:
    """A published size: heads are 32 wide."""
    return GCViT(
        dim,
        depths,
        [dim * 2**i // 32 for i in range(4)],
        mlp_ratio=mlp_ratio,
        layer_scale=layer_scale,
        image_size=image_size,
        drop_path=drop_path,
        num_classes=num_classes,
        in_channels=in_channels,
        features_only=features_only,
    )
