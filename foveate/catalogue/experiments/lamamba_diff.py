"""LaMamba-Diff: what scan and windows reach, what they cost, and whether a denoiser needs both."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.catalogue import pictures
from foveate.catalogue.lab import Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.digits import TEST, images
from foveate.catalogue.lab.tasks import generator
from foveate.vision import ConvValueAttention, LaMambaBlock, multiply_adds, snake_orders

SIDE, WINDOW, DIM, HEADS, COND = 8, 4, 24, 2, 24
STEPS, BATCH, RATE, CLEAN = 250, 16, 4e-3, 0.02  # chosen on the windows alone; CLEAN: least share of signal
ARMS = {  # scan, attention, MLP ratio per block: parameters of the three arms differ by less than 2 %
    "both": (True, True, 2.0),
    "windows": (False, True, 6.0),
    "scan": (True, False, 5.71),
}
COUNTS_IF = (
    "all of: in one block with windows alone the gradient of a cell reaches just the 16 cells of its window, and with "
    "scan and windows all 64; from 32 x 32 to 64 x 64 cells the counted multiply-adds of a block grow less than 4.05 "
    "times, those of attention over the whole map more than 8 times; and denoising digits (noise predicted, two "
    "blocks, arms of equal size within 2 %, three seeds, paired, 95 % intervals) the error with both is below that of "
    "the scan alone and below that of the windows alone"
)


class Denoiser(nn.Module):
    """(B, SIDE, SIDE) noisy images, times (B,), classes (B,) -> noise."""

    def __init__(self, scan: bool, attention: bool, ratio: float) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(1, DIM), nn.Linear(DIM, 1)
        self.positions = nn.Parameter(0.5 * torch.randn(SIDE, SIDE, DIM))
        self.classes, self.time = nn.Embedding(10, COND), nn.Linear(8, COND)
        self.blocks = nn.ModuleList(
            LaMambaBlock(
                DIM,
                HEADS,
                window=WINDOW,
                shift=WINDOW // 2 * i,
                cond_dim=COND,
                mlp_ratio=ratio,
                expand=1,
                scan=scan,
                attention=attention,
            )
            for i in range(2)
        )
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t[:, None] * torch.pi * torch.tensor([0.5, 1.0, 2.0, 4.0])
        c = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.classes(y)
        z = self.embed(x[..., None]) + self.positions
        for block in self.blocks:
            z = block(z, c)
        return self.out(self.norm(z))[..., 0]


def noised(g: torch.Generator, batch: int, test: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noisy images, times, classes and the noise in them: sqrt(a) x + sqrt(1 - a) noise, a from CLEAN to 1."""
    x, y = images()
    x, y = (x[:TEST], y[:TEST]) if test else (x[TEST:], y[TEST:])
    at = torch.randint(len(x), (batch,), generator=g)
    t = torch.rand(batch, generator=g)
    share = (CLEAN + (1 - CLEAN) * (1 - t))[:, None, None]
    noise = torch.randn(batch, SIDE, SIDE, generator=g)
    return share.sqrt() * x[at] + (1 - share).sqrt() * noise, t, y[at], noise


