"""MoA: spans searched at two short lengths, against one span for all heads, at a longer length of the reader."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import foveate as fv
from foveate.cache import MoAPlan, SpanRule, attention_influence, group_influence, search_spans, span_rules
from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    FAILS,
    HOLDS,
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
from foveate.catalogue.lab.reading import attending, excerpts, reader
from foveate.organisms.reader import data

BLOCK = SINK = 16
DENSITY = 0.5
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
ARMS = ("dense", "searched", "one window", "rules shuffled")
COUNTS_IF = (
    "gate: dense finds at least 0.9 of the needles in 1024 bytes, else open. Then all of, over three seeds with texts "
    "and plans of their own (95 % intervals, paired): a plan that was searched at 256 and 512 bytes finds more needles "
    "at 1024 than one window with sinks for all heads that has at least as many pairs, and has less loss on their "
    "digits; it finds more than the same rules dealt to the heads at random; its density is at most 0.5 at all three "
    "lengths; it has at least two different rules"
)


def prompts(length: int, count: int, seed: int, held_out: bool) -> list[tuple[Tensor, int, float]]:
    """(bytes, digits at their end that are the answer, depth) of needles in text, `count` at each depth."""
    rng, text = np.random.default_rng([seed, length, held_out]), data.stdlib_text(held_out=held_out)
    made = []
    for depth in DEPTHS:
        for _ in range(count):
            ids, answer = data.needle(length, depth, rng, text, distractors=0)
            made.append((torch.from_numpy(ids.astype(np.int64)), answer.stop - answer.start, depth))
    return made


def influence(length: int, count: int, seed: int) -> Tensor:
    """(layers, key/value heads, blocks, blocks): what the entries are worth to the answers of the dense model."""
    asked = prompts(length, count, seed, held_out=False)
    ids, digits = torch.stack([row for row, *_ in asked]), asked[0][1]
    kept: list[tuple[Tensor, ...]] = []

    def keep(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = fv.attention(q, k, v, is_causal=True)
        assert isinstance(out, Tensor)
        if not out.requires_grad:
            out.requires_grad_()
        out.retain_grad()
        kept.append((q.detach(), k.detach(), v.detach(), out))
        return out

    with torch.enable_grad(), attending(reader(), keep):
        logits = reader()(input_ids=ids).logits[:, -digits - 1 : -1]
        said = logits.detach().argmax(-1)  # the model's own answers are the targets
        F.cross_entropy(logits.flatten(0, 1), said.flatten(), reduction="sum").div(digits).backward()
    found = []
    for q, k, v, out in kept:
        assert out.grad is not None
        made = attention_influence(q, k, v, out.grad, block=BLOCK)[0]
        found.append(group_influence(made, k.shape[1]))
    return torch.stack(found)


def searched(lab: Lab, seed: int) -> MoAPlan:
    profiled, longest = lab.pick((256, 512), (128, 256)), lab.pick(1024, 512)
    made = {n: influence(n, lab.pick(2, 1), seed) for n in lab.track(profiled, f"influence, seed {seed}")}
    rules = span_rules(profiled, longest, step=profiled[0] // 4, sink=SINK, block=BLOCK)
    return search_spans(made, [longest], DENSITY, rules=rules, block=BLOCK)


def one_window(density: float, n: int) -> SpanRule:
    """The narrowest span, the same for all heads, with at least this density."""
    spans = (SpanRule(alpha, 0.0, SINK, 1) for alpha in range(1, n + 1))
    return next(rule for rule in spans if rule.density(n) >= density)


def shuffled(plan: MoAPlan, seed: int) -> MoAPlan:
    rules = [rule for layer in plan.rules for rule in layer]
    random.Random(seed).shuffle(rules)
    heads = plan.kv_heads
    return MoAPlan(tuple(tuple(rules[x : x + heads]) for x in range(0, len(rules), heads)))


def asked_under(
    plan: MoAPlan | None, asked: Sequence[tuple[Tensor, int, float]], text: Tensor
) -> dict[str, Any]:
    """Needles found at each depth, mean loss of their digits in bits, bits per byte of text."""
    n, model = len(asked[0][0]), reader()
    patterns: Any = [fv.patterns.Causal()] * model.config.num_hidden_layers
    if plan is not None:
        patterns = plan.patterns(n, model.config.num_attention_heads)
    found: dict[float, list[float]] = {depth: [] for depth in DEPTHS}
    losses = []
    with torch.no_grad(), attending(model, lambda layer, q, k, v: fv.attention(q, k, v, patterns[layer])):  # pyright: ignore
        for ids, digits, depth in asked:
            logits = model(input_ids=ids[None], logits_to_keep=digits + 1).logits[0, :-1]
            found[depth].append(float((logits.argmax(-1) == ids[-digits:]).all()))
            losses.append(float(F.cross_entropy(logits, ids[-digits:])) / np.log(2))
        logits = model(input_ids=text).logits[:, :-1].flatten(0, 1)
        bits = float(F.cross_entropy(logits, text[:, 1:].flatten())) / np.log(2)
    depths = [sum(hits) / len(hits) for hits in found.values()]
    return {
        "depths": depths,
        "found": sum(depths) / len(depths),
        "loss": sum(losses) / len(losses),
        "bits": bits,
    }


def compared(lab: Lab, seed: int) -> dict[str, Any]:
    """Every arm of one seed, the densities and the number of different rules."""
    n = lab.pick(1024, 512)
    plan = searched(lab, seed)
    window = MoAPlan(((one_window(plan.density(n), n),) * plan.kv_heads,) * plan.layers)
    plans = {"dense": None, "searched": plan, "one window": window, "rules shuffled": shuffled(plan, seed)}
    asked, text = prompts(n, lab.pick(4, 1), seed, held_out=True), excerpts(lab.pick(4, 1), n, seed)
    arms = {name: asked_under(plans[name], asked, text) for name in lab.track(ARMS, f"reading, seed {seed}")}
    densities = [plan.density(length) for length in (*lab.pick((256, 512), (128, 256)), n)]
    spans = [[rule.span(n) for rule in layer] for layer in plan.rules]
    return {"arms": arms, "densities": densities, "window": window.density(n), "spans": spans,
            "rules": len({rule for layer in plan.rules for rule in layer})}  # fmt: skip


def run(lab: Lab) -> Finding:
    """Do spans searched head by head at short lengths keep more of a longer prompt than one window?"""
    runs = [lab.once(f"seed-{seed}", partial(compared, lab, seed)) for seed in lab.seeds]
    of = lambda arm, what: [run["arms"][arm][what] for run in runs]  # noqa: E731
    found = {arm: interval(f"needles found: {arm}", of(arm, "found")) for arm in ARMS}
    loss = {arm: interval(f"loss of a digit: {arm}", of(arm, "loss"), "bits") for arm in ARMS}
    bits = {arm: interval(f"text: {arm}", of(arm, "bits"), "bits/byte") for arm in ARMS}
    gains = [
        difference(f"needles found: searched - {arm}", of("searched", "found"), of(arm, "found"))
        for arm in ARMS[2:]
    ]
    less = difference(
        "loss of a digit: one window - searched", of("one window", "loss"), of("searched", "loss"), "bits"
    )
    most = Figure("largest density of a plan", max(d for run in runs for d in run["densities"]))
    window = interval("density of the one window", [run["window"] for run in runs])
    rules = Figure("least number of different rules", min(run["rules"] for run in runs))
    spans = [span for run in runs for layer in run["spans"] for span in layer]
    narrow, wide = Figure("narrowest span", min(spans)), Figure("widest span", max(spans))
    verdict = OPEN
    if found["dense"].value >= 0.9:
        verdict = all_of(
            judge(gains[0], 0.0),
            judge(less, 0.0),
            judge(gains[1], 0.0),
            HOLDS if most.value <= DENSITY + 1e-9 else FAILS,
            HOLDS if rules.value >= 2 else FAILS,
        )
    return Finding(
        question="Do spans searched head by head at short lengths keep more of a longer prompt than one window?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"At density {most.value:.3g}, needles found in {lab.pick(1024, 512)} bytes: "
        + ", ".join(f"{arm} {found[arm].value:.3g}" for arm in ARMS)
        + f"; spans from {narrow.value:g} to {wide.value:g}; text in bits per byte: "
        + ", ".join(f"{arm} {bits[arm].value:.3g}" for arm in ARMS)
        + ".",
        figures=(*found.values(), *loss.values(), *bits.values(), *gains, less, most, window, rules, narrow, wide),
        plot=lines(
            "Needles found by the reader",
            "depth of the needle (0 is the start)",
            "share found",
            [banded(arm, DEPTHS, of(arm, "depths"), most=1.0, reference=arm == "dense") for arm in ARMS],
        ),
        quality=found["searched"].value / max(found["dense"].value, 1e-9),
        cost=most.value,
    )  # fmt: skip


def picture() -> dict[str, Any]:
    """A rule at three lengths."""
    frames = []
    for alpha, beta in ((8, 0.0), (0, 0.25), (8, 0.25), (0, 0.5)):
        for n in (16, 32, 64):
            rule = SpanRule(alpha, beta, sink=2, block=4)
            code = f"SpanRule({alpha}, {beta}, sink=2, block=4).pattern({n})"
            dense = rule.pattern(n).layout(n).to_dense()[0, 0]
            frames.append(({"rule": f"{alpha} + {beta} n", "tokens": n}, dense, code))
    return pictures.pairs(
        "A few sinks and a span that stays as it is, or grows with the length, head by head.",
        frames,
        tokens=64,
    )
