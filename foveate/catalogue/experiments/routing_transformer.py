"""Routing Transformer: facts found through clusters of tokens, and how the scores that this takes grow."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import foveate as fv
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
    slope,
)
from foveate.catalogue.lab.facts import Facts
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import TinyLM
from foveate.layers import ClusterLayout, RoutingSelector, routing_attention
from foveate.patterns import Causal, SlidingWindow

TOKENS, WINDOW, CLUSTERS, HEADS, DIM, LAYERS, STEPS, DECAY = 256, 32, 8, 4, 64, 2, 200, 0.98
LOCAL = HEADS // 2  # heads of a routing layer that see a window
FAR = LAYERS * WINDOW  # what two windows reach
TASK = Facts(TOKENS, (1, 17, 33, 65, 97, 129, 193, 256))
OURS = "routing"
COUNTS_IF = (
    "three seeds, paired, 95 % intervals. Gate: full attention answers at least 0.95 of the questions about facts more "
    "than 64 tokens back, else open. Then all of: with two of four heads routed among 8 clusters of 32 the model "
    "answers more of them than with windows of 32 in all heads, and more than with random clusters of the same size, "
    "each by more than 0.2; and with C = w = sqrt(N) the counted scores (of centroids and of pairs) grow with an "
    "exponent below 1.6 from 256 to 4,096 tokens"
)


class AtRandom(RoutingSelector):
    """Clusters of as many tokens, drawn anew at every call."""

    def forward(self, q: Tensor, k: Tensor, *more: Any, **settings: Any) -> ClusterLayout:
        noise = torch.randn_like(q)
        return super().forward(noise, noise, *more, **settings)


class Mix(nn.Module):
    """How one layer attends: windows in all heads, or in half of them and clusters in the others."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.assignment = name, "balanced"
        make = {OURS: RoutingSelector, "random clusters": AtRandom}.get(name)
        self.selector = make(HEADS - LOCAL, DIM // HEADS, CLUSTERS, DECAY) if make else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.name == "full":
            return cast(Tensor, fv.attention(q, k, v, is_causal=True))
        near = HEADS if self.selector is None else LOCAL
        local = fv.attention(q[:, :near], k[:, :near], v[:, :near], Causal() & SlidingWindow(WINDOW))
        if self.selector is None:
            return cast(Tensor, local)
        routed = routing_attention(
            q[:, near:], None, v[:, near:], self.selector, window=min(WINDOW, q.shape[2]), assignment=self.assignment
        )  # fmt: skip
        return torch.cat([cast(Tensor, local), routed], 1)


ARMS = ("full", OURS, "windows", "random clusters")


def trained(lab: Lab, name: str, seed: int) -> dict[str, Any]:
    """Share of questions answered by distance, and beyond FAR; also with the exactly causal clusters."""
    torch.manual_seed(seed)
    mixes = [Mix(name) for _ in range(LAYERS)]
    model = TinyLM(TASK.vocab, DIM, HEADS, LAYERS, mixes, positions="none")
    TASK.learn(lab, model, lab.pick(STEPS, 6), seed, f"{name}, seed {seed}")
    near, far, _ = TASK.answered(model, lab.pick(128, 16), FAR)
    for mix in mixes:
        mix.assignment = "nearest"
    return {"near": near, "far": far, "nearest": TASK.answered(model, lab.pick(128, 16), FAR)[1]}


def scores(n: int) -> int:
    """Dot products of one routing head at n tokens with about sqrt(n) clusters: of centroids, and in the groups."""
    clusters = round(math.sqrt(n))
    x = torch.randn(1, 1, n, 8, generator=generator(n))
    return n * clusters + RoutingSelector(1, 8, clusters)(x, x).computed


def run(lab: Lab) -> Finding:
    """Do heads that route tokens into clusters find facts that windows and random clusters do not, at n^1.5 cost?"""
    runs = {
        name: [lab.once(f"{name.replace(' ', '-')}-{seed}", partial(trained, lab, name, seed)) for seed in lab.seeds]
        for name in ARMS
    }  # fmt: skip
    far = {name: [r["far"] for r in found] for name, found in runs.items()}
    mean = {name: interval(f"answered beyond {FAR}: {name}", values) for name, values in far.items()}
    causal = interval(f"answered beyond {FAR}: routing, nearest at test", [r["nearest"] for r in runs[OURS]])
    gains = {name: difference(f"{OURS} - {name}", far[OURS], far[name]) for name in ARMS if name != OURS}
    sizes = (256, 512, 1024, 2048, 4096)
    growth = slope("growth of scores, N from 256 to 4,096", sizes, [scores(n) for n in sizes])
    below = Figure("1.6 - growth", 1.6 - growth.value, 1.6 - (growth.high or 0), 1.6 - (growth.low or 0))
    verdict = OPEN
    if mean["full"].value >= 0.95:
        verdict = all_of(
            judge(gains["windows"], 0.2), judge(gains["random clusters"], 0.2), judge(below, 0.0)
        )
    pairs = (TOKENS + 1) / 2 * TOKENS
    routed = CLUSTERS * WINDOW * (WINDOW + 1) / 2 + TOKENS * CLUSTERS
    window = TOKENS * WINDOW - WINDOW * (WINDOW - 1) / 2
    cost = (LOCAL * window + (HEADS - LOCAL) * routed) / (HEADS * pairs)
    return Finding(
        question="Do heads that route tokens into clusters find facts that windows and random clusters do not, at a "
        "cost of N^1.5?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Questions about facts more than {FAR} tokens back answered: "
        + ", ".join(f"{name} {figure.value:.3g}" for name, figure in mean.items())
        + f"; routing with the exactly causal clusters at test {causal.value:.3g}; scores grow as "
        f"N^{growth.value:.3g}.",
        figures=(
            *mean.values(),
            causal,
            *gains.values(),
            growth,
            below,
            Figure("scores over causal pairs", cost),
        ),
        plot=lines(
            f"Facts asked for, two layers of {HEADS} heads",
            "distance (tokens)",
            "share answered",
            [
                banded(name, TASK.middles, [r["near"] for r in found], most=1.0, reference=name == "full")
                for name, found in runs.items()
            ],
        ),
        quality=mean[OURS].value / mean["full"].value,
        cost=cost,
    )


def picture() -> dict[str, Any]:
    """Clusters and their assignment, for tokens of four kinds in random order."""
    g = generator(4)
    kind = torch.randint(4, (64,), generator=g)
    x = 2 * torch.randn(4, 16, generator=g)[kind] + 0.5 * torch.randn(64, 16, generator=g)
    x = x[None, None]
    frames = []
    for assignment in ("balanced", "nearest"):
        for clusters in (4, 2, 8):
            torch.manual_seed(1)
            selector = RoutingSelector(1, 16, clusters, decay=0.5)
            for _ in range(20):
                selector.update(x)
            code = f'RoutingSelector(1, 16, n_clusters={clusters})(q, q, assignment="{assignment}")'
            dense = selector(x, x, None, assignment).to_dense(64)[0, 0]
            frames.append(({"assignment": assignment, "clusters": clusters}, dense, code))
    return pictures.pairs(
        "Tokens of four kinds in random order. A token sees the earlier tokens of its cluster; balanced clusters take "
        "the 64 / C tokens nearest to their centroid, so that some tokens are in several and some in none.",
        frames,
        tokens=64,
    )
