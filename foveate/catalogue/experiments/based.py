"""Based: recall against bytes of state, with both dials, and against each part alone at equal bytes."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch

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
    series,
    spearman,
)
from foveate.catalogue.lab.facts import Facts
from foveate.catalogue.lab.tasks import generator
from foveate.layers import BasedLM, SelfAttention, TransformerLM, state_bytes
from foveate.linear import taylor_linear_attention

TOKENS, DIM, STEPS = 128, 32, 200
TASK = Facts(TOKENS, (1, TOKENS), kinds=16)
FEATURES, WINDOWS = (2, 4, 8), (4, 16)
SWEEP = [(f, w) for w in WINDOWS for f in FEATURES]
ALONE = {
    "linear alone": ("linear", "linear"),
    "windows alone": ("window", "window"),
}  # both with f = 4 or w = 8
COUNTS_IF = (
    "three seeds, paired, 95 % intervals. Gate: full attention answers at least 0.95 of the questions, else open. Then "
    "all of: over the six settings of f in 2, 4, 8 and w in 4, 16 the mean share answered rises with the bytes of "
    "state, Spearman at least 0.8; f = 4 with w = 8 answers more than two linear layers of f = 4 and more than two "
    "window layers of w = 8, which hold as many bytes (within 2 %), each difference above 0"
)


def trained(lab: Lab, layout: tuple[str, ...], f: int, w: int, seed: int) -> dict[str, Any]:
    """Share of all questions answered, share beyond 16 tokens, and the bytes that decoding holds after a row."""
    torch.manual_seed(seed)
    if layout == ("full", "full"):
        model = TransformerLM(TASK.vocab, DIM, 2, lambda layer: SelfAttention(DIM, 1), mlp=1)
    else:
        model = BasedLM(TASK.vocab, DIM, 2, heads=1, layout=layout, window=w, feature_dim=f, mlp=1)
    name = f"{'+'.join(layout)} f={f} w={w}"
    TASK.learn(lab, model, lab.pick(STEPS, 2), seed, f"{name}, seed {seed}", lr=6e-3)
    (answered,), far, _ = TASK.answered(model, lab.pick(128, 4), 16)
    with torch.no_grad():
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        _, state = model.step(ids, model.initial_state(ids))
    return {"answered": answered, "far": far, "bytes": state_bytes(state)}


def run(lab: Lab) -> Finding:
    """Does recall rise with the state, and do linear attention and a small window need each other?"""
    arms = {f"f={f} w={w}": (("linear", "window"), f, w) for f, w in [*SWEEP, (4, 8)]}
    arms |= {name: (layout, 4, 8) for name, layout in ALONE.items()} | {"full": (("full", "full"), 0, 0)}
    runs = {
        name: [lab.once(f"{name.replace(' ', ',')}-{seed}", partial(trained, lab, *arm, seed)) for seed in lab.seeds]
        for name, arm in arms.items()
    }  # fmt: skip
    share = {name: [r["answered"] for r in found] for name, found in runs.items()}
    held = {name: found[0]["bytes"] for name, found in runs.items()}
    mean = {name: interval(f"answered: {name}", values) for name, values in share.items()}
    swept = [f"f={f} w={w}" for f, w in SWEEP]
    ranked = [held[name] for name in swept], [mean[name].value for name in swept]
    rank = Figure("Spearman of bytes and share answered", 0.0)
    if len(set(ranked[1])) > 1:
        rank = spearman(rank.name, *ranked)
    both = "f=4 w=8"
    gains = {name: difference(f"{both} - {name}", share[both], share[name]) for name in (*ALONE, "full")}
    far = {
        name: interval(f"answered beyond 16: {name}", [r["far"] for r in runs[name]])
        for name in (both, *ALONE)
    }
    sizes = [Figure(f"bytes: {name}", held[name], unit="B") for name in (both, *ALONE, "full")]
    verdict = OPEN
    if mean["full"].value >= 0.95:
        verdict = all_of(judge(rank, 0.8 - 1e-9), *(judge(gains[name], 0.0) for name in ALONE))
    by_window = [
        banded(
            f"linear and window of {w}",
            [held[f"f={f} w={w}"] for f in FEATURES],
            [[share[f"f={f} w={w}"][i] for f in FEATURES] for i in range(len(lab.seeds))],
            most=1.0,
        )
        for w in WINDOWS
    ]
    ends = [min(held[n] for n in swept), max(held[n] for n in swept)]
    level = lambda name: series(name, ends, [mean[name].value] * 2, reference=True)  # noqa: E731
    return Finding(
        question="Does recall rise with the bytes of state, and do linear attention and a small window together recall "
        "more than each alone at equal bytes?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Share of questions answered: full attention {mean['full'].value:.3g}, linear and window "
        f"{mean[both].value:.3g} with {held[both]:,} bytes, linear alone {mean['linear alone'].value:.3g} with "
        f"{held['linear alone']:,}, windows alone {mean['windows alone'].value:.3g} with {held['windows alone']:,}; "
        f"rank correlation of bytes and recall over six settings {rank.value:.2f}.",
        figures=(*mean.values(), rank, *gains.values(), *far.values(), *sizes),
        plot=lines(
            f"16 facts in {TOKENS} tokens, two layers",
            "state (bytes)",
            "share answered",
            [*by_window, *(level(name) for name in ("full", *ALONE))],
            log_x=True,
        ),
        quality=mean[both].value / max(mean["full"].value, 1e-9),
        cost=held[both] / held["full"],
    )


def picture() -> dict[str, Any]:
    """Weights of one head."""
    q, k = (2 * torch.randn(1, 1, 48, 16, generator=generator(i)) for i in (3, 4))
    weights = cast(torch.Tensor, taylor_linear_attention(q, k, torch.eye(48).expand(1, 1, 48, 48)))[0, 0]
    return pictures.weights(
        "Weights 1 + z + z^2 / 2 of one head, each row divided by its sum: like softmax large where the logit z is "
        "large, but never near 0, and never from a cache: all of the past is one matrix.",
        weights,
        code="taylor_linear_attention(q, k, torch.eye(48))",
    )
