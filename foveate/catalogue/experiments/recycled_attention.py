"""Recycled attention: needles that the reader finds while it reads only some keys per step, and what the stride costs.

A first look at three questions (64 keys, a full step every 10: none found, the answer being over before) came before
the settings below; nothing was changed after them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import foveate as fv
from foveate.cache import Recycled, recycled_mask
from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    HOLDS,
    OPEN,
    Finding,
    Lab,
    all_of,
    difference,
    interval,
    judge,
    lines,
    series,
)
from foveate.catalogue.lab.decoding import bits, found, needles, passage, reader
from foveate.catalogue.lab.tasks import generator

TOKENS, KEEP, DEPTHS = 1024, 128, (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
STRIDES = (2, 5, 10, 50)
MAIN = "recycled, 5"
COUNTS_IF = (
    "reader, 1,024 bytes, one needle, 128 keys per step, answers of five bytes decoded after the question; gate: dense "
    "finds at least 0.9, else open. Then all of: with a full step every 5 it finds more needles than sinks + recent "
    "and than H2O, which evict for good, both with as many keys (95 % intervals over three seeds, paired, above 0.1); "
    "decoding 128 bytes of plain text, a full step every 50 costs more bits per byte than every 2 (interval above 0)"
)


def arms() -> dict[str, Any]:
    make: dict[str, Any] = {
        "dense": lambda model: fv.hf.Cache(model, "oracle", 1.0),
        "sinks + recent": lambda model: fv.hf.Cache(model, "streaming", KEEP),
        "H2O": lambda model: fv.hf.Cache(model, "h2o", KEEP),
    }
    for stride in STRIDES:
        make[f"recycled, {stride}"] = lambda model, stride=stride: fv.hf.Cache(model, Recycled(stride), KEEP)
    return make


def share_found(name: str, seed: int, depths: tuple[float, ...]) -> float:
    asked = needles(seed, TOKENS, depths) + needles(seed + 1000, TOKENS, depths)
    return sum(found(reader(), question, arms()[name]) for question in asked) / len(asked)


def text_cost(name: str, seed: int, tokens: int) -> list[float]:
    """Bits per byte of the last bytes of a passage, and keys read per step over those of a full cache."""
    ids = passage(seed, TOKENS)
    cost, cache = bits(reader(), ids, TOKENS - tokens, arms()[name])
    full = sum(range(TOKENS - tokens + 1, TOKENS)) * len(cache.layers) * 4
    return [cost, cache.held().keys_read / full]


def run(lab: Lab) -> Finding:
    """Do the keys of an occasional full step serve the steps in between?"""
    depths, tokens = lab.pick(DEPTHS, (0.5,)), lab.pick(128, 8)
    names = tuple(arms())
    share, cost, read = ({name: [] for name in names} for _ in range(3))
    for seed in lab.seeds:
        for name in lab.track(names, f"seed {seed}"):
            tag = f"{name.replace(' ', '').replace(',', '-')}-{seed}"
            share[name].append(lab.once(f"found-{tag}", partial(share_found, name, seed, depths)))
            bpb, keys = lab.once(f"text-{tag}", partial(text_cost, name, seed, tokens))
            cost[name].append(bpb)
            read[name].append(keys)
    mean = {name: interval(f"needles found: {name}", share[name]) for name in names}
    gains = [
        difference(f"found: {MAIN} - {name}", share[MAIN], share[name]) for name in ("sinks + recent", "H2O")
    ]
    longer = difference(
        "bits per byte: a full step every 50 - every 2",
        cost["recycled, 50"],
        cost["recycled, 2"],
        "bits/byte",
    )
    keys = {name: interval(f"keys read over all: {name}", read[name]) for name in names}
    verdict = OPEN
    if mean["dense"].value >= 0.9:
        verdict = all_of(*(judge(gain, 0.1) for gain in gains), judge(longer, 0.0), HOLDS)
    return Finding(
        question="Do the keys of an occasional full step serve the steps in between?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Needles found: "
        + ", ".join(f"{name} {figure.value:.2f}" for name, figure in mean.items())
        + f". Every 5 steps in full, {keys[MAIN].value:.0%} of the keys are read; the memory of the cache stays whole.",
        figures=(
            *mean.values(),
            *gains,
            longer,
            *keys.values(),
            *(interval(f"bits per byte: {name}", cost[name], "bits/byte") for name in names),
        ),
        plot=lines(
            "Needles found and keys read",
            "share of the keys read while decoding text",
            "needles found",
            [
                series("recycled: a full step every 2 to 50", *zip(*sorted(
                    (keys[f"recycled, {s}"].value, mean[f"recycled, {s}"].value) for s in STRIDES
                ), strict=True)),  # pyright: ignore[reportArgumentType]
                *(series(name, [keys[name].value], [mean[name].value]) for name in names[:3]),
            ],
        ),
        quality=mean[MAIN].value / max(mean["dense"].value, 1e-9),
        cost=keys[MAIN].value,
    )  # fmt: skip


def picture() -> dict[str, Any]:
    """What each row may read, by stride."""
    q, k = (torch.randn(1, 1, 48, 8, generator=generator(seed)) for seed in (3, 4))
    k = k.cumsum(2) * 0.4  # neighbours are alike
    frames = [
        (
            {"stride": stride, "keep": keep},
            recycled_mask(q, k, keep, stride)[0, 0],
            f"recycled_mask(q, k, keep={keep}, stride={stride})",
        )
        for stride in (4, 8, 16)
        for keep in (4, 8)
    ]
    return pictures.pairs(
        "A full row now and then; the rows in between read its strongest columns and what came since.", frames
    )
