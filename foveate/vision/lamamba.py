"""LaMamba-Diff: four snake-like selective scans, shifted windows and an MLP, modulated by time and class; the U-Net."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.vision.blocks import Mlp, interpolate_map, sincos_2d
from foveate.vision.swin import PatchMerging, ShiftedWindowAttention

CHUNK = 64  # steps that one doubling covers


@lru_cache(maxsize=64)
def _snakes(h: int, w: int) -> np.ndarray:
    cells = np.arange(h * w).reshape(h, w)
    rows = np.where(np.arange(h)[:, None] % 2 == 0, cells, cells[:, ::-1]).ravel()
    columns = np.where(np.arange(w)[:, None] % 2 == 0, cells.T[:, ::-1], cells.T).ravel()
    return np.stack([rows, rows[::-1], columns, columns[::-1]])


def snake_orders(h: int, w: int, *, device: torch.device | str | None = "cpu") -> tuple[Tensor, Tensor]:
    """Four ways along all cells of a map in which consecutive cells touch, and their inverses; int64 (4, h w) each.

    Order 0 goes right in even rows and left in odd ones, from the top left; order 2 goes up in even columns and down in
    odd ones, from the bottom left; orders 1 and 3 are their reverses. orders[k, t] is the row-major number of the cell
    at step t; inverse[k, cell] is its step: image[orders[k]][inverse[k]] is the image.

    >>> snake_orders(2, 3)[0].tolist()
    [[0, 1, 2, 5, 4, 3], [3, 4, 5, 2, 1, 0], [3, 0, 1, 4, 5, 2], [2, 5, 4, 1, 0, 3]]
    """
    if min(h, w) < 1:
        raise ValueError(f"snake_orders: sides must be >= 1, got {h} and {w}")
    orders = _snakes(h, w)
    return torch.tensor(orders, device=device), torch.tensor(orders.argsort(1), device=device)


def scan(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t from h = 0, along the last axis, elementwise in all others.

    Doubling inside chunks of 64 steps, then from chunk to chunk: for very many short sequences of single numbers this
    takes less work than the products of `foveate.linear.recurrence`.

    >>> scan(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([4.0, 1.0, 2.0])).tolist()
    [4.0, 3.0, 2.0]
    """
    found, h = [], torch.zeros_like(b[..., :1])
    for keep, made in zip(a.split(CHUNK, -1), b.split(CHUNK, -1), strict=True):
        apart = 1
        while apart < keep.shape[-1]:
            made = made + keep * F.pad(made[..., :-apart], (apart, 0))
            keep = keep * F.pad(keep[..., :-apart], (apart, 0), value=1.0)
            apart *= 2
        made = made + keep * h
        h = made[..., -1:]
        found.append(made)
    return torch.cat(found, -1)


