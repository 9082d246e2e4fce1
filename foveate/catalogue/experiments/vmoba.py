"""VMoBA: a small video denoiser trained through sparse attention of equal size, and the time of long videos."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

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
    Times,
    all_of,
    bars,
    difference,
    interval,
    judge,
    paired_times,
)
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import Block
from foveate.core.block_choice import choice_attention
from foveate.selectors import VMoBA, vmoba_attention, vmoba_cycle

SHAPE, CHANNELS, HEADS, LAYERS, NOISE = (8, 8, 8), 8, 3, 3, 1.0
STEPS, BATCH, TAU = 200, 2, 0.3
CYCLE = vmoba_cycle(SHAPE, frames=0.5, tile=(2, 2), cube=(2, 4, 4), tau=TAU)  # 16 blocks of 32 tokens each
VIDEO = (21, 30, 52)  # 32,760 tokens in 7, 40 and 60 blocks
OURS = "VMoBA"
COUNTS_IF = (
    "three seeds, paired, 95 % intervals. Gate: trained on own blocks alone the denoiser's error on held-out clips is "
    "at least 0.01 above full attention's, and every sparse rival computes at least 0.95 times as many pairs as VMoBA; "
    "else open. Then all of: the error with VMoBA is below that with blocks in time only, with the same number of "
    "blocks for every query, and with random blocks; and at 32,760 tokens in 7, 40 and 60 blocks, choosing included, "
    "a cycle of three layers is more than 1.35 times as fast as three dense ones on the same engine"
)


@dataclass
class Mix:
    """How one layer attends: over the blocks that `choose` gives for q and k; counts the share of pairs per head."""

    choose: Callable[[Tensor, Tensor], Tensor] | None
    blocks: Tensor | None = None
    shares: list[list[float]] = field(default_factory=list)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.choose is None or self.blocks is None:
            return fv.attention(q, k, v)  # pyright: ignore[reportReturnType]
        choice = self.choose(q, k)
        sizes = torch.bincount(self.blocks).double()
        self.shares.append(((choice.double() @ sizes).mean((0, 2)) / q.shape[2]).tolist())
        return choice_attention(q, k, v, choice, self.blocks)


def at_random(chooser: VMoBA, count: int, g: torch.Generator, q: Tensor, k: Tensor) -> Tensor:
    """Own block and count - 1 others, drawn anew for every query."""
    blocks = int(chooser.blocks.max()) + 1
    own = nn.functional.one_hot(chooser.blocks, blocks)
    score = torch.rand(*q.shape[:3], blocks, generator=g) + own
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(count, -1).indices, True)


def arms(seed: int) -> dict[str, list[Mix]]:
    """One `Mix` per layer."""
    time = [CYCLE[0]] * LAYERS
    fixed = [replace(c, mode="topk", scope="query", topk=4) for c in CYCLE]
    own = [replace(c, mode="topk", topk=1) for c in CYCLE]
    g = generator(seed, 7)
    return {
        "full": [Mix(None) for _ in CYCLE],
        OURS: [Mix(c.select, c.blocks) for c in CYCLE],
        "in time only": [Mix(replace(c, tau=TAU).select, c.blocks) for c in time],
        "fixed number of blocks": [Mix(c.select, c.blocks) for c in fixed],
        "random blocks": [Mix(partial(at_random, c, 4, g), c.blocks) for c in CYCLE],
        "own block only": [Mix(c.select, c.blocks) for c in own],
    }


def clips(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """(noisy, clean), (count, tokens, channels): squares of 3 x 3 cells move over a background and come and go."""
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in SHAPE), indexing="ij")
    clean = torch.randn(count, 1, 1, 1, CHANNELS, generator=g).expand(count, *SHAPE, CHANNELS)
    for _ in range(6):
        looks = torch.randn(count, 1, 1, 1, CHANNELS, generator=g)
        y, x, start = (torch.randint(8, (count, 1, 1, 1), generator=g) for _ in range(3))
        vy, vx = (torch.randint(-1, 2, (count, 1, 1, 1), generator=g) for _ in range(2))
        there = ((h - y - vy * t) % 8 < 3) & ((w - x - vx * t) % 8 < 3) & (t >= start - 3) & (t < start + 3)
        clean = torch.where(there[..., None], looks, clean)
    clean = clean.flatten(1, 3)
    return clean + NOISE * torch.randn(clean.shape, generator=g), clean


class Denoiser(nn.Module):
    """Noisy tokens -> clean ones: three blocks of attention with rotary positions on three axes."""

    def __init__(self, mixes: Sequence[Mix], dim: int = 16 * HEADS) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(CHANNELS, dim), nn.Linear(dim, CHANNELS)
        self.layers = nn.ModuleList(Block(dim, HEADS, mix) for mix in mixes)
        self.norm = nn.LayerNorm(dim)
        place = torch.cartesian_prod(*(torch.arange(n) for n in SHAPE)).float()  # (tokens, 3)
        angles = torch.cat(
            [place, place / 4, torch.zeros(len(place), 2)], 1
        )  # of 8 pairs of dimensions, 2 unrotated
        self.register_buffer("angles", angles)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(x)
        for layer in self.layers:
            y = layer(y, self.angles)
        return self.write(self.norm(y))


def trained(lab: Lab, name: str, seed: int) -> dict[str, Any]:
    """Error on held-out clips and the share of pairs per head and layer of one arm, after training."""
    torch.manual_seed(seed)
    mixes = arms(seed)[name]
    model = Denoiser(mixes)
    steps = lab.pick(STEPS, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in lab.track(range(steps), f"{name}, seed {seed}"):
        noisy, clean = clips(BATCH, generator(seed, step, 1))
        loss = (model(noisy) - clean).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    during = [mix.shares.copy() for mix in mixes]
    with torch.no_grad():
        noisy, clean = clips(lab.pick(64, 8), generator(seed, 2))
        error = statistics.mean(
            float((model(a) - b).square().mean()) for a, b in zip(noisy.split(8), clean.split(8), strict=True)
        )
    shares = [
        [statistics.mean(head) for head in zip(*layer, strict=True)] if layer else [1.0] for layer in during
    ]
    return {"error": error, "shares": shares}


def timings(lab: Lab) -> list[dict[str, Any]]:
    """Speed of the three kinds of block and of their cycle against dense attention, forward, one head."""
    shape = lab.pick(VIDEO, (7, 10, 26))
    q, k, v = (
        torch.randn(1, 1, shape[0] * shape[1] * shape[2], 64, generator=generator(i)) for i in range(3)
    )
    tile, cube = lab.pick(((3, 13), (7, 6, 13)), ((2, 7), (7, 2, 7)))
    kinds = vmoba_cycle(shape, frames=shape[0] / 7, tile=tile, cube=cube)
    names = [f"in {len(c.blocks.unique())} blocks" for c in kinds]
    calls: dict[str, Callable[[], object]] = {
        name: partial(vmoba_attention, q, k, v, c) for name, c in zip(names, kinds, strict=True)
    }
    calls["dense"] = partial(fv.attention, q, k, v, engine="native")
    calls["choosing"] = lambda: [c.select(q, k) for c in kinds]
    taken = paired_times(lab, calls, lab.pick(5, 1))
    cycle = [math.fsum(turn) for turn in zip(*(taken.rounds[name] for name in names), strict=True)]
    both = Times({}, {"cycle": cycle, "dense": [3 * seconds for seconds in taken.rounds["dense"]]})
    figures = [
        both.speedup("cycle", "dense", "a cycle against three dense layers"),
        *(taken.speedup(name, "dense", f"{name} against dense") for name in names),
        Figure("choosing, share of the cycle's time", taken.median("choosing") / both.median("cycle")),
    ]
    return [vars(figure) for figure in figures]


def run(lab: Lab) -> Finding:
    """Does a video denoiser learn better with VMoBA than with other sparse attention of its size, and is it faster?"""
    runs = {
        name: [
            lab.once(f"{name.replace(' ', '-')}-{seed}", partial(trained, lab, name, seed))
            for seed in lab.seeds
        ]
        for name in arms(0)
    }
    times = [Figure(**figure) for figure in lab.once("times", partial(timings, lab))]
    errors = {name: [r["error"] for r in found] for name, found in runs.items()}
    mean = {name: interval(f"error: {name}", values) for name, values in errors.items()}
    share = {
        name: statistics.mean(s for r in found for layer in r["shares"] for s in layer)
        for name, found in runs.items()
    }
    rivals = ["in time only", "fixed number of blocks", "random blocks"]
    gains = [difference(f"{name} - {OURS}", errors[name], errors[OURS]) for name in rivals]
    room = difference("own block only - full", errors["own block only"], errors["full"])
    heads = [s for r in runs[OURS] for layer in r["shares"] for s in layer]
    fair = all(share[name] >= 0.95 * share[OURS] for name in rivals)
    needed = judge(room, 0.01) == HOLDS
    verdict = OPEN
    if fair and needed:
        verdict = all_of(*(judge(gain, 0.0) for gain in gains), judge(times[0], 1.35))
    return Finding(
        question="Does a video denoiser learn better with VMoBA than with other sparse attention of its size, and is "
        "VMoBA faster than dense attention on long videos?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Error on held-out clips: "
        + ", ".join(f"{name} {f.value:.4f} ({share[name]:.0%} of the pairs)" for name, f in mean.items())
        + f"; at {lab.pick('32,760', '1,820')} tokens a cycle is {times[0]} as fast as dense."
        + (
            ""
            if needed
            else " Own blocks alone do no worse than full attention here: the gate is not passed."
        ),
        figures=(
            *mean.values(),
            difference(f"{OURS} - full", errors[OURS], errors["full"]),
            room,
            *gains,
            *(Figure(f"share of pairs: {name}", value) for name, value in share.items() if name != "full"),
            Figure("share of pairs of a head: least", min(heads)),
            Figure("share of pairs of a head: most", max(heads)),
            *times,
        ),
        plot=bars(
            "Error of a video denoiser, three layers, trained through each",
            "mean squared error",
            [replace(f, name=f"{name}, {share[name]:.0%}") for name, f in mean.items()],
            [f"{name}, {share[name]:.0%}" for name in ("full", "random blocks", "own block only")],
        ),
        quality=mean["full"].value / mean[OURS].value,
        cost=share[OURS],
    )


def picture() -> dict[str, Any]:
    """Kind of block and tau on a clip of four frames of 8 x 8 tokens, drawn one below the other."""
    g = generator(5)
    t, h, w = torch.meshgrid(torch.arange(4), torch.arange(8), torch.arange(8), indexing="ij")
    square = (h - 1 - t >= 0) & (h - 1 - t < 3) & (w - t >= 0) & (w - t < 3)  # moves down and to the right
    looks = torch.randn(2, 16, generator=g)
    x = torch.where(square.reshape(-1, 1), looks[0], 0.7 * looks[1]) + 0.6 * torch.randn(256, 16, generator=g)
    x = x[None, None]
    blocks = {"space and time": (2, 4, 4), "space": (4, 2, 4), "time": (1, 8, 8)}
    frames = []
    for kind, block in blocks.items():
        for tau in (0.4, 0.25, 0.6):
            code = f"VMoBA((4, 8, 8), {block}, tau={tau})"
            frames.append(
                ({"blocks in": kind, "tau": tau}, VMoBA((4, 8, 8), block, tau=tau).layout(x, x), code)
            )
    return pictures.pairs(
        "Four frames of 8 x 8 tokens, one below the other; a square moves. Every query sees its own block and those "
        "whose mean key is most like it, in competition with the other queries of the head.",
        frames,
        grid=(32, 8),
    )
