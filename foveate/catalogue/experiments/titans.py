"""Titans: what one reading leaves in a memory, and facts answered far beyond the window it stands beside."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor
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
    proportion,
)
from foveate.catalogue.lab.facts import Facts
from foveate.catalogue.lab.tasks import generator
from foveate.layers import NeuralMemory, SelfAttention, TitansBlock, TransformerLM
from foveate.linear import MemoryState, memorise, memory_read

DIM, HEADS, LAYERS, WINDOW, STEPS = 64, 4, 2, 16, 200
TASK = Facts(256, (1, 17, 33, 65, 97, 129, 193, 256))
FAR = 96  # six windows; what two layers of the window of equal state reach is less
MOMENTA, STEP_SIZES = (0.0, 0.8), (0.05, 0.1, 0.2, 0.4, 0.8)
COUNTS_IF = (
    "95 % intervals. Untrained, 64 unit keys of 32 numbers written once, 16 draws, all of: with steps of 0.1, momentum "
    "0.8 leaves less error than none; two layers leave less than one, each at the rates that are best for it on other "
    "draws; of a key written twice, forgetting 0.02, the newer value is nearer in more than 0.9 of 64 draws. Trained, "
    "three seeds, paired, gate: full attention answers at least 0.95 of the questions about facts more than 96 tokens "
    "back, else open; then mag with a window of 16 answers more by 0.2 than each of: the window alone with as many "
    "parameters, a window that holds as many bytes as mag's state, and mag whose memory never writes"
)


# ------------------------------------------------------------------------------------- one reading, untrained
def drawn(seed: int, draws: int, n: int = 64, d: int = 32) -> tuple[Tensor, Tensor]:
    """Unit keys and unit values, (draws, 1, n, d)."""
    g = generator(seed)
    k, v = (F.normalize(torch.randn(draws, 1, n, d, generator=g), dim=-1) for _ in range(2))
    return k, v


def written(k: Tensor, v: Tensor, depth: int, eta: float, theta: float, alpha: float = 0.0) -> MemoryState:
    """The memory after one reading, a step per token; one layer starts at 0, two at random with 2 d inside."""
    draws, _, n, d = k.shape
    g = generator(17, depth)
    shapes = [(d, d)] if depth == 1 else [(2 * d, d), (d, 2 * d)]
    start = [torch.randn(1, o, i, generator=g) * i**-0.5 * (depth > 1) for o, i in shapes]
    momentum, step, forget = (torch.full((draws, 1, n), r) for r in (eta, theta, alpha))
    return memorise(k, k, v, momentum, step, forget, MemoryState.start(start, draws), chunk=1)[1]


def error(seed: int, draws: int, depth: int, eta: float, theta: float) -> list[float]:
    """|M(k) - v|^2 after the reading, a mean over the keys of each draw (1: nothing is known)."""
    k, v = drawn(seed, draws)
    left = (memory_read(written(k, v, depth, eta, theta).weights, k) - v).square().sum(-1)
    return [min(x, 1e6) for x in left.mean((1, 2)).nan_to_num(1e6).tolist()]


def best(depth: int, momenta: tuple[float, ...]) -> tuple[float, float]:
    """The momentum and the step size with the least error on draws of their own."""
    means = {rates: sum(error(1, 8, depth, *rates)) for rates in itertools.product(momenta, STEP_SIZES)}
    return min(means, key=lambda rates: means[rates])


def newest(draws: int) -> Figure:
    """Share of draws in which a key written at 0 and at 32 of 40 reads nearer to the second value."""
    k, v = drawn(3, draws, 40)
    k[:, :, 32] = k[:, :, 0]
    read = memory_read(written(k, v, 1, 0.5, 0.1, 0.02).weights, k[:, :, :1])[:, 0]  # (draws, 1, d)
    near = (read - v[:, 0, 32:33]).norm(dim=-1) < (read - v[:, 0, :1]).norm(dim=-1)
    return proportion("the newer of two values is nearer", int(near.sum()), draws)


def one_reading(lab: Lab) -> tuple[list[Figure], str]:
    draws = lab.pick(16, 4)
    at = partial(error, 2, draws)
    plain, pushed = (at(1, eta, 0.1) for eta in MOMENTA)
    momentum = difference(f"error: no momentum - momentum {MOMENTA[1]}, steps of 0.1", plain, pushed)
    tuned = {depth: at(depth, *best(depth, MOMENTA)) for depth in (1, 2)}
    depth = difference("error: one layer - two, best rates", tuned[1], tuned[2])
    last = newest(lab.pick(64, 8))
    shown = []
    for layers, eta in itertools.product((1, 2), MOMENTA):
        rates = best(layers, (eta,))
        shown.append(interval(f"error: layers {layers}, momentum {eta}, step {rates[1]}", at(layers, *rates)))
    verdict = all_of(judge(momentum, 0.0), judge(depth, 0.0), judge(last, 0.9))
    return [momentum, depth, last, *shown], verdict


# -------------------------------------------------------------------------------------------------- trained
def mag(max_step: float) -> TitansBlock:
    memory = NeuralMemory(DIM, HEADS, depth=1, chunk=32, max_step=max_step)
    return TitansBlock(DIM, HEADS, "mag", window=WINDOW, memory=memory)


def model_of(name: str) -> TransformerLM:
    """A model by its arm; those without a memory get wider MLPs until they have as many parameters."""
    if name.startswith("mag"):
        return TransformerLM(TASK.vocab, DIM, LAYERS, lambda _: mag(0.0 if "never" in name else 0.1))
    block, x = mag(0.1), torch.zeros(1, 100, DIM)
    state = block(x, state=block.initial_state(x))[1].nbytes
    window = {"full": None, "window": WINDOW, "window, equal state": 1 + -(-state // (2 * DIM * 4))}[name]
    mixer = SelfAttention(DIM, HEADS, window=window)
    more = sum(p.numel() for p in block.parameters()) - sum(p.numel() for p in mixer.parameters())
    wider = 8 / 3 + more / (3 * DIM * DIM)
    return TransformerLM(
        TASK.vocab, DIM, LAYERS, lambda _: SelfAttention(DIM, HEADS, window=window), mlp=wider
    )


ARMS = ("full", "mag", "mag, never writing", "window", "window, equal state")


def trained(lab: Lab, name: str, seed: int) -> dict[str, Any]:
    """Share of questions answered by distance, and beyond FAR."""
    torch.manual_seed(seed)
    model = model_of(name)
    TASK.learn(lab, model, lab.pick(STEPS, 3), seed, f"{name}, seed {seed}")
    near, far, _ = TASK.answered(model, lab.pick(128, 4), FAR)
    return {"near": near, "far": far}


def run(lab: Lab) -> Finding:
    """Does a memory that learns while it reads keep what a window has passed?"""
    untrained, verdict = one_reading(lab)
    runs = {
        name: [
            lab.once(f"{name.replace(', ', '-').replace(' ', '-')}-{seed}", partial(trained, lab, name, seed))
            for seed in lab.seeds
        ]
        for name in ARMS
    }
    far = {name: [r["far"] for r in found] for name, found in runs.items()}
    mean = {name: interval(f"answered beyond {FAR}: {name}", values) for name, values in far.items()}
    gains = [difference(f"mag - {name}", far["mag"], far[name]) for name in ARMS[2:]]
    gate = mean["full"].value >= 0.95
    verdict = all_of(verdict, *(judge(gain, 0.2) for gain in gains)) if gate else OPEN
    return Finding(
        question="Does a memory that learns while it reads keep what a window has passed?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Questions about facts more than {FAR} tokens back answered beside a window of {WINDOW}: "
        + ", ".join(f"{name} {figure.value:.3g}" for name, figure in mean.items())
        + f"; untrained, momentum lowers the error by {untrained[0].value:.2g}, a second layer by "
        f"{untrained[1].value:.2g}, and the newer of two values wins in {untrained[2].value:.0%}.",
        figures=(*mean.values(), *gains, *untrained),
        plot=lines(
            f"Facts asked for, two layers, window {WINDOW}",
            "distance (tokens)",
            "share answered",
            [
                banded(name, TASK.middles, [r["near"] for r in found], most=1.0, reference=name == "full")
                for name, found in runs.items()
            ],
        ),
    )


def picture() -> dict[str, Any]:
    """How much of each token's step is in the weights after every token."""
    n = 48
    keys, values = torch.eye(n)[None, None], torch.ones(1, 1, n, 1)
    eta, theta, alpha = (torch.full((1, 1, n), r) for r in (0.8, 0.5, 0.05))
    alpha[..., 30] = 0.8  # one token forgets nearly all
    state, rows = MemoryState.start([torch.zeros(1, 1, 1, n)]), []
    for t in range(n):
        k, v, *rates = (x[:, :, t : t + 1] for x in (keys, values, eta, theta, alpha))
        _, state = memorise(k, k, v, rates[0], rates[1], rates[2], state, chunk=n)
        rows.append(state.weights[0][0, 0, 0])
    return pictures.weights(
        "How much of each token's step is in the weights after later tokens. Momentum lets it grow for a while, "
        "forgetting lets it fade; token 30 is one at which the memory is told to forget.",
        torch.stack(rows),
        rows="after token",
        columns="step of token",
        code="memorise(q, k, v, eta=0.8, theta=0.5, alpha=0.05)",
    )
