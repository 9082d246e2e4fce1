"""Checks of selectors: the layout is valid, causal, the same every time, and attention over it is exact."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.catalogue.conformance import engines
from foveate.catalogue.conformance.patterns import strided, whole
from foveate.catalogue.conformance.subject import Subject, demand, fail, places, refused
from foveate.core.layout import TILE, BlockLayout
from foveate.core.selectors.base import Selector


def _selector(s: Subject) -> Selector:
    made = s.build()
    demand(isinstance(made, Selector), f"{made!r} is a {type(made).__name__}; a selector is a Selector")
    return made


def _forms(s: Subject) -> list[bool]:
    """The values of is_causal that its tags promise."""
    causal, both = "causal" in s.tags, "bidirectional" in s.tags
    return [True, False] if causal and both else [causal]


def _layout(selector: Selector, q: Tensor, k: Tensor, is_causal: bool) -> BlockLayout:
    made = selector.layout(q, k, is_causal=is_causal)
    demand(isinstance(made, BlockLayout), f"layout() returned a {type(made).__name__}; accepted: BlockLayout")
    return made


def valid_layout(s: Subject) -> None:
    selector, n = _selector(s), s.check.tokens
    for is_causal in _forms(s):
        sizes = [(n, n), (n - 1, n - 1), (n + 62, n + 62), (TILE, n + TILE), (1, n), (n, n + TILE)]
        for number, (a, b) in enumerate(sizes):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                q, k, _ = s.qkv(a, b, dtype=dtype)
                layout, refusal = refused(lambda q=q, k=k, c=is_causal: _layout(selector, q, k, c))
                if layout is None:
                    demand(
                        number,
                        f"refuses {a} queries and {b} keys in {dtype}, which the check asks for: {refusal}",
                    )
                    continue
                _valid(layout, q, k)


def _valid(layout: BlockLayout, q: Tensor, k: Tensor) -> None:
    what = f"the layout for {q.shape[2]} queries, {k.shape[2]} keys, {q.dtype}"
    demand(
        (layout.q_len, layout.k_len) == (q.shape[2], k.shape[2]),
        f"{what} is for {layout.q_len} x {layout.k_len}",
    )
    demand(layout.batch in (1, len(q)), f"{what} has batch {layout.batch}; q has {len(q)}")
    demand(layout.heads in (1, q.shape[1]), f"{what} has {layout.heads} heads; q has {q.shape[1]}")
    try:
        layout._validate()
    except (ValueError, TypeError) as error:
        fail(f"{what} is not valid: {error}")
    demand(
        BlockLayout.from_mask(layout.to_dense()) == layout,
        f"{what} is not canonical: its set, laid out by from_mask, has other arrays",
    )


def deterministic(s: Subject) -> None:
    selector = _selector(s)
    q, k, _ = s.qkv(s.check.tokens)
    for is_causal in _forms(s):
        one, other = (_layout(selector, q, k, is_causal) for _ in range(2))
        demand(one == other, f"the same q and k give two layouts, of {one.area} and {other.area} pairs")
        fresh = _layout(_selector(s), q, k, is_causal)
        demand(one == fresh, f"an equal selector gives another layout, of {fresh.area} pairs, not {one.area}")


def inputs_unchanged(s: Subject) -> None:
    selector = _selector(s)
    q, k, _ = s.qkv(s.check.tokens)
    before = q.clone(), k.clone()
    _layout(selector, q, k, _forms(s)[0])
    for name, t, old in (("q", q, before[0]), ("k", k, before[1])):
        demand(torch.equal(t, old), f"the selector wrote into {name}, at {places(t != old)}")


def batch_rows(s: Subject) -> None:
    selector = _selector(s)
    q, k, _ = s.qkv(s.check.tokens, batch=3)
    for is_causal in _forms(s):
        together = _layout(selector, q, k, is_causal).expand(3, q.shape[1]).to_dense()
        for b in range(3):
            alone = _layout(selector, q[b : b + 1], k[b : b + 1], is_causal).expand(1, q.shape[1]).to_dense()
            wrong = alone != together[b : b + 1]
            demand(
                not bool(wrong.any()),
                f"batch row {b} alone selects another set than among 3 rows: (batch, head, query, key) {places(wrong)}",
            )


def strides(s: Subject) -> None:
    selector, n = _selector(s), s.check.tokens
    q, k, _ = strided(s, n, batch=2, heads=s.check.heads)
    is_causal = _forms(s)[0]
    got = _layout(selector, q, k, is_causal)
    want = _layout(selector, q.contiguous(), k.contiguous(), is_causal)
    demand(
        got == want, f"strided q and k give a layout of {got.area} pairs, contiguous ones one of {want.area}"
    )


def engines_forward(s: Subject) -> None:
    _engines(s, s.check.heads, s.check.heads, engines.forward)


def engines_gradients(s: Subject) -> None:
    _engines(s, s.check.heads, s.check.heads, engines.gradients)


def grouped_heads(s: Subject) -> None:
    for kv_heads in (1, 2):
        _engines(s, 4, kv_heads, engines.forward)


def flex_engine(s: Subject) -> None:
    _engines(s, s.check.heads, s.check.heads, _flex)


def _flex(q: Tensor, k: Tensor, v: Tensor, who: Selector, allowed: Tensor) -> int:
    return engines.forward(q, k, v, who, allowed, ("flex",)) or 1  # it may decline


def _engines(s: Subject, heads: int, kv_heads: int, run) -> None:
    selector, n = _selector(s), s.check.tokens
    for is_causal in _forms(s):
        q, k, v = s.qkv(n, heads=heads, kv_heads=kv_heads)
        layout = _layout(selector, q, k, is_causal)
        _valid(layout, q, k)
        # attention asks a selector with is_causal as it was called; here it asks for the form that is under check
        ran = run(q, k, v, _Form(selector, is_causal), layout.to_dense())
        demand(ran, f"no engine runs attention over the selection of {selector!r} on {n} tokens")


class _Form(Selector):
    """A selector asked for one value of is_causal."""

    def __init__(self, selector: Selector, is_causal: bool) -> None:
        self.selector, self.is_causal = selector, is_causal

    def layout(self, q, k, *, scale=None, is_causal=True):
        return self.selector.layout(q, k, scale=scale, is_causal=self.is_causal)


# -------------------------------------------------------------------------------------------- what tags bring
def no_later_key(s: Subject) -> None:
    selector, n = _selector(s), s.check.tokens
    for a, b in ((n, n), (TILE, n + TILE), (1, n)):
        q, k, _ = s.qkv(a, b)
        layout, _ = refused(lambda q=q, k=k: _layout(selector, q, k, True))
        if layout is None:
            demand((a, b) != (n, n), f"tagged causal, but refuses is_causal=True on {n} tokens")
            continue
        wrong = layout.to_dense() & (torch.arange(b) > torch.arange(a)[:, None] + (b - a))
        demand(
            not bool(wrong.any()),
            f"tagged causal, but on {a} x {b} selects a later key at (batch, head, query, key) {places(wrong)}",
        )


def limits(s: Subject) -> None:
    n = s.check.tokens
    q, k, _ = s.qkv(n)
    for limit in s.check.limits:
        selector = s.build(**limit["arguments"])
        layout = _layout(selector, q, k, limit["equals"] == "causal")
        wrong = layout.to_dense() != whole(limit["equals"], n, n)
        demand(
            not bool(wrong.any()),
            f"with {limit['arguments']} it is not {limit['equals']} attention on {n} tokens: (batch, head, query, key) "
            f"{places(wrong)}",
        )


CHECKS = {
    f.__name__: f
    for f in (
        valid_layout,
        deterministic,
        inputs_unchanged,
        batch_rows,
        strides,
        engines_forward,
        engines_gradients,
        grouped_heads,
        flex_engine,
        no_later_key,
        limits,
    )
}
