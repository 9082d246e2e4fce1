"""Task-KV: needles that the reader finds when the heads that stand apart keep the prompt, at one size of the cache."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import foveate as fv
from foveate.cache import TaskKV
from foveate.catalogue import pictures
from foveate.catalogue.lab import HOLDS, OPEN, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.decoding import ANSWER, found, needles, passage, read_on, reader
from foveate.catalogue.lab.tasks import generator

TOKENS, DEPTHS = 1024, (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
CUT = {"obs_window": 16, "n_sink": 4, "n_recent": 32, "n_mid": 28, "mode": "fraction", "head_fraction": 0.25}
REFERENCES = ("dense", "random heads", "nearest heads")
TOTAL = round(
    0.25 * TOKENS + 0.75 * 64
)  # tokens per head on average: one of four heads whole, 64 tokens in the others
COUNTS_IF = (
    "reader, 1,024 bytes, one needle, cut after the question was read, one KV head of four whole in each layer and 64 "
    "tokens in the others (30 % of the cache); gate: dense finds at least 0.9, else open. Then all of: the farthest "
    "heads whole find at least as many needles as the nearest heads whole plus 0.1, and more than heads drawn at "
    "random (95 % intervals of the paired differences over three seeds above 0.1 and 0); they find more than sinks + "
    "recent of the same size (above 0.1); the heads chosen for needles and for plain text differ (Jaccard below 1)"
)


@dataclass(frozen=True)
class _Nearest(TaskKV):
    """Control: the heads nearest to the mean keep everything."""

    name: ClassVar[str] = ""

    def split(self, distances: Tensor) -> Tensor:
        return super().split(-distances)


@dataclass(frozen=True)
class _AtRandom(TaskKV):
    """Control: heads drawn by a seed."""

    name: ClassVar[str] = ""
    seed: int = 0

    def split(self, distances: Tensor) -> Tensor:
        drawn = torch.rand(distances.shape, generator=generator(self.seed + int(distances.sum() * 1000)))
        return super().split(drawn)


def arms(seed: int) -> dict[str, Any]:
    return {
        "dense": lambda model: fv.hf.Cache(model, "streaming", 1.0),
        "farthest heads": lambda model: fv.hf.Cache(model, TaskKV(**CUT)),
        "random heads": lambda model: fv.hf.Cache(model, _AtRandom(**CUT, seed=seed)),
        "nearest heads": lambda model: fv.hf.Cache(model, _Nearest(**CUT)),
        "sinks + recent": lambda model: fv.hf.Cache(model, "streaming", TOTAL),
        "SnapKV": lambda model: fv.hf.Cache(model, "snapkv", TOTAL),
    }


def share_found(name: str, seed: int, depths: tuple[float, ...]) -> float:
    asked = needles(seed, TOKENS, depths) + needles(seed + 1000, TOKENS, depths)
    return sum(found(reader(), question, arms(seed)[name]) for question in asked) / len(asked)


def whole_heads(ids: Tensor) -> set[tuple[int, int]]:
    """(layer, KV head) of the heads that keep the whole prompt."""
    _, cache = read_on(reader(), ids, len(ids) - 1, arms(0)["farthest heads"])
    return {
        (layer.layer, head)
        for layer in cache.held().layers
        for head, n in enumerate(layer.tokens[0])
        if n > 64
    }


def overlap(seed: int) -> float:
    """Jaccard index of the heads chosen for a needle's question and for plain text."""
    one, other = whole_heads(needles(seed, TOKENS, (0.5,))[0][:-ANSWER]), whole_heads(passage(seed, TOKENS))
    return len(one & other) / len(one | other)


def run(lab: Lab) -> Finding:
    """Are the heads that stand apart those that need the whole prompt?"""
    depths = lab.pick(DEPTHS, (0.5,))
    names = tuple(arms(0))
    share: dict[str, list[float]] = {name: [] for name in names}
    same = []
    for seed in lab.seeds:
        for name in lab.track(names, f"seed {seed}"):
            tag = name.replace(" ", "").replace("+", "and")
            share[name].append(lab.once(f"found-{tag}-{seed}", partial(share_found, name, seed, depths)))
        same.append(lab.once(f"overlap-{seed}", partial(overlap, seed)))
    mean = {name: interval(f"needles found: {name}", share[name]) for name in names}
    gains = {
        name: difference(f"found: farthest heads - {name}", share["farthest heads"], share[name])
        for name in names[2:]
    }
    jaccard = interval("Jaccard index of the heads chosen for needles and for text", same)
    verdict = OPEN
    if mean["dense"].value >= 0.9:
        verdict = all_of(
            judge(gains["nearest heads"], 0.1),
            judge(gains["random heads"], 0.0),
            judge(gains["sinks + recent"], 0.1),
            HOLDS if jaccard.value < 1 else OPEN,
        )
    return Finding(
        question="Are the heads that stand apart those that need the whole prompt?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Needles found with 30 % of the cache: "
        + ", ".join(f"{name} {figure.value:.2f}" for name, figure in mean.items())
        + f"; heads chosen for needles and for text have a Jaccard index of {jaccard.value:.2f}.",
        figures=(*mean.values(), *gains.values(), jaccard),
        plot=bars(
            "Needles found at one size of the cache",
            "share found",
            list(mean.values()),
            [mean[n].name for n in REFERENCES],
        ),
        quality=mean["farthest heads"].value / max(mean["dense"].value, 1e-9),
        cost=TOTAL / TOKENS,
    )


def picture() -> dict[str, Any]:
    """What the last tokens of a prompt may read, head by head."""
    from foveate.cache import Budget, Geometry, LayerCache

    n, heads = 48, 4
    q, k, v = (torch.randn(1, heads, n, 8, generator=generator(seed)) for seed in (1, 2, 3))
    w_o = torch.randn(heads, 8, 16, generator=generator(4))
    v[:, 1] *= 3  # this head's output lies far from the others'
    weights = torch.softmax(
        (q @ k.transpose(2, 3) * 0.6).masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf), -1
    )
    frames = []
    for middle in (2, 6):
        policy = TaskKV(8, 2, 6, middle, "fraction", head_fraction=0.25)
        layer = LayerCache(policy, Budget(1.0), 1, 0)
        layer.prefill(q, k, v, weights @ v, torch.ones(1, n, dtype=torch.bool), Geometry(0.6, out_weight=w_o))
        store = layer.store
        assert store is not None
        for head in range(heads):
            kept = torch.zeros(n, n, dtype=torch.bool)
            kept[:, store.tokens(head)] = True
            dense = torch.ones(n, n, dtype=torch.bool).tril()
            dense[n - 12 :] &= kept[n - 12 :]  # the last rows stand for what is decoded after the cut
            code = f"TaskKV(obs_window=8, n_sink=2, n_recent=6, n_mid={middle})"
            frames.append(({"head": head, "n_mid": middle}, dense, code))
    return pictures.pairs(
        "Prompt rows see everything; afterwards (the last rows) only the head that stands apart still does.",
        frames,
    )
