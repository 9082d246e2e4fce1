"""Hierarchical self-attention: how near to softmax a tree of lines stays, on queries and keys of a trained model.

A first form, which trained small classifiers of drawn digits, was given up: dense attention did not learn them in the
time, and no other arm was run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.catalogue import pictures
from foveate.catalogue.lab import HOLDS, OPEN, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab.reading import attending, excerpts, reader
from foveate.catalogue.lab.tasks import generator
from foveate.compress import Hierarchy, hierarchical_attention

NEWLINE = 10
COUNTS_IF = (
    "on texts of 512 bytes, over softmax attention (both directions) of the reader's queries and keys, mean of its "
    "layers and heads, all of (95 % intervals over three sets of eight texts, paired): with the tree of lines, at most "
    "a tenth of the scores; divergence from softmax below that of softmax averaged over the same pairs of lines, below "
    "that of softmax over windows and over random keys with as many scores, and below that of a tree of the same shape "
    "over shuffled tokens; relative error of the output below that of the windows and of the random keys"
)
ARMS = ("tree of lines", "softmax averaged", "windows", "random keys", "shuffled tree")


def lines_of(text: Tensor) -> list[int]:
    """The line of each byte; a line ends with its newline."""
    ends = (text == NEWLINE).int()
    return (ends.cumsum(0) - ends).tolist()


def sparse(logits: Tensor, seen: Tensor) -> Tensor:
    return logits.masked_fill(~seen, -torch.inf).softmax(-1)


def averaged(softmax: Tensor, lines: list[int]) -> Tensor:
    """Softmax within lines, its average over each pair of two lines."""
    member = F.one_hot(torch.tensor(lines)).to(softmax)
    member = member / member.sum(0).sqrt()  # columns of unit length
    same = torch.tensor(lines)[:, None] == torch.tensor(lines)
    return torch.where(same, softmax, member @ (member.T @ softmax @ member) @ member.T)


def matrices(q: Tensor, k: Tensor, lines: list[int], g: torch.Generator) -> tuple[dict[str, Tensor], float]:
    """The matrix of each arm, (1, H, N, N), and the scores of the tree as a share of all pairs."""
    n = len(lines)
    tree = Hierarchy.from_segments([lines])
    logits = q @ k.mT * q.shape[3] ** -0.5
    softmax = logits.softmax(-1)
    width = -(-tree.scores // n)  # keys per query of the controls, rounded up
    window = torch.arange(n) // width
    picked = torch.rand(n, n, generator=g).fill_diagonal_(2.0)
    random = picked >= picked.topk(width, -1).values[:, -1:]
    order = torch.randperm(n, generator=g)
    back = order.argsort()
    weigh = partial(hierarchical_attention, v=k, tree=tree, return_weights=True)
    moved = weigh(q[:, :, order], k[:, :, order])[1][:, :, back][..., back]
    return {
        "softmax": softmax,
        "tree of lines": weigh(q, k)[1],
        "softmax averaged": averaged(softmax, lines),
        "windows": sparse(logits, window[:, None] == window),
        "random keys": sparse(logits, random),
        "shuffled tree": moved,
    }, tree.scores / n**2


def measured(lab: Lab, seed: int) -> dict[str, Any]:
    """Mean divergence and output error of each arm, and the share of scores."""
    found: dict[str, list[float]] = {f"{what} {arm}": [] for what in ("KL", "error") for arm in ARMS}
    shares: list[float] = []
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        kept.append((q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    for text in lab.track(list(excerpts(lab.pick(8, 1), lab.pick(512, 128), seed)), f"texts, seed {seed}"):
        kept.clear()
        with torch.no_grad(), attending(reader(), keep):
            reader()(input_ids=text[None])
        for layer, (q, k, v) in enumerate(kept):
            made, share = matrices(q.double(), k.double(), lines_of(text), generator(seed, layer))
            softmax, exact = made["softmax"], made["softmax"] @ v.double()
            for arm in ARMS:
                theta = made[arm]
                kl = torch.special.xlogy(theta, theta) - torch.special.xlogy(theta, softmax)
                found[f"KL {arm}"].append(float(kl.sum(-1).mean()))
                gap = (theta @ v.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
                found[f"error {arm}"].append(float(gap.mean()))
        shares.append(share)
    return {name: sum(values) / len(values) for name, values in {**found, "share": shares}.items()}


def run(lab: Lab) -> Finding:
    """Does a tree of lines stay nearer to softmax attention than other matrices with as few different weights?"""
    runs = [lab.once(f"texts-{seed}", partial(measured, lab, seed)) for seed in lab.seeds]
    values = {name: [run[name] for run in runs] for name in runs[0]}
    kl = {arm: interval(f"divergence: {arm}", values[f"KL {arm}"], "nats") for arm in ARMS}
    error = {arm: interval(f"output error: {arm}", values[f"error {arm}"]) for arm in ARMS}
    share = interval("scores of the tree, of dense", values["share"])
    ours = ARMS[0]
    gains = [
        difference(f"divergence: {arm} - {ours}", values[f"KL {arm}"], values[f"KL {ours}"])
        for arm in ARMS[1:]
    ]
    nearer = [
        difference(f"output error: {arm} - {ours}", values[f"error {arm}"], values[f"error {ours}"])
        for arm in ("windows", "random keys")
    ]
    verdict = all_of(
        HOLDS if share.value <= 0.1 else OPEN, *(judge(figure, 0.0) for figure in (*gains, *nearer))
    )
    return Finding(
        question="Does a tree of lines stay nearer to softmax attention than other matrices with as few weights?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"With {share.value:.1%} of the scores, {kl[ours].value:.3g} nats from softmax ("
        + ", ".join(f"{arm} {kl[arm].value:.3g}" for arm in ARMS[1:])
        + f"); relative error of the output {error[ours].value:.3g} ("
        + ", ".join(f"{arm} {error[arm].value:.3g}" for arm in ARMS[1:])
        + ").",
        figures=(*kl.values(), *error.values(), share, *gains, *nearer),
        plot=bars("Divergence from softmax attention, reader, 512 bytes", "nats per row", list(kl.values()),
                  [figure.name for arm, figure in kl.items() if arm != ours]),
        cost=share.value,
    )  # fmt: skip


def picture() -> dict[str, Any]:
    """One weight per pair of siblings."""
    q, k, v = (torch.randn(1, 1, 48, 16, generator=generator(seed)) for seed in range(3))
    tree = Hierarchy.from_windows(48, [4, 4])
    weights = hierarchical_attention(1.5 * q, 1.5 * k, v, tree, return_weights=True)[1][0, 0]
    return pictures.weights(
        "Tokens of one window see each other one by one; windows, and windows of windows, share one weight.",
        weights.sqrt(),
        code="hierarchical_attention(q, k, v, Hierarchy.from_windows(48, [4, 4])), square roots",
    )
