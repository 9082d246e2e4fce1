"""InLine attention: digits with and without its two parts, and which queries linear attention cannot tell apart."""

from __future__ import annotations

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
from foveate.catalogue.lab.digits import TinyViT, batches, score
from foveate.catalogue.lab.image_mixers import ImageMixer
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.layers import InLineAttention2d
from foveate.linear import inline_weights, query_confusion

SIZE, PATCH, DIM, HEADS = 16, 2, 32, 2
SIDE = SIZE // PATCH
STEPS, BATCH, RATE, POSITIONS = 300, 32, 1e-2, 0.5  # chosen on softmax alone
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 360 test images. Gate: softmax recognises at least 0.85 of them, else open. "
    "Then all of: injective linear attention recognises more than linear attention with a ReLU map and as many "
    "parameters; with the predicted convolution it recognises more than without; and more than softmax's share less "
    "0.01. Besides, of 96 random queries, 32 directions in three lengths, dividing linear attention confuses 0.02 of "
    "the pairs or more (96 of 4,560 are of one direction), and injective linear attention none"
)
ARMS = {
    "softmax": lambda _: ImageMixer(DIM, HEADS, "softmax"),
    "linear": lambda _: ImageMixer(DIM, HEADS, "linear"),
    "injective": lambda _: InLineAttention2d(DIM, HEADS, local=False),
    "injective + local": lambda _: InLineAttention2d(DIM, HEADS),
}


def trained(lab: Lab, name: str, seed: int) -> float:
    """Share of the test images that the arm recognises."""
    torch.manual_seed(seed)
    model = TinyViT(ARMS[name], size=SIZE, patch=PATCH, dim=DIM)
    nn.init.normal_(model.positions, std=POSITIONS, generator=generator(seed, 1))
    draw = batches(seed, lab.pick(BATCH, 4), SIZE)
    train(lab, model, draw, steps=lab.pick(STEPS, 4), lr=RATE, what=f"{name}, seed {seed}")
    return score(model, SIZE)


def confusion() -> list[Figure]:
    """Share of pairs of random queries that get the same weights: with division, and injective."""
    g = generator(11)
    q, k = (torch.randn(4, 2, n, 16, generator=g, dtype=torch.float64) for n in (32, 64))
    q = torch.cat([q, 2 * q, 3 * q], 2)
    scores = torch.relu(q) @ torch.relu(k).mT
    divided = scores / scores.sum(-1, keepdim=True)
    return [
        Figure("pairs of queries confused: linear", query_confusion(divided)),
        Figure("pairs of queries confused: injective", query_confusion(inline_weights(q, k))),
    ]


def run(lab: Lab) -> Finding:
    """Does linear attention recognise more once its weights are injective, and more with a local part, as softmax?"""
    found = {
        name: [lab.once(f"{name.replace(' ', '')}-{seed}", partial(trained, lab, name, seed)) for seed in lab.seeds]
        for name in ARMS
    }  # fmt: skip
    mean = {name: interval(f"recognised: {name}", values) for name, values in found.items()}
    whole = "injective + local"
    gains = [
        difference(f"{a} - {b}", found[a], found[b])
        for a, b in (("injective", "linear"), (whole, "injective"), (whole, "softmax"))
    ]
    confused = confusion()
    told = confused[0].value >= 0.02 and confused[1].value == 0
    verdict = OPEN
    if mean["softmax"].value >= 0.85:
        trial = [judge(gain, above) for gain, above in zip(gains, (0, 0, -0.01), strict=True)]
        verdict = all_of(*trial, HOLDS if told else FAILS)
    n, d = SIDE**2, DIM // HEADS
    work = Figure("multiply-adds of InLine attention and convolution over softmax's", (2 * d + 9) / (2 * n))
    return Finding(
        question="Does linear attention recognise more once its weights are injective, and more with a local part, so "
        "that it keeps up with softmax?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Digits recognised: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in mean.items())
        + f"; pairs of queries confused: {confused[0].value:.3f} with division, {confused[1].value:.3g} without.",
        figures=(*mean.values(), *gains, *confused, work),
        plot=bars(
            f"Digits, two layers, {n} tokens",
            "share recognised",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()],
            ["softmax", "linear"],
        ),
        quality=mean[whole].value / mean["softmax"].value,
        cost=work.value,
    )


def picture() -> dict[str, Any]:
    """How much the weights of queries of one direction and of others differ."""
    g = generator(3)
    q, k = torch.randn(1, 1, 8, 16, generator=g), torch.randn(1, 1, 64, 16, generator=g)
    q = torch.cat([q, 2 * q, 3 * q], 2)
    w = inline_weights(q, k)[0, 0]
    return pictures.weights(
        "Eight queries, then the same twice and three times as long: how far apart their weights are (sum over 64 keys "
        "of the absolute differences). Only the diagonal is white: all are told apart. Linear attention that divides "
        "by the sum gives all three lengths the same weights.",
        torch.cdist(w, w, p=1.0),
        columns="query",
        code="w = inline_weights(q, k)[0, 0]; torch.cdist(w, w, p=1.0)",
    )
