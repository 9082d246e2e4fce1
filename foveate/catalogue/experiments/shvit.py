"""SHViT: digits recognised by one head on a quarter of the channels, against several heads on all."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
from foveate.catalogue.lab.canvas import MapClassifier
from foveate.catalogue.lab.digits import batches, score
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.vision import SingleHeadPartialAttention, WindowAttention, multiply_adds, parameters_of

SIDE, PATCH, DIM, PARTIAL, HEADS, DEPTH = 16, 2, 48, 12, 4, 2
CELLS = SIDE // PATCH
STEPS, BATCH, RATE = 300, 32, 5e-3  # chosen with four heads
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 360 test images. Gate: four heads on all channels recognise at least 0.85, "
    "else open. Then all of: one head on a quarter of the channels, in a model with no more parameters, recognises "
    "more than four heads less 0.03, and more than the same layer whose head is replaced by its values alone; and "
    "at C = 224 and 14 x 14 cells the layer with p = 48 needs at most half the multiply-adds of eight heads on all "
    "channels"
)


class ValuesAlone(SingleHeadPartialAttention):
    """The layer when every cell reads only itself."""

    def mixed(self, x: Tensor) -> Tensor:
        v = self.qkv(self.norm(x[:, : self.partial_dim]))[:, 2 * self.qk_dim :]
        return torch.cat([v, x[:, self.partial_dim :]], 1)


ARMS = {  # the mixer, and hidden channels of the MLP over C
    "one head on a quarter": (lambda _: SingleHeadPartialAttention(DIM, PARTIAL), 2),
    "four heads on all": (lambda _: WindowAttention(DIM, HEADS, CELLS, relative_bias=False), 1),
    "values alone": (lambda _: ValuesAlone(DIM, PARTIAL), 2),
}


def made(name: str, seed: int) -> MapClassifier:
    torch.manual_seed(seed)
    mixer, ratio = ARMS[name]
    model = MapClassifier(mixer, side=SIDE, patch=PATCH, dim=DIM, depth=DEPTH, classes=10, mlp_ratio=ratio)
    assert model.positions is not None
    nn.init.normal_(model.positions, std=0.5, generator=generator(seed, 1))
    for layer in model.mixers:  # a weight of 0 on a branch helps only deep models
        if isinstance(layer, SingleHeadPartialAttention):
            nn.init.ones_(layer.proj.norm.weight)
    return model


@torch.no_grad()
def alike(model: MapClassifier) -> float:
    """Mean cosine similarity of the weights of two heads for one query, over queries, pairs of heads and layers."""
    found: list[float] = []

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, WindowAttention)
        qkv = layer.qkv(inputs[0].flatten(1, 2)).unflatten(2, (3, HEADS, -1))  # (B, N, 3, heads, d)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        unit = F.normalize((q @ k.mT * q.shape[3] ** -0.5).softmax(3), dim=3)  # (B, heads, N, N)
        pairs = [float((unit[:, a] * unit[:, b]).sum(2).mean()) for a in range(HEADS) for b in range(a)]
        found.append(sum(pairs) / len(pairs))

    hooks = [layer.register_forward_pre_hook(look) for layer in model.mixers]
    model.eval()(batches(9, 64, SIDE)(0)[0])
    for hook in hooks:
        hook.remove()
    return sum(found) / len(found)


def trained(lab: Lab, name: str, seed: int) -> list[float]:
    """Share of the test images that are recognised; for several heads, how alike they are."""
    model = made(name, seed)
    train(
        lab,
        model,
        batches(seed, lab.pick(BATCH, 4), SIDE),
        steps=lab.pick(STEPS, 3),
        lr=RATE,
        what=f"{name}, seed {seed}",
    )
    return [score(model, SIDE), alike(model) if name == "four heads on all" else 0.0]


class OnMaps(nn.Module):
    """A layer on (B, H, W, C) called with (B, C, H, W)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 2, 3, 1))


def share_of_work(side: int = 14, dim: int = 224, partial_dim: int = 48) -> float:
    """Multiply-adds of the layer over those of eight heads on all channels."""
    with torch.device("meta"):
        layers = (
            SingleHeadPartialAttention(dim, partial_dim),
            WindowAttention(dim, 8, side, relative_bias=False),
        )
        ours, full = (multiply_adds(OnMaps(layer), side, in_channels=dim) for layer in layers)
    return ours / full


def run(lab: Lab) -> Finding:
    """Does one head on a quarter of the channels recognise what several heads on all do?"""
    found = {
        name: [
            lab.once(f"{name.replace(' ', '')}-{seed}", partial(trained, lab, name, seed))
            for seed in lab.seeds
        ]
        for name in ARMS
    }
    share = {name: [value[0] for value in values] for name, values in found.items()}
    mean = {name: interval(f"recognised: {name}", values) for name, values in share.items()}
    ours = "one head on a quarter"
    less = difference("one head less four", share[ours], share["four heads on all"])
    gain = difference("one head less values alone", share[ours], share["values alone"])
    heads = interval("cosine similarity of two of four heads", [v[1] for v in found["four heads on all"]])
    size = Figure(
        "parameters over those with four heads",
        parameters_of(made(ours, 0)) / parameters_of(made("four heads on all", 0)),
    )
    work = Figure("multiply-adds over those of eight heads, C = 224, 14 x 14", share_of_work())
    verdict = OPEN
    if mean["four heads on all"].value >= 0.85:
        exact = work.value <= 0.5 and size.value <= 1
        verdict = all_of(judge(less, -0.03), judge(gain, 0), HOLDS if exact else FAILS)
    return Finding(
        question="Does one head on a quarter of the channels recognise what several heads on all do?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Digits recognised: "
        + ", ".join(f"{figure.value:.3f} with {name}" for name, figure in mean.items())
        + f"; at C = 224 and 14 x 14 one head of 48 channels needs {work.value:.2f} of eight heads' multiply-adds.",
        figures=(*mean.values(), less, gain, heads, size, work),
        plot=bars(
            "Digits, two layers, 64 cells",
            "share recognised",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()],
            ["four heads on all", "values alone"],
        ),
        quality=mean[ours].value / max(mean["four heads on all"].value, 0.01),
        cost=work.value,
    )


def picture() -> dict[str, Any]:
    """Which channels before a cell's output map depend on other cells."""
    torch.manual_seed(0)
    layer, side, dim = SingleHeadPartialAttention(24, 6), 4, 24
    x = torch.randn(1, dim, side, side, generator=generator(1)).requires_grad_()
    mixed = layer.eval().mixed(x)[0, :, 0, 0]  # (C,), the upper left cell
    rows = [torch.autograd.grad(mixed[c], x, retain_graph=True)[0].abs().sum(1).flatten() for c in range(dim)]
    reach = torch.stack(rows)  # (C, N)
    return pictures.weights(
        "24 channels of the upper left cell of a 4 x 4 map, and how much each depends on each cell: the first six are "
        "mixed by the head, the other 18 read their own cell alone.",
        reach / reach.amax(1, keepdim=True),
        rows="channel",
        columns="cell",
        code="SingleHeadPartialAttention(24, 6)",
    )
