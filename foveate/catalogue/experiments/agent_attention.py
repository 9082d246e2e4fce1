"""Agent attention: digits, against softmax and against linear attention with the same parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    OPEN,
    Figure,
    Finding,
    Lab,
    all_of,
    bars,
    difference,
    interval,
    judge,
)
from foveate.catalogue.lab.digits import TinyViT, batches, score
from foveate.catalogue.lab.image_mixers import ImageMixer
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.compress import agent_attention, pool_agents
from foveate.layers import AgentAttention2d

SIZE, PATCH, DIM, HEADS, AGENTS = 16, 2, 32, 2, 9
SIDE = SIZE // PATCH
GRID = (SIDE, SIDE)
STEPS, BATCH, RATE, POSITIONS = 300, 32, 1e-2, 0.5  # chosen on softmax alone
COUNTS_IF = (
    "three seeds, paired, 95 % intervals, 360 test images. Gate: softmax recognises at least 0.85 of them, else open. "
    "Then all of: agent attention without biases and convolution, whose parameters are those of softmax and of linear "
    "attention with a ReLU map, recognises more than the latter; the whole layer recognises more than linear attention "
    "with the same convolution; and the whole layer recognises more than softmax's share less 0.01"
)
ARMS = {
    "softmax": lambda _: ImageMixer(DIM, HEADS, "softmax"),
    "agent": lambda _: AgentAttention2d(DIM, HEADS, GRID, agents=AGENTS),
    "bare agent": lambda _: AgentAttention2d(
        DIM, HEADS, GRID, agents=AGENTS, depthwise=False, position=False
    ),
    "linear": lambda _: ImageMixer(DIM, HEADS, "linear"),
    "linear + conv": lambda _: ImageMixer(DIM, HEADS, "linear", GRID),
}


def trained(lab: Lab, name: str, seed: int) -> float:
    """Share of the test images that the arm recognises."""
    torch.manual_seed(seed)
    model = TinyViT(ARMS[name], size=SIZE, patch=PATCH, dim=DIM)
    nn.init.normal_(model.positions, std=POSITIONS, generator=generator(seed, 1))
    train(
        lab,
        model,
        batches(seed, lab.pick(BATCH, 4), SIZE),
        steps=lab.pick(STEPS, 4),
        lr=RATE,
        what=f"{name}, seed {seed}",
    )
    return score(model, SIZE)


def run(lab: Lab) -> Finding:
    """Do a few agents recognise what softmax does, where linear attention with as many parameters does not?"""
    found = {
        name: [
            lab.once(f"{name.replace(' ', '')}-{seed}", partial(trained, lab, name, seed))
            for seed in lab.seeds
        ]
        for name in ARMS
    }
    mean = {name: interval(f"recognised: {name}", values) for name, values in found.items()}
    gains = [
        difference(f"{a} - {b}", found[a], found[b])
        for a, b in (("bare agent", "linear"), ("agent", "linear + conv"), ("agent", "softmax"))
    ]
    verdict = OPEN
    if mean["softmax"].value >= 0.85:
        verdict = all_of(*(judge(gain, above) for gain, above in zip(gains, (0, 0, -0.01), strict=True)))
    tokens = SIDE**2
    work = Figure(
        "multiply-adds of agent attention and convolution over softmax's",
        (4 * AGENTS + 9) / (2 * tokens),
    )
    return Finding(
        question="Do a few agents recognise what softmax does, where linear attention of as many parameters does not?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Digits recognised with {AGENTS} agents for {tokens} tokens: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in mean.items())
        + f"; the agents cost {work.value:.2f} of softmax's multiply-adds.",
        figures=(*mean.values(), *gains, work),
        plot=bars(
            f"Digits, two layers, {tokens} tokens, {AGENTS} agents",
            "share recognised",
            [Figure(name, f.value, f.low, f.high, f.n) for name, f in mean.items()],
            ["softmax", "linear", "linear + conv"],
        ),
        quality=mean["agent"].value / mean["softmax"].value,
        cost=work.value,
    )


def picture() -> dict[str, Any]:
    """The weights of all pairs that four agents make."""
    side, g = 8, generator(4)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    at = torch.stack([y, x]).flatten(1).T / side  # (64, 2)
    features = torch.randn(2, 24, generator=g)
    q = torch.cat([(2 * torch.pi * at @ features / 2).sin(), (2 * torch.pi * at @ features / 2).cos()], 1)
    q = 1.5 * q[None, None]  # (1, 1, 64, 48)
    agents = pool_agents(q, (2, 2), (side, side))
    whole = agent_attention(q, q, torch.eye(side * side)[None, None], agents)
    return pictures.weights(
        "An 8 x 8 map, row by row, and four agents, the means of its quarters. Each agent reads the keys it resembles "
        "and tells the queries that resemble it: the weights of all pairs are a matrix of rank four.",
        whole[0, 0],
        code="agent_attention(q, k, torch.eye(64)[None, None], pool_agents(q, (2, 2), (8, 8)))",
    )
