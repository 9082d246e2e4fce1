"""HiP: what a search through a tree of key ranges finds, where neighbouring keys agree and where they do not."""

from __future__ import annotations

import math
import statistics
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import foveate as fv
from foveate.bench.subject import load_subject
from foveate.bench.texts import load_text
from foveate.catalogue import pictures
from foveate.catalogue.experiments.anchor_attention import Recorder, log_mass
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
    proportion,
)
from foveate.catalogue.lab.controls import equal_window
from foveate.catalogue.lab.tasks import generator, structured_qkv
from foveate.core.gathered import KeyLists, gathered_attention
from foveate.patterns import Causal, Sinks
from foveate.selectors import HiP

TOKENS, HEADS, DIM, LENGTH, SPREAD = (
    8192,
    2,
    32,
    64,
    4.0,
)  # LENGTH tokens: the walk's memory; SPREAD of the logits
BUDGETS = (64, 128, 256, 512, 1024)
KEPT = 512  # the paper's budget; 256 on reader, which has half as many tokens
LENGTHS = (8192, 32768, 131072)
COUNTS_IF = (
    "The share of the attention mass of the searched keys that the chosen blocks hold, over the share that the same "
    "number of blocks with the best scores holds (exhaustive search, same scores), window of 64, 16 sinks, key blocks "
    "of 2. Then all of: on smooth keys (a random walk that forgets over 64 tokens; 8,192 tokens, logits of standard "
    "deviation 4, 512 keys) it is above 0.8, on q and k of reader (4,096 bytes, all layers, 256 keys) too, and on "
    "independent keys below that on smooth ones by more than 0.2 (95 % intervals over three seeds); a smooth needle "
    "(16 tokens to either side) outside the window is chosen in more than 0.9 of 96 trials (95 % interval); a query "
    "block among 131,072 keys scores at most 2.5 times as many key blocks as one among 8,192"
)
reader = cache(lambda: load_subject("reader"))


def walk(n: int, memory: float, g: torch.Generator) -> Tensor:
    """(1, HEADS, n, DIM) standard normal, neighbours correlated by exp(-1 / memory); 0 = independent."""
    steps = torch.randn(1, HEADS, n, DIM, generator=g)
    if memory == 0:
        return steps
    keep = math.exp(-1 / memory)
    found = [steps[:, :, 0]]
    for step in steps.unbind(2)[1:]:
        found.append(keep * found[-1] + math.sqrt(1 - keep**2) * step)
    return torch.stack(found, 2)


def chooser(keys: int) -> HiP:
    return HiP(keys=keys, window=64)


def others(q: Tensor, k: Tensor, hip: HiP, arm: str, g: torch.Generator) -> KeyLists:
    """As many blocks of the same regions, the best-scored ones or random ones."""
    n, kv_heads = q.shape[2], k.shape[1]
    lists, _ = hip.search(q, k)
    positions = torch.zeros(1, q.shape[1], lists.groups, hip.keys, dtype=torch.int64)
    for i in range(lists.groups):
        end = min((i + 1) * hip.block_q, n)
        count = int(hip.near.region(end))
        if count == 0:
            continue
        rows = q[:, :, torch.arange(end - 1, i * hip.block_q - 1, -hip.stride_q)].unflatten(1, (kv_heads, -1))
        region = k[:, :, None, hip.sink : hip.sink + count * hip.block_k]
        score = (rows @ region.transpose(-1, -2)).amax(-2).unflatten(-1, (count, hip.block_k)).amax(-1)
        score = torch.rand(score.shape, generator=g) if arm == "random" else score
        block = score.flatten(1, 2).topk(hip.ranges).indices.unsqueeze(-1)
        inside = torch.arange(hip.block_k)
        positions[:, :, i] = (hip.sink + block * hip.block_k + inside).flatten(-2)
    return KeyLists.from_padded(positions, n, n, hip.block_q, counts=lists.counts)