class SelectiveScan2D(nn.Module):
    """Every cell reads all others through recurrences along four orders; linear in the cells.

        u, z = split(W_in x);   u = SiLU(DW_3 u)
        per order k, along its steps t:  (r, B, C) = W_k u,   delta = softplus(W_delta,k r + b_k)
            h_t = exp(delta_t A_k) h_{t-1} + delta_t B_t u_t,   y_t = C_t . h_t + E_k u_t,   A_k < 0
        out = W_out (LN(sum_k y_k) * SiLU(z))

    Args:
        dim: C; expand: width of u over C.
        state: numbers that a channel remembers per order.
        rank: width of r; None: ceil(dim / 16).

    The scans are computed in float32 (float64 for float64).

    Shape: (B, H, W, C) -> the same.

    Source: LaMamba-Diff (2024); its scan is that of Mamba (2023), on maps as in VMamba (2024).

    >>> SelectiveScan2D(16)(torch.randn(2, 5, 3, 16)).shape
    torch.Size([2, 5, 3, 16])
    """

    def __init__(self, dim: int, *, expand: int = 2, state: int = 1, rank: int | None = None) -> None:
        super().__init__()
        for name, value in (("expand", expand), ("state", state), ("rank", 1 if rank is None else rank)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"SelectiveScan2D: {name} must be an int >= 1, got {value!r}")
        self.dim, self.inner, self.state = dim, expand * dim, state
        self.rank = math.ceil(dim / 16) if rank is None else rank
        inner = self.inner
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.x_proj = nn.Parameter(torch.empty(4, self.rank + 2 * state, inner))
        self.delta_proj = nn.Parameter(torch.empty(4, inner, self.rank))
        self.delta_bias = nn.Parameter(torch.empty(4, inner))
        self.log_decay = nn.Parameter(
            torch.arange(1.0, state + 1).log().repeat(4, inner, 1)
        )  # A = -exp of it
        self.skip = nn.Parameter(torch.ones(4, inner))
        self.norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        nn.init.uniform_(self.x_proj, -(inner**-0.5), inner**-0.5)
        nn.init.uniform_(self.delta_proj, -(self.rank**-0.5), self.rank**-0.5)
        with torch.no_grad():  # softplus(delta_bias) spread evenly in its logarithm from 0.001 to 0.1
            step = torch.exp(torch.rand(4, inner) * math.log(100) + math.log(1e-3))
            self.delta_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def scanned(self, u: Tensor) -> Tensor:
        """sum_k y_k (B, N, Ci), in raster order, of u (B, Ci, H, W)."""
        orders, inverse = snake_orders(u.shape[2], u.shape[3], device=u.device)
        n = orders.shape[1]
        along = u.flatten(2)[:, :, orders].transpose(1, 2)  # (B, 4, Ci, N)
        made = torch.einsum("bkcn,krc->bkrn", along, self.x_proj)
        ranks, inputs, outputs = made.split([self.rank, self.state, self.state], 2)
        delta = torch.einsum("bkrn,kcr->bkcn", ranks, self.delta_proj)
        wide = torch.float64 if u.dtype == torch.float64 else torch.float32
        along, inputs, outputs = along.to(wide), inputs.to(wide), outputs.to(wide)
        delta = F.softplus(delta.to(wide) + self.delta_bias[..., None].to(wide))  # (B, 4, Ci, N)
        rate = -self.log_decay.to(wide).exp()  # (4, Ci, S)
        keep = torch.exp(delta.unsqueeze(3) * rate.unsqueeze(3))  # (B, 4, Ci, S, N)
        added = (delta * along).unsqueeze(3) * inputs.unsqueeze(2)
        h = scan(keep, added)  # (B, 4, Ci, S, N)
        y = (h * outputs.unsqueeze(2)).sum(3) + self.skip[..., None].to(wide) * along  # (B, 4, Ci, N)
        index = inverse.view(1, 4, 1, n).expand_as(y)
        return y.gather(3, index).sum(1).transpose(1, 2).to(u.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """out (B, H, W, C) of x (B, H, W, C)."""
        if x.ndim != 4 or x.shape[3] != self.dim:
            raise ValueError(f"SelectiveScan2D: x must be (B, H, W, {self.dim}), got {tuple(x.shape)}")
        u, z = self.in_proj(x).chunk(2, -1)
        y = self.scanned(F.silu(self.conv(u.permute(0, 3, 1, 2)))).view_as(z)
        return self.out_proj(self.norm(y) * F.silu(z))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, inner={self.inner}, state={self.state}, rank={self.rank}"


class LaMambaBlock(nn.Module):
    """Scan, windows and MLP, one after another, each with shift, scale and gate from the condition (adaLN-zero).

        c' = W_c c or c;   nine vectors = W SiLU(c'), W zero at the start
        x += g_1 * Scan(LN(x) (1 + s_1) + b_1);  x += g_2 * Windows(LN(x) (1 + s_2) + b_2);  x += g_3 * MLP(...)

    At the start every block is the identity.

    Args:
        dim, heads: C and H.
        window, shift: of the attention.
        cond_dim: width of c.
        mlp_ratio: hidden width of the MLP over C.
        expand, state: of the scan.
        project: with W_c; None: where cond_dim is not dim.
        scan, attention: False leaves the branch out.

    Shape: x (B, H, W, C), c (B, cond_dim) -> (B, H, W, C).

    >>> block = LaMambaBlock(16, 2, window=4, cond_dim=8)
    >>> x = torch.randn(2, 5, 6, 16)
    >>> torch.equal(block(x, torch.randn(2, 8)), x)
    True
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        cond_dim: int,
        window: int = 8,
        shift: int = 0,
        mlp_ratio: float = 4.0,
        expand: int = 2,
        state: int = 1,
        project: bool | None = None,
        scan: bool = True,
        attention: bool = True,
    ) -> None:
        super().__init__()
        if project is False and cond_dim != dim:
            raise ValueError(f"LaMambaBlock: project=False needs cond_dim = dim, got {cond_dim} and {dim}")
        project = cond_dim != dim if project is None else project
        self.cond_proj = nn.Linear(cond_dim, dim) if project else nn.Identity()
        branches: list[nn.Module] = []
        if scan:
            branches.append(SelectiveScan2D(dim, expand=expand, state=state))
        if attention:
            branches.append(ShiftedWindowAttention(dim, heads, window, shift=shift))
        branches.append(Mlp(dim, int(dim * mlp_ratio)))
        self.branches = nn.ModuleList(branches)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in branches)
        self.modulation = nn.Linear(dim, 3 * len(branches) * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        made = self.modulation(F.silu(self.cond_proj(c)))[:, None, None]  # (B, 1, 1, 9 C)
        parts = made.chunk(3 * len(self.branches), -1)
        for i, (norm, branch) in enumerate(zip(self.norms, self.branches, strict=True)):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            x = x + gate * branch(norm(x) * (1 + scale) + shift)
        return x


class PatchExpand(nn.Module):
    """One cell becomes four of half the width: LN(shuffle(W x)); (B, H, W, C) -> (B, 2 H, 2 W, C / 2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand, self.norm = nn.Linear(dim, 2 * dim, bias=False), nn.LayerNorm(dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        cells = self.expand(x).view(b, h, w, 2, 2, -1)
        return self.norm(cells.transpose(2, 3).reshape(b, 2 * h, 2 * w, -1))


class LaMambaUNet(nn.Module):
    """The denoiser: four levels down, a middle, four levels up, skips added; noise and its variance for latents.

    Widths D, 2 D, 4 D, 4 D; patches are merged after the first and the second level only. The condition, of width 4 D,
    is an embedding of the time plus one of the class; class `num_classes` stands for none. Windows shift in every odd
    block of a level. Levels up have one block more, and their blocks always project the condition.

    Args:
        base: D, a multiple of 4 and of heads.
        depths: blocks of the levels down.
        middle: blocks of the middle, which has a residual around it.
        heads, window, mlp_ratio, expand, state: see `LaMambaBlock`.
        in_channels: of the latents.
        num_classes: see above.
        class_dropout: share of classes replaced by none in train mode.
        side: of the table of positions; other sides interpolate it.

    Shape: x (B, in_channels, H, W), t (B,), y (B,) int64 -> (B, 2 in_channels, H, W).

    Source: LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba (2024).

    >>> model = LaMambaUNet(8, depths=(1, 1, 1, 1), middle=1, heads=2, window=4, num_classes=10, side=8)
    >>> model(torch.randn(2, 4, 9, 7), torch.tensor([3, 500]), torch.tensor([1, 10])).shape
    torch.Size([2, 8, 9, 7])
    """

    def __init__(
        self,
        base: int = 320,
        *,
        depths: Sequence[int] = (2, 2, 2, 2),
        middle: int = 2,
        heads: int = 16,
        window: int = 8,
        mlp_ratio: float = 4.0,
        expand: int = 2,
        state: int = 1,
        in_channels: int = 4,
        num_classes: int = 1000,
        class_dropout: float = 0.1,
        side: int = 32,
    ) -> None:
        super().__init__()
        if len(depths) != 4:
            raise ValueError(f"LaMambaUNet: depths must have four values, got {tuple(depths)}")
        if base < 1 or base % 4 or base % heads:
            raise ValueError(f"LaMambaUNet: base must be a multiple of 4 and of heads {heads}, got {base}")
        if not 0 <= class_dropout < 1:
            raise ValueError(f"LaMambaUNet: class_dropout must be in [0, 1), got {class_dropout}")
        self.in_channels, self.num_classes, self.class_dropout = in_channels, num_classes, class_dropout
        dims, cond = (base, 2 * base, 4 * base, 4 * base), 4 * base

        def level(dim: int, depth: int, project: bool | None = None) -> nn.ModuleList:
            return nn.ModuleList(
                LaMambaBlock(
                    dim,
                    heads,
                    window=window,
                    shift=window // 2 if i % 2 else 0,
                    cond_dim=cond,
                    mlp_ratio=mlp_ratio,
                    expand=expand,
                    state=state,
                    project=project,
                )
                for i in range(depth)
            )

        self.embed, self.embed_norm = nn.Conv2d(in_channels, base, 1), nn.LayerNorm(base)
        self.positions = nn.Parameter(sincos_2d(base, (side, side))[None])  # (1, side, side, D)
        self.time = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.classes = nn.Embedding(num_classes + 1, cond)
        self.down = nn.ModuleList(level(dim, depth) for dim, depth in zip(dims, depths, strict=True))
        self.merges = nn.ModuleList(PatchMerging(dims[i], dims[i + 1]) for i in (0, 1))
        self.middle = level(dims[-1], middle)
        self.up = nn.ModuleList(level(dims[i], depths[i] + 1, True) for i in (3, 2, 1, 0))
        self.expands = nn.ModuleList(PatchExpand(dim) for dim in (4 * base, 2 * base))
        self.last, self.last_norm = nn.Linear(base, base, bias=False), nn.LayerNorm(base)
        self.last_cond, self.last_modulation = nn.Linear(cond, base), nn.Linear(base, 2 * base)
        self.out = nn.Linear(base, 2 * in_channels)
        self._init()

    def _init(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.embed.weight.flatten(1))
        if self.embed.bias is not None:
            nn.init.zeros_(self.embed.bias)
        for weight in (self.classes.weight, self.time[0].weight, self.time[2].weight):
            nn.init.normal_(weight, std=0.02)  # pyright: ignore
        zero = [m.modulation for m in self.modules() if isinstance(m, LaMambaBlock)]
        for m in (*zero, self.last_modulation):
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """c (B, 4 D) of times and classes (B,)."""
        if self.training and self.class_dropout:
            y = torch.where(torch.rand(y.shape, device=y.device) < self.class_dropout, self.num_classes, y)
        rates = torch.exp(-math.log(10_000) * torch.arange(128, device=t.device) / 128)
        angles = t[:, None].float() * rates  # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], 1).to(self.classes.weight.dtype)
        return self.time(waves) + self.classes(y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"LaMambaUNet: x must be (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            raise ValueError(
                f"LaMambaUNet: t and y must be ({x.shape[0]},), got {tuple(t.shape)}, {tuple(y.shape)}"
            )
        c = self.condition(t, y)
        x = self.embed_norm(self.embed(x).permute(0, 2, 3, 1))  # (B, H, W, D)
        x, skips = x + interpolate_map(self.positions, (x.shape[1], x.shape[2])), []
        for i, level in enumerate(self.down):
            x = _run(level, x, c)
            skips.append(x)
            if i < 2:
                x = self.merges[i](x)
        x = x + _run(self.middle, x, c)
        for i, level in enumerate(self.up):
            skip = skips.pop()
            if i >= 2:
                x = self.expands[i - 2](x)[:, : skip.shape[1], : skip.shape[2]]
            x = _run(level, x + skip, c)
        shift, scale = self.last_modulation(F.silu(self.last_cond(c)))[:, None, None].chunk(2, -1)
        x = F.layer_norm(self.last_norm(self.last(x)), x.shape[-1:], eps=1e-6)
        return self.out(x * (1 + scale) + shift).permute(0, 3, 1, 2)

    @torch.no_grad()
    def guided(self, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance: noise(none) + scale (noise(y) - noise(none)), variance of y; as `forward`."""
        both = self(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, self.num_classes)]))
        (noise, other), variance = both[:, : self.in_channels].chunk(2), both[: len(x), self.in_channels :]
        return torch.cat([other + scale * (noise - other), variance], 1)


def _run(level: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    for block in level.children():
        x = block(x, c)
    return x


def lamamba_unet(
    *,
    base: int = 320,
    depths: Sequence[int] = (2, 2, 2, 2),
    heads: int = 16,
    in_channels: int = 4,
    num_classes: int = 1000,
    side: int = 32,
) -> LaMambaUNet:
    """LaMamba-Diff-XL for latents of 32 x 32: 652,484,648 parameters."""
    return LaMambaUNet(
        base, depths=depths, heads=heads, in_channels=in_channels, num_classes=num_classes, side=side
    )
