"""Checks of patterns: the layout is the set, promises hold, every engine computes over just that set."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.catalogue.conformance import engines
from foveate.catalogue.conformance.subject import CUTS, Subject, demand, fail, places
from foveate.core.layout import TILE
from foveate.core.patterns import EMPTY, FULL, Extent, Mask, Order, Pattern

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# ------------------------------------------------------------------------------------------- what patterns need
def truth(pattern: Pattern, n: int, m: int) -> Tensor:
    """Bool (batch, heads, n, m): `contains` on every pair."""
    ext = Extent(n, m)
    q, k = np.arange(n)[:, None], np.arange(m)[None, :]
    return torch.from_numpy(
        np.array(
            [
                [np.broadcast_to(pattern.contains(ext, b, h, q, k), (n, m)) for h in range(pattern.heads)]
                for b in range(pattern.batch)
            ]
        )
    )


def takes(pattern: Pattern, n: int, m: int) -> bool:
    """Whether the pattern can live on n queries and m keys."""
    try:
        pattern.check(Extent(n, m))
    except ValueError:
        return False
    return True


def planes(s: Subject, pattern: Pattern) -> list[tuple[int, int]]:
    """The check's own plane, which must be accepted, and other sizes where they are: odd, ragged, N != M."""
    n = s.check.tokens
    part = 61 if n > 61 else max(1, n // 2)
    others = [(part, n), (1, n), (n, part), (7, 7), (63, 63), (75, 75), (389, 389)]
    return [(n, n), *((a, b) for a, b in others if takes(pattern, a, b))]


def room(s: Subject, pattern: Pattern) -> dict[str, Any]:
    """Batch and heads of inputs for the pattern."""
    heads = pattern.heads if pattern.heads > 1 else s.check.heads
    return {"batch": pattern.batch if pattern.batch > 1 else 2, "heads": heads}


def _pattern(s: Subject) -> Pattern:
    made = s.build()
    demand(isinstance(made, Pattern), f"{made!r} is a {type(made).__name__}; a pattern is a Pattern")
    return made


# -------------------------------------------------------------------------------------------------- the set
def layout_is_contains(s: Subject) -> None:
    pattern = _pattern(s)
    for n, m in planes(s, pattern):
        layout = pattern.layout(n, m)
        dense, want = layout.to_dense(), truth(pattern, n, m)
        demand(
            (layout.q_len, layout.k_len) == (n, m) and dense.shape[0] in (1, want.shape[0]),
            f"layout({n}, {m}) is for {layout.q_len} x {layout.k_len}, batch {layout.batch}",
        )
        wrong = dense != want
        demand(
            not bool(wrong.any()),
            f"layout({n}, {m}) and contains() disagree at (batch, head, query, key) {places(wrong)}",
        )


def classification(s: Subject) -> None:
    pattern = _pattern(s)
    random = np.random.default_rng(0)
    for n, m in planes(s, pattern):
        q, k = (np.sort(random.integers(0, size + 1, (2, 300)), 0) for size in (n, m))
        some = (q[0] < q[1]) & (k[0] < k[1])
        tiles = np.stack(np.meshgrid(np.arange(-(-n // TILE)), np.arange(-(-m // TILE)), indexing="ij"))
        qt, kt = tiles.reshape(2, -1) * TILE
        q0, q1 = np.r_[q[0][some], qt], np.r_[q[1][some], np.minimum(qt + TILE, n)]
        k0, k1 = np.r_[k[0][some], kt], np.r_[k[1][some], np.minimum(kt + TILE, m)]
        dense = truth(pattern, n, m).numpy()
        for b in range(pattern.batch):
            for h in range(pattern.heads):
                kinds = np.broadcast_to(pattern.classify(Extent(n, m), b, h, q0, q1, k0, k1), q0.shape)
                for kind, *box in zip(kinds, q0, q1, k0, k1, strict=True):
                    seen = dense[b, h, box[0] : box[1], box[2] : box[3]]
                    name = {EMPTY: "EMPTY", FULL: "FULL"}.get(int(kind))
                    if (kind == EMPTY and seen.any()) or (kind == FULL and not seen.all()):
                        fail(
                            f"classify() says {name} for queries [{box[0]}, {box[1]}) and keys [{box[2]}, {box[3]}) "
                            f"of {n} x {m}, head {h}; contains() allows {seen.sum()} of {seen.size} pairs"
                        )


def equality(s: Subject) -> None:
    one, other = _pattern(s), _pattern(s)
    demand(one == other, f"two patterns made with the same arguments are not equal: {one!r}")
    demand(hash(one) == hash(other), f"equal patterns have different hashes: {one!r}")
    text = repr(one)
    if "<" in text:  # content too long to be told, such as a mask
        return
    names: dict[str, Any] = dict(vars(importlib.import_module("foveate.patterns")))
    names |= vars(importlib.import_module(type(one).__module__))
    names |= {type(one).__name__: type(one), "Order": Order}
    try:
        again = eval(text, names)
    except Exception as error:
        fail(f"repr does not evaluate: {text}: {type(error).__name__}: {error}")
    demand(again == one, f"repr {text} evaluates to another pattern, {again!r}")


# ---------------------------------------------------------------------------------------------- the engines
def engines_forward(s: Subject) -> None:
    pattern = _pattern(s)
    for n, m in planes(s, pattern)[:2]:
        allowed = truth(pattern, n, m)
        for dtype in DTYPES:
            ran = engines.forward(*s.qkv(n, m, dtype=dtype, **room(s, pattern)), pattern, allowed)
            demand(ran, f"no engine accepts {pattern!r} on {n} x {m} in {dtype}")


def engines_gradients(s: Subject) -> None:
    pattern, n = _pattern(s), s.check.tokens
    allowed = truth(pattern, n, n)
    for dtype in (torch.float32, torch.float64):
        ran = engines.gradients(*s.qkv(n, dtype=dtype, **room(s, pattern)), pattern, allowed)
        demand(ran, f"no engine gives gradients for {pattern!r} on {n} tokens in {dtype}")


def flex_engine(s: Subject) -> None:
    pattern, n = _pattern(s), s.check.tokens
    q, k, v = s.qkv(n, **room(s, pattern))
    engines.forward(q, k, v, pattern, truth(pattern, n, n), ("flex",))


def unseen_rows(s: Subject) -> None:
    pattern, n = _pattern(s), s.check.tokens
    rows = torch.arange(n)[:, None]
    shown = (rows >= TILE + 5) if n > 2 * TILE else rows % 5 != 2  # a whole tile of rows, part of one, none
    part = pattern & Mask(shown)
    allowed = truth(pattern, n, n) & shown
    inputs = s.qkv(n, **room(s, pattern))
    engines.forward(*inputs, part, allowed)
    engines.gradients(*inputs, part, allowed)


def masked_nan(s: Subject) -> None:
    pattern, n = _pattern(s), s.check.tokens
    rows, keys = torch.arange(n)[:, None], torch.arange(n)
    spoilt = keys % 7 == 3
    clean_rows = ~(spoilt & (rows % 2 == 0))  # even rows see no spoilt key, odd ones may
    q, k, v = s.qkv(n, **room(s, pattern))
    k[:, :, spoilt], v[:, :, spoilt] = float("nan"), float("inf")
    engines.forward(q, k, v, pattern, truth(pattern, n, n))
    engines.forward(q, k, v, pattern & Mask(clean_rows), truth(pattern, n, n) & clean_rows)
    nowhere = (~spoilt)[None, :]
    engines.gradients(q, k, v, pattern & Mask(nowhere), truth(pattern, n, n) & nowhere)


def grouped_heads(s: Subject) -> None:
    pattern, n = _pattern(s), s.check.tokens
    heads = pattern.heads if pattern.heads > 1 else 4
    allowed = truth(pattern, n, n)
    batch = room(s, pattern)["batch"]
    for kv_heads in {1, heads // 2 if heads % 2 == 0 else 1}:
        inputs = s.qkv(n, batch=batch, heads=heads, kv_heads=kv_heads)
        engines.forward(*inputs, pattern, allowed)
        engines.gradients(*inputs, pattern, allowed)


def strides(s: Subject) -> None:
    pattern, n = _pattern(s), s.check.tokens
    q, k, v = strided(s, n, **room(s, pattern))
    allowed = truth(pattern, n, n)
    engines.forward(q, k, v, pattern, allowed)
    engines.gradients(q, k, v, pattern, allowed)


def strided(s: Subject, n: int, batch: int, heads: int, dtype: torch.dtype = torch.float32):
    """q, k, v of one shape: q in memory order (B, N, H, D), k a slice of wider rows, v the same for the whole batch."""
    dim = s.check.head_dim
    q = s.normal(batch, n, heads, dim, dtype=dtype, seed=1).transpose(1, 2)
    k = s.normal(batch, heads, n, 2 * dim + 3, dtype=dtype, seed=2)[..., 1 : dim + 1]
    return q, k, s.normal(1, heads, n, dim, dtype=dtype, seed=3).expand(batch, -1, -1, -1)


def batch_rows(s: Subject) -> None:
    pattern, n = _pattern(s), s.check.tokens
    allowed = truth(pattern, n, n)
    q, k, v = s.qkv(n, batch=pattern.batch if pattern.batch > 1 else 3, heads=room(s, pattern)["heads"])
    together = engines.attend(q, k, v, pattern)
    for b in range(len(q)):
        mine = allowed[b : b + 1] if pattern.batch > 1 else allowed
        row = q[b : b + 1], k[b : b + 1], v[b : b + 1]
        engines.assert_within_budget(together[b : b + 1], *row, mine)
        engines.forward(*row, pattern if pattern.batch == 1 else mine, mine)


# -------------------------------------------------------------------------------------------- what tags bring
def no_later_key(s: Subject) -> None:
    pattern = _pattern(s)
    for n, m in planes(s, pattern):
        later = torch.arange(m) > torch.arange(n)[:, None] + (m - n)
        wrong = truth(pattern, n, m) & later
        demand(
            not bool(wrong.any()),
            f"tagged causal, but on {n} x {m} sees a later key at (batch, head, query, key) {places(wrong)}",
        )


def prefix_causality(s: Subject) -> None:
    pattern, n = _pattern(s), s.check.tokens
    allowed = truth(pattern, n, n)
    q, k, v = s.qkv(n, **room(s, pattern))
    full = engines.attend(q, k, v, pattern)
    for p in (cut for cut in CUTS if cut < n):
        changed = [torch.cat([t[:, :, :p], 1 - 2 * t[:, :, p:]], 2) for t in (q, k, v)]
        other = engines.attend(changed[0], changed[1], changed[2], pattern)
        wrong = (other[:, :, :p] != full[:, :, :p]).any(-1)
        demand(
            not bool(wrong.any()),
            f"tokens from {p} on change what comes before, at (batch, head, query) {places(wrong)}",
        )
        if takes(pattern, p, p):
            alone = truth(pattern, p, p)
            wrong = alone != allowed[:, :, :p, :p]
            demand(
                not bool(wrong.any()),
                f"the set on {p} tokens is not that of the first {p} of {n}: (batch, head, query, key) {places(wrong)}",
            )
            engines.forward(q[:, :, :p], k[:, :, :p], v[:, :, :p], pattern, allowed[:, :, :p, :p])


def shift(s: Subject) -> None:
    """Rows far enough from the borders see the same offsets as the row that sees most (of several, the middle one)."""
    pattern, n = _pattern(s), s.check.tokens
    shape = getattr(pattern, "shape", None)
    shape = tuple(shape) if isinstance(shape, tuple) else (n,)
    order = getattr(pattern, "order", None)
    place = torch.arange(n) if order is None else torch.argsort(order.permutation)  # cell -> place in memory
    dense = truth(pattern, n, n)[:, :, place][..., place].flatten(0, 1)  # (sets, query cell, key cell)
    cells = torch.stack(torch.unravel_index(torch.arange(n), shape), -1)  # (n, axes)
    size = torch.tensor(shape)
    off = (cells - (size // 2)).abs().sum(-1)
    model = int((dense.sum((0, 2)) * (1 + n) - off).argmax())
    reach = cells[dense[:, model].any(0)] - cells[model]
    demand(len(reach), f"no query of {shape} sees anything")
    behind, ahead = reach.min(0).values.clamp(max=0), reach.max(0).values.clamp(min=0)
    inner = ((cells + behind >= 0) & (cells + ahead < size)).all(-1).nonzero()[:, 0]
    demand(
        len(inner) > 1,
        f"query {tuple(cells[model].tolist())} of {shape} sees {(-behind).tolist()} behind and {ahead.tolist()} ahead, "
        "and no other query has as much room; accepted: more tokens, or a smaller window",
    )
    steps = torch.tensor([math.prod(shape[axis + 1 :]) for axis in range(len(shape))])
    for row in inner:
        by = int(((cells[row] - cells[model]) * steps).sum())  # along the cells in row-major order
        for which, seen in enumerate(dense):
            expected = torch.zeros(n, dtype=torch.bool)
            expected[seen[model].nonzero()[:, 0] + by] = True
            wrong = seen[row] != expected
            demand(
                not bool(wrong.any()),
                f"tagged shift-equivariant, but query {tuple(cells[row].tolist())} of {shape}, set {which}, does "
                f"not see the keys of query {tuple(cells[model].tolist())} moved along: cells {places(wrong)} differ",
            )


def limits(s: Subject) -> None:
    n = s.check.tokens
    for limit in s.check.limits:
        pattern = s.build(**limit["arguments"])
        dense, want = pattern.layout(n).to_dense(), whole(limit["equals"], n, n)
        wrong = dense != want
        demand(
            not bool(wrong.any()),
            f"with {limit['arguments']} it is not {limit['equals']} attention on {n} tokens: (batch, head, query, key) "
            f"{places(wrong)}",
        )


def whole(equals: str, n: int, m: int) -> Tensor:
    """Bool (n, m): full, or causal with the last query at the last key."""
    everything = torch.ones(n, m, dtype=torch.bool)
    return everything if equals == "full" else everything.tril(m - n)


CHECKS = {
    f.__name__: f
    for f in (
        layout_is_contains,
        classification,
        equality,
        engines_forward,
        engines_gradients,
        flex_engine,
        unseen_rows,
        masked_nan,
        grouped_heads,
        strides,
        batch_rows,
        no_later_key,
        prefix_causality,
        shift,
        limits,
    )
}
