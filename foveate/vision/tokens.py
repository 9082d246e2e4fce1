"""What isotropic vision transformers share: patches, attention among all tokens, a class token that is read out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from foveate.core.attention import attention
from foveate.vision.backbone import Backbone
from foveate.vision.blocks import init_


def pad_images(images: Tensor, multiple: int) -> Tensor:
    """Images (B, C, H, W) with zeros right and bottom, so that both sides are multiples.

    >>> import torch
    >>> pad_images(torch.ones(1, 3, 17, 32), 16).shape
    torch.Size([1, 3, 32, 32])
    """
    h, w = images.shape[-2:]
    return F.pad(images, (0, -w % multiple, 0, -h % multiple)) if h % multiple or w % multiple else images


class PatchEmbed(nn.Module):
    """Square patches without overlap, each one linear map: (B, C, H, W) -> (B, H / patch, W / patch, dim).

    Sides that are not multiples of the patch are padded with zeros, right and bottom.

    >>> import torch
    >>> PatchEmbed(3, 8, 16)(torch.randn(1, 3, 33, 64)).shape
    torch.Size([1, 3, 4, 8])
    """

    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_channels, dim, patch, stride=patch)
        init_(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(pad_images(images, self.patch)).permute(0, 2, 3, 1)


class TokenAttention(nn.Module):
    """Softmax attention among all tokens: (B, N, C) -> (B, N, C), or (B, H, W, C) -> (B, H, W, C).

        out = concat_h(softmax(Q_h K_h^T / sqrt(D)) V_h) W_O

    Args:
        dim: C; heads: H.
        bias: of the query, key and value maps; the output map always has one.

    >>> import torch
    >>> TokenAttention(32, 4)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, dim: int, heads: int, *, bias: bool = False) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"{type(self).__name__}: dim must be a multiple of heads, got {dim} and {heads}")
        self.dim, self.heads, self.head_dim = dim, heads, dim // heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        init_(self)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in (3, 4) or x.shape[-1] != self.dim:
            raise ValueError(
                f"{type(self).__name__}: x must be (B, N, {self.dim}) or (B, H, W, {self.dim}), got {tuple(x.shape)}"
            )
        qkv = self.qkv(x).flatten(1, -2)  # (B, N, 3 C)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.mix(q, k, v).transpose(1, 2).flatten(2)).reshape(x.shape)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, N, D) of three such; for layers that attend otherwise."""
        return cast(Tensor, attention(q, k, v))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}"


class Maps(list[Tensor]):
    """Maps with the class token (B, C) beside them, for `ClassTokenBackbone.forward_head`."""

    def __init__(self, maps: Iterable[Tensor], token: Tensor) -> None:
        super().__init__(maps)
        self.token = token


class ClassTokenBackbone(Backbone):
    """A backbone that reads out a class token: a subclass writes `forward_tokens`, which gives it beside the map."""

    def forward_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The class token (B, C) and the map (B, H, W, C) after the last block, before the norm."""
        raise NotImplementedError

    def forward_features(self, images: Tensor) -> list[Tensor]:
        token, x = self.forward_tokens(images)
        return Maps([x.permute(0, 3, 1, 2)], token)

    def pool(self, maps: list[Tensor]) -> Tensor:
        """(B, C): `norm` of the class token, which `forward_features` gives with its maps."""
        if not isinstance(maps, Maps):
            raise TypeError(
                f"{type(self).__name__}: the class token is read out; maps must come from forward_features, "
                f"got {type(maps).__name__}"
            )
        return maps.token if self.norm is None else self.norm(maps.token)
