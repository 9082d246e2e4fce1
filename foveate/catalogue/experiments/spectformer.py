"""SpectFormer: how many of six blocks filter and how many attend, on digits; what a filter keeps and what it costs."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    FAILS,
    HOLDS,
    OPEN,
    Figure,
    Finding,
    Lab,
    all_of,
    bars,
    difference,
    interval,
    judge,
)
from foveate.catalogue.lab.digits import batches, score
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.vision import SpectFormer, SpectralBlock, SpectralGate
from foveate.vision.blocks import init_
from foveate.vision.spectformer import AttentionBlock

SIZE, PATCH, DIM, HEADS, DEPTH = 16, 2, 32, 2, 6
ALPHAS = (0, 2, 4, 6)
STEPS, BATCH, RATE, POSITIONS, WEIGHTS = 400, 16, 5e-3, 0.5, 0.1  # chosen with attention alone
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 360 test images. Gate: attention alone recognises at least 0.8, else open. "
    "Then all of: the mean of the mixed models (2 and 4 spectral blocks of 6) is above that of attention alone less "
    "0.01, and above that of filters alone less 0.01; a spectral block with random weights passes circular shifts of "
    "its map on to within 1e-5 but changes by more than 0.1 under a permutation, while an attention block without "
    "positions passes the permutation on to within 1e-5; and on 56 x 56 tokens a filter counts fewer operations than "
    "the pairs of attention"
)


class Digits(nn.Module):
    """(B, 16, 16) -> (B, 10)."""

    def __init__(self, alpha: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = SpectFormer(
            dim=DIM,
            depth=DEPTH,
            heads=HEADS,
            alpha=alpha,
            patch=PATCH,
            size=SIZE,
            mlp_ratio=2,
            num_classes=10,
            in_channels=1,
            drop_path=0.0,
        )
        init_(self.model, std=WEIGHTS)
        nn.init.normal_(self.model.positions, std=POSITIONS, generator=generator(seed, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x[:, None])


def trained(lab: Lab, alpha: int, seed: int) -> float:
    """Share of the test images that the model recognises."""
    model = Digits(alpha, seed)
    draw = batches(seed, lab.pick(BATCH, 4), SIZE)
    train(lab, model, draw, steps=lab.pick(STEPS, 3), lr=RATE, what=f"{alpha} spectral, seed {seed}")
    return score(model, SIZE)


@torch.no_grad()
def kept() -> tuple[Figure, Figure, Figure]:
    """How far blocks with random weights are from passing on a shift, or a permutation, of their map."""
    g, (h, w), dim = generator(3), (7, 9), 16
    torch.manual_seed(0)
    x, order = torch.randn(2, h, w, dim, generator=g).double(), torch.randperm(h * w, generator=g)
    blocks = SpectralBlock(dim, (h, w)).double(), AttentionBlock(dim, 2).double()
    for block in blocks:
        for p in block.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    shift = lambda t: t.roll((2, 5), (1, 2))  # noqa: E731
    permute = lambda t: t.flatten(1, 2)[:, order].view_as(t)  # noqa: E731
    off = lambda block, move: float((block(move(x)) - move(block(x))).abs().max())  # noqa: E731
    return (
        Figure("spectral block, off under a shift", off(blocks[0], shift)),
        Figure("spectral block, off under a permutation", off(blocks[0], permute)),
        Figure("attention block, off under a permutation", off(blocks[1], permute)),
    )


def run(lab: Lab) -> Finding:
    """Are some blocks that filter and some that attend as good as either alone?"""
    found = {
        alpha: [lab.once(f"{alpha}-{seed}", partial(trained, lab, alpha, seed)) for seed in lab.seeds]
        for alpha in ALPHAS
    }
    mean = {alpha: interval(f"recognised: {alpha} of {DEPTH} spectral", v) for alpha, v in found.items()}
    inside = [found[alpha] for alpha in ALPHAS[1:-1]]
    mixed = [sum(values) / len(inside) for values in zip(*inside, strict=True)]
    gains = [
        difference(f"mixed - {name}", mixed, found[alpha])
        for name, alpha in (("attention alone", 0), ("filters alone", DEPTH))
    ]
    shifted, permuted, attending = kept()
    exact = shifted.value < 1e-5 and permuted.value > 0.1 and attending.value < 1e-5
    n = 56 * 56
    work = Figure("operations at 56 x 56, filter over pairs", (5 * n * math.log2(n) + 3 * n) / (4 * n * n))
    verdict = OPEN
    if mean[0].value >= 0.8:
        verdict = all_of(
            *(judge(gain, above=-0.01) for gain in gains),
            HOLDS if exact else FAILS,
            HOLDS if work.value < 1 else FAILS,
        )
    return Finding(
        question="Are some blocks that filter and some that attend as good as either alone?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Digits recognised with "
        + ", ".join(f"{alpha}" for alpha in ALPHAS)
        + f" of {DEPTH} blocks spectral: "
        + ", ".join(f"{figure.value:.3f}" for figure in mean.values())
        + f". Off by {shifted.value:.1g} under shifts and {permuted.value:.2g} under a permutation, attention by "
        f"{attending.value:.1g}; at 56 x 56 tokens a filter counts {work.value:.4f} of attention's operations.",
        figures=(*mean.values(), *gains, shifted, permuted, attending, work),
        plot=bars(
            f"Digits, {DEPTH} blocks, {(SIZE // PATCH) ** 2} tokens",
            "share recognised",
            [Figure(f"{alpha} spectral", f.value, f.low, f.high, f.n) for alpha, f in mean.items()],
            [f"{ALPHAS[0]} spectral", f"{ALPHAS[-1]} spectral"],
        ),
        quality=sum(mixed) / len(mixed) / mean[0].value,
        cost=None,
    )


def picture() -> dict[str, Any]:
    """The matrix of a low-pass filter on a small map."""
    side = 6
    gate = SpectralGate(1, (side, side))
    rows, columns = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)
    soft = torch.exp(-12 * (rows**2 + columns**2))  # (6, 4)
    gate.weight.data = torch.stack([soft, torch.zeros_like(soft)], -1)[:, :, None]
    basis = torch.eye(side * side).view(-1, side, side, 1)
    with torch.no_grad():
        matrix = gate(basis).flatten(1).T
    return pictures.weights(
        "What a filter that keeps slow frequencies reads on a 6 x 6 map, row by row: the same kernel around every "
        "token, and beyond the border it goes on at the other side.",
        matrix.clamp_min(0),
        code="SpectralGate(1, (6, 6))(torch.eye(36).view(-1, 6, 6, 1))",
    )