def masses(q: Tensor, k: Tensor, hip: HiP, seed: int) -> dict[str, float]:
    """Share of the attention of the searched keys that each choice holds, over all queries that search."""
    near = log_mass(q, k, hip.near)
    rest = torch.log(-torch.expm1((near - log_mass(q, k)).clamp_max(-1e-7)))  # of all, what is not near
    far = rest + log_mass(q, k)
    nothing, found = k.new_zeros(*k.shape[:3], 1), {}
    for arm in ("HiP", "exhaustive", "random"):
        lists = hip.search(q, k)[0] if arm == "HiP" else others(q, k, hip, arm, generator(seed, 1))
        lse = gathered_attention(q, k, nothing, lists, return_lse=True)[1]
        searched = lse.isfinite()
        weight = (far - log_mass(q, k)).exp()[searched]  # queries count by what they have out there
        share = (lse - far)[searched].exp().clamp_max(1.0)
        found[arm] = float((share * weight).sum() / weight.sum())
    return found


def synthetic(lab: Lab, seed: int) -> dict[str, list[dict[str, float]]]:
    """For smooth and independent keys: masses for each budget."""
    n, found = lab.pick(TOKENS, 2048), {}
    for name, memory in (("smooth", LENGTH), ("independent", 0.0)):
        g = generator(seed)
        q, k = walk(n, LENGTH, g) * SPREAD, walk(n, memory, g)
        found[name] = [
            masses(q, k, chooser(keys), seed) for keys in lab.track(BUDGETS, f"{name}, seed {seed}")
        ]
    return found


def real(lab: Lab, seed: int) -> dict[str, float]:
    """Masses on reader, means over layers; and the recall of all attention beside a window's."""
    data, n = load_text("stdlib").data, lab.pick(4096, 1024)
    start = int(torch.randint(len(data) - n, (1,), generator=generator(seed)))
    recorder, hip = Recorder(), chooser(256)
    with fv.hf.apply(reader().model, recorder):
        reader().logits(torch.tensor(list(data[start : start + n])), 1)
    found = []
    for q, k in recorder.seen:
        layout = hip.layout(q, k)
        heads = q.shape[1]
        window = (
            equal_window(layout.expand(1, heads).area / (heads * n * (n + 1) / 2), n) | Sinks(16)
        ) & Causal()
        recall = {
            name: float((log_mass(q, k, who) - log_mass(q, k)).exp().mean())
            for name, who in (("recall: HiP", layout), ("recall: window + sinks", window))
        }
        found.append({**masses(q, k, hip, seed), **recall})
    return {name: statistics.mean(f[name] for f in found) for name in found[0]}


def needles(lab: Lab, seed: int) -> dict[str, int]:
    """How often a needle of logit 20, smooth or a single key, is among the chosen keys of the last queries."""
    n, trials = lab.pick(TOKENS, 2048), lab.pick(32, 4)
    g, hip, hits = generator(seed, 2), chooser(KEPT), {"smooth": 0, "single": 0}
    k = walk(n, LENGTH, g)
    for _ in lab.track(range(trials), f"needles, seed {seed}"):
        q = walk(hip.block_q, LENGTH, g) * SPREAD
        at = int(torch.randint(hip.sink, n - 2 * hip.window, (1,), generator=g))
        asked = q[:, :, -1] / q[:, :, -1].square().sum(-1, keepdim=True) * 20 * DIM**0.5  # (1, HEADS, DIM)
        away = (torch.arange(n) - at).abs()
        for name, shape in (("smooth", torch.exp(-away / 16)), ("single", (away == 0).float())):
            lists, _ = hip.search(q, k + shape[:, None] * asked.unsqueeze(2))
            hits[name] += int((lists.idx[: hip.keys] == at).any())
    return {**hits, "trials": trials}


def scored(n: int) -> int:
    """Key blocks that a query block at the end of n keys scores (counted)."""
    _, count = HiP(keys=KEPT, window=64).search(torch.zeros(1, 1, 64, 1), torch.zeros(1, 1, n, 1))
    return int(count[-1])


