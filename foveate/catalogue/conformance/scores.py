"""Checks of scores and normalisers: every engine that accepts one computes its definition, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.catalogue.conformance import engines
from foveate.catalogue.conformance.patterns import strided, whole
from foveate.catalogue.conformance.subject import CUTS, Subject, demand, places, refused, same
from foveate.core.patterns import Causal, SlidingWindow

WINDOW = SlidingWindow(before=11, after=4)


def _options(s: Subject) -> dict[str, Any]:
    return {s.check.use: s.build()}


def _whos(n: int) -> list[tuple[Any, Tensor | None]]:
    return [(None, None), (Causal(), whole("causal", n, n)), (WINDOW, WINDOW.layout(n).to_dense())]


def engines_forward(s: Subject) -> None:
    n = s.check.tokens
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for who, allowed in _whos(n):
            ran = engines.forward(*s.qkv(n, dtype=dtype), who, allowed, **_options(s))
            demand(ran, f"no engine accepts {_options(s)} with {who} in {dtype}")


def engines_gradients(s: Subject) -> None:
    n = s.check.tokens
    for dtype in (torch.float32, torch.float64):
        for who, allowed in _whos(n):
            ran = engines.gradients(*s.qkv(n, dtype=dtype), who, allowed, **_options(s))
            demand(ran, f"no engine gives gradients for {_options(s)} with {who} in {dtype}")


def flex_engine(s: Subject) -> None:
    n = s.check.tokens
    engines.forward(*s.qkv(n), WINDOW, WINDOW.layout(n).to_dense(), ("flex",), **_options(s))


def strides(s: Subject) -> None:
    n = s.check.tokens
    inputs = strided(s, n, batch=2, heads=s.check.heads)
    engines.forward(*inputs, Causal(), whole("causal", n, n), **_options(s))


def prefix_causality(s: Subject) -> None:
    n = s.check.tokens
    options = _options(s)
    q, k, v = s.qkv(n)
    full = engines.attend(q, k, v, None, is_causal=True, **options)
    for p in (cut for cut in CUTS if cut < n):
        changed = [torch.cat([t[:, :, :p], 1 - 2 * t[:, :, p:]], 2) for t in (q, k, v)]
        other = engines.attend(changed[0], changed[1], changed[2], None, is_causal=True, **options)
        wrong = (other[:, :, :p] != full[:, :, :p]).any(-1)
        demand(
            not bool(wrong.any()),
            f"under a causal mask, tokens from {p} on change what comes before, at (batch, head, query) "
            f"{places(wrong)}",
        )
    q, k, v = s.qkv(n, dtype=torch.float64)
    full = engines.attend(q, k, v, None, is_causal=True, **options)
    for p in (cut for cut in CUTS if cut < n):
        first = q[:, :, :p], k[:, :, :p], v[:, :, :p]
        out, _ = refused(lambda first=first: engines.attend(*first, None, is_causal=True, **options))
        if out is not None:
            same(f"under a causal mask, the first {p} of {n} tokens alone", out, full[:, :, :p])


CHECKS = {f.__name__: f for f in (engines_forward, engines_gradients, flex_engine, strides, prefix_causality)}
