"""A catalogue with made-up evidence, for the tests of the gallery: four entries get an implementation and a record."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import torch

from foveate.catalogue import load, pictures, plots, record
from foveate.catalogue.entry import Check, Entry
from foveate.catalogue.lab.finding import bars, lines, series
from foveate.catalogue.record import Figure, Record
from foveate.catalogue.store import Catalogue
from foveate.patterns import Causal, Neighborhood, Sinks, SlidingWindow

ENVIRONMENT = {
    "device": "cpu",
    "cpu": "A processor",
    "threads": 2,
    "torch": "2.13.0",
    "python": "3.11.7",
    "commit": "0123456789ab",
    "date": "2026-11-21T10:00:00+00:00",
}
SNIPPET = """import torch
import foveate as fv

q = k = v = torch.randn(1, 8, 1024, 64)  # (batch, heads, tokens, head_dim)
pattern = fv.patterns.Causal() & fv.patterns.SlidingWindow(256)
print(fv.attention(q, k, v, pattern).shape)
"""


def implemented(entry: Entry, path: str) -> Entry:
    """The entry as if it were built: `path` is its implementation."""
    return dataclasses.replace(
        entry,
        implementation=(path,),
        evidence=f"foveate.catalogue.experiments.{entry.key}.run",
        picture=f"foveate.catalogue.experiments.{entry.key}.picture",
        verification="equations",
        verified_by="the dense definition in float64, at prime sizes",
        differs="Odd windows only; the paper's kernel is not built.",
        snippet=SNIPPET,
        tests=("tests/core/test_patterns.py::test_layout",),
        checks=(Check(make=path, use="pattern"),),
    )


def a_record(key: str, **changes) -> Record:
    """A full, fresh record that holds."""
    figures = (
        Figure("window accuracy", 0.93, 0.91, 0.95, n=3),
        Figure("dense accuracy", 0.98, 0.97, 0.99, n=3),
        Figure("speed-up", 2.4, 2.2, 2.6, n=9, unit="x"),
    )
    made = Record(
        key=key,
        quick=False,
        question="Does the window keep what dense attention finds?",
        counts_if="window accuracy within 0.1 of dense, at half of the work",
        verdict=record.HOLDS,
        summary="0.93 against 0.98 at 20 % of the work.",
        figures=figures,
        seeds=(0, 1, 2),
        seconds=42.5,
        environment=ENVIRONMENT,
        sources={},
        plot=bars("Accuracy", "accuracy", figures[:2], ["dense accuracy"]),
        quality=0.95,
        cost=0.2,
    )
    return dataclasses.replace(made, **changes)


def sample(evidence: Path) -> Catalogue:
    """The library's entries, four of them with records in a folder.

    s2_attention: pairs with controls, holds. fused_neighborhood_attention: pairs on a grid, not reproduced.
    flexprefill: a map, older than the code. swin: a quick run.
    """
    catalogue = load(evidence=evidence)
    entries = dict(catalogue.entries)
    paths = {
        "s2_attention": "foveate.patterns.Shards",
        "fused_neighborhood_attention": "foveate.patterns.Neighborhood",
        "flexprefill": "foveate.selectors.FlexPrefill",
        "swin": "foveate.patterns.Windows",
    }
    for key, path in paths.items():
        entries[key] = implemented(entries[key], path)
    curve = lines(
        "Accuracy over length",
        "tokens",
        "accuracy",
        [
            series("window", [128, 256, 512], [0.95, 0.9, 0.8], [0.93, 0.88, 0.75], [0.97, 0.92, 0.85]),
            series("dense", [128, 256, 512], [0.99, 0.98, 0.97], reference=True),
        ],
        log_x=True,
    )
    kept = [
        a_record("s2_attention", picture=band()),
        a_record(
            "fused_neighborhood_attention",
            picture=neighbourhood(),
            verdict=record.OPEN,
            summary="Both arms stay at chance.",
            plot=curve,
            quality=0.7,
            cost=0.11,
        ),
        a_record(
            "flexprefill",
            picture=weights(),
            sources={"core/selectors/flexprefill.py": ["0" * 16] * 2},
            cost=None,
        ),
        a_record("swin", quick=True, plot=None),
    ]
    for one in kept:
        record.write(one, evidence)
        if one.plot is not None:
            (evidence / f"{one.key}.svg").write_text(plots.svg(one.plot), encoding="utf-8")
    return Catalogue(entries, evidence)


def band() -> dict:
    """A picture with two numeric controls and one of words."""
    frames = []
    for window, sinks, side in itertools.product((2, 4, 8, 16), (1, 2, 4), ("causal", "both")):
        pattern, code = SlidingWindow(window) | Sinks(sinks), f"SlidingWindow({window}) | Sinks({sinks})"
        if side == "causal":
            pattern, code = Causal() & pattern, f"Causal() & ({code})"
        frames.append(({"window": window, "sinks": sinks, "direction": side}, pattern, code))
    return pictures.pairs("A window and the first tokens, for every query", frames, tokens=48)


def neighbourhood() -> dict:
    """A picture of tokens on a grid."""
    frames = [
        (
            {"window": w, "dilation": d},
            Neighborhood((12, 12), w, dilation=d),
            f"Neighborhood((12, 12), {w}, dilation={d})",
        )
        for w, d in itertools.product((3, 5), (1, 2))
    ]
    return pictures.pairs(
        "Every query sees the window around it; at the border the window stays inside",
        frames,
        tokens=144,
        grid=(12, 12),
    )


def weights() -> dict:
    """A picture of weights."""
    torch.manual_seed(0)
    logits = torch.randn(40, 40) - 0.15 * (torch.arange(40)[:, None] - torch.arange(40)[None]).abs()
    causal = torch.ones(40, 40).tril().bool()
    return pictures.weights(
        "Half of the softmax of a causal head",
        logits.masked_fill(~causal, -1e9).softmax(-1) / 2,
        code="softmax(q @ k.T) / 2",
    )
