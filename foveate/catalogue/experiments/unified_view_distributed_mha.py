"""Unified view: cards that say what a mixer sees, measured; attention in two processes against all pairs in one."""

from __future__ import annotations

import resource
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

import foveate as fv
from foveate.bench.mixers import CARDS, MixerCard, mixer_card, receptive_field, small_instance
from foveate.catalogue import pictures
from foveate.catalogue.lab import FAILS, HOLDS, Figure, Finding, Lab, all_of, bars, interval, judge
from foveate.catalogue.lab.tasks import generator
from foveate.dist import distributed_attention, ring_bytes, run_workers
from foveate.dist.streamed import _Ring
from foveate.patterns import Causal, Neighborhood, PowerOfTwo, SlidingWindow

TOKENS, DIM, HEADS, WORKERS = 31, 16, 2, 2
PATTERNS = (
    Causal(),
    SlidingWindow(before=3, after=2),
    Causal() & SlidingWindow(7),
    PowerOfTwo(2),
    Neighborhood((TOKENS,), (5,), dilation=(2,), causal=False),
)
COUNTS_IF = (
    "three seeds. All of: the measured receptive field of every mixer and pattern is that of its card, on every seed, "
    "and no card agrees with the measurement of a mixer of another field; on two processes (gloo, 8,192 tokens, 64 "
    "wide, causal and not) rows and gradients are within 1e-5 of attention in one place, of the largest entry; each "
    "process sends exactly 2 n d (W - 1) / W numbers forward; its peak memory grows by less than 0.1 of what all pairs "
    "in one process take, forward and backward, 95 % interval of the ratio"
)


def inputs(n: int, seed: int) -> list[Tensor]:
    """q, k, v (1, 1, n, 64)."""
    g = generator(seed, 17)
    return [torch.randn(1, 1, n, 64, generator=g) for _ in range(3)]


