"""Relative convolutional attention: characters, the four ablations, and rows twice as long as in training."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge
from foveate.catalogue.lab import chars as text
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.layers import RelativeConvAttention, SelfAttention, TransformerLM, relative_attention

DIM, HEADS, DEPTH, STEPS, ROWS, TOKENS, LONGER = 64, 4, 2, 240, 8, 128, 256
ARMS = {  # (convolutions, relative terms); without the latter learned absolute positions
    "MHA": (False, False),
    "MDHA": (True, False),
    "RMHA": (False, True),
    "RCMHA": (True, True),
}
ROTARY = "MHA, rotary"
COUNTS_IF = (
    "three seeds, paired, 95 % intervals. Gate: MHA with learned absolute positions reaches less than 4 bits per byte "
    "of held-out text at 128 tokens, else open. Then all of: RCMHA needs fewer bits than RMHA, and RMHA fewer than "
    "MHA; the last 128 of 256 tokens cost RCMHA fewer bits more, compared with rows of 128, than they cost MHA. MDHA "
    "and MHA with rotation, which has no parameters for positions, are reported and decide nothing"
)


def model_of(name: str) -> TransformerLM:
    """The language model of an arm."""
    conv, relative = ARMS.get(name, (False, False))

    def mixer(layer: int) -> nn.Module:
        if name == ROTARY:
            return SelfAttention(DIM, HEADS)
        return RelativeConvAttention(DIM, HEADS, conv=conv, relative=relative, max_offset=LONGER)

    positions = 0 if relative or name == ROTARY else LONGER
    return TransformerLM(text.VOCAB, DIM, DEPTH, mixer, positions=positions)


def trained(lab: Lab, name: str, seed: int) -> dict[str, float]:
    """Held-out bits per byte on rows as long as in training, and of the last tokens of longer ones."""
    torch.manual_seed(seed)
    model = model_of(name)
    train(lab, model, lambda step: text.rows(ROWS, TOKENS, generator(seed, step)), steps=lab.pick(STEPS, 2), lr=1e-2,
          what=f"{name}, seed {seed}")  # fmt: skip
    few = {"batches": lab.pick(6, 1), "batch": lab.pick(16, 1)}
    return {"bits": text.bits(model, TOKENS, **few), "longer": text.bits(model, LONGER, last=TOKENS, **few)}


def run(lab: Lab) -> Finding:
    """Do convolutions and relative terms each save bits, and do offsets carry to longer rows?"""
    names = (*ARMS, ROTARY)
    runs = {
        name: [lab.once(f"{name.replace(' ', '-')}-{seed}", partial(trained, lab, name, seed)) for seed in lab.seeds]
        for name in names
    }  # fmt: skip
    bits = {name: [r["bits"] for r in found] for name, found in runs.items()}
    more = {name: [r["longer"] - r["bits"] for r in found] for name, found in runs.items()}
    mean = {name: interval(f"bits per byte: {name}", bits[name]) for name in names}
    cost = {name: interval(f"bits more at {LONGER} tokens: {name}", more[name]) for name in names}
    gains = [
        difference("bits, RMHA - RCMHA", bits["RMHA"], bits["RCMHA"]),
        difference("bits, MHA - RMHA", bits["MHA"], bits["RMHA"]),
        difference(f"bits more at {LONGER}, MHA - RCMHA", more["MHA"], more["RCMHA"]),
        difference("bits, MDHA - RCMHA", bits["MDHA"], bits["RCMHA"]),
    ]
    size = [Figure(f"parameters: {n}", sum(p.numel() for p in model_of(n).parameters())) for n in names]
    verdict = OPEN
    if mean["MHA"].value < 4.0:
        verdict = all_of(*(judge(gain, 0.0) for gain in gains[:3]))
    return Finding(
        question="Do convolutions and relative terms each save bits, and do offsets carry to longer rows?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Bits per byte of held-out code at {TOKENS} tokens (and how many more at {LONGER}): "
        + ", ".join(f"{name} {mean[name].value:.2f} ({cost[name].value:+.2f})" for name in names) + ".",
        figures=(*mean.values(), *cost.values(), *gains, *size),
        plot=bars(f"Characters, {DEPTH} layers of {DIM}, {STEPS} steps", "bits per byte", list(mean.values()),
                  [mean[name].name for name in ("MHA", ROTARY)]),
    )  # fmt: skip


def picture() -> dict[str, Any]:
    """Weights of plain logits and a table that prefers some offsets."""
    g = generator(3)
    q, k = torch.randn(1, 1, 48, 16, generator=g), torch.randn(1, 1, 48, 16, generator=g)
    bias = torch.zeros(96, 1)
    offsets = 48 - torch.arange(96)
    bias[(offsets >= 0) & (offsets < 3), 0] = 8.0
    bias[offsets == 12, 0] = 12.0
    table = 0.5 * torch.randn(96, 1, 16, generator=g)
    weights = relative_attention(q, k, torch.eye(48)[None, None], table, bias, torch.zeros(1, 16))
    return pictures.weights(
        "Each offset has a scalar (the same along a diagonal: here it favours the last three keys and the one 12 back) "
        "and a vector that the query reads.",
        weights[0, 0],
        code="relative_attention(q, k, v, R, b, u)",
    )
