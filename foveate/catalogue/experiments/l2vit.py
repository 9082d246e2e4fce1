"""L2ViT: how thinly ReLU linear attention spreads, and whether convolutions after it close the gap to softmax."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.canvas import MapClassifier, accuracy, digit
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.vision import LocalConcentration, ReluLinearAttention, WindowAttention

SIDE, PATCH, DIM, HEADS, DEPTH = 16, 2, 32, 2, 2  # 64 tokens
STEPS, BATCH, RATE, POSITIONS = 300, 32, 1e-2, 0.5  # chosen on softmax alone
TESTED = 1_000
COUNTS_IF = (
    "three seeds, paired, 95 % intervals. On the same random queries and keys (256 tokens, 16 channels) the rows of "
    "ReLU linear attention have an entropy at least 0.1 nats above those of softmax; and with two blocks on digits of "
    "64 tokens (16 x 16 pixels, 1,000 test images) linear attention with the local concentration recognises more than "
    "the mean of linear attention without it and of softmax, that is, it recovers more than half of the gap. Gate: "
    "softmax recognises at least 0.8 and more than linear attention without the convolutions, by the whole interval, "
    "else open"
)


class Mixer(nn.Module):
    """(B, H, W, C) -> the same: softmax or linear attention over the whole map, then maybe local concentration."""

    def __init__(self, name: str) -> None:
        super().__init__()
        softmax = name == "softmax"
        self.attn = (
            WindowAttention(DIM, HEADS, SIDE // PATCH, relative_bias=False)
            if softmax
            else ReluLinearAttention(DIM, HEADS)
        )
        self.norm = nn.LayerNorm(DIM) if name == "linear + LCM" else None
        self.local = LocalConcentration(DIM) if name == "linear + LCM" else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.attn(x)
        if self.norm is None or self.local is None:
            return out
        return out + self.local(self.norm(x + out))


ARMS = ("softmax", "linear", "linear + LCM")


def drawn(seed: int, batch: int, test: bool = False) -> tuple[Tensor, Tensor]:
    """(images (batch, SIDE, SIDE), classes)."""
    g = generator(seed)
    labels = torch.randint(0, 10, (batch,), generator=g)
    return torch.stack([digit(n, g, test=test, size=SIDE) for n in labels.tolist()]), labels


def trained(lab: Lab, name: str, seed: int) -> float:
    """Share of the test images that the arm recognises."""
    torch.manual_seed(seed)
    model = MapClassifier(lambda _: Mixer(name), side=SIDE, patch=PATCH, dim=DIM, depth=DEPTH, classes=10)
    assert model.positions is not None
    nn.init.normal_(model.positions, std=POSITIONS, generator=generator(seed, 1))
    batch = lab.pick(BATCH, 2)
    train(
        lab,
        model,
        lambda step: drawn(100_000 * (seed + 1) + step, batch),
        steps=lab.pick(STEPS, 2),
        lr=RATE,
        what=f"{name}, seed {seed}",
    )
    return accuracy(model, *drawn(7, lab.pick(TESTED, 20), test=True))


def entropies(seed: int) -> tuple[float, float]:
    """Mean entropy in nats of the rows of softmax and of normalised ReLU linear attention, on the same q and k."""
    q, k = torch.randn(2, 8, 256, 16, generator=generator(seed), dtype=torch.float64)
    soft = torch.softmax(q @ k.mT / 4, -1)
    linear = q.relu() @ k.relu().mT
    linear = linear / linear.sum(-1, keepdim=True)
    found = [-(w * w.clamp(min=1e-300).log()).sum(-1).mean() for w in (soft, linear)]
    return float(found[0]), float(found[1])


def run(lab: Lab) -> Finding:
    """Is ReLU linear attention spread more evenly, and do convolutions after it make up for that?"""
    spread = [entropies(seed) for seed in lab.seeds]
    soft = interval("entropy: softmax", [a for a, _ in spread], "nats")
    even = interval("entropy: linear", [b for _, b in spread], "nats")
    wider = difference("entropy: linear - softmax", [b for _, b in spread], [a for a, _ in spread], "nats")
    key = {name: name.replace(" ", "") for name in ARMS}
    found = {
        name: [lab.once(f"{key[name]}-{seed}", partial(trained, lab, name, seed)) for seed in lab.seeds]
        for name in ARMS
    }
    mean = {name: interval(f"recognised: {name}", values) for name, values in found.items()}
    gap = difference("softmax - linear", found["softmax"], found["linear"])
    half = [(a + b) / 2 for a, b in zip(found["softmax"], found["linear"], strict=True)]
    gain = difference("linear + LCM - half of the way", found["linear + LCM"], half)
    gate = mean["softmax"].value >= 0.8 and judge(gap, 0.0) == "holds"
    return Finding(
        question="Is ReLU linear attention spread more evenly, and do convolutions after it make up for that?",
        counts_if=COUNTS_IF,
        verdict=all_of(judge(wider, 0.1), judge(gain, 0.0) if gate else OPEN),
        summary=f"Entropy of a row of {256} weights: softmax {soft.value:.2f}, ReLU linear attention {even.value:.2f} "
        f"nats (at most {math.log(256):.2f}); digits recognised: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in mean.items())
        + ".",
        figures=(soft, even, wider, *mean.values(), gap, gain),
        plot=bars(
            f"Digits of {(SIDE // PATCH) ** 2} tokens, {DEPTH} blocks",
            "share recognised",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()],
            ["softmax", "linear"],
        ),
        quality=mean["linear + LCM"].value / max(mean["softmax"].value, 0.1),
        cost=(2 * (DIM // HEADS) + 98) / (2 * (SIDE // PATCH) ** 2),  # multiply-adds per token and channel
    )


def picture() -> dict[str, Any]:
    """The weights of ReLU linear attention on a small map."""
    side, g = 8, generator(2)
    places = (
        torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1).T / side
    )
    features = 2 * torch.pi * places @ torch.randn(2, 12, generator=g) / 2
    q = torch.cat([features.sin(), features.cos()], 1)[None, None]  # (1, 1, 64, 24)
    layer = ReluLinearAttention(64, 1, denom_min=1e-6, temperature=1.0)
    shared = layer.mixed(q, q, torch.eye(side * side)[None, None])
    return pictures.weights(
        "An 8 x 8 map, row by row: the weights that ReLU linear attention gives. Every row is spread over much of the "
        "map; the convolutions after it draw it back to the neighbourhood.",
        shared[0, 0],
        code="ReluLinearAttention(dim, 1, denom_min=1e-6, temperature=1.0).mixed(q, k, torch.eye(64)[None, None])",
    )
