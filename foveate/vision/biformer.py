"""BiFormer: regions choose regions by their means, then every token attends to all tokens of the chosen ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention
from foveate.core.patterns.orders import tile_major
from foveate.core.selectors.region_topk import RegionTopK
from foveate.vision.backbone import Backbone
from foveate.vision.blocks import ConvPositionEncoding, DropPath, Mlp, drop_path_rates
from foveate.vision.windows import Pair, attend, merge, pad_to, pair, partition

SCALES = ("dim", "head")


class BiLevelRoutingAttention(nn.Module):
    """Attention to the k regions that the token's own region chose, plus a depthwise convolution of the values.

        q, k, v = x W_qkv + b                                    of width C, cut into regions
        R(r) = top-k_s qbar_r . kbar_s                           means of regions, one choice for all heads
        out_i = (softmax_{j in R(r(i))}(c q_i . k_j) v_j + LEPE(v)_i) W_o + b_o

    The choice carries no gradient. A region is a cell of a grid of S x S at every resolution; where S does not divide a
    side, regions have ceil(side / S) cells and the last ones fewer. Costs k / S^2 of the pairs of full attention.

    Args:
        dim, heads: C, and into how many heads it is cut.
        regions: S, regions per axis (one int or two).
        k: regions that each region attends to; `regions` squared is full attention.
        lepe: side of the depthwise convolution of the value map, odd; 0: without.
        scale: "dim": c = C^-0.5, as released weights expect; "head": c = (C / heads)^-0.5.
        engine: None: the keys of the chosen regions are gathered, k times over, and multiplied densely; a name as in
            `attention`: that engine runs on the map in region order. Regions of a multiple of 64 tokens suit it.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W.

    Source: BiFormer: Vision Transformer with Bi-Level Routing Attention (2023). Differs: cells that only pad a map are
    neither attended to nor counted in the means, nor convolved.

    >>> BiLevelRoutingAttention(32, heads=2, regions=4, k=3)(torch.randn(2, 12, 11, 32)).shape
    torch.Size([2, 12, 11, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        regions: int | Pair = 7,
        k: int = 4,
        lepe: int = 5,
        scale: str = "dim",
        engine: str | None = None,
    ) -> None:
        super().__init__()
        name = "BiLevelRoutingAttention"
        self.heads, self.head_dim = _heads(name, dim, heads)
        self.regions = pair(name, "regions", regions)
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"{name}: k must be an int >= 1, got {k!r}")
        if scale not in SCALES:
            raise ValueError(f"{name}: scale must be 'dim' or 'head', got {scale!r}")
        self.k, self.engine = k, engine
        self.scale = (dim if scale == "dim" else self.head_dim) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = _depthwise(name, dim, lepe)
        self.proj = nn.Linear(dim, dim)

    def selector(self, shape: Pair, *, ordered: bool = False) -> RegionTopK:
        """The choice on a map of this shape, for tokens row by row, or with `ordered` region after region."""
        chooser = RegionTopK(shape, self.regions, self.k)
        return (
            RegionTopK(shape, self.regions, self.k, order=tile_major(shape, chooser.cells))
            if ordered
            else chooser
        )

    def forward(self, x: Tensor) -> Tensor:
        shape = _shape("BiLevelRoutingAttention", x, self.heads * self.head_dim)
        q, k, v = self.qkv(x).chunk(3, -1)  # (B, H, W, C)
        out = self._gathered(q, k, v, shape) if self.engine is None else self._ordered(q, k, v, shape)
        if self.lepe is not None:
            out = out + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out)

    def chosen(self, x: Tensor) -> Tensor:
        """int64 (B, R, k): the regions that each region of x (B, H, W, C) attends to, the best first."""
        shape = _shape("BiLevelRoutingAttention", x, self.heads * self.head_dim)
        q, k, _ = self.qkv(x).chunk(3, -1)
        return self.selector(shape).select(self._tokens(q), self._tokens(k))[:, 0]

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, heads, H W, d)"""
        return x.flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _gathered(self, q: Tensor, k: Tensor, v: Tensor, shape: Pair) -> Tensor:
        chooser = self.selector(shape)
        chosen = chooser.select(self._tokens(q), self._tokens(k))[:, 0]  # (B, R, K)
        (rows, columns), (batch, count, _) = chooser.cells, chosen.shape
        first = torch.arange(batch, device=q.device)[:, None, None] * count
        flat = (chosen + first).flatten()  # (B R K,)

        def cells(x: Tensor) -> Tensor:  # (B R, n, C)
            return partition(pad_to(x, (rows, columns)), (rows, columns))

        def split(x: Tensor) -> Tensor:  # (G, n, C) -> (G, heads, n, d)
            return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

        def gather(x: Tensor) -> Tensor:  # (B R, n, C) -> (B R, K n, C)
            return x.index_select(0, flat).unflatten(0, (batch * count, -1)).flatten(1, 2)

        mask = None
        grid = chooser.counts[0] * rows, chooser.counts[1] * columns
        if grid != shape:
            real = cells(q.new_ones(1, *shape, 1))[:, :, 0] > 0  # (R, n)
            mask = real[chosen].flatten(2).flatten(0, 1)[:, None].expand(-1, rows * columns, -1)
        out = attend(
            split(cells(q)),
            split(gather(cells(k))),
            split(gather(cells(v))),
            mask=mask,
            scale=self.scale,
            engine="auto" if mask is None else "dense",  # a mask that changes is not worth a layout
        )
        out = merge(out.transpose(1, 2).flatten(2), (rows, columns), grid)
        return out[:, : shape[0], : shape[1]]

    def _ordered(self, q: Tensor, k: Tensor, v: Tensor, shape: Pair) -> Tensor:
        assert self.engine is not None
        chooser = self.selector(shape, ordered=True)
        q, k, v = (chooser.order.apply(self._tokens(t)) for t in (q, k, v))
        out = attention(q, k, v, chooser.layout(q, k), scale=self.scale, engine=self.engine)
        assert isinstance(out, Tensor)
        return chooser.order.undo(out).transpose(1, 2).flatten(2).unflatten(1, shape)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, regions={self.regions}, k={self.k}"


class InputPositionAttention(nn.Module):
    """Full attention plus a depthwise convolution of its input: what BiFormer's last stage uses.

        out = (softmax(q k^T d^-0.5) v + LEPE(x)) W_o + b_o,   q, k, v = x W_qkv without bias

    Args:
        dim, heads: C, and into how many heads it is cut.
        lepe: side of the depthwise convolution, odd; 0: without.

    Shape: (B, H, W, C) -> (B, H, W, C). Costs (H W)^2 pairs: for maps as small as a last stage's.

    Source: BiFormer: Vision Transformer with Bi-Level Routing Attention (2023).

    >>> InputPositionAttention(32, heads=2)(torch.randn(1, 7, 5, 32)).shape
    torch.Size([1, 7, 5, 32])
    """

    def __init__(self, dim: int, heads: int = 8, *, lepe: int = 5) -> None:
        super().__init__()
        self.heads, self.head_dim = _heads("InputPositionAttention", dim, heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lepe = _depthwise("InputPositionAttention", dim, lepe)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        shape = _shape("InputPositionAttention", x, self.heads * self.head_dim)
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.heads, -1))  # (B, N, 3, heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = attend(q, k, v).transpose(1, 2).flatten(2).unflatten(1, shape)
        if self.lepe is not None:
            out = out + self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.proj(out)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class BiFormerBlock(nn.Module):
    """x += DW3x3(x); x += Attention(LN x); x += MLP(LN x), on (B, H, W, C).

    Args:
        dim: C.
        heads: of the routed attention.
        k: regions attended to; None: `InputPositionAttention` with 8 heads instead.
        regions: as in `BiLevelRoutingAttention`.
        mlp_ratio: hidden width of the MLP over dim.
        drop_path: rate of stochastic depth.
        position: with the depthwise convolution at the start.
        engine: as in `BiLevelRoutingAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        k: int | None,
        regions: int | Pair = 7,
        mlp_ratio: float = 3.0,
        drop_path: float = 0.0,
        position: bool = True,
        engine: str | None = None,
    ) -> None:
        super().__init__()
        self.position = ConvPositionEncoding(dim) if position else None
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = (
            InputPositionAttention(dim)
            if k is None
            else BiLevelRoutingAttention(dim, heads, regions=regions, k=k, engine=engine)
        )
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.position is not None:
            x = self.position(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BiFormer(Backbone):
    """Four stages of BiFormer blocks at strides 4, 8, 16 and 32.

    Args:
        dims: width of each stage.
        depths: blocks of each stage.
        ks: regions attended to in each stage; None: full attention (8 heads).
        regions: S, regions per axis at every resolution.
        head_dim: width of a head in the routed stages.
        mlp_ratio: as in `BiFormerBlock`.
        stem: "conv": two 3 x 3 convolutions of stride 2, a 3 x 3 one between stages, positions from a convolution in
            each block; "patch": the layout of Swin, patches of 4 x 4 and of 2 x 2 with batch norms.
        engine: as in `BiLevelRoutingAttention`.
        num_classes, in_channels, drop_path, features_only: as in every backbone.

    Shape: images (B, in_channels, H, W), any H and W -> (B, num_classes), or four maps. With "patch", a side
    that patches do not divide is padded with zeros.

    Source: BiFormer: Vision Transformer with Bi-Level Routing Attention (2023).

    >>> model = BiFormer(dims=(32, 32, 64, 64), depths=(1, 1, 1, 1), num_classes=10)
    >>> model(torch.randn(1, 3, 64, 96)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        ks: Sequence[int | None] = (1, 4, 16, None),
        regions: int | Pair = 7,
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        stem: str = "conv",
        engine: str | None = None,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.1,
        features_only: bool = False,
    ) -> None:
        if not len(dims) == len(depths) == len(ks) == 4:
            raise ValueError(
                f"BiFormer: dims, depths and ks must have four entries, got {dims}, {depths}, {ks}"
            )
        super().__init__(
            channels=dims,
            strides=(4, 8, 16, 32),
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        if stem not in ("conv", "patch"):
            raise ValueError(f"BiFormer: stem must be 'conv' or 'patch', got {stem!r}")
        first = _conv_stem(in_channels, dims[0]) if stem == "conv" else _patch_stem(in_channels, dims[0])
        between = _conv_down if stem == "conv" else _patch_down
        downs = [between(a, b) for a, b in pairwise(dims)]
        self.downsamples = nn.ModuleList([first, *downs])
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    BiFormerBlock(
                        dim,
                        dim // head_dim,
                        k=k,
                        regions=regions,
                        mlp_ratio=mlp_ratio,
                        drop_path=rate,
                        position=stem == "conv",
                        engine=engine,
                    )
                    for rate in rates
                )
            )
            for dim, k, rates in zip(dims, ks, drop_path_rates(drop_path, depths), strict=True)
        )
        self.make_head(nn.BatchNorm2d(dims[-1]))
        for part in self.modules():  # convolutions keep torch's own
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        self.check(images)
        maps, x = [], images
        for down, stage in zip(self.downsamples, self.stages, strict=True):
            x = stage(down(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, C_i, H_i, W_i)
            maps.append(x)
        return maps

    def pool(self, maps: list[Tensor]) -> Tensor:
        x = maps[-1] if self.norm is None else self.norm(maps[-1])
        return x.mean((2, 3))


def biformer_tiny(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.1, features_only: bool = False
) -> BiFormer:
    """BiFormer-T: 13,142,760 parameters."""
    return BiFormer(
        num_classes=num_classes, in_channels=in_channels, drop_path=drop_path, features_only=features_only
    )


def biformer_small(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.15, features_only: bool = False
) -> BiFormer:
    """BiFormer-S: 25,536,232 parameters."""
    return BiFormer(
        depths=(4, 4, 18, 4),
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def biformer_base(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.4, features_only: bool = False
) -> BiFormer:
    """BiFormer-B: 56,804,968 parameters."""
    return BiFormer(
        dims=(96, 192, 384, 768),
        depths=(4, 4, 18, 4),
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def biformer_stl(
    *, num_classes: int = 1000, in_channels: int = 3, drop_path: float = 0.1, features_only: bool = False
) -> BiFormer:
    """BiFormer in the layout of Swin-T: 28,372,552 parameters."""
    return BiFormer(
        dims=(96, 192, 384, 768),
        depths=(2, 2, 6, 2),
        mlp_ratio=4.0,
        stem="patch",
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


_RENAMED = (
    (r"^downsample_layers\.", "downsamples."),
    (r"^(stages\.\d+\.)blocks\.", r"\1"),
    (r"\.pos_embed\.", ".position.conv."),
    (r"\.attn\.qkv\.qkv\.", ".attn.qkv."),
    (r"\.attn\.wo\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
)


def convert_biformer(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' weights under this module's names, for `load_state_dict`.

    >>> list(convert_biformer({"stages.0.1.mlp.3.bias": torch.zeros(4)}))
    ['stages.0.1.mlp.fc2.bias']
    """
    made = {}
    for name, tensor in released.items():
        for old, new in _RENAMED:
            name = re.sub(old, new, name)
        made[name] = tensor
    return made


# --------------------------------------------------------------------------------------------------- parts
class _Patches(nn.Conv2d):
    """A convolution of patches that do not overlap; the last ones are padded with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        side = self.stride[0]
        return super().forward(F.pad(x, (0, -x.shape[3] % side, 0, -x.shape[2] % side)))


def _conv_stem(in_channels: int, dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, dim // 2, 3, 2, 1),
        nn.BatchNorm2d(dim // 2),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, 2, 1),
        nn.BatchNorm2d(dim),
    )


def _conv_down(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim, out, 3, 2, 1), nn.BatchNorm2d(out))


def _patch_stem(in_channels: int, dim: int) -> nn.Sequential:
    return nn.Sequential(_Patches(in_channels, dim, 4, 4), nn.BatchNorm2d(dim))


def _patch_down(dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(dim), _Patches(dim, out, 2, 2))


def _depthwise(owner: str, dim: int, side: int) -> nn.Conv2d | None:
    if isinstance(side, bool) or not isinstance(side, int) or side < 0 or (side and side % 2 == 0):
        raise ValueError(f"{owner}: lepe must be 0 or an odd int, got {side!r}")
    return nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim) if side else None


def _heads(owner: str, dim: int, heads: int) -> tuple[int, int]:
    """(heads, head_dim)"""
    if heads < 1 or dim % heads:
        raise ValueError(f"{owner}: dim must be a multiple of heads, got {dim} and {heads}")
    return heads, dim // heads


def _shape(owner: str, x: Tensor, dim: int) -> Pair:
    if x.ndim != 4 or x.shape[3] != dim:
        raise ValueError(f"{owner}: x must be (B, H, W, {dim}), got {tuple(x.shape)}")
    return x.shape[1], x.shape[2]