def trained(lab: Lab, name: str, seed: int) -> float:
    """Mean squared error of the predicted noise on images held out."""
    torch.manual_seed(seed)
    model, steps = Denoiser(*ARMS[name]).train(), lab.pick(STEPS, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for step in lab.track(range(steps), f"{name}, seed {seed}"):
        x, t, y, noise = noised(generator(seed, step), lab.pick(BATCH, 2), False)
        loss = F.mse_loss(model(x, t, y), noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    x, t, y, noise = noised(generator(99), lab.pick(1_000, 20), True)
    with torch.no_grad():
        parts = zip(*(v.split(250) for v in (x, t, y, noise)), strict=True)
        return float(torch.cat([(model.eval()(a, b, c) - n) ** 2 for a, b, c, n in parts]).mean())


def reach(scan: bool) -> int:
    """Cells that move one cell of a block with all modulations at random."""
    torch.manual_seed(0)
    block = LaMambaBlock(8, 2, window=WINDOW, cond_dim=8, expand=1, scan=scan).double()
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    x = torch.randn(1, SIDE, SIDE, 8, dtype=torch.float64, requires_grad=True)
    out = block(x, torch.ones(1, 8, dtype=torch.float64))[0, 1, 2] * torch.randn(8, dtype=torch.float64)
    (grad,) = torch.autograd.grad(out.sum(), x)
    return int((grad[0].abs().sum(-1) > 0).sum())


class Mapped(nn.Module):
    """A block, or attention over the whole map, on (B, C, H, W)."""

    def __init__(self, dim: int, whole: bool) -> None:
        super().__init__()
        self.dim = dim
        self.block = None if whole else LaMambaBlock(dim, 2, window=8, cond_dim=dim, mlp_ratio=1)
        self.attention = ConvValueAttention(dim, 2) if whole else None

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if self.block is not None:
            return self.block(x, x.new_zeros(1, self.dim))
        assert self.attention is not None
        return self.attention(x)


def work(whole: bool, sides: list[int], dim: int = 64) -> list[int]:
    """Multiply-adds, counted on the operations themselves, for maps of these sides."""
    with torch.device("meta"):
        model = Mapped(dim, whole)
    return [multiply_adds(model, side, in_channels=dim) for side in sides]


def run(lab: Lab) -> Finding:
    """Do scan and windows together reach everything in linear time, and denoise better than either?"""
    near, far = reach(False), reach(True)
    ours, whole = (work(whole, lab.pick([16, 32, 64], [16, 32])) for whole in (False, True))
    growth = Figure("growth of the work per doubling of the side", ours[-1] / ours[-2])
    dense = Figure("growth of the work of attention over the whole map", whole[-1] / whole[-2])
    exact = near == WINDOW**2 and far == SIDE**2 and growth.value < 4.05 and dense.value > 8
    sizes = {name: sum(p.numel() for p in Denoiser(*arm).parameters()) for name, arm in ARMS.items()}
    apart = Figure("largest size of an arm over the smallest", max(sizes.values()) / min(sizes.values()))
    found = {
        name: [lab.once(f"{name}-{seed}", partial(trained, lab, name, seed)) for seed in lab.seeds]
        for name in ARMS
    }
    mean = {name: interval(f"error: {name}", values) for name, values in found.items()}
    gains = [difference(f"{name} - both", found[name], found["both"]) for name in ("windows", "scan")]
    proven = judge(Figure("exact and equal", float(exact and apart.value < 1.02)), 0.5)
    return Finding(
        question="Do scan and windows together reach everything in linear time, and denoise better than either?",
        counts_if=COUNTS_IF,
        verdict=all_of(proven, *(judge(gain, 0.0) for gain in gains)),
        summary=f"A cell reads {near} cells through its window and {far} with the scan; twice the side is "
        f"{growth.value:.2f} times the work (attention over the whole map: {dense.value:.1f}); error of the noise: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in mean.items())
        + ".",
        figures=(
            Figure("cells read: windows", near),
            Figure("cells read: both", far),
            growth,
            dense,
            apart,
            *mean.values(),
            *gains,
        ),
        plot=bars(
            "Denoising digits, two blocks",
            "mean squared error of the noise",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()],
            ["windows", "scan"],
        ),
        cost=ours[-1] / whole[-1],
    )


def picture() -> dict[str, Any]:
    """What each step of a snake has read."""
    side = 8
    frames = []
    for k, start in enumerate(("rows", "rows, reversed", "columns", "columns, reversed")):
        step = snake_orders(side, side)[1][k]  # of each cell
        frames.append(({"order": start}, step[:, None] >= step[None], f"snake_orders(8, 8)[0][{k}]"))
    return pictures.pairs(
        "An 8 x 8 map: the cells that a cell has behind it along each of the four snakes; together they are all cells.",
        frames,
        grid=(side, side),
    )
