"""L2ViT: softmax windows and global ReLU linear attention in turn, the latter sharpened by depthwise convolutions."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foveate.vision.backbone import Backbone
from foveate.vision.blocks import ConvPositionEncoding, DropPath, Mlp, drop_path_rates
from foveate.vision.windows import WindowAttention, pad_to


class ReluLinearAttention(nn.Module):
    """Every token reads all others through one D x D summary per head; the denominator has a floor.

        q' = relu(W_q x),  k' = relu(W_k x),  S = sum_j k'_j^T v_j,  z = sum_j k'_j
        o_i = tau q'_i S / max(denom_min, q'_i . z),   out = merge(o) W_o

    tau, a scalar per head, multiplies after the division and so is not cancelled by it. While q' . z stays below
    denom_min, o is linear in q'; above it, rows of weights sum to tau. S and z are summed in float32 (float64 for
    float64). Permuted tokens give permuted results. Work: 2 N D multiply-adds per channel's head, linear in the tokens.

    Args:
        dim: C, a multiple of heads; heads: H.
        denom_min: floor of the denominator, > 0. 100 steadies training; a small one normalises rows.
        temperature: "learned" (starts at D^-0.5) or a fixed number.
        bias: of the query, key and value map; the output map always has one.

    Shape: (B, ..., C) -> the same: tokens (B, N, C) or a map (B, H, W, C).

    Source: The Linear Attention Resurrection in Vision Transformer (2025).

    >>> layer = ReluLinearAttention(32, heads=4)
    >>> layer(torch.randn(2, 7, 5, 32)).shape, layer(torch.randn(2, 35, 32)).shape
    (torch.Size([2, 7, 5, 32]), torch.Size([2, 35, 32]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        denom_min: float = 100.0,
        temperature: str | float = "learned",
        bias: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or dim % heads:
            raise ValueError(f"ReluLinearAttention: dim must be a multiple of heads, got {dim} and {heads!r}")
        if not denom_min > 0:
            raise ValueError(f"ReluLinearAttention: denom_min must be > 0, got {denom_min}")
        if isinstance(temperature, str) and temperature != "learned":
            raise ValueError(
                f"ReluLinearAttention: temperature must be 'learned' or a number, got {temperature!r}"
            )
        self.dim, self.heads, self.head_dim, self.denom_min = dim, heads, dim // heads, float(denom_min)
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.temperature: nn.Parameter | float
        if isinstance(temperature, str):
            self.temperature = nn.Parameter(torch.full((heads, 1, 1), self.head_dim**-0.5))
        else:
            self.temperature = float(temperature)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """o (B, H, N, D) of q, k, v (B, H, N, D), before relu."""
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        exact = contextlib.nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False)
        with exact:
            q, k, v = q.relu().to(wide), k.relu().to(wide), v.to(wide)
            summary = (k.mT @ v) * self.temperature  # (B, H, D, D)
            floor = (q @ k.sum(2).unsqueeze(3)).clamp(min=self.denom_min)  # (B, H, N, 1)
            return q @ summary / floor

    def forward(self, x: Tensor) -> Tensor:
        """out (B, ..., C) of x (B, ..., C)."""
        if x.ndim < 3 or x.shape[-1] != self.dim:
            raise ValueError(f"ReluLinearAttention: x must be (B, ..., {self.dim}), got {tuple(x.shape)}")
        qkv = self.qkv(x).flatten(1, -2).unflatten(2, (3, self.heads, -1))  # (B, N, 3, H, D)
        out = self.mixed(*qkv.permute(2, 0, 3, 1, 4)).to(qkv.dtype)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, denom_min={self.denom_min:g}"


class LocalConcentration(nn.Module):
    """DW_k(BN(GELU(DW_k(x)))): draws what linear attention spread evenly back to where it came from.

    Args:
        dim: C; kernel: k, odd.

    Shape: (B, H, W, C) -> the same.

    Source: The Linear Attention Resurrection in Vision Transformer (2025).

    >>> LocalConcentration(8)(torch.randn(2, 5, 3, 8)).shape
    torch.Size([2, 5, 3, 8])
    """

    def __init__(self, dim: int, kernel: int = 7) -> None:
        super().__init__()
        if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"LocalConcentration: kernel must be odd, got {kernel!r}")
        self.conv1 = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.act = nn.GELU()
        self.norm = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm(self.act(self.conv1(x.permute(0, 3, 1, 2))))).permute(0, 2, 3, 1)


