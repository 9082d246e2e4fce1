"""LongHeads: a model trained on short rows finds pass keys in rows four and eight times as long, without training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import foveate as fv
from foveate.cache import LongHeadsPolicy, chunk_representation, longheads_attention, select_chunks
from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Finding, Lab, all_of, banded, difference, interval, judge, lines
from foveate.catalogue.lab.tasks import generator, passkey, reminders
from foveate.catalogue.lab.tiny import TinyLM, accuracy, train
from foveate.core.rotary import Rotary
from foveate.patterns import Causal, SlidingWindow

SHORT, VOCAB, DIM, HEADS, LAYERS = 128, 16, 64, 8, 2
POLICY, ROPE = LongHeadsPolicy(chunk=16, attn_length=SHORT), Rotary()
TIMES = (1, 2, 4, 8)
OURS = "LongHeads"
COUNTS_IF = (
    "models of two layers and eight heads with rotary positions, trained on rows of up to 128 tokens; 64 pass keys at "
    "random distances beyond 128 tokens, in rows of 512 and 1,024; chunks of 16, 128 keys per query; three seeds, "
    "95 % intervals. Gates: dense attention finds at least 0.95 of the keys in rows of 128, and at most 0.8 in rows of "
    "1,024, else open. Then all of, at 512 and at 1,024 tokens: LongHeads finds more than 0.8, and more than dense "
    "attention, a sliding window of 128, and as many chunks chosen at random, each by more than 0.1"
)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotated(q: Tensor, k: Tensor, v: Tensor, who: Any = None) -> Tensor:
    """Attention with every token at its own position."""
    place = torch.arange(q.shape[2])
    return fv.attention(ROPE(q, place), ROPE(k, place), v, who or Causal())  # pyright: ignore[reportReturnType]


@dataclass
class Heads:
    """LongHeads with representations of a kind; counts the heads that fetch a chunk for the last query."""

    kind: str = "attention"
    g: torch.Generator | None = None
    wanted: Tensor | None = None  # (rows,) the chunk that holds the key
    fetched: list[list[float]] = field(default_factory=list)  # per call, the share of rows of each head

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = POLICY.chunk
        whole = q.shape[2] // w
        if self.kind == "random":
            r = torch.randn(*q.shape[:2], whole, q.shape[3], generator=self.g)
        elif self.kind == "mean":
            r = k[:, :, : whole * w].unflatten(2, (-1, w)).mean(3)
        else:
            r = chunk_representation(q, k, v, w, ROPE)
        if self.wanted is not None:
            last = torch.tensor([(q.shape[2] - 1) // w])
            chosen = select_chunks(q[:, :, -1:], r, last, POLICY, k.shape[1])  # (rows, heads, 1, P)
            self.fetched.append(
                (chosen == self.wanted[:, None, None, None]).any(3).float().mean((0, 2)).tolist()
            )
        return longheads_attention(q, k, v, POLICY, ROPE, representations=r)


def arms(seed: int) -> dict[str, Attend]:
    return {
        "dense": rotated,
        "window": partial(rotated, who=SlidingWindow(SHORT)),
        OURS: Heads(),
        "mean keys for representations": Heads("mean"),
        "random chunks": Heads("random", generator(seed, 5)),
    }


def rows_of(step: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training rows after a share of the training: 16 tokens at first, all 128 from its middle on."""
    length = min(SHORT, 16 * math.ceil(step * 2 * SHORT / 16 + 1e-9))
    return reminders(1024 // length, length, VOCAB, g)


@torch.no_grad()
def measured(lab: Lab, seed: int) -> dict[str, Any]:
    """Arm -> share found in rows of each length; and how often heads fetch the chunk with the key, per layer."""
    torch.manual_seed(seed)
    model = TinyLM(VOCAB, DIM, HEADS, LAYERS, rotated, positions="none")
    steps = lab.pick(300, 5)
    with torch.enable_grad():
        train(lab, model, lambda step: rows_of(step / steps, generator(seed, step)), steps=steps, lr=4e-3,
              what=f"training, seed {seed}")  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in arms(seed)}
    fetched: dict[str, list[float]] = {}
    for times in lab.track(TIMES, f"rows, seed {seed}"):
        n, size, g = SHORT * times, 16, generator(seed, times, 9)
        batches, wanted = [], []
        for _ in range(lab.pick(4, 1)):
            far = torch.randint(min(SHORT, n // 2), n - 2, (size,), generator=g)
            batches.append(passkey(size, n, far, VOCAB, g))
            wanted.append((n - 1 - far) // POLICY.chunk)
        for name, attend in arms(seed).items():
            hits = []
            for batch, where in zip(batches, wanted, strict=True):
                if isinstance(attend, Heads):
                    attend.wanted = where
                for block in model.blocks:
                    block.attend = attend  # pyright: ignore[reportArgumentType]
                hits.append(accuracy(lab, model, [batch]))
            found[name].append(statistics.mean(hits))
            if isinstance(attend, Heads) and times == TIMES[-1]:
                shares = torch.tensor(attend.fetched).view(-1, LAYERS, HEADS).mean(0)  # (layers, heads)
                fetched[name] = [float(shares[-1].mean()), float(shares[-1].max())]
    return {"found": found, "fetched": fetched}


def run(lab: Lab) -> Finding:
    """Does a model read far beyond the length it was trained at when its heads choose chunks and renumber them?"""
    runs = [lab.once(f"found-{seed}", partial(measured, lab, seed)) for seed in lab.seeds]
    names = list(runs[0]["found"])
    at = lambda name, times: [r["found"][name][TIMES.index(times)] for r in runs]  # noqa: E731
    means = {(name, times): interval(f"found, {SHORT * times} tokens: {name}", at(name, times))
             for name in names for times in TIMES}  # fmt: skip
    gains = [
        difference(f"{OURS} - {name}, {SHORT * times} tokens", at(OURS, times), at(name, times))
        for times in (4, 8)
        for name in ("dense", "window", "random chunks")
    ]
    fetched = [
        interval(f"last layer's heads that fetch the key's chunk, 1024 tokens: {what}{name}",
                 [r["fetched"][name][i] for r in runs])
        for name in runs[0]["fetched"] for i, what in enumerate(("", "best head, "))
    ]  # fmt: skip
    verdict = OPEN
    if means["dense", 1].value >= 0.95 and means["dense", 8].value <= 0.8:
        verdict = all_of(
            *(judge(means[OURS, times], 0.8) for times in (4, 8)), *(judge(gain, 0.1) for gain in gains)
        )
    return Finding(
        question="Does a model find keys in rows four and eight times as long as those it was trained on when each "
        "head chooses chunks and reads them as one short row?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Trained on {SHORT} tokens, where dense attention finds {means['dense', 1].value:.3g}; beyond the "
        f"reach of a window, in rows of {SHORT * 4} and {SHORT * 8}: "
        + ", ".join(f"{name} {means[name, 4].value:.2f} and {means[name, 8].value:.2f}" for name in names)
        + f"; {fetched[0].value:.0%} of the last layer's heads fetch the chunk with the key (of random choices "
        f"{fetched[-2].value:.0%}).",
        figures=(*means.values(), *gains, *fetched),
        plot=lines(
            "Pass keys found, trained on 128 tokens",
            "tokens of the row",
            "share found",
            [
                banded(name, [SHORT * times for times in TIMES], [r["found"][name] for r in runs], most=1.0,
                       reference=name in ("random chunks", "dense"))
                for name in names
            ],
            log_x=True,
        ),
        quality=means[OURS, 8].value / means["dense", 1].value,
        cost=SHORT / (SHORT * TIMES[-1] / 2),
    )  # fmt: skip


def picture() -> dict[str, Any]:
    """Keys per query and chunk, per head: which keys of 64 tokens are read."""
    g = generator(2)
    q, k, v = (torch.randn(1, 2, 64, 16, generator=g) * 2 for _ in range(3))
    frames = []
    for length in (12, 16, 24):
        policy = LongHeadsPolicy(chunk=4, attn_length=length)
        r = chunk_representation(q, k, v, 4, ROPE)
        own = torch.arange(64) // 4
        chosen = select_chunks(q, r, own, policy, 2)[0]  # (heads, 64, P)
        read = (chosen[..., None] == own).any(2) & torch.ones(64, 64, dtype=torch.bool).tril()
        read[:, :length] = torch.ones(64, 64, dtype=torch.bool).tril()[:length]
        for head in (0, 1):
            frames.append(
                (
                    {"attn_length": length, "head": head},
                    read[head],
                    f"LongHeadsPolicy(chunk=4, attn_length={length})",
                )
            )
    return pictures.pairs(
        "A query reads the first chunk, its own, the one before, and those that its head chooses; they are renumbered, "
        "so that no distance reaches attn_length.",
        frames,
        tokens=64,
    )
