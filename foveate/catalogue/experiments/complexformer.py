"""ComplexFormer: does a head that learns how much content angles count predict and copy as well as a rotary head?"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Figure, Finding, Lab, all_of, bars, difference, interval, judge, tiny
from foveate.catalogue.lab.chars import VOCAB, bits, rows
from foveate.catalogue.lab.tasks import generator, passkey, reminders
from foveate.layers import ComplexAttention, TransformerLM, complex_rotate, near_branch_cut

DIM, HEADS, LAYERS, LR = 64, 4, 2, 3e-3
TEXT, TEXT_STEPS, TEXT_BATCH = 128, 150, 8
COPY, COPY_STEPS, COPY_BATCH, TOKENS = 64, 150, 16, 32
ARMS = ("RoPE", "complex", "complex, random start")
COUNTS_IF = (
    "two layers of width 64 and four heads, three seeds, paired, 95 % intervals; RoPE is the same layer with delta = 1 "
    "and bias = 0 held fixed, from the same initial weights. Gate: RoPE repeats at least 0.9 of the marked symbols in "
    "64 tokens, else open. Then both: learnt angles (from delta = 1) cost at most 0.5 % more bits per byte of held-out "
    "text than RoPE, and repeat at most 0.02 fewer of the symbols. Whether they are better is reported beside it"
)


def made(arm: str, seed: int, vocab: int) -> TransformerLM:
    """The same weights in every arm of a seed, apart from delta."""
    torch.manual_seed(seed)
    model = TransformerLM(vocab, DIM, LAYERS, lambda layer: ComplexAttention(DIM, HEADS))
    for block in model.blocks:
        mixer: Any = block.mixer
        mixer.delta.requires_grad_(arm != "RoPE")
        mixer.angle.requires_grad_(arm != "RoPE")
        if arm == "complex, random start":
            torch.nn.init.normal_(mixer.delta, std=(2 / mixer.head_dim) ** 0.5)
    return model


def on_text(lab: Lab, arm: str, seed: int) -> dict[str, float]:
    """Held-out bits per byte; how far delta moved, and pairs near the cut (uniform phases: 0.03)."""
    model = made(arm, seed, VOCAB)
    length = lab.pick(TEXT, 16)
    tiny.train(lab, model, lambda step: rows(TEXT_BATCH, length, generator(seed, step)),
               steps=lab.pick(TEXT_STEPS, 3), lr=LR, weight_decay=0.0, what=f"{arm}, text {seed}")  # fmt: skip
    heard: list[Tensor] = []
    mixer: Any = model.blocks[1].mixer  # pyright: ignore[reportIndexIssue]
    hook = mixer.q_proj.register_forward_hook(lambda m, args, out: heard.append(out))
    value = bits(model, length, batches=lab.pick(8, 1))
    hook.remove()
    near = near_branch_cut(heard[0].unflatten(2, (HEADS, -1)).transpose(1, 2)).mean()
    return {"bits": value, "moved": float((mixer.delta - 1).abs().mean()), "near": float(near)}


def on_copies(lab: Lab, arm: str, seed: int) -> float:
    """Share of marked symbols, 1 to 60 tokens back, that are repeated at the end."""
    model, g = made(arm, seed, TOKENS), generator(seed, 1, 99)
    tiny.train(lab, model, lambda step: reminders(lab.pick(COPY_BATCH, 2), COPY, TOKENS, generator(seed, step)),
               steps=lab.pick(COPY_STEPS, 3), lr=LR, weight_decay=0.0, what=f"{arm}, copies {seed}")  # fmt: skip
    count = lab.pick(512, 8)
    return tiny.accuracy(
        lab, model, [passkey(count, COPY, torch.randint(1, 61, (count,), generator=g), TOKENS, g)]
    )


def run(lab: Lab) -> Finding:
    """Does a head that learns how much content angles count do as well as a rotary head?"""
    text = {arm: [lab.once(f"text-{i}-{seed}", partial(on_text, lab, arm, seed)) for seed in lab.seeds]
            for i, arm in enumerate(ARMS)}  # fmt: skip
    copied = {arm: [lab.once(f"copies-{i}-{seed}", partial(on_copies, lab, arm, seed)) for seed in lab.seeds]
              for i, arm in enumerate(ARMS)}  # fmt: skip
    lost = {arm: [r["bits"] for r in found] for arm, found in text.items()}
    bit = {arm: interval(f"bits per byte: {arm}", values) for arm, values in lost.items()}
    copy = {arm: interval(f"repeated: {arm}", values) for arm, values in copied.items()}
    ours, plain = "complex", "RoPE"
    saved = difference("share of bits saved by complex", [a / b for a, b in zip(lost[plain], lost[ours], strict=True)],
                       [1.0] * len(lab.seeds))  # fmt: skip
    gain = difference("repeated, complex - RoPE", copied[ours], copied[plain])
    moved = interval("mean change of delta in layer 2, text", [r["moved"] for r in text[ours]])
    near = interval("queries' pairs within 0.1 of the cut", [r["near"] for r in text[ours]])
    verdict = all_of(judge(saved, -0.005), judge(gain, -0.02)) if copy[plain].value >= 0.9 else OPEN
    better = "more" if saved.value < 0 else "fewer"
    return Finding(
        question="Does a head that learns how much content angles count do as well as a rotary head?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Learnt angles cost {abs(saved.value):.1%} {better} bits per byte than RoPE "
        f"({bit[ours].value:.3f} and {bit[plain].value:.3f}) and repeated {copy[ours].value:.0%} of marked symbols "
        f"({copy[plain].value:.0%}); from a random start {bit[ARMS[2]].value:.3f} bits and {copy[ARMS[2]].value:.0%}.",
        figures=(*bit.values(), *copy.values(), saved, gain, moved, near),
        plot=bars("Held-out text, two layers", "bits per byte", [Figure(arm, f.value, f.low, f.high, f.n)
                                                                for arm, f in bit.items()], [plain]),
    )  # fmt: skip


def picture() -> dict[str, Any]:
    """Scores of one query with keys of the same length: by distance down, by content angle across."""
    turns = torch.linspace(-torch.pi, torch.pi, 65)[:-1]
    keys = torch.stack([turns.cos(), turns.sin()], 1)  # one pair of channels
    rows = []
    for distance in range(48):
        q = complex_rotate(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[0.5]]), torch.tensor([distance]))
        k = complex_rotate(keys[None, None], torch.tensor([[0.5]]), torch.zeros(64, dtype=torch.int64))
        rows.append((q @ k.transpose(-1, -2))[0, 0, 0])
    return pictures.weights(
        "One pair, delta = 0.5: distances turn the score as in rotary attention, angles of content half as fast, and "
        "where they wrap (left and right end) it jumps.",
        1 + torch.stack(rows),
        rows="distance",
        columns="content angle of the key",
        code="complex_rotate(q, delta, m) @ complex_rotate(k, delta, n).T",
    )
