"""Selective temperatures: some queries copy one of many tokens, others average sixteen; then rows grow eightfold."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveate.catalogue import pictures
from foveate.catalogue.lab import (
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
from foveate.catalogue.lab.tasks import generator
from foveate.core.attention import attention
from foveate.core.scores import Temperature
from foveate.layers import SelectiveSelfAttention, SelectiveTemperature, SelfAttention

DIM, HEADS, NAME, CLASS, VALUE, MEMBERS, ASKED = 64, 4, 16, 8, 4, 16, 4
FEATURES, LENGTHS, STEPS, ROWS = NAME + CLASS + VALUE + 2, (32, 64, 128, 256), 400, 48
LR = 2e-2  # the best of 3e-3 to 2e-2 for plain attention
COUNTS_IF = (
    "three seeds, paired, 95 % intervals. Gate: plain attention's error at 32 tokens, the length of the training, is "
    "below 0.2 of what answering the mean would give, else open. Then all of: at 256 tokens the error of selective "
    "attention (sigmoid positions) is lower than that of plain attention and than that of plain attention with biases, "
    "which has more parameters; its copying rows have lower entropy than its averaging rows. The parts alone (token, "
    "position, and the released loglog form) are reported and decide nothing"
)
ARMS = {
    "plain": None, "plain with biases": None,
    "selective": {"position": "sigmoid"},
    "selective, loglog": {"position": "loglog"},
    "token only": {"position": None},
    "position only": {"token": False, "position": "sigmoid"},
}  # fmt: skip


def task(rows: int, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens (rows, n + 2 ASKED, FEATURES), answers (rows, 2 ASKED, VALUE)): n items, then questions.

    An item has a name, a class and a value. ASKED questions hold a name: the answer is that item's value. As many hold
    the class that MEMBERS items have: the answer is their mean value, times sqrt(MEMBERS).
    """
    names = F.normalize(torch.randn(rows, n, NAME, generator=g), dim=-1)
    classes = F.normalize(torch.randn(rows, 2, CLASS, generator=g), dim=-1)  # the asked one, and the others'
    values = torch.randn(rows, n, VALUE, generator=g)
    order = torch.rand(rows, n, generator=g).argsort(1)
    inside = order < MEMBERS
    picked = torch.rand(rows, n, generator=g).argsort(1)[:, :ASKED]  # (rows, ASKED)
    tokens = torch.zeros(rows, n + 2 * ASKED, FEATURES)
    tokens[:, :n, :NAME] = names
    tokens[:, :n, NAME : NAME + CLASS] = torch.where(inside[..., None], classes[:, :1], classes[:, 1:])
    tokens[:, :n, NAME + CLASS : -2] = values
    tokens[:, n : n + ASKED, :NAME] = names.gather(1, picked[..., None].expand(-1, -1, NAME))
    tokens[:, n + ASKED :, NAME : NAME + CLASS] = classes[:, :1]
    tokens[:, n : n + ASKED, -2], tokens[:, n + ASKED :, -1] = 1.0, 1.0
    copied = values.gather(1, picked[..., None].expand(-1, -1, VALUE))
    mean = (values * inside[..., None]).sum(1, keepdim=True) / math.sqrt(MEMBERS)
    return tokens, torch.cat([copied, mean.expand(-1, ASKED, -1)], 1)  # all of variance 1


class Reader(nn.Module):
    """One layer of attention between linear maps: tokens -> answers at the questions."""

    def __init__(self, name: str) -> None:
        super().__init__()
        chosen = ARMS[name]
        self.inner, self.outer = nn.Linear(FEATURES, DIM), nn.Linear(DIM, VALUE)
        self.mixer = (
            SelfAttention(DIM, HEADS, rotary=False, bias="biases" in name) if chosen is None
            else SelectiveSelfAttention(DIM, HEADS, rotary=False, **chosen)
        )  # fmt: skip

    def forward(self, tokens: Tensor) -> Tensor:
        return self.outer(self.mixer(self.inner(tokens)))[:, -2 * ASKED :]

    @torch.no_grad()
    def entropy(self, tokens: Tensor) -> Tensor:
        """Nats of the questions' weights, mean over rows, heads and questions of a kind, (copy, average)."""
        mixer, x = self.mixer, self.inner(tokens)
        q, k = (p(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj))
        sharp = getattr(mixer, "tau_q", None)
        tau = torch.ones(1) if sharp is None else sharp(q, torch.arange(x.shape[1]))
        one = torch.eye(x.shape[1]).expand(*k.shape[:2], -1, -1)
        weights = attention(q, k, one, is_causal=True, score=Temperature(tau))
        assert isinstance(weights, Tensor)
        return torch.special.entr(weights[:, :, -2 * ASKED :]).sum(-1).unflatten(2, (2, -1)).mean((0, 1, 3))


