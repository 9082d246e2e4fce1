"""GC ViT: a mark at the other end of the image says which value to read, where windows never meet."""

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
from foveate.catalogue.lab.canvas import accuracy
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.vision import (
    GlobalQueryGenerator,
    GlobalWindowAttention,
    gcvit_tiny,
    multiply_adds,
    parameters_of,
)
from foveate.vision.gcvit import GCViTBlock, GCViTStage

SIDE, PATCH, WINDOW, DIM, HEADS, DEPTH = 16, 2, 4, 32, 2, 4
CELLS = SIDE // PATCH
BLIND = 11 / 16  # of the values named by the most frequent of four: the best without the mark
STEPS, BATCH, RATE = 400, 64, 3e-3
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 1,024 images. Gate: own queries alone name at least 0.65 of the values, near "
    "11/16, the most that whoever does not see the mark can, else open. Then all of: with shared queries in every "
    "second block at least 0.85 are named, and at least 0.15 more than with own queries alone; by gradients every "
    "pixel reaches the cell that is read with shared queries, and only its window's without; and making the queries "
    "takes at most 0.2 of the multiply-adds of its stage in each of the four stages of GC ViT-T"
)
ARMS = ("local + global", "local")


class Net(nn.Module):
    """Patches, learned positions, one stage of four blocks; the upper left cell is read.

    "local + global" is the paper's stage; "local" has own queries in every block.
    """

    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Conv2d(1, DIM, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.5 * torch.randn(DIM, CELLS, CELLS, generator=generator(seed, 1)))
        blocks = [
            GCViTBlock(
                DIM,
                HEADS,
                WINDOW,
                use_global=i % 2 == 1 and name == "local + global",
                mlp_ratio=2.0,
            )
            for i in range(DEPTH)
        ]
        self.stage = GCViTStage(DIM, HEADS, (WINDOW, WINDOW), 1, blocks)
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 2)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.stage(self.embed(x[:, None]) + self.positions)[:, :, 0, 0])  # (B, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def marked(seed: int, batch: int) -> tuple[Tensor, Tensor]:
    """Four values, -1 or 1, in the upper left window, one quarter lit in the lower right: the value in that quarter."""
    g = generator(seed, 7)
    values, mark = torch.randint(2, (batch, 4), generator=g), torch.randint(4, (batch,), generator=g)
    enlarged = lambda t: t.float().view(-1, 2, 2).repeat_interleave(4, 1).repeat_interleave(4, 2)  # noqa: E731
    x = torch.zeros(batch, SIDE, SIDE)
    x[:, :8, :8] = enlarged(2 * values - 1)
    x[:, 8:, 8:] = 2 * enlarged(nn.functional.one_hot(mark, 4))
    return x, values.gather(1, mark[:, None])[:, 0]


def trained(lab: Lab, name: str, seed: int) -> float:
    """Share of the values that are named."""
    model, batch = Net(name, seed), lab.pick(BATCH, 4)
    draw = lambda step: marked(10_000 * (seed + 1) + step, batch)  # noqa: E731
    train(lab, model, draw, steps=lab.pick(STEPS, 3), lr=RATE, what=f"{name}, seed {seed}")
    return accuracy(model, *marked(5, lab.pick(1024, 64)))


def reached(name: str) -> float:
    """Share of the pixels that move the cell that is read."""
    x = torch.rand(1, SIDE, SIDE, generator=generator(2)).requires_grad_()
    feature = Net(name, 0).eval().features(x)
    (feature * torch.randn(feature.shape, generator=generator(3))).sum().backward()
    assert x.grad is not None
    return float((x.grad != 0).double().mean())


def share_of_work() -> float:
    """Multiply-adds of the query generator over those of its stage: the most of the four stages of GC ViT-T."""
    with torch.device("meta"):
        model, shares = gcvit_tiny(), []
        for i, (stage, channels) in enumerate(zip(model.stages, model.channels, strict=True)):
            parts = (stage.queries, stage)
            ours, whole = (multiply_adds(part, 56 >> i, in_channels=channels) for part in parts)  # type: ignore
            shares.append(ours / whole)
    return max(shares)


def run(lab: Lab) -> Finding:
    """Do queries shared by the image bring to a window what windows alone never see, at little cost?"""
    found = {
        name: [
            lab.once(f"{name.replace(' ', '')}-{seed}", partial(trained, lab, name, seed))
            for seed in lab.seeds
        ]
        for name in ARMS
    }
    mean = {name: interval(f"named: {name}", values) for name, values in found.items()}
    gain = difference("named more than without", found["local + global"], found["local"])
    seen = {name: Figure(f"pixels that reach the cell: {name}", reached(name)) for name in ARMS}
    work = Figure("multiply-adds of the queries over their stage's, at most", share_of_work())
    size = Figure(
        "parameters over those without", parameters_of(Net(ARMS[0], 0)) / parameters_of(Net(ARMS[1], 0))
    )
    exact = (
        seen["local + global"].value == 1
        and seen["local"].value == (WINDOW * PATCH / SIDE) ** 2
        and work.value <= 0.2
    )
    verdict = OPEN
    if mean["local"].value >= 0.65:
        verdict = all_of(judge(mean["local + global"], 0.85), judge(gain, 0.15), HOLDS if exact else FAILS)
    blind = Figure("best without the mark", BLIND)
    return Finding(
        question="Do queries shared by the image bring to a window what windows alone never see, at little cost?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="The value that a mark in another window points at: named "
        + ", ".join(f"{figure.value:.3f} with {name}" for name, figure in mean.items())
        + f" (at most {BLIND:.3f} without the mark); the shared queries take {work.value:.3f} of a stage's "
        "multiply-adds.",
        figures=(*mean.values(), blind, gain, *seen.values(), work, size),
        plot=bars(
            "The value that a far mark points at, four blocks",
            "share named",
            [*(Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()), blind],
            ["local", "best without the mark"],
        ),
    )


def picture() -> dict[str, Any]:
    """What a pixel depends on in a window with its own queries, and with the image's."""
    torch.manual_seed(0)
    frames, side = [], CELLS
    for use_global in (False, True):
        layer = GlobalWindowAttention(DIM, HEADS, WINDOW, use_global=use_global)
        maker = GlobalQueryGenerator(DIM, 1, window=WINDOW)
        x = torch.randn(1, side, side, DIM, generator=generator(1)).requires_grad_()
        out = layer(x, maker(x.permute(0, 3, 1, 2)) if use_global else None).flatten(1, 2)[0]  # (64, C)
        rows = [torch.autograd.grad(out[i].sum(), x, retain_graph=True)[0].abs().sum(3).flatten() > 0
                for i in range(side * side)]  # fmt: skip
        code = f"GlobalWindowAttention(32, 2, 4, use_global={use_global})"
        frames.append(({"queries": "shared" if use_global else "own"}, torch.stack(rows), code))
    return pictures.pairs(
        "An 8 x 8 map: with its own queries a pixel depends on its window; with the image's, it still reads its window "
        "but depends on all pixels, which say what to look for.",
        frames,
        grid=(side, side),
    )
