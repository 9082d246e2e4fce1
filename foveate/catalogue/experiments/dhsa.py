"""DHSA: attention recalled by keys of predicted chunks, of even chunks, and of simpler choices with as many pairs.

A first form, with 256 keys per block, was left open: window + first keys came within 0.036 of the best lists possible.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import foveate as fv
from foveate.bench.subject import load_subject
from foveate.bench.texts import load_text
from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.tasks import generator
from foveate.core.selectors.token_lists import TokenLists
from foveate.layers import BoundaryPredictor, boundary_loss, boundary_targets
from foveate.patterns import Causal
from foveate.selectors import DHSA, Selector, fixed_boundaries

TOKENS, TRAINED, TEXTS, STEPS = 2048, 512, 4, 100
OURS = DHSA(block=64, budget=128, local=64, sink=8, instruction=0, theta=0.0)
NAME = "predicted chunks, square root"
CONTROLS = ("window + first keys", "random keys")
COUNTS_IF = (
    "reader's four layers on 2,048 bytes, four held-out texts for each of three seeds; query blocks of 64 keep 128 "
    "keys in every arm, so all compute the same number of pairs; predictors trained 100 steps on reader's own "
    "attention, a boundary wherever the predictor's probability is above one half; even chunks are at least as many as "
    "predicted ones. Gate: the best lists possible (from the true map) recall at least 0.05 more of the attention than "
    "window + "
    "first keys, else open. Then all of: predicted chunks scored with the square root recall more than predicted "
    "chunks scored by plain means, even chunks with the square root, even chunks by plain means, blocks of 64 keys, "
    "window + first keys, and random keys (95 % intervals of the paired differences above 0)"
)
reader = cache(lambda: load_subject("reader"))


class Recorder(Selector):
    """Keeps every layer's q and k and attends densely."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def layout(self, q, k, *, scale=None, is_causal=True):
        self.seen.append((q.detach(), k.detach()))
        return Causal().layout(q.shape[2], k.shape[2])


@torch.no_grad()
def layers(start: int, n: int) -> list[tuple[Tensor, Tensor]]:
    """The rotated queries and keys of each layer on n bytes of the text."""
    recorder = Recorder()
    ids = torch.tensor(list(load_text("stdlib").data[start : start + n]))
    with fv.hf.apply(reader().model, recorder):
        reader().logits(ids, 1)
    return recorder.seen


def places(lab: Lab, count: int, n: int, g: torch.Generator, held_out: bool) -> list[int]:
    """Where texts start: training texts in the first half, held-out ones in the second."""
    half = len(load_text("stdlib").data) // 2
    return (torch.randint(half - n, (count,), generator=g) + held_out * half).tolist()


def learn(lab: Lab, seed: int) -> BoundaryPredictor:
    """One predictor for all layers, from the targets that the model's own attention gives."""
    torch.manual_seed(seed)
    n, steps = lab.pick(TRAINED, 256), lab.pick(STEPS, 3)
    predictor = BoundaryPredictor(channels=128)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-3)
    starts = places(lab, steps, n, generator(seed, 1), held_out=False)
    for start in lab.track(starts, f"predictor, seed {seed}"):
        seen = layers(start, n)
        ratio = torch.cat([boundary_targets(q, k) for q, k in seen])  # (layers, n)
        loss = boundary_loss(predictor(torch.cat([k.transpose(2, 3).flatten(1, 2) for _, k in seen])), ratio)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return predictor.eval()


def with_scores(lists: TokenLists, score: Callable[[int], Tensor]) -> TokenLists:
    """The same blocks and budget; between the first and the last keys, those with the largest score(block) (1, M)."""
    made = []
    for number, tokens in enumerate(lists.tokens[0, 0]):
        values = score(number)[0].clone()
        first, last = tokens[: OURS.sink], tokens[-OURS.local :]
        values[int(last[0]) :] = -torch.inf
        values[first] = -torch.inf
        best = values.topk(OURS.budget - OURS.sink - OURS.local).indices.sort().values
        made.append(torch.cat([first, best, last]))
    return replace(lists, tokens=torch.stack(made)[None, None])


