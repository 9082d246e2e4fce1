"""AutoInt: planted crosses of three columns, found by depth, and shown by the weights."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.catalogue import pictures
from foveate.catalogue.lab import Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.tasks import generator
from foveate.layers import AutoInt, field_affinity

FIELDS, VALUES, ROWS, TEST = 8, 4, 20_000, 10_000
PLANTED = ((0, 3, 6), (1, 4, 7))  # columns 2 and 5 count by themselves
STEPS, BATCH, LR = 500, 256, 3e-3
ARMS: dict[str, tuple[int, ...]] = {
    "logistic regression": (),
    "one wide layer": (512,),
    "three layers": (64, 64, 64),
}
COUNTS_IF = (
    "20,000 click records of 8 columns with 4 values each; two crosses of three columns each, which no one or two of "
    "them foretell, and two columns that count by themselves; three seeds: the area under the curve of three layers is "
    "above logistic regression by 0.1 and above one layer of at least as many parameters; and in the mean over "
    "records, layers and heads the two other columns of a cross are the two that a column weighs most (itself left "
    "out; 1 in 21 by chance) for at least half of the six crossed columns. The best possible prediction must be above "
    "0.85, else the data say nothing."
)


def run(lab: Lab) -> Finding:
    """Do stacked interacting layers find crosses of three columns, and do the weights show them?"""
    found = {name: [lab.once(f"{name}-{seed}".replace(" ", "_"), lambda n=name, s=seed: one(lab, n, s))
                    for seed in lab.seeds] for name in ARMS}  # fmt: skip
    auc = {name: [r["auc"] for r in results] for name, results in found.items()}
    best = interval("best possible", [r["best"] for r in found["three layers"]])
    linear = difference("three layers - logistic regression", auc["three layers"], auc["logistic regression"])
    wide = difference("three layers - one wide layer", auc["three layers"], auc["one wide layer"])
    partners = interval("columns whose partners weigh most", [r["partners"] for r in found["three layers"]])
    of_one = interval("the same in one layer", [r["partners"] for r in found["one wide layer"]])
    shown = [best, *(interval(name, values) for name, values in auc.items())]
    return Finding(
        question="Do stacked interacting layers find crosses of three columns, and do the weights show them?",
        counts_if=COUNTS_IF,
        verdict=all_of(judge(best, above=0.85), judge(linear, above=0.1), judge(wide, above=0.0),
                       judge(partners, above=0.5 - 1e-9)),
        summary=f"Three layers reach an area under the curve of {shown[3]} of a possible {best}, logistic regression "
        f"{shown[1]}, one wide layer {shown[2]}; both partners weigh most for {partners} of the crossed columns.",
        figures=(*shown, linear, wide, partners, of_one,
                 *(Figure(f"parameters, {name}", found[name][0]["parameters"]) for name in ARMS)),
        plot=bars("Planted crosses of three columns", "area under the curve", shown,
                  ["best possible", *list(ARMS)[:2]]),
    )  # fmt: skip


def clicks(seed: int, rows: int, part: int) -> tuple[Tensor, Tensor, Tensor]:
    """Records (rows, 8), clicks (rows,), and the logits they were drawn from. Half of a column's values are signs +."""
    world, g = generator(seed, 1), generator(seed, 2, part)
    sign = torch.stack([torch.randperm(VALUES, generator=world) for _ in range(FIELDS)]) < VALUES // 2
    cat = torch.randint(VALUES, (rows, FIELDS), generator=g)
    s = 2.0 * sign[torch.arange(FIELDS), cat].float() - 1  # (rows, 8)
    logits = 2.5 * sum(s[:, list(cross)].prod(1) for cross in PLANTED) + 0.5 * (s[:, 2] + s[:, 5])
    return cat, (torch.rand(rows, generator=g) < logits.sigmoid()).float(), logits


class Logistic(nn.Module):
    """One weight for every value of every column."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(FIELDS, VALUES)), nn.Parameter(torch.zeros(()))

    def forward(self, cat: Tensor) -> Tensor:
        return self.weight[torch.arange(FIELDS), cat].sum(1) + self.bias


def one(lab: Lab, name: str, seed: int) -> dict[str, float]:
    """Train an arm and test it."""
    torch.manual_seed(seed)
    cat, y, _ = clicks(seed, lab.pick(ROWS, 1000), 0)
    model = AutoInt([VALUES] * FIELDS, layers=ARMS[name]) if ARMS[name] else Logistic()
    optimizer = torch.optim.Adam(model.parameters(), LR)
    g = generator(seed, 3)
    for _ in lab.track(range(lab.pick(STEPS, 5)), f"{name}, seed {seed}"):
        at = torch.randint(len(cat), (BATCH,), generator=g)
        loss = F.binary_cross_entropy_with_logits(model(cat[at]), y[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    held, clicked, logits = clicks(seed, lab.pick(TEST, 500), 1)
    with torch.no_grad():
        result = {"auc": area(model(held), clicked), "best": area(logits, clicked)}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    if isinstance(model, AutoInt):
        mean = field_affinity(model, [(held[:2000], None)]).mean((0, 1)).fill_diagonal_(-1.0)  # (M, M)
        top = mean.topk(2, 1).indices.tolist()
        result["partners"] = statistics.mean(
            set(top[m]) == set(cross) - {m} for cross in PLANTED for m in cross
        )
    return result


def area(score: Tensor, clicked: Tensor) -> float:
    """Area under the ROC curve: how often a click scores above no click; equal scores count half."""
    values, at, counts = score.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[at].double()  # from 1, the mean of equal ones
    hits = float(clicked.sum())
    return (float(rank[clicked > 0].sum()) - hits * (hits + 1) / 2) / (hits * (len(values[at]) - hits))


def picture() -> dict[str, Any]:
    """The weights of a small model on one record."""
    torch.manual_seed(1)
    model = AutoInt([VALUES] * FIELDS, layers=(16,), heads=1)
    model.embed.table.data.mul_(300)
    return pictures.weights(
        "How much each column of one record reads from each column, in one head. Averaged over records, the weights "
        "say which columns a model combines.",
        model.weights(torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))[0, 0, 0].detach(),
        rows="column",
        columns="column it reads",
        code="AutoInt([4] * 8).weights(cat)[layer, record, head]",
    )
