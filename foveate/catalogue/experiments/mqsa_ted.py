"""MQSA-TED: histories with a hidden interest and chains of items; one tower, the other, both, and with distillation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.catalogue import pictures
from foveate.catalogue.lab import Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.tasks import generator
from foveate.layers import (
    MultiQueryRecommender,
    transition_distillation_loss,
    transition_matrix,
    windowed_mean_query,
)

ITEMS, TOPICS, USERS, LENGTH, TOP = 300, 10, 2000, 20, 10
STEPS, BATCH, LR, LAMBDA = 150, 64, 3e-3, 0.1
ARMS = {  # alpha, distillation, share of the training histories
    "last item": (1.0, False, 1.0),
    "mean of four": (0.0, False, 1.0),
    "both": (0.5, False, 1.0),
    "both, a fifth": (0.5, False, 0.2),
    "both and transitions, a fifth": (0.5, True, 0.2),
}
COUNTS_IF = (
    "300 items in 10 topics, 2000 histories of 20 items: half of the steps follow a chain of items, half are any item "
    "of the user's topic; the last item is asked for, three seeds, NDCG@10: both towers are no worse than the better "
    "one of the two alone (the interval of the difference above -0.005), and distilled transitions add (its interval "
    "above 0) when a fifth of the histories is left. The better tower alone must exceed twice the score of the most "
    "popular items, else nothing was learnt."
)


def run(lab: Lab) -> Finding:
    """Do two query widths together recommend as well as the better one, and do distilled transitions help?"""
    file = lambda name, seed: f"{name}-{seed}".replace(", ", "_").replace(" ", "_")  # noqa: E731
    found = {name: [lab.once(file(name, seed), lambda n=name, s=seed: one(lab, n, s)) for seed in lab.seeds]
             for name in ARMS}  # fmt: skip
    score = {name: [r["ndcg"] for r in rows] for name, rows in found.items()}
    shown = [interval("most popular", [r["popular"] for r in found["both"]])]
    shown += [interval(name, values) for name, values in score.items()]
    better = max(("last item", "mean of four"), key=lambda name: sum(score[name]))
    blend = difference(f"both - {better}", score["both"], score[better])
    added = difference("transitions added", score["both and transitions, a fifth"], score["both, a fifth"])
    learnt = difference(
        "better tower - twice the most popular", score[better], [2 * r["popular"] for r in found["both"]]
    )
    return Finding(
        question="Do two query widths together recommend as well as the better one, and do distilled transitions help?",
        counts_if=COUNTS_IF,
        verdict=all_of(judge(learnt, above=0.0), judge(blend, above=-0.005), judge(added, above=0.0)),
        summary=f"NDCG@10 is {shown[1]} with the last item as the query, {shown[2]} with the mean of four, {shown[3]} "
        f"with both; of a fifth of the histories {shown[4]}, with distilled transitions {shown[5]}.",
        figures=(*shown, blend, added, learnt, Figure("parameters", found["both"][0]["parameters"])),
        plot=bars("The next item", "NDCG@10", shown, ["most popular", "last item", "mean of four", "both, a fifth"]),
    )  # fmt: skip


def histories(seed: int) -> Tensor:
    """ids (users, 20): each user has a topic; every item has a fixed successor anywhere, followed half of the time."""
    world, g = generator(seed, 1), generator(seed, 2)
    after = torch.randperm(ITEMS, generator=world)
    topic = torch.randint(TOPICS, (USERS,), generator=g)
    per = ITEMS // TOPICS
    liked = topic[:, None] * per + torch.randint(per, (USERS, LENGTH), generator=g)
    chained, ids = torch.rand(USERS, LENGTH, generator=g) < 0.5, liked.clone()
    for t in range(1, LENGTH):
        ids[:, t] = torch.where(chained[:, t], after[ids[:, t - 1]], liked[:, t])
    return ids + 1


def one(lab: Lab, name: str, seed: int) -> dict[str, float]:
    """Train an arm on histories without their last item, and rank all items for it."""
    alpha, distilled, share = ARMS[name]
    torch.manual_seed(seed)
    ids = histories(seed)
    known = ids[:, :-1]
    seen = known[: int(share * USERS)]
    counts = transition_matrix(seen.tolist(), ITEMS).to_dense()
    model = MultiQueryRecommender(ITEMS, 48, LENGTH, window=4, alpha=alpha, heads=2)
    optimizer, g = torch.optim.Adam(model.parameters(), LR), generator(seed, 3)
    for _ in lab.track(range(lab.pick(STEPS, 3)), f"{name}, seed {seed}"):
        rows = seen[torch.randint(len(seen), (BATCH,), generator=g)]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        if distilled:
            asked = torch.randint(1, ITEMS + 1, (128,), generator=g)
            loss = loss + LAMBDA * transition_distillation_loss(
                model.items.weight, counts, asked, dropout=0.2
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        logits = model(known)[:, -1]
    popular = seen.flatten().bincount(minlength=ITEMS + 1).float().expand(USERS, -1)
    return {"ndcg": ndcg(logits, ids[:, -1]), "popular": ndcg(popular, ids[:, -1]),
            "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip


def ndcg(logits: Tensor, target: Tensor) -> float:
    """NDCG@10 with one right item: 1 / log2(rank + 1) where the rank is at most 10. Histories may repeat items."""
    rank = 1 + (logits > logits.gather(1, target[:, None])).sum(1)
    gain = 1 / (rank + 1.0).log2()
    return (
        float(gain.masked_fill(rank > TOP, 0.0).double().mean()) if math.isfinite(float(gain.sum())) else 0.0
    )


def picture() -> dict[str, Any]:
    """How much of each item is in the query."""
    mask = torch.ones(1, 16, dtype=torch.bool)
    mask[0, :3] = False
    shares = windowed_mean_query(torch.eye(16)[None], mask, 4)[0]
    return pictures.weights(
        "The query of the long tower is the mean of the last four items: what each place asks with. Three places of "
        "padding at the left count for nothing.",
        shares,
        columns="item in the query",
        code="windowed_mean_query(x, mask, window=4)",
    )