def mass(q: Tensor, k: Tensor, lists: TokenLists) -> Tensor:
    """Attention that each listed block of queries pays to each key, summed over heads and queries, (blocks, M)."""
    n = q.shape[2]
    hidden, total = torch.ones(n, n, dtype=torch.bool).triu(1), torch.zeros(n, n)
    for h in range(q.shape[1]):
        logits = q[0, h] @ k[0, h * k.shape[1] // q.shape[1]].T * q.shape[3] ** -0.5
        total += torch.softmax(logits.masked_fill_(hidden, -torch.inf), -1)
    return torch.stack([x.sum(0) for x in total[lists.dense :].split(lists.block)])


@torch.no_grad()
def arms(q: Tensor, k: Tensor, predictor: BoundaryPredictor, g: torch.Generator) -> dict[str, Any]:
    """Share of the attention that each arm recalls, averaged over heads and queries; chunks, and where they end."""
    ours = replace(OURS, predictor=predictor)
    plain = replace(OURS, pooling="avgpool")
    cuts = ours.boundaries(k)
    n, chunks = k.shape[2], cuts.shape[1] - 1
    even = fixed_boundaries(n, max(1, n // chunks))[None]
    lists = ours.select(q, k, boundaries=cuts)
    best = mass(q, k, lists)
    chosen = {
        NAME: lists,
        "predicted chunks, mean": plain.select(q, k, boundaries=cuts),
        "even chunks, square root": OURS.select(q, k, boundaries=even),
        "even chunks, mean": plain.select(q, k, boundaries=even),
        "blocks of 64": replace(OURS, chunk=64).select(q, k),
        "window + first keys": replace(OURS, local=OURS.budget - OURS.sink).select(q, k),
        "random keys": with_scores(lists, lambda _: torch.rand(1, n, generator=g)),
        "best lists": with_scores(lists, lambda number: best[number : number + 1]),
    }
    assert len({x.area for x in chosen.values()}) == 1  # equal pairs
    nothing = k.new_zeros(*k.shape[:3], 1)
    full = fv.attention(q, k, nothing, is_causal=True, return_lse=True)[1]
    found = {
        name: float((x.attend(q, k, nothing, return_lse=True)[1] - full).exp().mean())
        for name, x in chosen.items()
    }
    changes = boundary_targets(q, k)[0] > 2
    return {
        "recall": found,
        "chunks": chunks,
        "changes": float(changes[8:-8].float().mean()),
        "hits": float(changes[cuts[0, 1:-1] - 1].float().mean()) if chunks > 1 else 0.0,
        "share": lists.area / (q.shape[1] * n * (n + 1) / 2),
    }


def measured(lab: Lab, seed: int) -> dict[str, Any]:
    """Means over layers and held-out texts."""
    predictor, g = learn(lab, seed), generator(seed, 3)
    starts = places(lab, lab.pick(TEXTS, 1), lab.pick(TOKENS, 512), generator(seed, 2), held_out=True)
    runs = [
        arms(q, k, predictor, g)
        for start in lab.track(starts, f"recall, seed {seed}")
        for q, k in layers(start, lab.pick(TOKENS, 512))
    ]
    mean = {name: statistics.mean(run["recall"][name] for run in runs) for name in runs[0]["recall"]}
    others = {key: statistics.mean(run[key] for run in runs) for key in runs[0] if key != "recall"}
    return {"recall": mean, **others}


def run(lab: Lab) -> Finding:
    """Do keys of predicted chunks with length-normalised scores recall more attention than even chunks and blocks?"""
    runs = [lab.once(f"recall-{seed}", partial(measured, lab, seed)) for seed in lab.seeds]
    recall = {name: [r["recall"][name] for r in runs] for name in runs[0]["recall"]}
    means = {name: interval(f"recall: {name}", values) for name, values in recall.items()}
    gains = [
        difference(f"{NAME} - {name}", recall[NAME], recall[name])
        for name in recall
        if name not in (NAME, "best lists")
    ]
    room = means["best lists"].value - means["window + first keys"].value
    verdict = all_of(*(judge(gain, 0.0) for gain in gains)) if room >= 0.05 else OPEN
    other = lambda name, key, unit="": interval(name, [r[key] for r in runs], unit)  # noqa: E731
    share = other("share of causal pairs, every arm", "share")
    return Finding(
        question="With equally many pairs, do single keys from predicted chunks, scored with the square root of the "
        "length, recall more of the attention than even chunks, blocks, a window or random keys?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Attention recalled with {share.value:.1%} of the pairs: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in means.items())
        + f"; {statistics.mean(r['chunks'] for r in runs):.0f} chunks, and attention changes at "
        f"{statistics.mean(r['hits'] for r in runs):.0%} of their ends (at "
        f"{statistics.mean(r['changes'] for r in runs):.0%} of all places).",
        figures=(
            *means.values(),
            *gains,
            share,
            other("predicted chunks", "chunks"),
            other("chunk ends where attention changes (ratio > 2)", "hits"),
            other("places where attention changes", "changes"),
        ),
        plot=bars(
            f"Attention recalled with {share.value:.0%} of the pairs, reader on Python text",
            "share of the attention",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in means.items()],
            CONTROLS,
        ),
        quality=means[NAME].value,
        cost=share.value,
    )


def picture() -> dict[str, Any]:
    """Chunks and budget on keys of segments of varying length."""
    g = generator(4)
    borders = [0, 7, 11, 26, 30, 45, 52, 64]
    looks = torch.randn(len(borders) - 1, 16, generator=g)
    kind = torch.repeat_interleave(torch.arange(len(looks)), torch.tensor(borders).diff())
    k = (looks[kind] + 0.3 * torch.randn(64, 16, generator=g))[None, None]
    q = torch.randn(64, 16, generator=g) + looks[
        torch.randint(len(looks), (8,), generator=g)
    ].repeat_interleave(8, 0)
    cuts = {
        "every 4 keys": fixed_boundaries(64, 4),
        "every 16": fixed_boundaries(64, 16),
        "at the borders": borders,
    }
    frames = []
    for name, where in cuts.items():
        for budget in (14, 20, 28):
            chooser = DHSA(block=8, budget=budget, local=8, sink=2, instruction=0)
            layout = chooser.select(q[None, None], k, boundaries=torch.as_tensor(where)[None]).layout()
            code = f"DHSA(block=8, budget={budget}, local=8, sink=2, instruction=0)"
            frames.append(({"chunks": name, "budget": budget}, layout, code))
    return pictures.pairs(
        "Each block of queries keeps the first keys, its own, and keys of the chunks that fit it best.",
        frames,
        tokens=64,
    )
