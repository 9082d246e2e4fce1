"""AnchorAttention: attention mass that single columns recall at equal density.

What counts once held a second condition, on the time of a long prefill. It was dropped because a busy machine cannot
time, when the recall of an unfinished run had been seen; the first condition is as it was.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import foveate as fv
from foveate.bench.subject import load_subject
from foveate.bench.texts import load_text
from foveate.catalogue import pictures
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
)
from foveate.catalogue.lab.controls import equal_random, equal_window
from foveate.catalogue.lab.tasks import generator, structured_qkv
from foveate.core.layout import BlockLayout
from foveate.patterns import Causal, Sinks
from foveate.selectors import AnchorAttention, FlexPrefill, Selector

TOKENS, BLOCK, TEXTS = 4096, 64, 2
THETAS = (0.0, 2.0, 4.0, 6.0, 8.0)
MOST = 40  # setting of FlexPrefill at which it keeps everything
OURS = "AnchorAttention"
COUNTS_IF = (
    "q and k of reader's four layers on 4,096 bytes, two texts for each of three seeds; blocks of 16 queries, "
    "groups of 64, 16 first keys; theta 0, 2, 4, 6, 8, of which those count that keep at most half of the causal "
    "pairs (fewer than three: open). Then all of: the stripes recall more of the attention than each of "
    "FlexPrefill, the strongest pooled blocks of 64, window + first keys, and random blocks, all with at least as"
    " many pairs (95 % interval of the paired difference above 0)"
)
reader = cache(lambda: load_subject("reader"))


class Recorder(Selector):
    """Keeps every layer's q and k and attends densely."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def layout(self, q, k, *, scale=None, is_causal=True):
        self.seen.append((q, k))
        return Causal().layout(q.shape[2], k.shape[2])


def log_mass(q: Tensor, k: Tensor, who: Any = None) -> Tensor:
    """Log of the sum of exponentiated logits over a set of keys, by default all earlier ones."""
    nothing = k.new_zeros(*k.shape[:3], 1)
    return fv.attention(q, k, nothing, who, is_causal=who is None, return_lse=True)[1]


