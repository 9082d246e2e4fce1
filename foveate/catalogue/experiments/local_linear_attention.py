"""Local linear attention: associative memory and a drifting regression, without training, between its two ends."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

import foveate as fv
from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.tasks import generator
from foveate.linear import global_ridge, local_linear_attention

SEEDS, KEYS, DIM, VALUES, NOISE, QUERIES = (0, 1, 2, 3, 4), 256, 16, 8, 0.05, 64
SCALES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
REGS = (1e-3, 1e-2, 1e-1)
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the global one, which is cheap
TIMES = (0.0, 0.5, 1.0, 2.0)
COUNTS_IF = (
    "five seeds, paired, 95 % intervals; temperature, ridge strength and the weight of time are each arm's best on a "
    "quarter of the draws, the error is that of the others. Gate: the global ridge has at most 0.1 of the values' "
    "variance as error where there is one regime, in both tasks, else open. Then all of: with two regimes the error "
    "of local linear attention is the lowest of the three on every seed, and softmax attention's and the global "
    "ridge's are larger by more than 0; the same in the second half of a stream whose map switches in the middle"
)
Arm = Callable[[Tensor, Tensor, Tensor, dict[str, float]], Tensor]


def softmax(q: Tensor, k: Tensor, v: Tensor, at: dict[str, float], causal: bool = False) -> Tensor:
    """Softmax attention: the local constant fit."""
    return cast(Tensor, fv.attention(q, k, v, is_causal=causal, scale=at["scale"]))


def local_linear(q: Tensor, k: Tensor, v: Tensor, at: dict[str, float], causal: bool = False) -> Tensor:
    """The local linear fit."""
    return cast(Tensor, local_linear_attention(q, k, v, reg=at["reg"], scale=at["scale"], causal=causal))


def ridge(q: Tensor, k: Tensor, v: Tensor, at: dict[str, float], causal: bool = False) -> Tensor:
    """The global linear fit; causal: of every prefix."""
    if not causal:
        return global_ridge(q, k, v, reg=at["reg"])
    return cast(Tensor, local_linear_attention(q, k, v, reg=at["reg"], scale=0.0, causal=True))


ARMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "softmax": (softmax, ("scale",)),
    "global ridge": (ridge, ("reg",)),
    "local linear": (local_linear, ("scale", "reg")),
}


def memory(draws: int, regimes: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, wanted): unit keys, values linear in them, with another map on each side of a plane, and noise."""
    g = generator(seed, regimes, 11)
    k, q = (F.normalize(torch.randn(draws, 1, n, DIM, generator=g), dim=-1) for n in (KEYS, QUERIES))
    maps = torch.randn(2, draws, 1, DIM, VALUES, generator=g)
    plane = torch.randn(draws, 1, DIM, 1, generator=g)
    made = [torch.where((x @ plane > 0) & (regimes == 2), x @ maps[1], x @ maps[0]) for x in (q, k)]
    return q, k, made[1] + NOISE * torch.randn(made[1].shape, generator=g), made[0]