def peak() -> int:
    """Largest resident size of this process so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def naive(rank: int, size: int, n: int, seed: int) -> int:
    """Growth of the peak, in KiB, when all pairs are held: forward and backward."""

    def once(length: int) -> None:
        q, k, v = (t.requires_grad_() for t in inputs(length, seed))
        x = (q @ k.transpose(-1, -2) / 8).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        (torch.softmax(x, -1) @ v).square().sum().backward()

    once(64)
    before = peak()
    once(n)
    return peak() - before


def shared(rank: int, size: int, n: int, seed: int) -> dict[str, Any]:
    """This process's rows: growth of the peak, bytes sent forward, output and gradients, causal and not."""
    sent: list[int] = []
    turn = _Ring.turn

    def counted(self: _Ring, x: Tensor) -> Tensor:
        sent.append(x.nbytes)
        return turn(self, x)

    _Ring.turn = counted

    def once(length: int, causal: bool) -> tuple[list[Tensor], int]:
        rows = slice(rank * length // size, (rank + 1) * length // size)
        q, k, v = (t[:, :, rows].clone().requires_grad_() for t in inputs(length, seed))
        sent.clear()
        out = distributed_attention(q, k, v, causal=causal, block=512)
        forward = sum(sent)
        out.square().sum().backward()
        return [out.detach(), *(cast(Tensor, t.grad) for t in (q, k, v))], forward

    once(64, True)
    before = peak()
    found = {causal: once(n, causal) for causal in (True, False)}
    return {"grown": peak() - before, "found": found}


def distributed(lab: Lab, seed: int) -> dict[str, Any]:
    """Largest error, bytes sent by each process, peak memory of a process over the naive one's."""
    n = lab.pick(8192, 1024)
    alone = run_workers(naive, 1, n, seed)[0]
    parts = run_workers(shared, WORKERS, n, seed)
    error = 0.0
    for causal in (True, False):
        q, k, v = (t.requires_grad_() for t in inputs(n, seed))
        out = cast(Tensor, fv.attention(q, k, v, is_causal=causal))
        out.square().sum().backward()
        for at, want in enumerate((out.detach(), q.grad, k.grad, v.grad)):
            got = torch.cat([part["found"][causal][0][at] for part in parts], 2)
            whole = cast(Tensor, want)
            error = max(error, float((got - whole).abs().max() / whole.abs().max()))
    sent = [part["found"][True][1] for part in parts]
    return {
        "error": error,
        "sent": sent,
        "told": ring_bytes([n // WORKERS] * WORKERS, 1, 64),
        "numbers": 2 * n * 64 * (WORKERS - 1) // WORKERS,
        "memory": max(part["grown"] for part in parts) / alone,
        "naive": alone / 1024,
        "grown": max(part["grown"] for part in parts) / 1024,
    }


def fields(lab: Lab, seed: int) -> dict[str, int]:
    """Cards right about their mixer, and pairs of a card and a mixer of another field that agree all the same."""
    cards: list[MixerCard] = [*CARDS.values(), *(mixer_card(p, TOKENS) for p in PATTERNS)]
    seen = [
        receptive_field(small_instance(card, DIM, HEADS, seed=seed), TOKENS, DIM, seed=seed) for card in cards
    ]
    right = sum(card.agrees(field) for card, field in zip(cards, seen, strict=True))
    fixed = [i for i, card in enumerate(cards) if card.one_layer_receptive_field != "content"]
    mixed_up = sum(
        cards[i].agrees(seen[j])
        for i in fixed
        for j in range(len(cards))
        if not torch.equal(cards[i].field(TOKENS), cards[j].field(TOKENS)) or j not in fixed
    )
    return {"cards": len(cards), "right": right, "mixed up": mixed_up}


def run(lab: Lab) -> Finding:
    """Do cards say what mixers see, and is attention over processes exact, frugal and as talkative as it says?"""
    read = [lab.once(f"fields-{seed}", partial(fields, lab, seed)) for seed in lab.seeds]
    split = [
        lab.once(f"processes-{seed}", partial(distributed, lab, seed))
        for seed in lab.track(lab.seeds, "seeds")
    ]
    right = Figure("cards that are right", min(r["right"] / r["cards"] for r in read), n=read[0]["cards"])
    mixed = Figure("cards that agree with another mixer's field", max(r["mixed up"] for r in read))
    error = Figure(
        "largest error of rows and gradients, of the largest entry", max(r["error"] for r in split)
    )
    exact = all(r["sent"] == r["told"] == [4 * r["numbers"]] * WORKERS for r in split)
    memory = interval("peak memory of a process / all pairs in one", [r["memory"] for r in split])
    sizes = [interval(f"peak memory: {name}", [r[key] for r in split], "MiB")
             for name, key in (("all pairs in one process", "naive"), ("one of two processes", "grown"))]  # fmt: skip
    conditions = right.value == 1 and mixed.value == 0 and error.value <= 1e-5 and exact
    below = judge(Figure("", -memory.value, None if memory.high is None else -memory.high,
                         None if memory.low is None else -memory.low), -0.1)  # fmt: skip
    return Finding(
        question="Do cards say what mixers see, and is attention over processes exact, frugal and as talkative as it "
        "says?",
        counts_if=COUNTS_IF,
        verdict=all_of(HOLDS if conditions else FAILS, below),
        summary=f"{right.value:.0%} of {read[0]['cards']} cards are right about what one layer sees, {mixed.value:.0f} "
        f"fit another mixer; two processes are within {error.value:.1e} of one, send {split[0]['sent'][0]:,} bytes "
        f"each and take {memory.value:.1%} of the memory of all pairs.",
        figures=(right, mixed, error, Figure("processes send what was said", float(exact)), memory, *sizes),
        plot=bars("Peak memory, forward and backward", "MiB", sizes, [sizes[0].name]),
    )


def picture() -> dict[str, Any]:
    """Measured fields of a few mixers."""
    names = ("attention", "sliding window", "dynamic mask", "routing", "hierarchical", "gated linear")
    frames = [
        (
            {"mixer": name},
            receptive_field(small_instance(CARDS[name], DIM, HEADS), TOKENS, DIM),
            f'CARDS["{name}"]',
        )
        for name in names
    ]
    return pictures.pairs(
        "On which tokens (columns) the result at a token (row) depends after one layer, measured by gradients.",
        frames,
        tokens=TOKENS,
    )
