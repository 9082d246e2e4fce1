"""DuoAttention: gates learned on the reader, and the needles found when only the heads they name keep the context."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

import foveate as fv
from foveate.cache import DuoAttention, duo_pattern
from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.decoding import found, held_out, needles, reader
from foveate.catalogue.lab.tasks import generator
from foveate.organisms.reader import data

TOKENS, DEPTHS = 1024, (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
SINK, RECENT, STEPS = 4, 64, 60
SPARSITY = 0.75
COUNTS_IF = (
    "reader, 16 KV heads, gates learned in 60 steps on needles in 512 bytes (sink 4, recent 64), then a quarter of the "
    "heads full; 1,024 bytes, one needle more than 64 bytes away, cut before the question is read; gate: dense finds "
    "at least 0.9, else open. Then all of: the learned heads find at least 0.8 of what dense finds, and more than as "
    "many heads drawn at random and than the heads with the lowest gates, each by more than 0.1 (95 % intervals of the "
    "paired differences over three seeds)"
)


def examples(seed: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Needles with three distractors; the states that predict the answer are supervised."""
    rng = np.random.default_rng([seed, 99])
    made = []
    for _ in range(count):
        ids, answer = data.needle(512, float(rng.uniform(0.05, 0.9)), rng, held_out(), distractors=3)
        supervised = torch.zeros(1, len(ids), dtype=torch.bool)
        supervised[:, answer.start - 1 : answer.stop - 1] = True
        made.append((torch.from_numpy(ids)[None], supervised))
    return made


def learned(seed: int, steps: int) -> list[list[float]]:
    """The gates (layers x KV heads) after training."""
    gates = fv.hf.train_head_gates(reader(), examples(seed, steps), sink=SINK, recent=RECENT, steps=steps)
    return gates.alpha.detach().tolist()


def tables(alpha: list[list[float]], seed: int) -> dict[str, Any]:
    """Which heads are full, in each arm; equal numbers of them."""
    gates = fv.hf.HeadGates(len(alpha), len(alpha[0]))
    gates.alpha.data = torch.tensor(alpha)
    chosen = gates.binarize(sparsity=SPARSITY)
    gates.alpha.data = 1 - gates.alpha.data
    lowest = gates.binarize(sparsity=SPARSITY)
    gates.alpha.data = torch.rand(chosen.shape, generator=generator(seed + 50))
    return {"learned": chosen, "random": gates.binarize(sparsity=SPARSITY), "reversed": lowest}


def share_found(table: torch.Tensor | None, seed: int, depths: tuple[float, ...]) -> float:
    def make(model: Any) -> Any:
        if table is None:
            return fv.hf.Cache(model, "streaming", 1.0)
        return fv.hf.Cache(model, DuoAttention(tuple(map(tuple, table.tolist())), SINK, RECENT))

    asked = needles(seed, TOKENS, depths) + needles(seed + 1000, TOKENS, depths)
    return sum(found(reader(), question, make, asked_first=False) for question in asked) / len(asked)


def run(lab: Lab) -> Finding:
    """Do gates learned on needles name the heads that need the whole context?"""
    depths, steps = lab.pick(DEPTHS, (0.5,)), lab.pick(STEPS, 3)
    share: dict[str, list[float]] = {"dense": [], "learned": [], "random": [], "reversed": []}
    named = []
    for seed in lab.seeds:
        alpha = lab.once(f"gates-{seed}", partial(learned, seed, steps))
        arms = {"dense": None, **tables(alpha, seed)}
        named.append(arms["learned"])
        for name in lab.track(list(arms), f"seed {seed}"):
            share[name].append(
                lab.once(f"found-{name}-{seed}", partial(share_found, arms[name], seed, depths))
            )
    mean = {name: interval(f"needles found: {name}", values) for name, values in share.items()}
    gains = [
        difference(f"found: learned - {name}", share["learned"], share[name])
        for name in ("random", "reversed")
    ]
    kept = [a / max(d, 1e-9) for a, d in zip(share["learned"], share["dense"], strict=True)]
    ratio = interval("found with the learned heads over dense", kept)
    verdict = OPEN
    if mean["dense"].value >= 0.9:
        verdict = all_of(judge(ratio, 0.8), *(judge(gain, 0.1) for gain in gains))
    every = torch.stack(named).all(0).nonzero().tolist()
    tokens = (1 - SPARSITY) * TOKENS + SPARSITY * (SINK + RECENT)
    return Finding(
        question="Do gates learned on needles name the heads that need the whole context?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Needles found with {tokens / TOKENS:.0%} of the cache: "
        + ", ".join(f"{name} {figure.value:.2f}" for name, figure in mean.items())
        + "; KV heads (layer, head) named by every seed: "
        + (", ".join(f"({a}, {b})" for a, b in every) or "none")
        + ".",
        figures=(*mean.values(), *gains, ratio),
        plot=bars(
            "Needles found with a quarter of the heads full",
            "share found",
            list(mean.values()),
            [mean[name].name for name in ("dense", "random", "reversed")],
        ),
        quality=mean["learned"].value / max(mean["dense"].value, 1e-9),
        cost=tokens / TOKENS,
    )


def picture() -> dict[str, Any]:
    """Two kinds of heads."""
    frames = []
    for sink in (1, 4):
        for recent in (6, 12):
            for head, kind in enumerate(("retrieval", "streaming")):
                pattern = duo_pattern([True, False], 2, sink=sink, recent=recent)
                dense = pattern.layout(48, 48).to_dense()[0, head]
                code = f"duo_pattern([True, False], 2, sink={sink}, recent={recent})  # {kind} head"
                frames.append(({"sink": sink, "recent": recent, "head": head}, dense, code))
    return pictures.pairs(
        "One kind of head reads everything, the other the first tokens and the latest ones.", frames
    )
