"""Combiner: a byte model and a pass key, against full attention and the sparse pattern that suggests the regions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

import foveate as fv
from foveate.catalogue import pictures
from foveate.catalogue.lab import HOLDS, OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.carrying import Carrying
from foveate.catalogue.lab.controls import causal_share, equal_window
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import TinyLM, train
from foveate.compress import combiner_attention
from foveate.organisms.reader.data import stdlib_text
from foveate.patterns import Causal, Documents, MaskMod, Pattern

OURS, SPARSE = "Combiner", "sparse"
CONTEXT, BATCH, STEPS, LR = 512, 1, 300, 5e-3
KEYS = Carrying(256, layers=1, heads=4, edges=(1, 17, 49, 97, 161, 255), steps=120, lr=5e-3)
REACH = 48  # three segments of 16 tokens: no window of as many pairs reaches as far
COUNTS_IF = (
    "three seeds, paired, 95 % intervals. Gate: two layers of full attention read bytes, 512 at a time, at least 0.02 "
    "bits per byte better than two of the sparse pattern (own segment, and the last token of each earlier one), and "
    "one layer of full attention finds at least 0.9 of the pass keys more than 48 tokens away; else open. Then all "
    "of: bits per byte with Combiner are fewer than with the sparse pattern, and nearer to full attention's than to "
    "the sparse pattern's; and one layer of Combiner finds at least 0.5 more of those pass keys than one of the "
    "sparse pattern. Both compute equally many pairs"
)


def sparse(n: int) -> Pattern:
    """The pairs of tokens that stand where Combiner has pairs: a region is read through its last token."""
    size = math.isqrt(n - 1) + 1
    last = MaskMod(lambda b, h, q, k: k % size == size - 1)
    return Causal() & (Documents(torch.arange(n) // size) | last)


def arms(n: int) -> dict[str, Pattern | Callable[[Tensor, Tensor, Tensor], Tensor]]:
    pattern = sparse(n)
    return {
        "full": Causal(),
        OURS: combiner_attention,
        SPARSE: pattern,
        "sliding window": equal_window(causal_share(pattern, n), n),
    }


@cache
def text(held_out: bool) -> Tensor:
    return torch.frombuffer(bytearray(stdlib_text(held_out=held_out)), dtype=torch.uint8).long()


def windows(count: int, held_out: bool, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bytes (count, CONTEXT) and the byte after each."""
    data = text(held_out)
    start = torch.randint(len(data) - CONTEXT - 1, (count, 1), generator=g)
    rows = data[start + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


def read(lab: Lab, name: str, seed: int) -> float:
    """Bits per byte on held-out text, after training."""
    by_length: dict[int, Any] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        arm = by_length.setdefault(q.shape[2], arms(q.shape[2])[name])
        return cast(Tensor, fv.attention(q, k, v, arm)) if isinstance(arm, Pattern) else arm(q, k, v)

    torch.manual_seed(seed)
    model = TinyLM(256, 64, 4, 2, attend)
    batch = lambda step: windows(BATCH, False, generator(seed, step))  # noqa: E731
    train(lab, model, batch, steps=lab.pick(STEPS, 3), lr=LR, what=f"{name}, seed {seed}")
    losses = []
    with torch.no_grad():
        for part in range(lab.pick(16, 1)):
            ids, targets = windows(8, True, generator(part, 1))
            losses.append(
                float(torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten()))
            )
    return statistics.mean(losses) / math.log(2)


def find(lab: Lab, name: str, seed: int) -> float:
    """Share of far pass keys found by one layer."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        arm = arms(q.shape[2])[name]
        return cast(Tensor, fv.attention(q, k, v, arm)) if isinstance(arm, Pattern) else arm(q, k, v)

    return KEYS.far(KEYS.found(lab, f"key-{name}", attend, seed), REACH)


def run(lab: Lab) -> Finding:
    """Does Combiner read and find nearly as full attention does, with the pairs of a sparse pattern?"""
    names = tuple(arms(64))
    bits = {
        name: [
            lab.once(f"bits-{name}-{seed}".replace(" ", "_"), partial(read, lab, name, seed))
            for seed in lab.seeds
        ]
        for name in names
    }
    far = {name: [find(lab, name, seed) for seed in lab.seeds] for name in names}
    mean = {name: interval(f"bits per byte: {name}", bits[name]) for name in names}
    found = {name: interval(f"far pass keys found: {name}", far[name]) for name in names}
    room = difference("bits per byte: sparse - full", bits[SPARSE], bits["full"])
    gain = difference(f"bits per byte: sparse - {OURS}", bits[SPARSE], bits[OURS])
    lost = difference(f"bits per byte: {OURS} - full", bits[OURS], bits["full"])
    nearer = difference(
        "how much nearer to full than to sparse",
        [a - b for a, b in zip(bits[SPARSE], bits[OURS], strict=True)],
        [a - b for a, b in zip(bits[OURS], bits["full"], strict=True)],
    )
    more = difference(f"far pass keys: {OURS} - sparse", far[OURS], far[SPARSE])
    share = {
        n: Figure(f"share of the causal pairs, {n} tokens", causal_share(sparse(n), n))
        for n in (256, CONTEXT)
    }
    open_ = judge(room, 0.02) != HOLDS or found["full"].value < 0.9
    verdict = OPEN if open_ else all_of(judge(gain, 0.0), judge(nearer, 0.0), judge(more, 0.5))
    return Finding(
        question="Does Combiner read and find nearly as full attention does, with the pairs of a sparse pattern?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Bits per byte: "
        + ", ".join(f"{mean[name].value:.3f} ({name})" for name in names)
        + "; far pass keys found by one layer: "
        + ", ".join(f"{found[name].value:.2f} ({name})" for name in names)
        + f"; {share[CONTEXT].value:.2f} of the pairs."
        + (" The gate is not passed." if open_ else ""),
        figures=(*mean.values(), room, gain, lost, nearer, *found.values(), more, *share.values()),
        plot=bars("Far pass keys found by one layer", "share", list(found.values()), [found["full"].name]),
        quality=mean["full"].value / mean[OURS].value,
        cost=share[CONTEXT].value,
    )


def picture() -> dict[str, Any]:
    """The weights of four patterns where all scores are equal, side by side."""
    x, names = torch.zeros(1, 1, 64, 4), torch.eye(64)[None, None]
    settings: tuple[dict[str, Any], ...] = (
        {"pattern": "fixed"},
        {"pattern": "logsparse"},
        {"pattern": "axial_row", "grid": (4, 16)},
        {"pattern": "axial_col", "grid": (4, 16)},
    )
    maps = [combiner_attention(x, x, names, **how)[0, 0].sqrt() for how in settings]
    return pictures.weights(
        "Weights of 64 tokens where all scores are equal (square roots): nothing of the past is out of reach, and a "
        "region shares the weight of one key. Above: fixed segments, dyadic blocks; below: rows, columns of a grid.",
        torch.cat([torch.cat(maps[:2], 1), torch.cat(maps[2:], 1)]),
        code='combiner_attention(q, k, v, pattern="logsparse")',
    )