def stream(draws: int, regimes: int, seed: int, time: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, wanted) of a regression in context: query i + 1 is asked after i pairs; the map switches half way.

    Keys carry the time as a place on half a circle of radius `time`, by which an arm may prefer recent pairs.
    """
    g = generator(seed, regimes, 13)
    x = F.normalize(torch.randn(draws, 1, KEYS + 1, DIM // 2, generator=g), dim=-1)
    maps = torch.randn(2, draws, 1, DIM // 2, VALUES, generator=g)
    late = torch.arange(KEYS + 1)[:, None] >= KEYS // 2
    y = torch.where(late & (regimes == 2), x @ maps[1], x @ maps[0])
    angle = torch.pi * torch.arange(KEYS + 1.0)[:, None].expand(draws, 1, KEYS + 1, 1) / KEYS
    x = torch.cat([x, time * angle.cos(), time * angle.sin()], -1)
    noisy = y + NOISE * torch.randn(y.shape, generator=g)
    return x[:, :, 1:], x[:, :, :-1], noisy[:, :, :-1], y[:, :, 1:]


def errors(lab: Lab, task: str, arm: str, regimes: int, seed: int) -> dict[str, Any]:
    """Share of the values' variance that an arm leaves on draws that did not choose its settings; the settings."""
    draws = lab.pick(16, 4)
    run, names = ARMS[arm]
    grid = {
        "scale": lab.pick(SCALES, (2.0, 8.0)),
        "reg": lab.pick(RIDGES if arm == "global ridge" else REGS, (1e-2,)),
    }
    times = (0.0,) if task == "memory" else lab.pick(TIMES, (1.0,))
    tried = []
    for time, *values in itertools.product(times, *(grid[name] for name in names)):
        at = dict(zip(names, values, strict=True))
        q, k, v, want = (
            memory(draws, regimes, seed) if task == "memory" else stream(draws, regimes, seed, time)
        )
        wrong = (run(q, k, v, at, task == "stream") - want).square().mean(-1)[:, 0]  # (draws, queries)
        wrong = wrong[:, KEYS // 2 :] if task == "stream" else wrong
        part = wrong.mean(1) / want.square().mean()
        tried.append(
            (float(part[: draws // 4].mean()), float(part[draws // 4 :].mean()), {**at, "time": time})
        )
    best = min(tried, key=lambda t: t[0])
    return {"error": best[1], "at": best[2]}


def run(lab: Lab) -> Finding:
    """Does a local linear fit read a memory of changing linear maps better than a local constant or a global one?"""
    seeds = lab.pick(SEEDS, (0,))
    found: dict[tuple[str, str], list[float]] = {}
    gate: list[Figure] = []
    for task in ("memory", "stream"):
        for arm, regimes in (*((arm, 2) for arm in ARMS), ("global ridge", 1)):
            name = f"{task}-{arm.replace(' ', '-')}-{regimes}"
            got = [
                lab.once(f"{name}-{seed}", partial(errors, lab, task, arm, regimes, seed))["error"]
                for seed in seeds
            ]
            if regimes == 1:
                gate.append(interval(f"{task}, one regime: global ridge", got))
            else:
                found[task, arm] = got
    ours = "local linear"
    means = {key: interval(f"{key[0]}: {key[1]}", values) for key, values in found.items()}
    gains = [
        difference(f"{task}: {arm} - {ours}", found[task, arm], found[task, ours])
        for task in ("memory", "stream")
        for arm in ("softmax", "global ridge")
    ]
    lowest = Figure(
        "seeds and tasks in which local linear is lowest",
        sum(
            found[task, ours][i] < min(found[task, arm][i] for arm in ("softmax", "global ridge"))
            for task in ("memory", "stream")
            for i in range(len(seeds))
        )
        / (2 * len(seeds)),
    )
    verdict = OPEN
    if all(figure.value <= 0.1 for figure in gate):
        verdict = all_of(*(judge(gain, 0.0) for gain in gains), judge(lowest, 1 - 1e-9))
    return Finding(
        question="Does a local linear fit read a memory of changing linear maps better than a local constant or a "
        "global one?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Share of the values' variance left: "
        + "; ".join(
            f"{task}: " + ", ".join(f"{arm} {means[task, arm].value:.3f}" for arm in ARMS)
            for task in ("memory", "stream")
        )
        + f"; lowest in {lowest.value:.0%} of seeds and tasks.",
        figures=(*means.values(), *gains, lowest, *gate),
        plot=bars(
            "Two regimes, without training",
            "share of variance left",
            list(means.values()),
            [f.name for key, f in means.items() if key[1] != ours],
        ),
    )


def picture() -> dict[str, Any]:
    """Weights of keys on a line, for queries on the same line that reaches beyond them."""
    k, q = torch.linspace(-1, 1, 48).view(1, 1, 48, 1), torch.linspace(-1.5, 1.5, 48).view(1, 1, 48, 1)
    weights = cast(
        Tensor, local_linear_attention(q, k, torch.eye(48).expand(1, 1, 48, 48), reg=1e-3, scale=12.0)
    )
    return pictures.weights(
        "Weights of 48 keys on a line for queries from left of all keys to right of them. Within, they resemble "
        "softmax attention; where keys lie on one side only, some become negative (white), and the fit extrapolates.",
        weights[0, 0].clamp_min(0),
        code="local_linear_attention(q, k, eye, reg=1e-3, scale=12.0)",
    )
