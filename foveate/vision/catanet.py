"""CATANet: tokens sorted by their nearest centre attend in slices of the sorted order, and to the centres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.vision.windows import attend


@dataclass(frozen=True)
class SortedClusters:
    """Slices of tokens that are sorted by their nearest centre: which tokens a query sees.

        c(i) = argmax_m cos(x_i, M_m),   order = stable sort of the tokens by c
        the query at sorted place p of slice g = floor(p / group) sees the sorted places [g group, (g + span) group)

    Places beyond the last token are those before it, mirrored: N, N + 1, ... are N - 1, N - 2, ... Such keys count as
    often as they are listed. Slices cut clusters, and hold tokens of several.

    Args:
        group: tokens per slice; all where there are fewer.
        span: slices that a query sees, its own and the next ones.

    >>> slices = SortedClusters(group=2)
    >>> slices.places(5).tolist()
    [[0, 1, 2, 3], [2, 3, 4, 4], [4, 4, 3, 2]]
    """

    group: int = 128
    span: int = 2

    def __post_init__(self) -> None:
        for name, value in (("group", self.group), ("span", self.span)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"SortedClusters: {name} must be an int >= 1, got {value!r}")

    @torch.no_grad()
    def order(self, x: Tensor, centres: Tensor) -> Tensor:
        """int64 (B, N): the token at each sorted place, for x (B, N, C) and centres (m, C)."""
        similar = F.normalize(x, dim=-1) @ F.normalize(centres, dim=-1).T  # (B, N, m)
        return similar.argmax(-1).argsort(dim=-1, stable=True)

    def places(self, tokens: int, device: torch.device | str | None = None) -> Tensor:
        """int64 (slices, span * group): the sorted places that each slice sees."""
        size = min(self.group, tokens)
        starts = torch.arange(-(-tokens // size), device=device) * size
        at = (starts[:, None] + torch.arange(self.span * size, device=device)) % (2 * tokens)
        return torch.where(at < tokens, at, 2 * tokens - 1 - at)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, order: Tensor, *, scale: float | None = None) -> Tensor:
        """Attention inside the slices, (B, H, N, e), in the order of the tokens.

        Args:
            q, k: (B, H, N, d); v: (B, H, N, e); order: int64 (B, N).
            scale: default d^-0.5.
        """
        batch, heads, n, _ = q.shape
        size, places = min(self.group, n), self.places(n, q.device)

        def take(
            x: Tensor, at: Tensor
        ) -> Tensor:  # (B, H, N, d) and places (slices, L) -> (B slices, H, L, d)
            rows = order[:, at.flatten()] + torch.arange(batch, device=x.device)[:, None] * n
            found = x.transpose(1, 2).reshape(batch * n, -1).index_select(0, rows.flatten())
            return found.view(batch * len(at), at.shape[1], heads, -1).transpose(1, 2)

        own = places[:, :size]
        out = attend(take(q, own), take(k, places), take(v, places), scale=scale)  # (B slices, H, size, e)
        out = out.transpose(1, 2).reshape(batch, -1, heads * v.shape[3])[
            :, :n
        ]  # sorted; the mirrored ones dropped
        back = torch.empty_like(order).scatter_(1, order, torch.arange(n, device=q.device).expand_as(order))
        out = out.gather(1, back[..., None].expand_as(out))
        return out.unflatten(2, (heads, -1)).transpose(1, 2)


class TokenCentres(nn.Module):
    """m centres of tokens, shared by all images: clustered in training, an average over batches in use.

        assign   c(i) = argmax_m cos(x_i, M_m)
        update   M_m <- normalised sum of x_i / |x_i| over the batch's tokens with c(i) = m; empty ones stay

    In train mode `forward` makes `iters` updates from the stored centres (from the means of m runs of tokens the very
    first time), the last one with gradient to x, and `store` moves the stored centres by 1 - decay towards the result
    (the first time it copies it). In eval mode `forward` gives the stored centres.

    Args:
        m: centres.
        dim: C.
        decay: of the average.
        iters: updates per step.

    Source: CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution (2025).

    >>> centres = TokenCentres(4, 8)
    >>> centres.store(centres(torch.randn(2, 30, 8)))
    >>> centres.eval()(torch.randn(1, 5, 8)).shape, bool(centres.started)
    (torch.Size([4, 8]), True)
    """

    means: Tensor
    started: Tensor

    def __init__(self, m: int, dim: int, *, decay: float = 0.999, iters: int = 5) -> None:
        super().__init__()
        for name, value in (("m", m), ("iters", iters)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"TokenCentres: {name} must be an int >= 1, got {value!r}")
        if not 0 <= decay <= 1:
            raise ValueError(f"TokenCentres: decay must be in [0, 1], got {decay}")
        self.m, self.decay, self.iters = m, decay, iters
        self.register_buffer("means", torch.randn(m, dim))
        self.register_buffer("started", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """(m, C): the centres to read, for the tokens x (B, N, C)."""
        if not self.training:
            return self.means
        with torch.no_grad():
            centres = self.means if bool(self.started) else self.first(x)
            for _ in range(self.iters - 1):
                centres = self.updated(x, centres)
        return self.updated(x, centres)

    @torch.no_grad()
    def store(self, centres: Tensor) -> None:
        """Move the stored centres towards these; after a forward in train mode."""
        if bool(self.started):
            self.means.lerp_(centres.to(self.means), 1 - self.decay)
        else:
            self.means.copy_(centres)
            self.started.fill_(True)

    def first(self, x: Tensor) -> Tensor:
        """(m, C): means over the batch of m runs of tokens, the tokens mirrored at the end to fill the last run."""
        batch, n, dim = x.shape
        length = n // self.m + 1
        at = torch.arange(length * self.m, device=x.device) % (2 * n)
        at = torch.where(at < n, at, 2 * n - 1 - at)
        return x[:, at].view(batch, self.m, length, dim).mean((0, 2))

    def updated(self, x: Tensor, centres: Tensor) -> Tensor:
        """One update, (m, C) with rows of length 1; x (B, N, C)."""
        unit, old = F.normalize(x, dim=-1).flatten(0, 1), F.normalize(centres, dim=-1)
        nearest = (unit.detach() @ old.detach().T).argmax(-1)  # (B N,)
        sums = torch.zeros_like(old).index_add(0, nearest, unit)
        used = torch.bincount(nearest, minlength=self.m)[:, None] > 0
        return torch.where(used, F.normalize(sums, dim=-1), old)

    def extra_repr(self) -> str:
        return f"m={self.m}, decay={self.decay:g}, iters={self.iters}"


class TokenAggregationAttention(nn.Module):
    """Attention in slices of similar tokens plus attention to the centres, two softmaxes that are summed.

        q, k, v = x W_q, x W_k, x W_v;  k_M, v_M = M W_k', M W_v'
        o_i = softmax_{j in slice(i)}(q_i . k_j d^-0.5) v_j + softmax_m(q_i . k_M d^-0.5) v_M
        out = o W_o

    Costs N (2 group + m) pairs. In train mode a forward also moves the centres.

    Args:
        dim: C, width of the tokens and of the values.
        heads: H.
        qk_dim: width of queries and keys of all heads; default dim.
        m: centres.
        group: tokens per slice.
        decay, iters: as in `TokenCentres`.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W.

    Source: CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution (2025). Differs:
    a stable sort; slices also of maps with fewer than 1.5 times as many tokens.

    >>> layer = TokenAggregationAttention(16, 2, m=4, group=8)
    >>> layer(torch.randn(2, 5, 7, 16)).shape
    torch.Size([2, 5, 7, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qk_dim: int | None = None,
        m: int = 8,
        group: int = 128,
        decay: float = 0.999,
        iters: int = 5,
    ) -> None:
        super().__init__()
        qk_dim = _widths("TokenAggregationAttention", dim, heads, qk_dim)
        self.heads, self.slices = heads, SortedClusters(group)
        self.centres = TokenCentres(m, dim, decay=decay, iters=iters)
        self.q_proj, self.k_proj = (nn.Linear(dim, qk_dim, bias=False) for _ in range(2))
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.centre_k, self.centre_v = nn.Linear(dim, qk_dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _map("TokenAggregationAttention", x, self.v_proj.in_features)
        tokens = x.flatten(1, 2)  # (B, N, C)
        centres = self.centres(tokens)
        order = self.slices.order(tokens, centres)
        split = lambda t: t.unflatten(2, (self.heads, -1)).transpose(1, 2)  # noqa: E731  (B, H, N, d)
        q, k, v = split(self.q_proj(tokens)), split(self.k_proj(tokens)), split(self.v_proj(tokens))
        k_m, v_m = (
            split(p(centres)[None]).expand(len(x), -1, -1, -1) for p in (self.centre_k, self.centre_v)
        )
        out = self.slices.attend(q, k, v, order) + attend(q, k_m, v_m)
        if self.training:
            self.centres.store(centres.detach())
        return self.proj(out.transpose(1, 2).flatten(2)).view_as(x)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, group={self.slices.group}"


class OverlapPatchAttention(nn.Module):
    """Full attention inside square patches that overlap; a token in several patches gets their mean.

    Patches begin every patch - overlap cells, the last one so that it ends with the map.

    Args:
        dim: C.
        heads: H.
        patch: side of a patch; on a map whose side is smaller, the side.
        qk_dim: width of queries and keys of all heads; default dim.
        overlap: cells that neighbouring patches share, less than patch.

    Shape: (B, H, W, C) -> (B, H, W, C), any H and W.

    Source: CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution (2025). Differs:
    where three patches meet on an axis, their mean is taken.

    >>> OverlapPatchAttention(16, 2, 6)(torch.randn(1, 13, 11, 16)).shape
    torch.Size([1, 13, 11, 16])
    """

    def __init__(
        self, dim: int, heads: int, patch: int = 16, *, qk_dim: int | None = None, overlap: int = 2
    ) -> None:
        super().__init__()
        qk_dim = _widths("OverlapPatchAttention", dim, heads, qk_dim)
        if not 0 <= overlap < patch:
            raise ValueError(f"OverlapPatchAttention: overlap must be in [0, {patch}), got {overlap}")
        self.heads, self.patch, self.overlap = heads, patch, overlap
        self.q_proj, self.k_proj = (nn.Linear(dim, qk_dim, bias=False) for _ in range(2))
        self.v_proj, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def starts(self, side: int) -> list[int]:
        """Where patches begin along an axis of so many cells."""
        size = min(self.patch, side)
        step = max(1, self.patch - self.overlap)
        return [min(at, side - size) for at in range(0, max(1, side - size + step), step)]

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = _map("OverlapPatchAttention", x, self.proj.in_features)
        at = [
            torch.tensor(self.starts(n), device=x.device)[:, None]
            + torch.arange(min(self.patch, n), device=x.device)
            for n in (height, width)
        ]  # (patches of the axis, cells)
        cells = (at[0][:, None, :, None] * width + at[1][None, :, None, :]).flatten(0, 1).flatten(1)  # (P, n)

        def split(t: Tensor) -> Tensor:  # (B, H, W, C) -> (B P, heads, n, d)
            return t.flatten(1, 2)[:, cells].flatten(0, 1).unflatten(2, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        out = attend(q, k, v).transpose(1, 2).flatten(2).view(batch, -1, dim)  # (B, P n, C)
        flat = cells.flatten()
        sums = torch.zeros(batch, height * width, dim, dtype=out.dtype, device=x.device).index_add(
            1, flat, out
        )
        counts = torch.bincount(flat, minlength=height * width)[:, None].to(out.dtype)
        return self.proj((sums / counts).view_as(x))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, patch={self.patch}, overlap={self.overlap}"


class ConvFFN(nn.Module):
    """Linear, GELU, h + GELU(DW5x5(h)), Linear on (B, H, W, C)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.conv = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(x))
        return self.fc2(hidden + F.gelu(self.conv(hidden.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))


class TokenAggregationBlock(nn.Module):
    """x += W TokenAggregationAttention(LN x); x += ConvFFN(LN x), on (B, H, W, C). W is a 1 x 1 convolution.

    Args:
        dim, heads, qk_dim, m, group, decay, iters: as in `TokenAggregationAttention`.
        hidden: width of the ConvFFN.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qk_dim: int,
        hidden: int,
        m: int,
        group: int,
        decay: float = 0.999,
        iters: int = 5,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = TokenAggregationAttention(
            dim, heads, qk_dim=qk_dim, m=m, group=group, decay=decay, iters=iters
        )
        self.mix = nn.Conv2d(dim, dim, 1, bias=False)
        self.ffn = ConvFFN(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.attn(self.norm1(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.ffn(self.norm2(x))


class OverlapPatchBlock(nn.Module):
    """x += OverlapPatchAttention(LN x); x += ConvFFN(LN x), on (B, H, W, C).

    Args:
        dim, heads, patch, qk_dim: as in `OverlapPatchAttention`.
        hidden: width of the ConvFFN.
    """

    def __init__(self, dim: int, heads: int, patch: int, *, qk_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = OverlapPatchAttention(dim, heads, patch, qk_dim=qk_dim)
        self.ffn = ConvFFN(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class CATANet(nn.Module):
    """Super-resolution: convolutions around blocks of token aggregation and of overlapping patches.

        x_0 = conv(image);  x_{l+1} = x_l + conv(Patch_l(Aggregation_l(x_l)));  out = up(x_L + x_0) + bilinear(image)

    Args:
        scale: 2, 3 or 4, how much larger each side becomes.
        dim, qk_dim, hidden, heads: widths of tokens, of queries and keys, of the ConvFFNs; heads.
        centres: m of each block; groups, patches, of each block likewise.
        decay, iters: as in `TokenCentres`.
        aggregation: with the blocks of token aggregation.
        in_channels: of the images.

    Shape: (B, in_channels, H, W) -> (B, in_channels, scale H, scale W), any H and W.

    Source: CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution (2025).

    >>> model = CATANet(2, dim=8, qk_dim=8, hidden=16, heads=2, centres=(4,), groups=(16,), patches=(6,))
    >>> model(torch.rand(1, 3, 9, 7)).shape
    torch.Size([1, 3, 18, 14])
    """

    def __init__(
        self,
        scale: int = 4,
        *,
        dim: int = 40,
        qk_dim: int = 36,
        hidden: int = 96,
        heads: int = 4,
        centres: Sequence[int] = (16, 32, 64, 128) * 2,
        groups: Sequence[int] = (256, 128, 64, 32) * 2,
        patches: Sequence[int] = (16, 20, 24, 28) * 2,
        decay: float = 0.999,
        iters: int = 5,
        aggregation: bool = True,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if scale not in (2, 3, 4):
            raise ValueError(f"CATANet: scale must be 2, 3 or 4, got {scale!r}")
        if not len(centres) == len(groups) == len(patches) >= 1:
            raise ValueError(
                "CATANet: centres, groups and patches must have an entry for each block, "
                f"got {len(centres)}, {len(groups)} and {len(patches)}"
            )
        self.scale, self.in_channels = scale, in_channels
        self.first = nn.Conv2d(in_channels, dim, 3, padding=1)
        self.aggregations = nn.ModuleList(
            TokenAggregationBlock(
                dim, heads, qk_dim=qk_dim, hidden=hidden, m=m, group=group, decay=decay, iters=iters
            )
            if aggregation
            else nn.Identity()
            for m, group in zip(centres, groups, strict=True)
        )
        self.locals = nn.ModuleList(
            OverlapPatchBlock(dim, heads, patch, qk_dim=qk_dim, hidden=hidden) for patch in patches
        )
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in patches)
        steps = (2, 2) if scale == 4 else (scale,)
        self.ups = nn.Sequential()
        for step in steps:
            for part in (
                nn.Conv2d(dim, dim * step**2, 3, padding=1),
                nn.PixelShuffle(step),
                nn.LeakyReLU(0.1),
            ):
                self.ups.append(part)
        self.last = nn.Conv2d(dim, in_channels, 3, padding=1)
        for part in self.modules():  # convolutions keep torch's own
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"CATANet: images must be (B, {self.in_channels}, H, W), got {tuple(images.shape)}"
            )
        x = start = self.first(images)
        for together, local, conv in zip(self.aggregations, self.locals, self.convs, strict=True):
            x = x + conv(local(together(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2))
        plain = F.interpolate(images, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return self.last(self.ups(x + start)) + plain


def catanet_x2(*, in_channels: int = 3) -> CATANet:
    """The published network that doubles the sides: 477,435 parameters."""
    return CATANet(2, in_channels=in_channels)


def catanet_x3(*, in_channels: int = 3) -> CATANet:
    """The published network for a scale of 3: 549,635 parameters."""
    return CATANet(3, in_channels=in_channels)


def catanet_x4(*, in_channels: int = 3) -> CATANet:
    """The published network for a scale of 4: 535,195 parameters."""
    return CATANet(4, in_channels=in_channels)


# --------------------------------------------------------------------------------------------------- parts
def _widths(owner: str, dim: int, heads: int, qk_dim: int | None) -> int:
    qk_dim = dim if qk_dim is None else qk_dim
    if heads < 1 or dim % heads or qk_dim % heads:
        raise ValueError(
            f"{owner}: dim and qk_dim must be multiples of heads, got {dim}, {qk_dim} and {heads}"
        )
    return qk_dim


def _map(owner: str, x: Tensor, dim: int) -> tuple[int, int, int, int]:
    if x.ndim != 4 or x.shape[3] != dim:
        raise ValueError(f"{owner}: x must be (B, H, W, {dim}), got {tuple(x.shape)}")
    batch, height, width, _ = x.shape
    return batch, height, width, dim
