"""TransNormerLLM: text with decaying linear attention, without decay and with softmax; and what a token costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    HOLDS,
    OPEN,
    Figure,
    Finding,
    Lab,
    all_of,
    bars,
    chars,
    difference,
    interval,
    judge,
    slope,
)
from foveate.catalogue.lab.counting import multiply_adds
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.layers import SelfAttention, SimpleGLU, TransNormerLLM
from foveate.linear import alibi_decay, lightning_attention

TOKENS, DIM, DEPTH, HEADS, STEPS, BATCH, RATE = 128, 64, 2, 4, 350, 8, 3e-3
ARMS = ("TNL", "TNL without decay", "softmax")
MARGIN, LEARNT = 1.05, 3.5
COUNTS_IF = (
    f"three seeds, paired, 95 % intervals, held-out bits per byte of a model of two layers after {STEPS} steps. Gate: "
    f"softmax needs fewer than {LEARNT} bits, else open. Then all of: TNL needs fewer bits than the same model without "
    f"decay; TNL needs fewer than {MARGIN} times the bits of softmax attention in a model of as many parameters "
    "(within 2 %); multiply-adds of the operator grow with the tokens, 1,024 to 16,384, with an exponent between 0.99 "
    "and 1.01, where the N x N form of it has one above 1.9; the state of decoding has the same bytes after 8 tokens "
    "as after 512"
)


def model(name: str) -> nn.Module:
    """One of the arms; softmax has a wider gated unit in place of the output gate."""
    made = TransNormerLLM(chars.VOCAB, DIM, DEPTH, HEADS, decay="none" if name == ARMS[1] else "slopes")
    if name == "softmax":
        gate = 2 * DIM * (DIM // HEADS)
        for block in made.blocks:
            block.mixer = SelfAttention(DIM, HEADS)
            block.glu = SimpleGLU(DIM, round(8 / 3 * DIM + gate / (3 * DIM)))
    return made


def trained(lab: Lab, name: str, seed: int) -> float:
    """Held-out bits per byte."""
    torch.manual_seed(seed)
    made, steps = model(name), lab.pick(STEPS, 12)
    batch = lab.pick(BATCH, 4)
    train(lab, made, lambda step: chars.rows(batch, TOKENS, generator(seed, step)), steps=steps, lr=RATE,
          what=f"{name}, seed {seed}")  # fmt: skip
    return chars.bits(made, TOKENS, batches=lab.pick(8, 1))


def counted(lab: Lab) -> list[Figure]:
    """Exponents of the multiply-adds of one head in the number of tokens: tile by tile, and as N x N products."""
    decay, found = alibi_decay(1), []
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
        "tiles": lambda q, k, v: lightning_attention(q, k, v, decay),
        "N x N": lambda q, k, v: (q @ k.transpose(2, 3)).tril() @ v,
    }
    for name, sizes in (
        ("tiles", lab.pick((1024, 4096, 16384), (256, 512, 1024))),
        ("N x N", (256, 512, 1024)),
    ):
        work = []
        for n in sizes:
            q = k = v = torch.zeros(1, 1, n, 64)
            work.append(multiply_adds(lambda name=name, q=q, k=k, v=v: ways[name](q, k, v)))
        found.append(slope(f"growth of multiply-adds, {name}", sizes, work))
    return found


def decoding(lab: Lab) -> list[Figure]:
    """Bytes of the state after few and after many tokens."""
    made, short, long = model("TNL"), 8, lab.pick(512, 24)
    ids, _ = chars.rows(1, long, generator(0))
    with torch.no_grad():
        state = made.initial_state(ids)  # pyright: ignore[reportCallIssue]
        found = []
        for t in range(long):
            _, state = made.step(ids[:, t : t + 1], state)  # pyright: ignore[reportCallIssue]
            if t + 1 in (short, long):
                found.append(Figure(f"bytes of state after {t + 1} tokens", sum(s.nbytes for s in state)))
    return found


def run(lab: Lab) -> Finding:
    """Does decaying linear attention without softmax predict text like softmax, at a cost per token that stays?"""
    bits = {
        name: [lab.once(f"{name.replace(' ', '-')}-{seed}", partial(trained, lab, name, seed)) for seed in lab.seeds]
        for name in ARMS
    }  # fmt: skip
    mean = {name: interval(f"bits per byte: {name}", values) for name, values in bits.items()}
    sizes = {name: sum(p.numel() for p in model(name).parameters()) for name in ARMS}
    gain = difference("bits that the decay saves", bits["TNL without decay"], bits["TNL"])
    room = difference(
        f"{MARGIN} times softmax's bits less TNL's", [MARGIN * b for b in bits["softmax"]], bits["TNL"]
    )
    tiles, square = counted(lab)
    short, long = decoding(lab)
    verdict = OPEN
    if (
        mean["softmax"].value < LEARNT
        and abs(sizes["softmax"] / sizes["TNL"] - 1) < 0.02
        and square.value > 1.9
    ):
        costs = abs(tiles.value - 1) < 0.01 and short.value == long.value
        verdict = all_of(judge(gain, 0), judge(room, 0), HOLDS if costs else OPEN)
    return Finding(
        question="Does decaying linear attention without softmax predict text like softmax, at a cost per token that "
        "stays?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Held-out bits per byte: "
        + ", ".join(f"{name} {figure.value:.3f}" for name, figure in mean.items())
        + f"; multiply-adds grow as N^{tiles.value:.3f} (N x N form: N^{square.value:.2f}).",
        figures=(
            *mean.values(), gain, room, tiles, square, short, long,
            *(Figure(f"parameters: {name}", n) for name, n in sizes.items()),
        ),
        plot=bars(f"Text, two layers, {STEPS} steps", "held-out bits per byte", list(mean.values()),
                  [mean["softmax"].name]),
        quality=statistics.mean(bits["softmax"]) / statistics.mean(bits["TNL"]),
        cost=(64 + DIM // HEADS) / ((TOKENS + 1) / 2),  # at so few tokens tiles of 64 save nothing
    )  # fmt: skip


def picture() -> dict[str, Any]:
    """What the operator multiplies a pair by: four heads of the first of three layers, then of the second."""
    ones, eye = torch.ones(1, 4, 48, 1), torch.eye(48).expand(1, 4, 48, 48)
    rows = []
    for layer in (0, 1):
        maps = lightning_attention(ones, ones, eye, alibi_decay(4, layer, 3))
        assert isinstance(maps, torch.Tensor)
        rows.append(torch.cat(list(maps[0]), 1))  # (48, 4 * 48)
    return pictures.weights(
        "Four heads side by side, first layer above, second of three below: each forgets at its own rate, deeper "
        "layers more slowly, and the last one (not shown) hardly at all.",
        torch.cat(rows),
        code="lightning_attention(ones, ones, eye, alibi_decay(4, layer, 3))",
    )
