"""DaViT: a digit named at the other end of the image, where windows never meet, through attention among channels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

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
from foveate.catalogue.lab.canvas import MapClassifier, accuracy, digit, reached
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.vision import ChannelGroupAttention, WindowAttention, multiply_adds

SIDE, PATCH, WINDOW, DIM, HEADS, DEPTH = 16, 2, 4, 32, 2, 4
CELLS = SIDE // PATCH
STEPS, BATCH, RATE = 400, 32, 3e-3  # chosen with full attention
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 512 digits held out. Gate: windows and full attention in turn name at least "
    "0.7 of the far digits, else open. Then all of: by gradients every pixel reaches the cell that is read with "
    "windows and channels in turn, and only its own window's with windows alone; windows and channels name at least "
    "0.6, and at least 0.4 more than windows alone; and channel attention of width 96 needs at most a tenth of the "
    "multiply-adds of full attention at 56 x 56 tokens, maps of queries, keys, values and output included"
)


def window(side: int) -> nn.Module:
    return WindowAttention(DIM, HEADS, side, relative_bias=False)


ARMS = {
    "windows + channels": lambda layer: ChannelGroupAttention(DIM, HEADS) if layer % 2 else window(WINDOW),
    "windows + full": lambda layer: window(CELLS if layer % 2 else WINDOW),
    "windows": lambda layer: window(WINDOW),
}


def far(seed: int, batch: int, *, test: bool = False) -> tuple[Tensor, Tensor]:
    """A digit in the lower right quarter of an empty image, and its class."""
    g = generator(seed, 7)
    x, labels = torch.zeros(batch, SIDE, SIDE), torch.randint(10, (batch,), generator=g)
    for image, label in zip(x, labels.tolist(), strict=True):
        image[8:, 8:] = digit(label, g, test=test)
    return x, labels


def made(name: str, seed: int) -> MapClassifier:
    torch.manual_seed(seed)
    model = MapClassifier(
        ARMS[name], side=SIDE, patch=PATCH, dim=DIM, depth=DEPTH, classes=10, readout="corner"
    )
    assert model.positions is not None
    nn.init.normal_(model.positions, std=0.5, generator=generator(seed, 1))
    return model


def trained(lab: Lab, name: str, seed: int) -> float:
    """Share of the far digits that the corner names."""
    model, batch = made(name, seed), lab.pick(BATCH, 4)
    draw = lambda step: far(10_000 * (seed + 1) + step, batch)  # noqa: E731
    train(lab, model, draw, steps=lab.pick(STEPS, 3), lr=RATE, what=f"{name}, seed {seed}")
    return accuracy(model, *far(5, lab.pick(512, 32), test=True))


class OnMaps(nn.Module):
    """A layer on (B, H, W, C) called with (B, C, H, W)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1))


def share_of_work(side: int, dim: int = 96, heads: int = 3) -> float:
    """Multiply-adds of channel attention over those of full attention on side x side tokens."""
    with torch.device("meta"):
        layers = ChannelGroupAttention(dim, heads), WindowAttention(dim, heads, side, relative_bias=False)
        ours, full = (multiply_adds(OnMaps(layer), side, in_channels=dim) for layer in layers)
    return ours / full


def run(lab: Lab) -> Finding:
    """Does attention among channels carry what windows cannot, at a cost linear in the tokens?"""
    found = {
        name: [
            lab.once(f"{name.replace(' ', '')}-{seed}", partial(trained, lab, name, seed))
            for seed in lab.seeds
        ]
        for name in ARMS
    }
    mean = {name: interval(f"named: {name}", values) for name, values in found.items()}
    gain = difference("named more than by windows alone", found["windows + channels"], found["windows"])
    seen = {name: Figure(f"pixels that reach the corner: {name}", float(reached(made(name, 0), SIDE).double().mean()))
            for name in ARMS}  # fmt: skip
    work = Figure("multiply-adds over full attention's, 56 x 56 tokens", share_of_work(56))
    exact = (
        seen["windows + channels"].value == 1
        and seen["windows"].value == (WINDOW * PATCH / SIDE) ** 2
        and work.value <= 0.1
    )
    verdict = OPEN
    if mean["windows + full"].value >= 0.7:
        verdict = all_of(judge(mean["windows + channels"], 0.6), judge(gain, 0.4), HOLDS if exact else FAILS)
    return Finding(
        question="Does attention among channels carry what windows cannot, at a cost linear in the tokens?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="A digit named at the opposite corner: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in mean.items())
        + f" (chance 0.1); channel attention needs {work.value:.3f} of full attention's multiply-adds at 56 x 56.",
        figures=(*mean.values(), gain, *seen.values(), work),
        plot=bars(
            "A digit named at the opposite corner, four layers",
            "share named",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()],
            ["windows + full", "windows"],
        ),
        quality=mean["windows + channels"].value / max(mean["windows + full"].value, 0.01),
        cost=work.value,
    )


def picture() -> dict[str, Any]:
    """Which pixels a pixel sees after the windows, and after the channels."""
    torch.manual_seed(0)
    frames, side = [], 8
    layers = {
        "windows": window(WINDOW),
        "then channels": nn.Sequential(window(WINDOW), ChannelGroupAttention(DIM, HEADS)),
    }
    for name, layer in layers.items():
        x = torch.randn(1, side, side, DIM, generator=generator(1)).requires_grad_()
        out = layer(x).flatten(1, 2)[0]  # (64, C)
        rows = [torch.autograd.grad(out[i].sum(), x, retain_graph=True)[0].abs().sum(3).flatten() > 0
                for i in range(side * side)]  # fmt: skip
        code = "WindowAttention(32, 2, 4)" + ("" if name == "windows" else ", ChannelGroupAttention(32, 2)")
        frames.append(({"after": name}, torch.stack(rows), code))
    return pictures.pairs(
        "An 8 x 8 map: inside the windows a pixel sees 16 others; after attention among channels it depends on all.",
        frames,
        grid=(side, side),
    )
