"""ConViT: digits from few examples, against plain attention and against gated heads that do not begin as taps."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    OPEN,
    Figure,
    Finding,
    Lab,
    all_of,
    banded,
    difference,
    interval,
    judge,
    lines,
)
from foveate.catalogue.lab.digits import TinyViT, score, split
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.vision import GPSA, attention_distance, locality_gates, positional_factors
from foveate.vision.tokens import TokenAttention

SIZE, PATCH, DIM, HEADS, DEPTH = 16, 2, 32, 4, 2
GRID = (SIZE // PATCH, SIZE // PATCH)
SHARES = (0.1, 0.3, 1.0)  # of 1,437 training images
STEPS, BATCH, RATE, POSITIONS = 400, 16, 1e-2, 0.5  # chosen on plain attention with all images
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 360 test images. Gate: plain attention trained on all images recognises at "
    "least 0.85, else open. Then all of: trained on a tenth of the images, gated heads recognise more than plain "
    "attention; that gain is larger than the one with all images; trained on a tenth, they recognise more than gated "
    "heads of the same parameters whose positions and values start at random; and before training, the positional "
    "part looks less than 1.5 patches away on average, plain attention more than 3"
)
ARMS = {
    "attention": lambda: TokenAttention(DIM, HEADS),
    "GPSA": lambda: OnGrid(GPSA(DIM, HEADS)),
    "GPSA from random": lambda: OnGrid(GPSA(DIM, HEADS, locality_strength=None)),
}


class OnGrid(nn.Module):
    """A layer for maps, on tokens."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unflatten(1, GRID)).flatten(1, 2)


def trained(lab: Lab, name: str, share: float, seed: int) -> dict[str, float]:
    """Share of the test images recognised after training on a part of the rest; where the gates went."""
    torch.manual_seed(seed)
    model = TinyViT(lambda _: ARMS[name](), size=SIZE, patch=PATCH, dim=DIM, depth=DEPTH)
    nn.init.normal_(model.positions, std=POSITIONS, generator=generator(seed, 1))
    (x, y), _ = split(SIZE)
    part = torch.randperm(len(x), generator=generator(seed, 2))[: round(share * len(x))]

    def draw(step: int) -> tuple[Tensor, Tensor]:
        at = part[torch.randint(0, len(part), (lab.pick(BATCH, 4),), generator=generator(seed, 3, step))]
        return x[at], y[at]

    train(lab, model, draw, steps=lab.pick(STEPS, 3), lr=RATE, what=f"{name}, {share:g}, seed {seed}")
    gates = torch.cat(list(locality_gates(model).values()) or [torch.zeros(1)])
    return {
        "recognised": score(model, SIZE),
        "least gate": float(gates.min()),
        "largest gate": float(gates.max()),
    }


def at_first() -> tuple[Figure, Figure, Figure]:
    """How far heads look before training, in patches: the positional part, the mixture, plain attention."""
    torch.manual_seed(0)
    layer, x = GPSA(DIM, HEADS), torch.randn(8, *GRID, DIM)
    plain = GPSA(DIM, HEADS, gate=-30.0)
    rows, columns = positional_factors(layer.position.weight, GRID)
    positional = torch.einsum("hyv,hxu->hyxvu", rows, columns).flatten(3).flatten(1, 2)
    far = (attention_distance(a, GRID) for a in (positional, layer.weights(x), plain.weights(x)))
    names = ("positional part", "GPSA", "attention")
    found = [
        Figure(f"patches away before training: {n}", float(d.detach().mean()))
        for n, d in zip(names, far, strict=True)
    ]
    return found[0], found[1], found[2]


def run(lab: Lab) -> Finding:
    """Do heads that begin as the taps of a convolution learn from fewer images?"""
    runs = [(name, share) for name in ("attention", "GPSA") for share in SHARES]
    runs.append(("GPSA from random", SHARES[0]))
    steps = {
        (name, share): [
            lab.once(f"{name.replace(' ', '')}-{share:g}-{seed}", partial(trained, lab, name, share, seed))
            for seed in lab.seeds
        ]
        for name, share in runs
    }
    found = {at: [step["recognised"] for step in values] for at, values in steps.items()}
    mean = {at: interval(f"recognised: {at[0]}, {at[1]:g} of the images", v) for at, v in found.items()}
    few, most = SHARES[0], SHARES[-1]
    gain = {
        s: difference(f"GPSA - attention, {s:g}", found["GPSA", s], found["attention", s]) for s in SHARES
    }
    gained = {
        s: [a - b for a, b in zip(found["GPSA", s], found["attention", s], strict=True)] for s in SHARES
    }
    larger = difference("gain with a tenth - gain with all", gained[few], gained[most])
    start = difference("GPSA - GPSA from random, 0.1", found["GPSA", few], found["GPSA from random", few])
    positional, mixed, plain = at_first()
    verdict = OPEN
    if mean["attention", most].value >= 0.85:
        near = judge(Figure("nearer than 1.5", 1.5 - positional.value), above=0)
        verdict = all_of(judge(gain[few], 0), judge(larger, 0), judge(start, 0), near, judge(plain, above=3))
    gates = [
        interval(f"{which} after training on all", [step[which] for step in steps["GPSA", most]])
        for which in ("least gate", "largest gate")
    ]
    count = len(split(SIZE)[0][0])
    curves = [
        banded(name, [s * count for s in SHARES], list(zip(*(found[name, s] for s in SHARES), strict=True)), most=1.0,
               reference=name == "attention")
        for name in ("attention", "GPSA")
    ]  # fmt: skip
    tokens = GRID[0] * GRID[1]
    return Finding(
        question="Do heads that begin as the taps of a convolution learn from fewer images?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Digits recognised, gated heads against plain attention: "
        + ", ".join(
            f"{mean['GPSA', s].value:.3f} and {mean['attention', s].value:.3f} from {round(s * count)} images"
            for s in SHARES
        )
        + f"; gated heads from random positions {mean['GPSA from random', few].value:.3f} from "
        f"{round(few * count)}. Before training the positional part looks {positional.value:.2f} patches away, "
        f"the mixture {mixed.value:.2f}, plain attention {plain.value:.2f}; training left the gates between "
        f"{gates[0].value:.2f} and {gates[1].value:.2f}.",
        figures=(
            *mean.values(),
            *gain.values(),
            larger,
            start,
            positional,
            mixed,
            plain,
            *gates,
        ),
        plot=lines(
            f"Digits, two layers, {tokens} tokens",
            "training images",
            "share recognised",
            curves,
            log_x=True,
        ),
        quality=mean["GPSA", most].value / mean["attention", most].value,
        cost=(2 * tokens + sum(GRID)) / (2 * tokens),
    )


def picture() -> dict[str, Any]:
    """The positional attention of the middle token, all heads beside each other."""
    heads, side = 9, 7
    layer = GPSA(heads, heads)
    rows, columns = positional_factors(layer.position.weight.detach(), (side, side))
    middle = torch.einsum("hv,hu->hvu", rows[:, side // 2], columns[:, side // 2])  # (heads, side, side)
    tiled = (
        middle.unflatten(0, (3, 3)).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    )  # head a + 3 b at row a, column b
    return pictures.weights(
        "Nine heads at the start, three by three: where the token in the middle of a 7 x 7 map looks in each. Together "
        "they are the taps of a 3 x 3 kernel; a gate per head may turn each towards content.",
        tiled,
        rows="row, three heads",
        columns="column, three heads",
        code="positional_factors(GPSA(9, 9).position.weight, (7, 7))",
    )