def trained(lab: Lab, name: str, seed: int) -> dict[str, Any]:
    """Squared error by length, of copies and averages; and the entropies of both at the last length."""
    torch.manual_seed(seed)
    model = Reader(name)
    steps = lab.pick(STEPS, 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps + 1)
    for step in lab.track(range(steps), f"{name}, seed {seed}"):
        tokens, answers = task(ROWS, LENGTHS[0], generator(seed, step))
        loss = F.mse_loss(model(tokens), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    errors = []
    tokens = torch.zeros(0)
    for n in LENGTHS:
        tokens, answers = task(lab.pick(128, 8), n, generator(7, n))
        with torch.no_grad():
            errors.append((model(tokens) - answers).square().unflatten(1, (2, -1)).mean((0, 2, 3)).tolist())
    return {"errors": errors, "entropy": model.entropy(tokens[:32]).tolist()}


def run(lab: Lab) -> Finding:
    """Do temperatures per token and position keep copying and averaging apart when rows grow eightfold?"""
    runs = {
        name: [lab.once(f"{name.replace(' ', '-')}-{s}", partial(trained, lab, name, s)) for s in lab.seeds]
        for name in ARMS
    }
    error = {name: [[sum(e) / 2 for e in r["errors"]] for r in found] for name, found in runs.items()}
    far = {name: interval(f"error at 256: {name}", [e[-1] for e in rows]) for name, rows in error.items()}
    near = {name: interval(f"error at 32: {name}", [e[0] for e in rows]) for name, rows in error.items()}
    gains = [
        difference(f"error at 256, {name} - selective", [e[-1] for e in error[name]],
                   [e[-1] for e in error["selective"]])
        for name in ("plain", "plain with biases")
    ]  # fmt: skip
    kinds = [
        interval(f"error at 256, {kind}: {name}", [r["errors"][-1][i] for r in runs[name]])
        for name in ("plain", "selective") for i, kind in enumerate(("copies", "averages"))
    ]  # fmt: skip
    entropy = [list(rows) for rows in zip(*(r["entropy"] for r in runs["selective"]), strict=True)]
    apart = difference("entropy of averaging - of copying rows, nats", entropy[1], entropy[0])
    verdict = OPEN
    if near["plain"].value < 0.2:
        verdict = all_of(*(judge(gain, 0.0) for gain in gains), judge(apart, 0.0))
    count = {name: Figure(f"parameters: {name}", sum(p.numel() for p in Reader(name).mixer.parameters()))
             for name in ("plain", "plain with biases", "selective")}  # fmt: skip
    return Finding(
        question="Do temperatures per token and position keep copying and averaging apart when rows grow eightfold?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Squared error at 256 tokens, trained at 32 (answering the mean: 1): "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in far.items())
        + f"; at 32: plain {near['plain'].value:.3f}, selective {near['selective'].value:.3f}.",
        figures=(*far.values(), *near.values(), *gains, *kinds, apart, *count.values()),
        plot=lines(
            f"One copied, {MEMBERS} averaged; trained at 32 tokens", "tokens", "squared error",
            [banded(name, LENGTHS, rows, reference=name == "plain") for name, rows in error.items()], log_x=True,
        ),
    )  # fmt: skip


def picture() -> dict[str, Any]:
    """Weights of rows with temperatures that differ."""
    g = generator(1)
    q, k = torch.randn(1, 1, 48, 16, generator=g), torch.randn(1, 1, 48, 16, generator=g)
    tau = SelectiveTemperature(1, 16, position="sigmoid")
    nn.init.normal_(next(tau.parameters()), generator=g)
    score = Temperature(tau(q, torch.arange(48)).detach())
    weights = attention(q, k, torch.eye(48)[None, None], is_causal=True, score=score)
    assert isinstance(weights, Tensor)
    return pictures.weights(
        "Each row has a temperature of its own, from its token and its position: some look sharply, others broadly.",
        weights[0, 0],
        code="selective_attention(q, k, v, tau(q, positions))",
    )
