"""Deconstructing attention: character models that lack one property of it, in all or in every second layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from foveate.catalogue import pictures
from foveate.catalogue.lab import (
    FAILS,
    HOLDS,
    OPEN,
    Figure,
    Finding,
    Lab,
    bars,
    chars,
    difference,
    interval,
)
from foveate.catalogue.lab.tasks import generator
from foveate.catalogue.lab.tiny import train
from foveate.layers import AttentionVariant, VariantLM

DEPTH, DIM, HEADS, TOKENS, ROWS, STEPS = 4, 32, 2, 64, 32, 250
LR, MLP = 2e-2, 1  # chosen for standard attention
HYBRIDS = ("approximate", "non_approximate", "rnd_emb_qk", "static_emb_qk")
COUNTS_IF = (
    "three seeds. Gate: standard attention needs fewer held-out bits per byte than a table of character pairs counted "
    "over the training text, else open. Three signs: (a) the model with MLPs in place of attention needs over 5 % more "
    "bits than standard attention, and more than every hybrid; (b) each of the four hybrids needs at most 5 % more "
    "bits than standard attention; (c) each hybrid needs over 25 % more bits when its variant layers are left out. "
    "Holds if every seed shows at least two of them, does not hold if no seed does, else open"
)


def pair_bits(most: int) -> float:
    """Held-out bits per byte of a table of which character follows which, counted over the training text plus one.

    most: bytes of each text that are read.
    """
    train_text, held_out = (chars.text(which)[:most].long() for which in (False, True))
    pairs = train_text[:-1] * chars.VOCAB + train_text[1:]
    counts = 1 + torch.bincount(pairs, minlength=chars.VOCAB**2).view(chars.VOCAB, -1).double()
    share = counts / counts.sum(1, keepdim=True)
    return float(-share[held_out[:-1], held_out[1:]].log2().mean())


def trained(lab: Lab, variant: str, layout: str, seed: int) -> dict[str, float]:
    """Held-out bits per byte of a model, and of the same without the layers that are not standard attention."""
    torch.manual_seed(seed)
    model = VariantLM(
        chars.VOCAB,
        DIM,
        DEPTH,
        heads=HEADS,
        variant=variant,
        layout=layout,
        tokens=TOKENS,
        mlp=MLP,
        seed=seed,
    )
    batch = lambda step: chars.rows(lab.pick(ROWS, 2), TOKENS, generator(seed, step))  # noqa: E731
    train(lab, model, batch, steps=lab.pick(STEPS, 2), lr=LR, what=f"{layout} {variant}, seed {seed}")
    test = partial(chars.bits, model, TOKENS, batches=lab.pick(8, 1))
    bits, model.skip = test(), True
    return {"bits": bits, "skip": test()}


def run(lab: Lab) -> Finding:
    """Which property of attention can a language model lack everywhere, and which in every second layer?"""
    arms = {"standard": ("standard", "uniform"), "mlp everywhere": ("mlp", "uniform")}
    arms |= {f"half {variant}": (variant, "hybrid") for variant in HYBRIDS}
    runs = {
        name: [lab.once(f"{name.replace(' ', ',')}-{seed}", partial(trained, lab, *arm, seed)) for seed in lab.seeds]
        for name, arm in arms.items()
    }  # fmt: skip
    bits = {name: [r["bits"] for r in found] for name, found in runs.items()}
    halves = [name for name in arms if name.startswith("half")]
    signs = {"a": 0, "b": 0, "c": 0}
    shown = []
    for i, standard in enumerate(bits["standard"]):
        hybrid, mlp = [bits[name][i] for name in halves], bits["mlp everywhere"][i]
        found = {
            "a": mlp > 1.05 * standard and mlp > max(hybrid),
            "b": max(hybrid) <= 1.05 * standard,
            "c": all(runs[name][i]["skip"] > 1.25 * bits[name][i] for name in halves),
        }
        signs = {name: signs[name] + found[name] for name in signs}
        shown.append(sum(found.values()) >= 2)
    pairs = Figure(
        "table of pairs", lab.once("pairs", partial(pair_bits, lab.pick(1 << 40, 10_000))), unit="bits/byte"
    )
    mean = {name: interval(name, values, "bits/byte") for name, values in bits.items()}
    skip = {
        name: interval(f"{name}, left out", [r["skip"] for r in runs[name]], "bits/byte") for name in halves
    }
    more = {name: difference(f"{name} - standard", bits[name], bits["standard"], "bits/byte") for name in bits
            if name != "standard"}  # fmt: skip
    verdict = HOLDS if all(shown) else FAILS if not any(shown) else OPEN
    if mean["standard"].value >= pairs.value:
        verdict = OPEN
    worst = max(halves, key=lambda name: mean[name].value)
    return Finding(
        question="Which property of attention can a language model lack everywhere, and which in every second layer?",
        counts_if=COUNTS_IF,
        verdict=verdict,
        summary=f"Bits per byte: standard {mean['standard'].value:.3g}, MLPs everywhere "
        f"{mean['mlp everywhere'].value:.3g}, a table of pairs {pairs.value:.3g}; of the hybrids the worst "
        f"({worst[5:]}) {mean[worst].value:.3g}, and at least {min(f.value for f in skip.values()):.3g} with its "
        f"variant layers left out. Signs seen in {len(shown)} seeds: "
        + ", ".join(f"({name}) {count}" for name, count in signs.items()),
        figures=(*mean.values(), pairs, *more.values(), *skip.values(),
                 *(Figure(f"seeds that show sign ({name})", count) for name, count in signs.items())),
        plot=bars(
            f"Character models of {DEPTH} layers after {STEPS} steps",
            "held-out bits per byte",
            [*mean.values(), pairs, *skip.values()],
            ["standard", pairs.name],
        ),
    )  # fmt: skip


def picture() -> dict[str, Any]:
    """One score per key."""
    torch.manual_seed(3)
    layer = AttentionVariant(32, 1, "non_approximate")
    with torch.no_grad():
        for map_ in (layer.q_proj, layer.k_proj):
            map_.weight *= 3
        weights = layer.weights(torch.randn(1, 48, 32, generator=generator(5)))[0, 0]
    return pictures.weights(
        "Without queries: every key has one score, and all later rows give it the same weight, divided by the sum so "
        "far. Columns stand out, and fade as more keys share the weight.",
        weights,
        code='AttentionVariant(32, 1, "non_approximate").weights(h)',
    )
