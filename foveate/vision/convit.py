"""ConViT: heads that begin as the taps of a convolution and may leave it, by a gate between position and content."""

from __future__ import annotations

import math
import warnings
from typing import cast

import torch
from torch import Tensor, nn

from foveate.core.attention import attention
from foveate.vision.blocks import DropPath, Mlp, drop_path_rates, init_, interpolate_map
from foveate.vision.tokens import ClassTokenBackbone, PatchEmbed, TokenAttention


def positional_factors(weight: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The positional attention of each head, as one matrix per axis: P_h = rows_h (x) columns_h.

        P_h = softmax_j(w_h . (dx, dy, dx^2 + dy^2)),  dx = x_j - x_i,  dy = y_j - y_i

    The squared distance is a sum over the axes, so the softmax over the grid is the product of two over its sides.

    Args:
        weight: w (heads, 3).
        grid: (h, w), rows and columns of the tokens.

    Returns:
        rows (heads, h, h) and columns (heads, w, w); P[h, (y, x), (v, u)] = rows[h, y, v] columns[h, x, u].

    >>> rows, columns = positional_factors(torch.tensor([[2.0, 0.0, -1.0]]), (1, 3))
    >>> columns[0, 0].argmax().item()  # the query at 0 looks one to the right
    1
    """

    def axis(length: int, slope: Tensor) -> Tensor:
        at = torch.arange(length, device=weight.device, dtype=weight.dtype)
        step = at - at[:, None]  # key minus query (length, length)
        return torch.softmax(slope[:, None, None] * step + weight[:, 2, None, None] * step * step, -1)

    return axis(grid[0], weight[:, 1]), axis(grid[1], weight[:, 0])


def gated_positional_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, gate: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Content attention and positional attention, mixed after their softmaxes.

        O = (1 - sigma(g)) softmax(Q K^T / sqrt(D)) V + sigma(g) P V,  P of `positional_factors`

    The second part costs h + w multiply-adds per token and channel instead of h w.

    Args:
        q, k: (B, heads, h w, D), tokens of a grid in row-major order; v: (B, heads, h w, E).
        weight: (heads, 3); gate: g (heads,).
        grid: (h, w).

    Returns:
        (B, heads, h w, E).
    """
    rows, columns = positional_factors(weight, grid)
    near = torch.einsum("hxu,bhyue->bhyxe", columns, v.unflatten(2, grid))
    near = torch.einsum("hyu,bhuxe->bhyxe", rows, near).flatten(2, 3)  # (B, heads, h w, E)
    share = torch.sigmoid(gate)[:, None, None]
    return (1 - share) * cast(Tensor, attention(q, k, v)) + share * near


class GPSA(nn.Module):
    """Gated positional self-attention.

        A_h = (1 - sigma(g_h)) softmax(Q_h K_h^T / sqrt(D)) + sigma(g_h) P_h
        out = concat_h(A_h V_h) W_O

    Two softmaxes are mixed, so no bias on the logits expresses it. `local_init_` makes the heads the taps of a
    K x K convolution, K = floor(sqrt(heads)); training may turn each gate towards content.

    Args:
        dim: C; heads: a square number makes all heads local.
        bias: of the query, key and value maps; the output map always has one.
        locality_strength: alpha of `local_init_`; None leaves the positions random and V as it is.
        gate: g at the beginning.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W.

    Source: ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases (2021). Differs: grids
    need not be square; P is applied axis by axis; rows are not divided by their sum, which is 1. The bias of the
    positional logits cancels in the softmax: it is kept (counts, weights of others) but not trained.

    >>> GPSA(32, heads=4)(torch.randn(2, 5, 7, 32)).shape
    torch.Size([2, 5, 7, 32])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        bias: bool = False,
        locality_strength: float | None = 1.0,
        gate: float = 1.0,
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"GPSA: dim must be a multiple of heads, got {dim} and {heads}")
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.qk = nn.Linear(dim, 2 * dim, bias=bias)
        self.v = nn.Linear(dim, dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.position = nn.Linear(3, heads)
        self.gate = nn.Parameter(torch.full((heads,), float(gate)))
        init_(self)
        self.position.bias.requires_grad_(False)
        if locality_strength is not None:
            self.local_init_(locality_strength)

    @torch.no_grad()
    def local_init_(self, alpha: float = 1.0) -> GPSA:
        """Make the first K^2 heads the taps of a K x K convolution: head a + K b looks at Delta = (b - c, a - c).

            positional logit = alpha (2 delta . Delta - |delta|^2),  V = identity

        delta and Delta as (x, y), key minus query; c = (K - 1) / 2. Heads beyond K^2 keep what they have (a warning).
        """
        side = math.isqrt(self.heads)
        if side * side != self.heads:
            warnings.warn(
                f"GPSA: {self.heads} heads are not a square number; heads from {side * side} on are not local",
                stacklevel=2,
            )
        tap = torch.arange(side * side)
        delta = torch.stack([tap // side, tap % side], 1) - (side - 1) / 2  # (K^2, 2) as (x, y)
        logits = torch.cat([2 * delta, -torch.ones(side * side, 1)], 1)
        self.position.weight[: side * side] = (alpha * logits).to(self.position.weight)
        self.position.bias.zero_()
        nn.init.eye_(self.v.weight)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """out (B, H, W, C) for x (B, H, W, C)."""
        q, k, v, grid = self._split(x)
        out = gated_positional_attention(q, k, v, self.position.weight, self.gate, grid)
        return self.proj(out.transpose(1, 2).flatten(2)).unflatten(1, grid)

    def weights(self, x: Tensor) -> Tensor:
        """A (B, heads, N, N) for x (B, H, W, C), N = H W: for looking at; `forward` never makes it."""
        q, k, _, grid = self._split(x)
        rows, columns = positional_factors(self.position.weight, grid)
        positional = torch.einsum("hyv,hxu->hyxvu", rows, columns).flatten(3).flatten(1, 2)
        share = torch.sigmoid(self.gate)[:, None, None]
        return (1 - share) * torch.softmax(q @ k.mT * self.head_dim**-0.5, -1) + share * positional

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ValueError(f"GPSA: x must be (B, H, W, {self.dim}), got {tuple(x.shape)}")
        both = torch.cat([self.qk(x), self.v(x)], -1).flatten(1, 2)  # (B, N, 3 C)
        q, k, v = both.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v, (x.shape[1], x.shape[2])

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}"


def attention_distance(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """Non-locality of each head: how far it looks, in tokens.

        D_h = mean_i sum_j A_ij |delta_ij|

    Args:
        weights: A (..., heads, N, N) with rows that sum to 1; leading axes are averaged.
        grid: (h, w), N = h w.

    Returns:
        (heads,).

    >>> attention_distance(torch.eye(6)[None], (2, 3))
    tensor([0.])
    """
    h, w = grid
    if weights.ndim < 3 or weights.shape[-2:] != (h * w, h * w):
        raise ValueError(
            f"attention_distance: weights must be (.., heads, {h * w}, {h * w}) for grid {(h, w)}, "
            f"got {tuple(weights.shape)}"
        )
    at = torch.cartesian_prod(torch.arange(h), torch.arange(w)).to(weights)  # (N, 2)
    far = (weights * torch.cdist(at, at)).sum(-1).mean(-1)  # (.., heads)
    return far.flatten(0, -2).mean(0) if far.ndim > 1 else far


def locality_gates(model: nn.Module) -> dict[str, Tensor]:
    """sigma(g) (heads,) of every GPSA layer of a model, by the layer's name: 1 is position alone, 0 content alone.

    >>> locality_gates(nn.Sequential(GPSA(8, 4)))["0"]
    tensor([0.7311, 0.7311, 0.7311, 0.7311])
    """
    return {
        name: torch.sigmoid(layer.gate.detach())
        for name, layer in model.named_modules()
        if isinstance(layer, GPSA)
    }


class ConViTBlock(nn.Module):
    """x + GPSA(LN x), then x + MLP(LN x), on (B, H, W, C). `gated` False: ordinary attention on (B, N, C)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        gated: bool = True,
        mlp_ratio: float = 4.0,
        bias: bool = False,
        locality_strength: float | None = 1.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)
        init_(self)
        self.attention = (
            GPSA(dim, heads, bias=bias, locality_strength=locality_strength)
            if gated
            else TokenAttention(dim, heads, bias=bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ConViT(ClassTokenBackbone):
    """A vision transformer whose first layers are gated positional self-attention.

    Patches and learned absolute positions; `local` GPSA blocks on the map; then a class token joins for the rest,
    which are ordinary, and is read out.

    Args:
        dim, heads, depth; local: how many of the blocks are GPSA.
        patch: side of a patch; size: side of the images that positions are learned for; others interpolate them
            (bicubic). Sides that are not multiples of the patch are padded with zeros, right and bottom.
        mlp_ratio, bias (of queries, keys and values), locality_strength (see `GPSA`).
        num_classes, in_channels, drop_path, features_only: see `Backbone`.

    Source: ConViT (2021). Differs: any size of image.
    """

    def __init__(
        self,
        *,
        dim: int = 192,
        heads: int = 4,
        depth: int = 12,
        local: int = 10,
        patch: int = 16,
        size: int = 224,
        mlp_ratio: float = 4.0,
        bias: bool = False,
        locality_strength: float | None = 1.0,
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
        if not 0 <= local <= depth:
            raise ValueError(f"ConViT: local must be in [0, depth = {depth}], got {local}")
        self.local = local
        self.embed = PatchEmbed(in_channels, dim, patch)
        self.positions = nn.Parameter(torch.empty(1, -(-size // patch), -(-size // patch), dim))
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        for table in (self.positions, self.class_token):
            nn.init.trunc_normal_(table, std=0.02)
        rates = drop_path_rates(drop_path, [depth])[0]
        self.blocks = nn.ModuleList(
            ConViTBlock(
                dim,
                heads,
                gated=i < local,
                mlp_ratio=mlp_ratio,
                bias=bias,
                locality_strength=locality_strength,
                drop_path=rates[i],
            )
            for i in range(depth)
        )
        self.make_head(nn.LayerNorm(dim))
        if self.head is not None:
            init_(self.head)

    def forward_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The class token (B, C) and the map (B, H, W, C) after the last block, before the norm."""
        self.check(images)
        x = self.embed(images)
        grid = (x.shape[1], x.shape[2])
        x = x + interpolate_map(self.positions, grid)
        for block in self.blocks[: self.local]:
            x = block(x)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x.flatten(1, 2)], 1)  # (B, 1 + H W, C)
        for block in self.blocks[self.local :]:
            x = block(x)
        return x[:, 0], x[:, 1:].unflatten(1, grid)


def convit_tiny(
    *,
    size: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.1,
    features_only: bool = False,
) -> ConViT:
    """ConViT-Ti: 4 heads, width 192."""
    return ConViT(
        dim=192,
        heads=4,
        size=size,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def convit_small(
    *,
    size: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.1,
    features_only: bool = False,
) -> ConViT:
    """ConViT-S: 9 heads, width 432."""
    return ConViT(
        dim=432,
        heads=9,
        size=size,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def convit_base(
    *,
    size: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.1,
    features_only: bool = False,
) -> ConViT:
    """ConViT-B: 16 heads, width 768."""
    return ConViT(
        dim=768,
        heads=16,
        size=size,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )
