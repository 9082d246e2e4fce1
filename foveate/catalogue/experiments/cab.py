"""CAB in small: the uses that five operators support, their scores in each, and from which length they cost less."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

import foveate as fv
from foveate.bench.cab import AttentionPattern, Operator, efficiency_length, supported_patterns
from foveate.bench.cab_mini import CabMini
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
from foveate.catalogue.lab.counting import multiply_adds
from foveate.linear import LightningAttention, LinearAttention, elu_plus_one
from foveate.patterns import SlidingWindow

NS, CS, NC, CC = AttentionPattern
WINDOW, AGENTS, STEPS = 8, 4, 300
GATES = {NS: 0.8, CS: 4.0, NC: 0.1, CC: 0.95}  # of softmax
COUNTS_IF = (
    "three seeds, paired, 95 % intervals; four tasks, one for each use, the same model, data and steps for every "
    f"operator. Gate: softmax reads {GATES[NS]} of the digits, needs fewer than {GATES[CS]} bits per byte, leaves less "
    f"than {GATES[NC]} squared error on the curves and reverses {GATES[CC]} of the symbols, else open. Then all of: "
    "the validator finds just the uses that each operator declares, and of two that declare too much (softmax without "
    "a mask and pooled queries, for all four) it refuses the first in CS alone, the second in CS and CC; no efficient "
    "operator reaches softmax in the cross uses (each is worse there); two efficient operators have another order in "
    "one use than in another, both differences beyond their intervals; the length from which each of the four "
    "efficient operators needs fewer multiply-adds than plain attention, fitted to 256 to 8,192 tokens, is below 8,192"
)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return cast(Tensor, fv.attention(q, k, v))


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return cast(Tensor, fv.attention(q, k, v, is_causal=True))


def local(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    window = SlidingWindow(WINDOW) if causal else SlidingWindow.symmetric(WINDOW)
    return cast(Tensor, fv.attention(q, k, v, window))


def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """phi(q) (sum_j phi(k_j) v_j^T) / phi(q) . sum_j phi(k_j), over all keys."""
    q, k = elu_plus_one(q), elu_plus_one(k)
    return q @ (k.transpose(2, 3) @ v) / (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)


def lightning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With the norm that stands for the denominator."""
    out = cast(Tensor, LightningAttention()(q, k, v))
    return out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-6)


def pooled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Means of runs of queries read the keys, and the queries read them."""
    agents = F.adaptive_avg_pool1d(q.flatten(0, 1).transpose(1, 2), AGENTS)  # (B H, D, AGENTS)
    agents = agents.transpose(1, 2).unflatten(0, q.shape[:2])
    scale = q.shape[3] ** -0.5
    read = (scale * agents @ k.transpose(2, 3)).softmax(-1) @ v
    return (scale * q @ agents.transpose(2, 3)).softmax(-1) @ read


ARMS: dict[str, dict[AttentionPattern, Operator]] = {
    "softmax": {NS: softmax, CS: masked, NC: softmax, CC: softmax},
    "local": {NS: partial(local, causal=False), CS: partial(local, causal=True)},
    "kernel": {NS: kernel, CS: cast(Operator, LinearAttention()), NC: kernel, CC: kernel},
    "lightning": {CS: lightning},
    "pooled": {NS: pooled, NC: pooled},
}


def validated(lab: Lab) -> bool:
    """Whether the validator agrees with every declaration, and sees through the two that declare too much."""
    size = {"dim": 32, "heads": 2, "n": lab.pick(50, 16), "m": lab.pick(100, 24)}
    found = {name: supported_patterns(uses.get, **size) for name, uses in ARMS.items()}
    right = all(found[name] == {p: p in uses for p in AttentionPattern} for name, uses in ARMS.items())
    for op, refused in ((softmax, {CS}), (pooled, {CS, CC})):
        right &= supported_patterns(lambda p, op=op: op, **size) == {
            p: p not in refused for p in AttentionPattern
        }
    return right


def break_even(lab: Lab) -> list[Figure]:
    """Lengths from which the efficient operators need fewer multiply-adds than plain attention, one head of 64."""
    sizes = lab.pick((256, 512, 1024, 2048, 4096, 8192), (256, 512, 1024))
    costs: dict[str, list[float]] = {name: [] for name in ("plain", *list(ARMS)[1:])}
    for n in sizes:
        q = k = v = torch.zeros(1, 1, n, 64)
        costs["plain"].append(multiply_adds(lambda q=q, k=k, v=v: (q @ k.transpose(2, 3)).softmax(-1) @ v))
        costs["local"].append(SlidingWindow.symmetric(WINDOW).layout(n).area * 2 * 64)
        for name, op in (("kernel", kernel), ("lightning", lightning), ("pooled", pooled)):
            costs[name].append(multiply_adds(lambda q=q, k=k, v=v, op=op: op(q, k, v)))
    return [
        Figure(
            f"break-even in multiply-adds: {name}",
            efficiency_length(sizes, costs["plain"], found),
            unit="tokens",
        )
        for name, found in costs.items()
        if name != "plain"
    ]


def better(pattern: AttentionPattern, name: str, a: Sequence[float], b: Sequence[float]) -> Figure:
    """How much better a is than b, whichever way the metric points."""
    lower = CabMini().tasks()[pattern].lower
    return difference(name, b, a) if lower else difference(name, a, b)


def run(lab: Lab) -> Finding:
    """Does the use decide which efficient attention is better, and does a validator know which uses it has?"""
    mini = lab.pick(CabMini(steps=STEPS), CabMini(steps=3, batch=4))
    scores: dict[AttentionPattern, dict[str, list[float]]] = {p: {} for p in AttentionPattern}
    for name, uses in ARMS.items():
        for p, op in uses.items():
            scores[p][name] = [
                lab.once(f"{name}-{p.name}-{s}", lambda op=op, p=p, s=s: mini.trained(op, p, s))
                for s in lab.seeds
            ]
    means = {(p, name): interval(f"{p.name} {mini.tasks()[p].metric}: {name}", values)
             for p, found in scores.items() for name, values in found.items()}  # fmt: skip
    behind = [
        better(p, f"{p.name}: softmax ahead of {name}", scores[p]["softmax"], scores[p][name])
        for p in (NC, CC)
        for name in scores[p]
        if name != "softmax"
    ]
    orders = [
        (first, second)
        for a, b in itertools.combinations([name for name in ARMS if name != "softmax"], 2)
        for first, second in itertools.combinations(
            [better(p, f"{p.name}: {a} ahead of {b}", scores[p][a], scores[p][b])
             for p in AttentionPattern if a in scores[p] and b in scores[p]], 2)
    ]  # fmt: skip
    turned = any({judge(x, 0), judge(y, 0)} == {HOLDS, FAILS} for x, y in orders)
    lengths, valid = break_even(lab), validated(lab)
    gate = all(
        means[p, "softmax"].value < limit if mini.tasks()[p].lower else means[p, "softmax"].value >= limit
        for p, limit in GATES.items()
    )
    verdict = OPEN
    if gate:
        verdict = all_of(
            HOLDS if valid else FAILS,
            *(judge(f, 0) for f in behind),
            HOLDS if turned else OPEN,
            *(HOLDS if f.value < 8192 else OPEN for f in lengths),
        )
    index = normalised(scores)
    return Finding(
        question="Does the use decide which efficient attention is better, and does a validator know which uses it "
        "has?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"The validator {'agrees' if valid else 'disagrees'} with the declared uses; "
        + "; ".join(
            f"{p.name}: " + ", ".join(f"{name} {means[p, name].value:.3g}" for name in row) for p, row in scores.items()
        )
        + "; break-even from " + ", ".join(f"{f.value:.0f} ({f.name.split(': ')[1]})" for f in lengths) + " tokens.",
        figures=(*means.values(), *behind, *(f for pair in orders for f in pair), *lengths, *index),
        plot=bars("Normalised score by use (mean 0, spread 1 over the operators of a use)", "score", index,
                  [f.name for f in index if "softmax" in f.name]),
    )  # fmt: skip


def normalised(scores: dict[AttentionPattern, dict[str, list[float]]]) -> list[Figure]:
    """Scores of each use with mean 0 and spread 1 over its operators; higher is better."""
    found = []
    for p, row in scores.items():
        values = {name: math.fsum(v) / len(v) for name, v in row.items()}
        mean = math.fsum(values.values()) / len(values)
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values.values()) / len(values)) or 1.0
        sign = -1 if CabMini().tasks()[p].lower else 1
        found += [Figure(f"{p.name} {name}", sign * (v - mean) / spread) for name, v in values.items()]
    return found


def picture() -> dict[str, Any]:
    """Which keys each use may read, with 32 queries."""
    at = torch.arange(32)
    every, past = torch.ones(32, 32, dtype=torch.bool), at[:, None] >= at
    frames = [
        ({"use": p.name}, past if p is CS else every, f"AttentionPattern.{p.name}  # {p.value}")
        for p in AttentionPattern
    ]  # fmt: skip
    return pictures.pairs(
        "Four uses. In the two cross uses the keys are a memory that every query sees whole; causal cross looks like "
        "noncausal, and forbids later queries to change earlier rows.",
        frames,
    )
