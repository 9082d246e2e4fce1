"""FuseMax: what the pass counter says of softmax, against executions that count the keys they load."""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor

import foveate as fv
from foveate.bench.cascades import (
    KeyBuffer,
    accelerator_cost,
    attention_cascade,
    attention_shapes,
    key_traffic,
)
from foveate.catalogue import pictures
from foveate.catalogue.lab import FAILS, HOLDS, Figure, Finding, Lab, lines, series, slope
from foveate.catalogue.lab.tasks import generator

DIM, QUERIES, BLOCK, BUFFER = 64, 256, 256, 1 << 20  # buffer: elements of keys and values
KINDS = {"three_pass": 3, "two_pass": 2, "one_pass": 1}
COUNTS_IF = (
    "all of: the counter finds 3, 2 and 1 passes; hand-written executions of the three, whose result is within 1e-4 of "
    "softmax attention, load exactly as many keys and values as the traffic that follows from the cascade, at every "
    "length; at the longest, of 65,536 keys, keys loaded are within 2 % of 3 : 2 : 1, at the shortest, which fits, "
    "1 : 1 : 1; what one pass keeps per query grows with exponent 0 and what three passes keep with more than 0.95; in "
    "the cost model the one-pass mapping uses at least 0.9 of the array at the longest and spills nothing"
)


def executed(kind: str, q: Tensor, k: Tensor, v: Tensor, buffer: int) -> tuple[Tensor, dict[str, int]]:
    """Blocked attention q (P, D), k, v (M, D) as written by hand: the result, and elements loaded of "K" and "V"."""
    store = KeyBuffer(buffer)

    def read(name: str, x: Tensor, i: int) -> Tensor:
        part = x[i * BLOCK : (i + 1) * BLOCK]
        store.read(name, i, part.numel())
        return part

    blocks = range(ceil(len(k) / BLOCK))
    top = q.new_full((len(q), 1), -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros(len(q), v.shape[1])
    if kind != "one_pass":
        for i in blocks:
            top = torch.maximum(top, (q @ read("K", k, i).T).amax(1, keepdim=True))
    if kind == "three_pass":
        for i in blocks:
            total += (q @ read("K", k, i).T - top).exp().sum(1, keepdim=True)
        for i in blocks:
            out += ((q @ read("K", k, i).T - top).exp() / total) @ read("V", v, i)
        return out, store.loaded
    for i in blocks:
        x = q @ read("K", k, i).T
        new = top if kind == "two_pass" else torch.maximum(top, x.amax(1, keepdim=True))
        p, keep = (x - new).exp(), (top - new).exp()
        total, out, top = total * keep + p.sum(1, keepdim=True), out * keep + p @ read("V", v, i), new
    return out / total, store.loaded


def measured(lab: Lab, m: int) -> dict[str, Any]:
    """Per cascade: elements loaded by the execution and by the model, and the error."""
    g = generator(m, 5)
    q, k, v = (torch.randn(n, DIM, generator=g) for n in (QUERIES, m, m))
    q = q / DIM**0.5
    want = cast(Tensor, fv.attention(q[None, None], k[None, None], v[None, None], scale=1.0))[0, 0]
    found = {}
    for kind in KINDS:
        out, loaded = executed(kind, q, k, v, BUFFER)
        model = key_traffic(attention_cascade(kind), attention_shapes(QUERIES, m, DIM, DIM, BLOCK), BUFFER)
        found[kind] = {"executed": loaded, "model": model, "error": float((out - want).abs().max())}
    return found


def run(lab: Lab) -> Finding:
    """Do the passes counted from a cascade say how often attention must load its keys?"""
    sizes = lab.pick([1024 << i for i in range(7)], [1024, 32768, 65536])
    found = [lab.once(f"keys-{m}", partial(measured, lab, m)) for m in lab.track(sizes, "lengths")]
    passes = {kind: attention_cascade(kind).passes("m") for kind in KINDS}
    read = {
        kind: [row[kind]["executed"]["K"] / (m * DIM) for m, row in zip(sizes, found, strict=True)]
        for kind in KINDS
    }
    shapes = [attention_shapes(m, m, DIM, DIM, BLOCK) for m in sizes]
    live = {kind: [sum(attention_cascade(kind).live_footprint(s).values()) for s in shapes] for kind in KINDS}
    cost: dict[str, Any] = {kind: accelerator_cost(attention_cascade(kind), shapes[-1]) for kind in KINDS}
    growth = {kind: slope(f"growth of what a query keeps: {kind}", sizes, live[kind]) for kind in KINDS}
    alike = all(row[kind]["executed"] == row[kind]["model"] for row in found for kind in KINDS)
    error = max(row[kind]["error"] for row in found for kind in KINDS)
    used = Figure("share of the array used: one_pass", cost["one_pass"]["utilisation"])
    conditions = (
        passes == KINDS,
        alike and error < 1e-4,
        all(abs(read[kind][-1] / read["one_pass"][-1] / n - 1) < 0.02 for kind, n in KINDS.items()),
        all(read[kind][0] == 1 for kind in KINDS),
        abs(growth["one_pass"].value) < 1e-9 and growth["three_pass"].value > 0.95,
        used.value >= 0.9 and cost["one_pass"]["spilled"] == 0,
    )
    figures = (
        *(Figure(f"passes: {kind}", n) for kind, n in passes.items()),
        *(
            Figure(f"times that keys are loaded, {sizes[-1]:,} keys: {kind}", read[kind][-1])
            for kind in KINDS
        ),
        *(Figure(f"times that keys are loaded, {sizes[0]:,} keys: {kind}", read[kind][0]) for kind in KINDS),
        Figure("executions that load what the model says", float(alike)),
        Figure("largest error of an execution", error),
        *growth.values(),
        used,
        Figure(
            "modelled cycles: three_pass / one_pass", cost["three_pass"]["total"] / cost["one_pass"]["total"]
        ),
        Figure(
            "modelled traffic: three_pass / one_pass",
            cost["three_pass"]["traffic"] / cost["one_pass"]["traffic"],
        ),
    )
    return Finding(
        question="Do the passes counted from a cascade say how often attention must load its keys?",
        counts_if=COUNTS_IF,
        verdict=HOLDS if all(conditions) else FAILS,
        summary=f"Passes {', '.join(str(n) for n in passes.values())}; with {sizes[-1]:,} keys and a buffer of "
        f"{BUFFER:,} elements three, two and one pass load each key "
        + ", ".join(f"{read[kind][-1]:.3g}" for kind in KINDS)
        + f" times, with {sizes[0]:,} once; the one-pass mapping uses {used.value:.1%} of the modelled array.",
        figures=figures,
        plot=lines(
            f"Executions with a buffer of {BUFFER:,} elements",
            "keys",
            "times that each key is loaded",
            [series(kind.replace("_", " "), sizes, read[kind]) for kind in KINDS],
            log_x=True,
        ),
    )


def picture() -> dict[str, Any]:
    """Which block of keys is read when, by the three cascades one after another."""
    blocks = 16
    steps = [i for kind in KINDS for _ in range(attention_cascade(kind).passes("m")) for i in range(blocks)]
    return pictures.weights(
        "Blocks of keys (columns) as time goes down: three passes, then two, then one. Each slope is one sweep over "
        "all keys, which is loaded anew once the keys do not fit into the buffer.",
        torch.nn.functional.one_hot(torch.tensor(steps), blocks).float(),
        rows="time",
        columns="block of keys",
        code='attention_cascade("three_pass").passes("m"), ...',
    )
