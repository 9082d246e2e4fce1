"""Dynamic mask attention: facts asked for long after, with few keys kept, and the pairs that this computes."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import foveate as fv
from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    HOLDS,
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
from foveate.layers import KeptKeys, dma_attention, dma_bias, topw_prefix_selector
from foveate.patterns import Causal, SlidingWindow

TOKENS, KEEP, HEADS, DIM, LAYERS, STEPS = 256, 32, 4, 64, 2, 200
TASK = Facts(TOKENS, (1, 17, 33, 65, 97, 129, 193, 256))
FAR = LAYERS * KEEP  # what two windows reach
COUNTS_IF = (
    "three seeds, paired, 95 % intervals. Gate: full attention answers at least 0.95 of the questions about facts more "
    "than 64 tokens back, else open. Then all of: dynamic masks with w = 32 answer more than full attention's share "
    "less 0.1, and more than a sliding window of 32 and than 32 keys kept at random, each by more than 0.2; the last "
    "query keeps more than 0.8 of the facts, mean over the heads of the layer that keeps more; at 32,768 tokens and "
    "w = 2,048 fewer than 0.15 of the causal pairs are computed, for random and for equal biases"
)


class Mix(nn.Module):
    """How one layer attends; "dynamic masks" have parameters of their own."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        self.name, self.noise = name, generator(seed, 7)
        if name == "dynamic masks":
            self.A = nn.Parameter(torch.zeros(HEADS))
            self.dt_proj = nn.Linear(DIM, HEADS, bias=False)
        self.kept: KeptKeys | None = None  # by the last call

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.name == "full":
            return cast(Tensor, fv.attention(q, k, v, is_causal=True))
        if self.name == "sliding window":
            return cast(Tensor, fv.attention(q, k, v, Causal() & SlidingWindow(KEEP)))
        if self.name == "random keys":  # drawn anew at every call, not added to the logits
            self.kept = topw_prefix_selector(torch.rand(k.shape[:3], generator=self.noise), KEEP)
            return self.kept.attend(q, k, v, torch.zeros(k.shape[:3]))
        bias = dma_bias(v, self.dt_proj, self.A)
        self.kept = topw_prefix_selector(bias, KEEP)
        return dma_attention(q, k, v, bias, KEEP)


ARMS = ("full", "dynamic masks", "sliding window", "random keys")


def trained(lab: Lab, name: str, seed: int) -> dict[str, Any]:
    """Share of questions answered by distance, and beyond FAR; facts among the keys that the last query keeps."""
    torch.manual_seed(seed)
    mixes = [Mix(name, seed) for _ in range(LAYERS)]
    model = TinyLM(TASK.vocab, DIM, HEADS, LAYERS, mixes)
    TASK.learn(lab, model, lab.pick(STEPS, 6), seed, f"{name}, seed {seed}")
    near, far, place = TASK.answered(model, lab.pick(128, 16), FAR)
    last = [mix.kept.at(TOKENS - 1).float() for mix in mixes if mix.kept is not None]  # (rows, heads, keys)
    held = [float(at.gather(2, place[:, None].expand(-1, HEADS, -1)).mean()) for at in last]
    return {"near": near, "far": far, "held": max(held, default=1.0)}


def counted(lab: Lab) -> list[Figure]:
    """Pairs that the gathered form computes over the causal ones, and how they grow with the length."""
    sizes, w = lab.pick(((8192, 16384, 32768), 2048), ((512, 1024, 2048), 64))
    n, found = sizes[-1], []
    biases = {"random": torch.rand(1, 1, n, generator=generator(3)), "equal": torch.zeros(1, 1, n)}
    for name, bias in biases.items():
        pairs = [topw_prefix_selector(bias[..., :size], w).gathered for size in sizes]
        found.append(Figure(f"share of causal pairs at {n:,}, {name} biases", pairs[-1] / (n * (n + 1) / 2)))
        found.append(slope(f"growth of pairs, {name} biases", sizes, pairs))
    return found


def run(lab: Lab) -> Finding:
    """Does a model that keeps the w keys it finds important answer like full attention where a window does not?"""
    runs = {
        name: [lab.once(f"{name.replace(' ', '-')}-{seed}", partial(trained, lab, name, seed)) for seed in lab.seeds]
        for name in ARMS
    }  # fmt: skip
    ours = "dynamic masks"
    far = {name: [r["far"] for r in found] for name, found in runs.items()}
    mean = {name: interval(f"answered beyond {FAR}: {name}", values) for name, values in far.items()}
    gains = {name: difference(f"{ours} - {name}", far[ours], far[name]) for name in ARMS if name != ours}
    held = {name: interval(f"facts kept by the last query: {name}", [r["held"] for r in runs[name]])
            for name in (ours, "random keys")}  # fmt: skip
    costs = counted(lab)
    verdict = OPEN
    if mean["full"].value >= 0.95:
        verdict = all_of(
            judge(gains["full"], -0.1),
            judge(gains["sliding window"], 0.2),
            judge(gains["random keys"], 0.2),
            judge(held[ours], 0.8),
            *(HOLDS if costs[i].value < 0.15 else OPEN for i in (0, 2)),
        )
    return Finding(
        question="Does a model that keeps the w keys it finds important answer like full attention where a window "
        "does not?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Questions about facts more than {FAR} tokens back answered with {KEEP} keys: "
        + ", ".join(f"{name} {figure.value:.3g}" for name, figure in mean.items())
        + f"; the last query keeps {held[ours].value:.0%} of the facts (random keys {held['random keys'].value:.0%}).",
        figures=(*mean.values(), *gains.values(), *held.values(), *costs),
        plot=lines(
            f"Facts asked for, two layers of {HEADS} heads, {KEEP} keys kept",
            "distance (tokens)",
            "share answered",
            [
                banded(name, TASK.middles, [r["near"] for r in found], most=1.0, reference=name == "full")
                for name, found in runs.items()
            ],
        ),
        quality=mean[ours].value / mean["full"].value,
        cost=statistics.mean(min(KEEP, i + 1) for i in range(TOKENS)) / ((TOKENS + 1) / 2),
    )  # fmt: skip


def picture() -> dict[str, Any]:
    """Keys kept, and how much the biases differ."""
    g = generator(2)
    noise = torch.rand(1, 1, 64, generator=g)
    bias = noise + 2.0 * (torch.rand(1, 1, 64, generator=g) < 0.15)  # a few tokens matter
    frames = []
    for what, b in (("learnt", bias), ("none (untrained)", torch.zeros(1, 1, 64))):
        for w in (12, 6, 24):
            code = f"topw_prefix_selector(bias, w={w}).layout(heads=1)"
            frames.append(({"importance": what, "w": w}, topw_prefix_selector(b, w).layout(1), code))
    return pictures.pairs(
        "Every key has an importance, from its value. A query sees the w most important keys so far: columns that "
        "last, and unimportant keys that soon drop out and never return. Untrained, all are equal: a sliding window.",
        frames,
        tokens=64,
    )