def run(lab: Lab) -> Finding:
    """Does halving ranges find what matters where keys are smooth, and less where they are not?"""
    made = [lab.once(f"synthetic-{seed}", partial(synthetic, lab, seed)) for seed in lab.seeds]
    on_reader = [lab.once(f"reader-{seed}", partial(real, lab, seed)) for seed in lab.seeds]
    found = [lab.once(f"needles-{seed}", partial(needles, lab, seed)) for seed in lab.seeds]
    at = BUDGETS.index(KEPT)
    near = {
        name: [r[name][at]["HiP"] / r[name][at]["exhaustive"] for r in made]
        for name in ("smooth", "independent")
    }
    near["reader"] = [r["HiP"] / r["exhaustive"] for r in on_reader]
    ratios = {name: interval(f"HiP over exhaustive: {name}", values) for name, values in near.items()}
    loss = difference("smooth - independent", near["smooth"], near["independent"])
    trials = sum(f["trials"] for f in found)
    smooth, single = (
        proportion(f"{name} needle chosen", sum(f[name] for f in found), trials)
        for name in ("smooth", "single")
    )
    counts = {n: scored(n) for n in LENGTHS}
    growth = Figure("scored blocks at 131,072 keys over 8,192", counts[131072] / counts[8192], unit="x")
    everything = {"recall: HiP", "recall: window + sinks", "random"}
    reader_figures = [
        interval(f"reader: {name}", [r[name] for r in on_reader]) for name in sorted(everything)
    ]
    curves = [("smooth", "HiP"), ("smooth", "exhaustive"), ("independent", "HiP"), ("independent", "exhaustive"),
              ("smooth", "random")]  # fmt: skip
    return Finding(
        question="Does a beam search over halves of key ranges find nearly what an exhaustive search finds, where "
        "neighbouring keys are alike, with a cost that grows as the logarithm of the length?",
        counts_if=COUNTS_IF,
        verdict=all_of(
            judge(ratios["smooth"], 0.8),
            judge(ratios["reader"], 0.8),
            judge(loss, 0.2),
            judge(smooth, 0.9),
            HOLDS if growth.value <= 2.5 else OPEN,
        ),
        summary="Of the attention mass that an exhaustive search for as many blocks finds, HiP finds "
        + ", ".join(f"{figure.value:.3g} ({name})" for name, figure in ratios.items())
        + f"; smooth needle {smooth.value:.2g}, single key {single.value:.2g}; scored blocks {growth.value:.2g} x "
        "from 8,192 to 131,072 keys.",
        figures=(*ratios.values(), loss, smooth, single, growth, *reader_figures),
        plot=lines(
            "Attention mass of the searched keys",
            "chosen keys",
            "share held",
            [
                banded(
                    f"{arm}, {name} keys",
                    list(BUDGETS),
                    [[each[arm] for each in r[name]] for r in made],
                    most=1.0,
                    reference=arm == "random",
                )
                for name, arm in curves
            ],
            log_x=True,
        ),
        quality=ratios["reader"].value,
        cost=counts[8192] / ((8192 - 80) / 2),
    )


def picture() -> dict[str, Any]:
    """Budget and head on keys with heavy columns and a near band; one cell is 4 tokens."""
    q, k, _ = structured_qkv(256, 2, 2, 32, generator(1), hitters=6, local=4.0, strength=7.0)
    frames = []
    for keys in (8, 16, 32, 64):
        for stride in (1, 8):
            code = f"HiP(keys={keys}, block_q=16, stride_q={stride}, block_k=4, sink=4, window=16)"
            hip = HiP(keys=keys, block_q=16, stride_q=stride, block_k=4, sink=4, window=16)
            dense = hip.layout(q, k).expand(1, 2).to_dense()[0]
            cells = dense.unflatten(2, (64, 4)).unflatten(1, (64, 4)).any(-1).any(2)
            frames += [({"keys": keys, "stride_q": stride, "head": h}, cells[h], code) for h in (0, 1)]
    return pictures.pairs(
        "The first keys and a window are always read; further back, a block of queries reads the key blocks that its "
        "search ends at. One cell is 4 tokens.",
        frames,
    )
