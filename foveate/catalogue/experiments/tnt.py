"""Transformer in Transformer: counting patches by how their quarters are arranged, against a plain transformer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import accuracy, train
from foveate.vision import TNT, ConViT, WordAttention, multiply_adds, parameters_of

SIDE, PATCH, STRIDE, TEXTURES, CLASSES = 32, 8, 4, 4, 4
DIM, WORD, HEADS, INNER_HEADS, DEPTH = 32, 8, 4, 2, 2
STEPS, BATCH, RATE = 400, 32, 3e-3  # chosen on the plain transformer
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 1,024 fresh images, four classes. Gate: the plain transformer, which has at "
    "least as many parameters, is right for 0.35 to 0.9 of them, else open. Then all of: transformer in transformer is "
    "right more often than the plain one, and more often than itself with words that attend to themselves alone"
)


class Alone(WordAttention):
    """Every word attends to itself alone."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return v


def scenes(seed: int, batch: int) -> tuple[Tensor, Tensor]:
    """Images (batch, 1, 32, 32) and how many (0 to 3) of their 16 patches are diagonal.

    A patch has two of four textures, each in two of its quarters: on the diagonals, or (the others) on rows or columns.
    """
    g = generator(seed)
    textures = torch.randn(TEXTURES, STRIDE, STRIDE, generator=generator(7))
    count = torch.randint(CLASSES, (batch,), generator=g)
    cells = (SIDE // PATCH) ** 2
    place = torch.rand(batch, cells, generator=g).argsort(1).argsort(1)  # each patch's rank
    diagonal = place < count[:, None]
    straight = torch.randint(1, 3, (batch, cells), generator=g)  # 1: rows, 2: columns
    kind = torch.where(diagonal, 0, straight)
    quarters = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 1]])[
        kind
    ]  # (batch, cells, 4): first or second
    two = torch.rand(batch, cells, TEXTURES, generator=g).argsort(2)[..., :2]  # which two textures
    patches = textures[two.gather(2, quarters)]  # (batch, cells, 4, 4, 4)
    image = patches.view(batch, SIDE // PATCH, SIDE // PATCH, 2, 2, STRIDE, STRIDE)
    return image.permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, 1, SIDE, SIDE), count


def nested(attention: bool = True) -> TNT:
    """TNT, or the same with words that attend to themselves alone."""
    model = TNT(
        dim=DIM,
        inner_dim=WORD,
        heads=HEADS,
        inner_heads=INNER_HEADS,
        depth=DEPTH,
        patch=PATCH,
        stride=STRIDE,
        size=SIDE,
        num_classes=CLASSES,
        in_channels=1,
        drop_path=0.0,
    )
    if not attention:
        for block in model.blocks:
            block.inner_attention = Alone(WORD, INNER_HEADS)
    return model


def plain(dim: int) -> ConViT:
    """A vision transformer on the patches."""
    return ConViT(
        dim=dim,
        heads=HEADS,
        depth=DEPTH,
        local=0,
        patch=PATCH,
        size=SIDE,
        num_classes=CLASSES,
        in_channels=1,
        drop_path=0.0,
    )


def matched() -> int:
    """The least width of the plain transformer with at least the parameters of the nested one."""
    dim = HEADS
    while parameters_of(plain(dim)) < parameters_of(nested()):
        dim += HEADS
    return dim


def trained(lab: Lab, name: str, seed: int) -> float:
    """Share of fresh images for which the arm is right."""
    torch.manual_seed(seed)
    model = plain(matched()) if name == "plain" else nested(name == "TNT")
    draw = lambda step: scenes(10_000 * (seed + 1) + step, lab.pick(BATCH, 4))  # noqa: E731
    train(lab, model, draw, steps=lab.pick(STEPS, 3), lr=RATE, what=f"{name}, seed {seed}")
    return accuracy(lab, model, [scenes(10**6 + part, 256) for part in range(lab.pick(4, 1))])


def run(lab: Lab) -> Finding:
    """Do words that attend within their patch find how it is arranged?"""
    names = ("plain", "TNT", "words alone")
    found = {
        name: [
            lab.once(f"{name.replace(' ', '')}-{seed}", partial(trained, lab, name, seed))
            for seed in lab.seeds
        ]
        for name in names
    }
    mean = {name: interval(f"right: {name}", values) for name, values in found.items()}
    gains = [difference(f"TNT - {other}", found["TNT"], found[other]) for other in ("plain", "words alone")]
    verdict = OPEN
    if 0.35 <= mean["plain"].value <= 0.9:
        verdict = all_of(*(judge(gain, above=0) for gain in gains))
    models = plain(matched()), nested()
    more = parameters_of(models[0]) / parameters_of(models[1])
    work = multiply_adds(models[1], SIDE) / multiply_adds(models[0], SIDE)
    return Finding(
        question="Do words that attend within their patch find how it is arranged?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Patches with equal textures on their diagonals counted rightly: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in mean.items())
        + f"; the plain transformer has {more:.2f} times the parameters of TNT, which does {work:.2f} times its "
        "multiply-adds.",
        figures=(
            *mean.values(),
            *gains,
            Figure("parameters, plain over TNT", more),
            Figure("multiply-adds, TNT over plain", work),
        ),
        plot=bars(
            f"Which patches are diagonal, counted; {STEPS} steps",
            "share right (chance 0.25)",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()],
            ["plain", "words alone"],
        ),
        quality=mean["TNT"].value / mean["plain"].value,
        cost=work,
    )


def picture() -> dict[str, Any]:
    """Who attends to whom among words, and among patches."""
    patch = torch.arange(64) // 16  # four patches of 16 words
    return pictures.pairs(
        "Four patches of sixteen words. The inner attention stays inside a patch; the outer one joins all patches, "
        "once the words of each have been added to it.",
        [
            ({"level": "words"}, patch[:, None] == patch, "WordAttention(24, 4)(words)  # (4, 16, 24)"),
            (
                {"level": "patches"},
                torch.ones(5, 5, dtype=torch.bool),
                "TokenAttention(384, 6)(z)  # (1, 5, 384)",
            ),
        ],
    )
