"""BiFormer: how much of full attention lies in the regions that the routing chooses, at a twelfth of the pairs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.canvas import MapClassifier, accuracy
from foveate.catalogue.lab.digits import batches, split
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.selectors import RegionTopK
from foveate.vision import BiLevelRoutingAttention

SIDE, PATCH, DIM, HEADS = 24, 2, 32, 2
REGIONS, K = 6, 3  # 12 x 12 tokens, 36 regions of 2 x 2, a twelfth of the pairs
GRID = (SIDE // PATCH, SIDE // PATCH)
STEPS, BATCH, RATE, POSITIONS = 200, 32, 1e-2, 0.5  # chosen on full attention alone
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, on models trained with full attention. Gate: they recognise at least 0.8 of "
    "the 360 test digits, else open. Then both of: the share of the attention weights that lies in the 3 of 36 "
    "regions which the routing chooses, averaged over queries, heads and layers, is larger than in the 3 nearest "
    "regions (the own one among them), and larger than in 3 random ones"
)
ARMS = ("routed", "nearest", "random", "best possible")


def picks(q: Tensor, k: Tensor, mass: Tensor, seed: int) -> dict[str, Tensor]:
    """Of each arm, the regions chosen: (B, R, K). mass (B, R, R): attention from a region to a region."""
    count = REGIONS * REGIONS
    at = torch.stack([torch.arange(count) // REGIONS, torch.arange(count) % REGIONS], 1).double()
    nearest = torch.cdist(at, at).argsort(dim=1, stable=True)[:, :K].expand(len(q), -1, -1)
    return {
        "routed": RegionTopK(GRID, REGIONS, K).select(q, k)[:, 0],
        "nearest": nearest,
        "random": torch.rand(mass.shape, generator=generator(seed, 9)).argsort(dim=2)[..., :K],
        "best possible": mass.argsort(dim=2, descending=True)[..., :K],
    }


@torch.no_grad()
def shares(model: MapClassifier, x: Tensor, seed: int) -> dict[str, float]:
    """Mean share of the attention weights inside the chosen regions, over layers, heads and queries."""
    found: dict[str, list[float]] = {name: [] for name in ARMS}

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, BiLevelRoutingAttention)
        qkv = layer.qkv(inputs[0]).flatten(1, 2).unflatten(2, (3, HEADS, -1))
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, d)
        weights = (q @ k.mT * layer.scale).softmax(3).mean(1)  # (B, N, N)
        blocks = RegionTopK(GRID, REGIONS, K).blocks
        member = nn.functional.one_hot(blocks).float()  # (N, R)
        mass = member.T @ weights @ member / member.sum(0)[:, None]  # (B, R, R), rows sum to 1
        for name, chosen in picks(q, k, mass, seed).items():
            found[name].append(float(mass.gather(2, chosen).sum(2).mean()))

    hooks = [m.register_forward_pre_hook(measure) for m in model.mixers]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    return {name: sum(values) / len(values) for name, values in found.items()}


def trained(lab: Lab, seed: int) -> dict[str, float]:
    """Recognised test digits of a model with full attention, and the shares of each arm on them."""
    torch.manual_seed(seed)
    # one region that attends to itself: full attention
    whole = partial(BiLevelRoutingAttention, DIM, HEADS, regions=1, k=1)
    model = MapClassifier(lambda _: whole(), side=SIDE, patch=PATCH, dim=DIM, classes=10)
    assert model.positions is not None
    nn.init.normal_(model.positions, std=POSITIONS, generator=generator(seed, 1))
    draw = batches(seed, lab.pick(BATCH, 4), SIDE)
    train(lab, model, draw, steps=lab.pick(STEPS, 4), lr=RATE, what=f"full attention, seed {seed}")
    _, (x, y) = split(SIDE)
    x, y = x[: lab.pick(len(x), 16)], y[: lab.pick(len(x), 16)]
    return {"recognised": accuracy(model, x, y), **shares(model, x, seed)}


def run(lab: Lab) -> Finding:
    """Do regions chosen by their means hold more of full attention than as many near or random ones?"""
    found = [lab.once(f"full-{seed}", partial(trained, lab, seed)) for seed in lab.seeds]
    gate = interval("recognised with full attention", [f["recognised"] for f in found])
    mean = [interval(f"share of the weights: {name}", [f[name] for f in found]) for name in ARMS]
    gains = [
        difference(f"routed - {name}", [f["routed"] for f in found], [f[name] for f in found])
        for name in ("nearest", "random")
    ]
    verdict = all_of(*(judge(gain, 0) for gain in gains)) if gate.value >= 0.6 else OPEN
    return Finding(
        question="Do regions chosen by their means hold more of full attention than as many near or random ones?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Share of full attention inside {K} of {REGIONS**2} regions: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in zip(ARMS, mean, strict=True))
        + f"; the models recognised {gate.value:.3f} of the digits.",
        figures=(gate, *mean, *gains),
        plot=bars(
            f"Attention of trained models inside {K} of {REGIONS**2} regions",
            "share of the weights",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in zip(ARMS, mean, strict=True)],
            ["nearest", "random", "best possible"],
        ),
        cost=K / REGIONS**2,
    )


def picture() -> dict[str, Any]:
    """Which tokens of an 8 x 8 map see which, for growing k."""
    g = generator(3)
    kinds = torch.tensor([[0, 0, 1, 1], [0, 2, 2, 1], [3, 2, 2, 3], [3, 3, 0, 0]])  # of each region
    means = 3 * torch.eye(4)[kinds].repeat_interleave(2, 0).repeat_interleave(2, 1).flatten(0, 1)
    q = (means + 0.3 * torch.randn(64, 4, generator=g))[None, None]  # (1, 1, 64, 4)
    frames = [
        ({"k": k}, RegionTopK((8, 8), 4, k).layout(q, q), f"RegionTopK((8, 8), regions=4, k={k})")
        for k in (1, 2, 4, 8, 16)
    ]
    return pictures.pairs(
        "An 8 x 8 map of four kinds of texture, cut into 16 regions: a region attends first to those of its own kind.",
        frames,
        grid=(8, 8),
    )