class LWABlock(nn.Module):
    """Local: x = CPE(x); x += WindowAttention(LN x); x = CPE(x); x += MLP(LN x).

    Args:
        dim, heads: C and H.
        window: side of the windows; maps are padded with zeros to its multiples, and padded cells are attended to.
        mlp_ratio: hidden width of the MLP over C.
        drop_path: share of branches dropped per image in train mode.

    CPE adds a depthwise 3 x 3 convolution. Windows are not shifted and have no position bias.

    Shape: (B, H, W, C) -> the same.

    >>> LWABlock(16, 2, window=4)(torch.randn(1, 5, 7, 16)).shape
    torch.Size([1, 5, 7, 16])
    """

    def __init__(
        self, dim: int, heads: int, *, window: int = 7, mlp_ratio: float = 4.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.positions1, self.positions2 = ConvPositionEncoding(dim), ConvPositionEncoding(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window, relative_bias=False, edge="zero")
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.positions1(x)
        h, w = x.shape[1:3]
        near = self.attn(pad_to(self.norm1(x), self.attn.window))[:, :h, :w]
        x = self.positions2(x + self.drop_path(near))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LGABlock(nn.Module):
    """Global: x = CPE(x); x += LinearAttention(LN x); x += LocalConcentration(LN x); x += MLP(LN x).

    Args:
        dim, heads: C and H.
        mlp_ratio: hidden width of the MLP over C.
        kernel: of the local concentration; None: without it.
        denom_min: see `ReluLinearAttention`.
        drop_path: share of branches dropped per image in train mode.

    Shape: (B, H, W, C) -> the same.

    >>> LGABlock(16, 2)(torch.randn(1, 5, 7, 16)).shape
    torch.Size([1, 5, 7, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        kernel: int | None = 7,
        denom_min: float = 100.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.positions = ConvPositionEncoding(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ReluLinearAttention(dim, heads, denom_min=denom_min)
        self.norm3 = None if kernel is None else nn.LayerNorm(dim)
        self.local = None if kernel is None else LocalConcentration(dim, kernel)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.positions(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if self.norm3 is not None and self.local is not None:
            x = x + self.drop_path(self.local(self.norm3(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class L2ViT(Backbone):
    """Four stages, in each even blocks local (`LWABlock`), odd ones global (`LGABlock`).

    Stem: 3 x 3 convolution of stride 2 to C/2, batch norm, ReLU, the same to C, batch norm, layer norm; between
    stages a layer norm and a 2 x 2 convolution of stride 2. Images and maps are padded with zeros right and below
    where a stride does not divide them. Head: layer norm, mean, linear.

    Args:
        dims, depths, heads: per stage.
        window: of the local blocks.
        mlp_ratio: hidden width of the MLPs over C.
        denom_min: see `ReluLinearAttention`.
        num_classes, in_channels, drop_path, features_only: see `Backbone`; drop_path grows linearly over the blocks.

    Shape: images (B, in_channels, H, W) of any size; strides 4, 8, 16, 32, sides rounded up.

    Source: The Linear Attention Resurrection in Vision Transformer (2025).

    >>> model = L2ViT((16, 32), (2, 2), (1, 2), window=4, num_classes=10)
    >>> model(torch.randn(2, 3, 30, 17)).shape, [m.shape[1:] for m in model.forward_features(torch.randn(2, 3, 30, 17))]
    (torch.Size([2, 10]), [torch.Size([16, 8, 5]), torch.Size([32, 4, 3])])
    """

    def __init__(
        self,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
        *,
        window: int = 7,
        mlp_ratio: float = 4.0,
        denom_min: float = 100.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.2,
        features_only: bool = False,
    ) -> None:
        for name, given in (("depths", depths), ("heads", heads)):
            if len(given) != len(dims):
                raise ValueError(
                    f"L2ViT: {name} must have one value per stage ({len(dims)}), got {tuple(given)}"
                )
        super().__init__(
            channels=tuple(dims),
            strides=tuple(4 * 2**i for i in range(len(dims))),
            num_classes=num_classes,
            in_channels=in_channels,
            features_only=features_only,
        )
        first = dims[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, first // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(first // 2),
            nn.ReLU(),
            nn.Conv2d(first // 2, first, 3, stride=2, padding=1),
            nn.BatchNorm2d(first),
        )
        # the norm of the stem comes after it, those of the reductions before them
        self.norms = nn.ModuleList(nn.LayerNorm(d) for d in (first, *dims[:-1]))
        self.reduce = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in itertools.pairwise(dims))
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path, depths)):
            blocks = [
                LGABlock(dims[i], heads[i], mlp_ratio=mlp_ratio, denom_min=denom_min, drop_path=rate)
                if j % 2
                else LWABlock(dims[i], heads[i], window=window, mlp_ratio=mlp_ratio, drop_path=rate)
                for j, rate in enumerate(rates)
            ]
            self.stages.append(nn.Sequential(*blocks))
        self.make_head(nn.LayerNorm(dims[-1]))
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(m.weight, std=0.02)  # cut off at 2, not at two deviations
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The maps (B, C_i, H_i, W_i) at the end of every stage."""
        self.check(images)
        x, maps = pad_to(images.permute(0, 2, 3, 1), 4), []
        x = self.norms[0](self.stem(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        for i, stage in enumerate(self.stages):
            if i:
                x = pad_to(self.norms[i](x), 2).permute(0, 3, 1, 2)
                x = self.reduce[i - 1](x).permute(0, 2, 3, 1)
            x = stage(x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps


def l2vit_tiny(
    *,
    window: int = 7,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    features_only: bool = False,
) -> L2ViT:
    """L2ViT-T: 28,596,781 parameters."""
    return L2ViT(
        window=window,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def l2vit_small(
    *,
    window: int = 7,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.2,
    features_only: bool = False,
) -> L2ViT:
    """L2ViT-S: 50,199,157 parameters."""
    return L2ViT(
        depths=(2, 2, 18, 2),
        window=window,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def l2vit_base(
    *,
    window: int = 7,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.3,
    features_only: bool = False,
) -> L2ViT:
    """L2ViT-B: 88,577,188 parameters; window=12 for images of 384 pixels."""
    return L2ViT(
        (128, 256, 512, 1024),
        (2, 2, 18, 2),
        (4, 8, 16, 32),
        window=window,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )
