"""FlexPrefill: needles found by a trained model through sparse prefills of equal density, and the time of a prefill."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
import torch

import foveate as fv
from foveate.bench.subject import load_subject
from foveate.bench.tasks import (
    Bits,
    Question,
    is_recalled,
    paired_difference,
    questions,
    token_windows,
    window_bits,
)
from foveate.bench.texts import load_text
from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    OPEN,
    Figure,
    Finding,
    Lab,
    all_of,
    difference,
    interval,
    judge,
    lines,
    paired_times,
    proportion,
    series,
)
from foveate.catalogue.lab.controls import equal_random, equal_window
from foveate.catalogue.lab.tasks import generator, structured_qkv
from foveate.patterns import Sinks
from foveate.selectors import FlexPrefill

TOKENS, BLOCK, DEPTHS = 2048, 64, (0.1, 0.3, 0.5, 0.7, 0.9)
GAMMAS = (0.95, 0.99, 0.999)
OURS = "FlexPrefill"
COUNTS_IF = (
    "reader, 2,048 bytes, one needle without distractors, blocks of 64 and a least budget of one; gate: dense finds at "
    "least 0.9 of the needles, else open. Then all of: with gamma = 0.95, 0.99, 0.999 together FlexPrefill finds more "
    "needles than each of window + sinks, one vertical-slash budget for all heads, and random blocks, all with at "
    "least as many pairs (95 % interval of the paired difference above 0); at 4,096 bytes and gamma = 0.95 the whole "
    "prefill takes less time than a dense one, selection included (95 % interval of the ratio above 1)"
)
reader = cache(lambda: load_subject("reader"))


def selector(gamma: float) -> FlexPrefill:
    return FlexPrefill(BLOCK, gamma=gamma, min_budget=BLOCK)


def fixed(blocks: int) -> FlexPrefill:
    """Vertical-slash with the same number of columns and diagonals for every head and input."""
    return FlexPrefill(BLOCK, gamma=0.0, tau=0.0, min_budget=blocks * BLOCK, max_budget=blocks * BLOCK)


def ask(policy: Any, asked: Sequence[Question]) -> dict[str, Any]:
    """Which needles the model finds under a policy (1 or 0), and the share of the causal pairs it computed."""
    with fv.hf.apply(reader().model, policy) as handle:
        logits = [reader().logits(question.ids, question.answer_len + 1)[0] for question in asked]
        hits = [int(is_recalled(found, question)) for found, question in zip(logits, asked, strict=True)]
        return {"hits": hits, "share": handle.report().density}


def controls(share: float, asked: Sequence[Question]) -> dict[str, Any]:
    """Policies with at least (random: on average) this share of the causal pairs."""
    n = len(asked[0].ids)
    enough = next(b for b in count(1) if ask(fixed(b), asked[:2])["share"] >= share)
    return {
        "window + sinks": equal_window(share, n) | Sinks(16),
        "fixed vertical-slash": fixed(enough),
        "random blocks": equal_random(share, n, block=BLOCK, heads=reader().shape.heads),
    }


def needles(lab: Lab) -> dict[str, list[dict[str, Any]]]:
    """Arm -> what `ask` found at each gamma."""
    text = load_text("stdlib")
    asked = [
        q
        for s in lab.seeds
        for q in questions(reader(), text, lab.pick(TOKENS, 512), DEPTHS, lab.pick(2, 1), s)
    ]
    asked = asked[: lab.pick(len(asked), 2)]
    found: dict[str, list[dict[str, Any]]] = {"dense": [ask("dense", asked)]}
    for gamma in lab.track(lab.pick(GAMMAS, GAMMAS[:1]), "needles"):
        ours = ask(selector(gamma), asked)
        found.setdefault("FlexPrefill", []).append(ours)
        for name, policy in controls(ours["share"], asked).items():
            found.setdefault(name, []).append(ask(policy, asked))
    return found


def text_bits(lab: Lab, share: float) -> list[dict[str, Any]]:
    """Bits per byte lost on held-out text, which needs few far keys: not a condition, but part of the picture."""
    windows = token_windows(reader(), load_text("stdlib"), lab.pick(TOKENS, 512), lab.pick(6, 2))

    def bits(policy: Any) -> Bits:
        with fv.hf.apply(reader().model, policy):
            found = [window_bits(reader().logits(w.ids)[0], w) for w in windows]
        return Bits(*(np.stack(part) for part in zip(*found, strict=True)))

    dense, n = bits("dense"), len(windows[0].ids)
    policies = {OURS: selector(GAMMAS[0]), "window + sinks": equal_window(share, n) | Sinks(16)}
    lost = {name: paired_difference(bits(policy), dense) for name, policy in policies.items()}
    return [
        vars(Figure(f"lost on text, gamma = {GAMMAS[0]}: {name}", *found, len(windows), "bits/byte"))
        for name, found in lost.items()
    ]


def prefills(lab: Lab) -> list[dict[str, Any]]:
    """Speed of the whole prefill against dense, for FlexPrefill and for a window of as many pairs."""
    n = lab.pick(4096, 1024)
    ids = torch.tensor(list(load_text("stdlib").data[:n]))

    def prefill(policy: Any) -> float:
        with fv.hf.apply(reader().model, policy) as handle:
            reader().logits(ids, 1)
            return handle.report().density

    share = prefill(selector(GAMMAS[0]))
    policies = {"FlexPrefill": selector(GAMMAS[0]), "window": equal_window(share, n), "dense": "dense"}
    arms: dict[str, Callable[[], object]] = {
        name: partial(prefill, policy) for name, policy in policies.items()
    }
    taken = paired_times(lab, arms, lab.pick(9, 1))
    figures = [
        taken.speedup(name, "dense", f"prefill against dense: {name}") for name in ("FlexPrefill", "window")
    ]
    return [vars(figure) for figure in (*figures, Figure("share of causal pairs in the timing", share))]


def run(lab: Lab) -> Finding:
    """At equal density, does FlexPrefill find more needles than fixed sparse prefills, and run faster than dense?"""
    found = lab.once("needles", partial(needles, lab))
    times = [Figure(**figure) for figure in lab.once("prefills", partial(prefills, lab))]
    lost = [Figure(**figure) for figure in lab.once("text", partial(text_bits, lab, found[OURS][0]["share"]))]
    hits = {
        name: [statistics.mean(h) for h in zip(*(a["hits"] for a in runs), strict=True)]
        for name, runs in found.items()
    }
    recall = {name: interval(f"needles found: {name}", values) for name, values in hits.items()}
    rivals = [name for name in found if name not in ("dense", OURS)]
    gains = [difference(f"{OURS} - {name}", hits[OURS], hits[name]) for name in rivals]
    verdict = OPEN
    if recall["dense"].value >= 0.9:
        verdict = all_of(*(judge(gain, 0.0) for gain in gains), judge(times[0], 1.0))
    shares = {name: [a["share"] for a in runs] for name, runs in found.items() if name != "dense"}
    return Finding(
        question="At equal density, does FlexPrefill find more needles than fixed sparse prefills, in less time than "
        "dense attention?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Needles found with {shares[OURS][0]:.0%} to {shares[OURS][-1]:.0%} of the pairs: "
        + ", ".join(f"{name} {figure.value:.3g}" for name, figure in recall.items())
        + f"; prefill of {lab.pick(4096, 1024):,} bytes {times[0]} as fast as dense; "
        f"on text {lost[0].value:+.3f} bits/byte (a window of as many pairs {lost[1].value:+.3f}).",
        figures=(
            *recall.values(),
            *gains,
            *times,
            *lost,
            *(
                Figure(f"share of causal pairs: {name}", statistics.mean(values))
                for name, values in shares.items()
            ),
        ),
        plot=drawn(found),
        quality=recall[OURS].value / max(recall["dense"].value, 1e-9),
        cost=statistics.mean(shares[OURS]),
    )


def drawn(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Needles found against the share of pairs, with intervals; dense as a level across the others' range."""
    sparse = [a["share"] for name, runs in found.items() if name != "dense" for a in runs]
    curves = []
    for name, runs in found.items():
        counted = [proportion(name, sum(a["hits"]), len(a["hits"])) for a in runs]
        x = [a["share"] for a in runs]
        if name == "dense":
            x, counted = [min(sparse), max(sparse)], counted * 2
        low, high = [f.low or 0.0 for f in counted], [f.high or 1.0 for f in counted]
        curves.append(series(name, x, [f.value for f in counted], low, high, reference=name == "dense"))
    return lines("Needles found through a sparse prefill", "share of causal pairs", "share found", curves)


def picture() -> dict[str, Any]:
    """Gamma, tau and head on keys with heavy columns and a near band; one cell is 64 tokens."""
    q, k, _ = structured_qkv(64 * 48, 2, 2, 32, generator(1), hitters=80, local=4.0, strength=7.0)
    frames = []
    for gamma in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
        for tau in (0.0, 1.0):
            layout = FlexPrefill(64, gamma=gamma, tau=tau, min_budget=64).layout(q, k)
            blocks = layout.to_dense()[0].unflatten(2, (48, 64)).unflatten(1, (48, 64)).any(-1).any(2)
            code = f"FlexPrefill(block=64, gamma={gamma}, tau={tau}, min_budget=64)"
            frames += [({"gamma": gamma, "tau": tau, "head": head}, blocks[head], code) for head in (0, 1)]
    return pictures.pairs(
        "Blocks of 64 tokens that a head keeps: tau = 0 makes it a head of columns and diagonals, tau = 1 a head of "
        "the strongest pooled blocks; gamma says how much attention they must cover.",
        frames,
    )