class Layers:
    """The q and k of a model's layers on one text, and what sets of pairs recall of their attention."""

    def __init__(self, ids: Tensor) -> None:
        recorder = Recorder()
        with fv.hf.apply(reader().model, recorder):
            reader().logits(ids, 1)
        self.qk = recorder.seen
        self.full = [log_mass(q, k) for q, k in self.qk]
        self.map = cache(self._map)

    def _map(self, method: str, setting: float) -> list[BlockLayout]:
        """A layout per layer; more pairs for a higher setting."""
        if method == OURS:
            chosen = AnchorAttention(block=16, step=4, theta=setting, init=16)
            return [chosen.layout(q, k) for q, k in self.qk]
        if method == "FlexPrefill":
            gamma = 1.01 if setting == MOST else 1 - 2 ** (-setting / 2)
            chosen = FlexPrefill(BLOCK, gamma=gamma, min_budget=BLOCK)
            return [chosen.layout(q, k) for q, k in self.qk]
        return [strongest_blocks(q, k, int(setting)) for q, k in self.qk]

    def share(self, layouts: Sequence[BlockLayout]) -> float:
        """Of the causal pairs of all heads and layers."""
        _, heads, n, _ = self.qk[0][0].shape
        return sum(x.expand(1, heads).area for x in layouts) / (len(layouts) * heads * n * (n + 1) / 2)

    def least(self, method: str, share: float, most: int) -> list[BlockLayout]:
        """The layouts of the least setting 1 ... most that has at least this share."""
        low, high = 1, most
        while low < high:
            mid = (low + high) // 2
            low, high = (low, mid) if self.share(self.map(method, mid)) >= share else (mid + 1, high)
        return self.map(method, low)

    def recall(self, layouts: Sequence[BlockLayout]) -> dict[str, float]:
        masses = zip(self.qk, layouts, self.full, strict=True)
        kept = [float((log_mass(q, k, who) - full).exp().mean()) for (q, k), who, full in masses]
        return {"share": self.share(layouts), "recall": statistics.mean(kept)}

    def arms(self, theta: float, seed: int) -> dict[str, dict[str, float]]:
        """What each method recalls with at least the pairs of the stripes at theta (random: on average)."""
        _, heads, n, _ = self.qk[0][0].shape
        share = self.share(self.map(OURS, theta))
        window = (equal_window(share, n) | Sinks(16)) & Causal()
        random = equal_random(share, n, block=BLOCK, heads=heads, seed=seed)
        chosen = {
            OURS: self.map(OURS, theta),
            "FlexPrefill": self.least("FlexPrefill", share, MOST),
            "strongest blocks": self.least("strongest blocks", share, n // BLOCK),
            "window + first keys": [window.layout(n)] * len(self.qk),
            "random blocks": [random.layout(n)] * len(self.qk),
        }
        return {name: self.recall(layouts) for name, layouts in chosen.items()}


def strongest_blocks(q: Tensor, k: Tensor, kept: int) -> BlockLayout:
    """For each block of queries the first block, its own and the `kept` whose mean keys fit its mean query best."""
    _, heads, n, _ = q.shape
    q_mean, k_mean = (t.unflatten(2, (-1, BLOCK)).mean(3) for t in (q, k))
    fit = q_mean @ k_mean.repeat_interleave(heads // k.shape[1], 1).transpose(
        -1, -2
    )  # (1, H, blocks, blocks)
    past = torch.ones(fit.shape[-2:], dtype=torch.bool).tril()
    rank = fit.masked_fill(~past, -torch.inf).argsort(-1, descending=True).argsort(-1)
    always = torch.eye(n // BLOCK, dtype=torch.bool)
    always[:, 0] = True
    return BlockLayout.from_blocks(((rank < kept) & past) | always, n, n, block=BLOCK, causal=True)


def recalls(lab: Lab, seed: int) -> list[dict[str, dict[str, float]]]:
    """For each theta, arm -> share and recall, means over the texts."""
    data, n = load_text("stdlib").data, lab.pick(TOKENS, 512)
    starts = torch.randint(len(data) - n, (lab.pick(TEXTS, 1),), generator=generator(seed)).tolist()
    found = []
    for start in starts:
        layers = Layers(torch.tensor(list(data[start : start + n])))
        found.append([layers.arms(theta, seed) for theta in lab.track(THETAS, f"recall, seed {seed}")])
    mean = lambda runs: {key: statistics.mean(run[key] for run in runs) for key in runs[0]}  # noqa: E731
    return [{name: mean([x[name] for x in each]) for name in each[0]} for each in zip(*found, strict=True)]


def run(lab: Lab) -> Finding:
    """Do single columns near the anchor recall more attention than blocks of equal density?"""
    runs = [lab.once(f"recall-{seed}", partial(recalls, lab, seed)) for seed in lab.seeds]
    shares = [statistics.mean(r[t][OURS]["share"] for r in runs) for t in range(len(THETAS))]
    counted = [t for t, share in enumerate(shares) if share <= 0.5] or [0]
    names = list(runs[0][0])
    recall = {name: [statistics.mean(r[t][name]["recall"] for t in counted) for r in runs] for name in names}
    gains = [difference(f"{OURS} - {name}", recall[OURS], recall[name]) for name in names if name != OURS]
    verdict = all_of(
        *(judge(gain, 0.0) for gain in gains),
        HOLDS if len(counted) >= 3 else OPEN,
    )
    means = {name: interval(f"recall: {name}", values) for name, values in recall.items()}
    x = {
        name: [statistics.mean(r[t][name]["share"] for r in runs) for t in range(len(THETAS))]
        for name in names
    }
    return Finding(
        question="With equally many pairs, do single columns chosen by their distance to an anchor recall more of the "
        "attention than blocks do?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Attention recalled with {shares[counted[0]]:.1%} to {shares[counted[-1]]:.1%} of the pairs: "
        + ", ".join(f"{name} {figure.value:.3g}" for name, figure in means.items())
        + ".",
        figures=(
            *means.values(),
            *gains,
            *(Figure(f"share of causal pairs, theta {THETAS[t]:g}", share) for t, share in enumerate(shares)),
        ),
        plot=lines(
            "Attention recalled, reader on Python text",
            "share of causal pairs",
            "share of the attention",
            [
                banded(
                    name,
                    x[name],
                    [[each[name]["recall"] for each in r] for r in runs],
                    most=1.0,
                    reference=name == "random blocks",
                )
                for name in names
            ],
            log_x=True,
        ),
        quality=means[OURS].value,
        cost=statistics.mean(shares[t] for t in counted),
    )


def picture() -> dict[str, Any]:
    """Theta, length of the group and head on keys with heavy columns and a near band; one cell is 4 tokens."""
    q, k, _ = structured_qkv(256, 2, 2, 32, generator(1), hitters=6, local=4.0, strength=7.0)
    frames = []
    for theta in (-4.0, 0.0, 2.0, 4.0, 6.0, 8.0):
        for step in (4, 8):
            code = f"AnchorAttention(block=16, step={step}, theta={theta}, init=16)"
            dense = AnchorAttention(16, step, theta, 16).layout(q, k).expand(1, 2).to_dense()[0]
            cells = dense.unflatten(2, (64, 4)).unflatten(1, (64, 4)).any(-1).any(2)
            frames += [({"theta": theta, "step": step, "head": h}, cells[h], code) for h in (0, 1)]
    return pictures.pairs(
        "The first keys and those near the group are the anchors; a column further back is kept for a whole group if "
        "it comes within theta of them. One cell is 4 tokens.",
        frames,
    )
