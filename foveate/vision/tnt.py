"""Transformer in Transformer: words inside each patch have a small transformer of their own and add to their patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.vision.blocks import DropPath, Mlp, drop_path_rates, init_, interpolate_map
from foveate.vision.tokens import ClassTokenBackbone, TokenAttention, pad_images
from foveate.vision.windows import attend, partition


class WordAttention(TokenAttention):
    """Attention among the words of one patch, all patches at once: (B P, m, C) -> (B P, m, C).

    The same as attention among all B P m words under a mask that allows the same patch alone.

    >>> WordAttention(24, 4)(torch.randn(6, 16, 24)).shape
    torch.Size([6, 16, 24])
    """

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v)


class WordEmbed(nn.Module):
    """Words of each patch: a 7 x 7 convolution, m = (patch / stride)^2 places per patch.

    (B, in_channels, H, W) -> (B P, m, dim), patches and the words of each in row-major order, P = (H W) / patch^2;
    sides that are not multiples of the patch are padded with zeros, right and bottom.

    Args:
        patch, stride: pixels; the stride divides the patch.
        dim: c, width of a word.
        legacy: the convolution sees the whole image, so words at the border of a patch look 3 pixels beyond it (as the
            first released weights do); else the patch is cut out first and words never see other patches.

    >>> WordEmbed(24)(torch.randn(2, 3, 32, 48)).shape
    torch.Size([12, 16, 24])
    """

    def __init__(
        self, dim: int, *, patch: int = 16, stride: int = 4, in_channels: int = 3, legacy: bool = False
    ) -> None:
        super().__init__()
        if stride < 1 or patch < 1 or patch % stride:
            raise ValueError(f"WordEmbed: patch must be a multiple of stride, got {patch} and {stride}")
        self.patch, self.side, self.legacy = patch, patch // stride, legacy
        self.proj = nn.Conv2d(in_channels, dim, 7, stride=stride, padding=3)

    def forward(self, images: Tensor) -> Tensor:
        images = pad_images(images, self.patch)
        if self.legacy:
            return partition(self.proj(images).permute(0, 2, 3, 1), self.side)
        cut = partition(images.permute(0, 2, 3, 1), self.patch)  # (B P, patch^2, in_channels)
        words = self.proj(cut.mT.unflatten(2, (self.patch, self.patch)))  # (B P, c, side, side)
        return words.flatten(2).mT


class TNTBlock(nn.Module):
    """One inner block on the words of each patch, what they add to the patch, one outer block on the patches.

        y_p <- y_p + Attn_in(LN y_p),  y_p <- y_p + MLP_in(LN y_p)      among the m words of patch p
        z_p <- z_p + LN(W LN(vec y_p))                                  (legacy: W vec(LN y_p) + b)
        z <- z + Attn_out(LN z),  z <- z + MLP(LN z)                    z with its class token, which gets no words

    Args:
        dim, heads: D of patches and the outer heads; inner_dim, inner_heads: c of words and the inner heads.
        words: m, words per patch.
        mlp_ratio: of the outer MLP; the inner one has 4.
        legacy: the projection of the first released weights.
        drop_path: rate of the four residual branches that are blocks; the words always reach their patch.

    Shape: words (B P, m, c) and patches (B, 1 + P, D), class token first -> both.

    Source: Transformer in Transformer (2021).

    >>> block = TNTBlock(48, 12, heads=3, inner_heads=2, words=4)
    >>> words, patches = block(torch.randn(2 * 6, 4, 12), torch.randn(2, 7, 48))
    >>> words.shape, patches.shape
    (torch.Size([12, 4, 12]), torch.Size([2, 7, 48]))
    """

    def __init__(
        self,
        dim: int = 384,
        inner_dim: int = 24,
        *,
        heads: int = 6,
        inner_heads: int = 4,
        words: int = 16,
        mlp_ratio: float = 4.0,
        legacy: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.words, self.legacy = words, legacy
        self.inner_norm1, self.inner_norm2 = nn.LayerNorm(inner_dim), nn.LayerNorm(inner_dim)
        self.inner_attention = WordAttention(inner_dim, inner_heads)
        self.inner_mlp = Mlp(inner_dim, 4 * inner_dim)
        self.word_norm = nn.LayerNorm(inner_dim if legacy else words * inner_dim)
        self.word_proj = nn.Linear(words * inner_dim, dim, bias=legacy)
        self.patch_norm = nn.Identity() if legacy else nn.LayerNorm(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = TokenAttention(dim, heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)
        init_(self)

    def forward(self, words: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        b, p = patches.shape[0], patches.shape[1] - 1
        if words.ndim != 3 or words.shape[:2] != (b * p, self.words):
            raise ValueError(
                f"TNTBlock: words must be ({b * p}, {self.words}, c) for patches {tuple(patches.shape)}, "
                f"got {tuple(words.shape)}"
            )
        words = words + self.drop(self.inner_attention(self.inner_norm1(words)))
        words = words + self.drop(self.inner_mlp(self.inner_norm2(words)))
        told = self.word_norm(words).flatten(1) if self.legacy else self.word_norm(words.flatten(1))
        told = self.patch_norm(self.word_proj(told)).unflatten(0, (b, p))  # (B, P, D)
        patches = torch.cat([patches[:, :1], patches[:, 1:] + told], 1)
        patches = patches + self.drop(self.attention(self.norm1(patches)))
        return words, patches + self.drop(self.mlp(self.norm2(patches)))


class TNT(ClassTokenBackbone):
    """Transformer in Transformer: `TNTBlock`s from words of `WordEmbed`; the class token is read out.

        z_p = LN(W LN(vec y_p)),  z = [class token, z_1, ...] + positions

    Args:
        dim, heads, inner_dim, inner_heads, depth, mlp_ratio, legacy: see `TNTBlock`.
        patch, stride: see `WordEmbed`.
        size: side of the images that patch positions are learned for; others interpolate them (bicubic). The positions
            of words are shared by all patches.
        num_classes, in_channels, drop_path, features_only: see `Backbone`.

    Source: Transformer in Transformer (2021). Differs: any size of image.
    """

    def __init__(
        self,
        *,
        dim: int = 384,
        inner_dim: int = 24,
        heads: int = 6,
        inner_heads: int = 4,
        depth: int = 12,
        patch: int = 16,
        stride: int = 4,
        size: int = 224,
        mlp_ratio: float = 4.0,
        legacy: bool = False,
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
        self.embed = WordEmbed(inner_dim, patch=patch, stride=stride, in_channels=in_channels, legacy=legacy)
        words, side = self.embed.side**2, -(-size // patch)
        self.word_norm = nn.LayerNorm(words * inner_dim)
        self.word_proj = nn.Linear(words * inner_dim, dim)
        self.patch_norm = nn.LayerNorm(dim)
        init_(self.word_proj)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.class_position = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, side, side, dim))
        self.word_positions = nn.Parameter(torch.empty(1, words, inner_dim))
        for table in (self.class_token, self.class_position, self.positions, self.word_positions):
            nn.init.trunc_normal_(table, std=0.02)
        self.blocks = nn.ModuleList(
            TNTBlock(
                dim,
                inner_dim,
                heads=heads,
                inner_heads=inner_heads,
                words=words,
                mlp_ratio=mlp_ratio,
                legacy=legacy,
                drop_path=rate,
            )
            for rate in drop_path_rates(drop_path, [depth])[0]
        )
        self.make_head(nn.LayerNorm(dim))
        if self.head is not None:
            init_(self.head)

    def forward_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The class token (B, D) and the map (B, H, W, D) after the last block, before the norm."""
        self.check(images)
        grid = (-(-images.shape[2] // self.embed.patch), -(-images.shape[3] // self.embed.patch))
        words = self.embed(images) + self.word_positions  # (B P, m, c)
        patches = self.patch_norm(self.word_proj(self.word_norm(words.flatten(1))))
        patches = patches.unflatten(0, (-1, grid[0] * grid[1]))  # (B, P, D)
        patches = patches + interpolate_map(self.positions, grid).flatten(1, 2)
        first = (self.class_token + self.class_position).expand(len(patches), -1, -1)
        patches = torch.cat([first, patches], 1)
        for block in self.blocks:
            words, patches = block(words, patches)
        return patches[:, 0], patches[:, 1:].unflatten(1, grid)


def tnt_tiny(
    *,
    size: int = 224,
    legacy: bool = False,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.1,
    features_only: bool = False,
) -> TNT:
    """TNT-Ti: patches of width 192 and 3 heads, words of width 12 and 2 heads."""
    return TNT(
        dim=192,
        inner_dim=12,
        heads=3,
        inner_heads=2,
        size=size,
        legacy=legacy,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def tnt_small(
    *,
    size: int = 224,
    legacy: bool = False,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.1,
    features_only: bool = False,
) -> TNT:
    """TNT-S: patches of width 384 and 6 heads, words of width 24 and 4 heads."""
    return TNT(
        dim=384,
        inner_dim=24,
        heads=6,
        inner_heads=4,
        size=size,
        legacy=legacy,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )


def tnt_base(
    *,
    size: int = 224,
    legacy: bool = False,
    num_classes: int = 1000,
    in_channels: int = 3,
    drop_path: float = 0.1,
    features_only: bool = False,
) -> TNT:
    """TNT-B: patches of width 640 and 10 heads, words of width 40 and 4 heads."""
    return TNT(
        dim=640,
        inner_dim=40,
        heads=10,
        inner_heads=4,
        size=size,
        legacy=legacy,
        num_classes=num_classes,
        in_channels=in_channels,
        drop_path=drop_path,
        features_only=features_only,
    )
