"""Entropy-ABF: how spread the reader's attention gets, and what it predicts, beyond the window it was trained with."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.catalogue import pictures
from foveate.catalogue.lab import OPEN, Finding, Lab, all_of, banded, difference, interval, judge, lines
from foveate.catalogue.lab.tasks import generator
from foveate.hf import (
    ABF,
    NTK,
    ContextExtension,
    EntropyABF,
    PositionInterpolation,
    YaRN,
    apply_context_extension,
    entropy_by_length,
    log_length_scale,
)

TRAINED, FACTOR, DEEP = 4096, 4, (2, 3)  # reader's window; layers with the factor on queries
PLACES, QUERIES, STEP = (
    (0.25, 0.5, 1, 2, 3, 4),
    16,
    7,
)  # of the window; queries that end there, so many tokens apart
ARMS: dict[str, ContextExtension | None] = {
    "no change": None,
    "PI": PositionInterpolation(FACTOR),
    "NTK": NTK(FACTOR),
    "YaRN": YaRN(FACTOR),
    "ABF": ABF(500_000.0),
    "Entropy-ABF": EntropyABF(500_000.0),
}
COUNTS_IF = (
    "reader (trained with 4,096 bytes), untuned, one held-out text of 16,384 bytes per seed, paired differences with "
    "95 % intervals over three seeds. Gate: without a change the last quarter costs more than 0.1 bits per byte more "
    "than the first, else open. Then all of: from 4,096 to 16,384 the entropy of attention in layers 2 and 3 grows "
    "less with Entropy-ABF than with each of no change, PI, NTK, YaRN and ABF; and the last quarter costs fewer bits "
    "with Entropy-ABF than with PI"
)


def text_of(seed: int, length: int) -> Tensor:
    """(1, length + 1) held-out bytes from a random place."""
    from foveate.organisms.reader.data import stdlib_text

    text = stdlib_text(held_out=True)
    at = int(torch.randint(len(text) - length - 1, (1,), generator=generator(seed, 11)))
    return torch.frombuffer(bytearray(text[at : at + length + 1]), dtype=torch.uint8).long()[None]


def measured(lab: Lab, arm: str, seed: int) -> dict[str, Any]:
    """Bits per byte in each quarter of a text of four windows, and the mean entropy in the deep layers by length."""
    from foveate import organisms

    window = lab.pick(TRAINED, 64)
    model, _ = organisms.load("reader")
    ids, heard = text_of(seed, FACTOR * window), []
    method = ARMS[arm]
    handle = apply_context_extension(model, method, train_length=window) if method else None
    hook = model.register_forward_hook(lambda module, args, out: heard.append(out.logits))
    queries = lab.pick(QUERIES, 2)
    lengths = [int(p * window) - STEP * i for p in PLACES for i in range(queries)]
    entropy = (
        entropy_by_length(model, ids[:, :-1], lengths, DEEP).entropy.mean((1, 2)).view(len(PLACES), queries)
    )
    hook.remove()
    if handle:
        handle.remove()
    ce = torch.nn.functional.cross_entropy(heard[0][0], ids[0, 1:], reduction="none") / math.log(2)
    return {"bits": ce.view(FACTOR, -1).mean(1).tolist(), "entropy": entropy.mean(1).tolist()}


def run(lab: Lab) -> Finding:
    """Does attention stay as sharp beyond the trained window with Entropy-ABF, and does the model still predict?"""
    runs = {arm: [lab.once(f"{arm.replace(' ', '-')}-{seed}", partial(measured, lab, arm, seed)) for seed in lab.seeds]
            for arm in ARMS}  # fmt: skip
    ours = "Entropy-ABF"
    grown = {
        arm: [r["entropy"][-1] - r["entropy"][PLACES.index(1)] for r in found] for arm, found in runs.items()
    }
    last = {arm: [r["bits"][-1] for r in found] for arm, found in runs.items()}
    growth = {arm: interval(f"growth of entropy: {arm}", values, "nats") for arm, values in grown.items()}
    bits = {arm: interval(f"last quarter: {arm}", values, "bits per byte") for arm, values in last.items()}
    calmer = [
        difference(f"growth, {arm} - {ours}", grown[arm], grown[ours], "nats") for arm in ARMS if arm != ours
    ]
    better = {arm: difference(f"bits, {arm} - {ours}", last[arm], last[ours], "bits per byte")
              for arm in ARMS if arm != ours}  # fmt: skip
    lost = difference("no change, last - first quarter", last["no change"], [r["bits"][0] for r in runs["no change"]],
                      "bits per byte")  # fmt: skip
    verdict = OPEN
    if (lost.value if lost.low is None else lost.low) > 0.1:
        verdict = all_of(*(judge(figure, 0.0) for figure in calmer), judge(better["PI"], 0.0))
    return Finding(
        question="Does attention stay as sharp beyond the trained window with Entropy-ABF, and does the model still "
        "predict, without any training?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary="Bits per byte in the last quarter of four trained windows, and growth of entropy there: "
        + ", ".join(f"{arm} {bits[arm].value:.2f} and {growth[arm].value:+.2f}" for arm in ARMS)
        + f"; the logarithm of the length grows by {math.log(FACTOR):.2f}.",
        figures=(*growth.values(), *bits.values(), *calmer, *better.values(), lost),
        plot=lines(
            "Entropy of attention in layers 2 and 3 of reader, trained with 4,096 bytes",
            "bytes read",
            "entropy (nats)",
            [banded(arm, [int(p * lab.pick(TRAINED, 64)) for p in PLACES], [r["entropy"] for r in found],
                    reference=arm == "no change") for arm, found in runs.items()],
            log_x=True,
        ),
    )  # fmt: skip


def picture() -> dict[str, Any]:
    """Attention of one head whose logits are drawn at random, with a trained window of 8."""
    n, c = 64, 8
    logits = 2 * torch.randn(n, n, generator=generator(5))
    scale = log_length_scale(torch.arange(1, n + 1), c).float()[:, None]
    seen = torch.ones(n, n).tril() > 0
    weights = (logits * scale).masked_fill(~seen, -torch.inf).softmax(1)
    return pictures.weights(
        f"Random logits in a model trained with {c} tokens: later rows read more keys, and their logits grow with the "
        "logarithm of the position, so that the rows do not get flatter.",
        weights,
        code=f"softmax(log_length_scale(i, {c}) * logits)",
    )
