"""Checks of operators: functions q (B, H, N, D), k (B, H, M, D), v (B, H, M, Dv) -> out (B, H, N, Dv).

How wrong an operator may be in low precision follows from its own conditioning in float64: a backward stable
computation in a dtype of unit roundoff u_io, with sums in float32 (u = 2^-24; 2^-53 for float64), returns the exact
result of inputs that are off by about

    delta = lambda (4 u_io + sqrt(D + M) u),   lambda = 2

relative. So the allowance of a row is FACTOR times the largest change of the exact result, over DRAWS draws of random
signs, when every input is multiplied by 1 + delta times a sign, plus delta times the row's largest magnitude.

A stateful operator is an object with `initial_state(q, k, v)`, the state before the first token for inputs of these
shapes, dtype and device; `op(q, k, v, state=s)` takes the next tokens and returns (out, state after them), without
changing s. Without `state` the same object is called as `op(q, k, v)` and returns out alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from foveate.catalogue.conformance.budget import LAMBDA, UNIT
from foveate.catalogue.conformance.oracle import logits64, weights
from foveate.catalogue.conformance.patterns import strided, whole
from foveate.catalogue.conformance.subject import CUTS, ODD, Subject, demand, places, refused, same

FACTOR, DRAWS = 4.0, 4
FLIPS = 0.25  # share of rows of a `content` operator whose discrete choice low precision may turn


def _operator(s: Subject, **other: Any) -> Callable[..., Tensor]:
    made = s.build(**other)
    demand(callable(made), f"{made!r} is a {type(made).__name__}; an operator is called with q, k, v")
    return made


def _run(op: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = op(q, k, v)
    demand(isinstance(out, Tensor), f"returned a {type(out).__name__}; an operator returns a tensor")
    return out


def shape_and_dtype(s: Subject) -> None:
    op, n = _operator(s), s.check.tokens
    for size in (n, *ODD):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            inputs = s.qkv(size, dtype=dtype)
            out, refusal = refused(lambda inputs=inputs: _run(op, *inputs))
            if out is None:
                demand(size != n, f"refuses {size} tokens in {dtype}, which the check asks for: {refusal}")
                continue
            want = (*inputs[0].shape[:3], inputs[2].shape[3])
            demand(
                tuple(out.shape) == want, f"{size} tokens: returned shape {tuple(out.shape)}; expected {want}"
            )
            demand(out.dtype == dtype, f"{size} tokens of {dtype}: returned {out.dtype}")
            demand(
                bool(torch.isfinite(out).all()),
                f"{size} tokens of {dtype}: not finite at {places(~out.isfinite())}",
            )


def precision(s: Subject) -> None:
    op, n = _operator(s), s.check.tokens
    for dtype in (torch.float32, torch.bfloat16):
        low = s.qkv(n, dtype=dtype)
        wide = [t.double() for t in low]
        exact = _run(op, *wide)
        delta = LAMBDA * (4 * UNIT[dtype] + math.sqrt(s.check.head_dim + n) * UNIT[torch.float32])
        moved = torch.zeros_like(exact)
        for draw in range(DRAWS):
            g = torch.Generator().manual_seed(draw)
            signs = [torch.randint(0, 2, t.shape, generator=g) * 2.0 - 1 for t in wide]
            near = _run(op, *(t * (1 + delta * sign) for t, sign in zip(wide, signs, strict=True)))
            moved = torch.maximum(moved, (near - exact).abs())
        allowed = FACTOR * moved.amax(-1, keepdim=True) + delta * exact.abs().amax(-1, keepdim=True)
        error = (_run(op, *low).double() - exact).abs()
        rows = ~(error <= allowed).all(-1)
        most = FLIPS * rows.numel() if "content" in s.tags else 0
        demand(
            int(rows.sum()) <= most,
            f"{dtype}: off by up to {float((error / allowed).nan_to_num(math.inf).max()):.3g} times what its "
            f"conditioning in float64 explains, in rows (batch, head, query) {places(rows)}",
        )


def gradients(s: Subject) -> None:
    op = _operator(s)
    size = min(7, s.check.tokens)
    inputs = s.qkv(size, batch=1, dtype=torch.float64)
    if refused(lambda: _run(op, *inputs))[0] is None:
        inputs = s.qkv(s.check.tokens, batch=1, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    out = _run(op, *leaves)
    demand(out.requires_grad, "the result carries no gradient")
    try:
        torch.autograd.gradcheck(lambda *a: _run(op, *a), leaves, fast_mode=True)
    except GradcheckError as error:
        raise AssertionError(
            f"gradients on {inputs[0].shape[2]} tokens are not those of the function: {error}"
        ) from None
    found = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    for name, grad in zip("qkv", found, strict=True):
        demand(grad is not None, f"{name} gets no gradient")


def batch_rows(s: Subject) -> None:
    op = _operator(s)
    q, k, v = s.qkv(s.check.tokens, batch=3, dtype=torch.float64)
    together = _run(op, q, k, v)
    for b in range(3):
        row = slice(b, b + 1)
        same(f"batch row {b} alone", _run(op, q[row], k[row], v[row]), together[row])


def strides(s: Subject) -> None:
    op = _operator(s)
    inputs = strided(s, s.check.tokens, 2, s.check.heads, torch.float64)
    same("strided inputs", _run(op, *inputs), _run(op, *(t.contiguous() for t in inputs)))


def grouped_heads(s: Subject) -> None:
    op = _operator(s)
    q, k, v = s.qkv(s.check.tokens, heads=4, kv_heads=2, dtype=torch.float64)
    if "shared-heads" in s.tags:  # they decide together, so alone they decide alike only if they are equal
        q = q[:, ::2].repeat_interleave(2, 1)
    out, refusal = refused(lambda: _run(op, q, k, v))
    if out is None:
        clear = any(word in refusal.lower() for word in ("head", "group", "shape"))
        demand(
            clear, f"refuses 4 query heads on 2 key heads without naming heads, groups or shapes: {refusal}"
        )
        return
    same("grouped heads", out, _run(op, q, *(t.repeat_interleave(2, 1) for t in (k, v))))


def extreme_logits(s: Subject) -> None:
    op = _operator(s)
    q, k, v = s.qkv(s.check.tokens)
    for factor in (1e3, 1e-6, 0.0):
        inputs = [q * factor, k * factor, v]
        out = _run(op, *inputs)
        demand(
            bool(torch.isfinite(out).all()),
            f"q and k times {factor:g}: not finite at (batch, head, query, dim) {places(~torch.isfinite(out))}",
        )


def deterministic(s: Subject) -> None:
    op = _operator(s)
    inputs = s.qkv(s.check.tokens)
    one, other = _run(op, *inputs), _run(op, *inputs)
    demand(torch.equal(one, other), f"the same inputs give other bits at {places(one != other)}")


def inputs_unchanged(s: Subject) -> None:
    op = _operator(s)
    inputs = s.qkv(s.check.tokens)
    before = [t.clone() for t in inputs]
    _run(op, *inputs)
    for name, t, old in zip("qkv", inputs, before, strict=True):
        demand(torch.equal(t, old), f"the operator wrote into {name}, at {places(t != old)}")


# -------------------------------------------------------------------------------------------- what tags bring
def prefix_causality(s: Subject) -> None:
    op, n = _operator(s), s.check.tokens
    q, k, v = s.qkv(n, dtype=torch.float64)
    full = _run(op, q, k, v)
    for p in (cut for cut in CUTS if cut < n):
        changed = [torch.cat([t[:, :, :p], 1 - 2 * t[:, :, p:]], 2) for t in (q, k, v)]
        same(f"tokens from {p} on changed: the first {p}", _run(op, *changed)[:, :, :p], full[:, :, :p])
        first = [t[:, :, :p] for t in (q, k, v)]
        out = refused(lambda first=first: _run(op, *first))[0]
        if out is not None:
            same(f"the first {p} of {n} tokens alone", out, full[:, :, :p])


def other_lengths(s: Subject) -> None:
    op, n = _operator(s), s.check.tokens
    for a, b in ((n, n // 2 + 1), (n // 2 + 1, n), (1, n)):
        inputs = s.qkv(a, b, dtype=torch.float64)
        out, refusal = refused(lambda inputs=inputs: _run(op, *inputs))
        demand(out is not None, f"tagged cross, but refuses {a} queries and {b} keys: {refusal}")
        want = (*inputs[0].shape[:3], inputs[2].shape[3])
        got = None if out is None else tuple(out.shape)
        demand(got == want, f"{a} queries, {b} keys: returned shape {got}; expected {want}")
        demand(bool(torch.isfinite(out).all()), f"{a} queries, {b} keys: not finite")  # pyright: ignore


def permutation(s: Subject) -> None:
    op, n = _operator(s), s.check.tokens
    q, k, v = s.qkv(n, dtype=torch.float64)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    full = _run(op, q, k, v)
    moved = _run(op, q[:, :, order], k[:, :, order], v[:, :, order])
    same("permuted tokens", moved, full[:, :, order])


def segments(s: Subject) -> None:
    op, n = _operator(s), s.check.tokens
    demand(hasattr(op, "initial_state"), f"tagged stateful, but {op!r} has no initial_state(q, k, v)")
    q, k, v = s.qkv(n, dtype=torch.float64)
    full = _run(op, q, k, v)
    cuts = [cut for cut in CUTS if cut < n]
    for ends in ([n], [*cuts, n], list(range(1, min(n, 23) + 1))):
        state, start, parts = op.initial_state(q, k, v), 0, []  # pyright: ignore[reportFunctionMemberAccess]
        for end in ends:
            piece = [t[:, :, start:end] for t in (q, k, v)]
            found = op(*piece, state=state)
            demand(
                isinstance(found, tuple) and len(found) == 2,
                f"with state= it returned a {type(found).__name__}; accepted: (out, state)",
            )
            same("the same state twice", op(*piece, state=state)[0], found[0])
            parts.append(found[0])
            state, start = found[1], end
        same(f"{len(ends)} segments ending at {ends[:7]}", torch.cat(parts, 2), full[:, :, : ends[-1]])


def limits(s: Subject) -> None:
    n = s.check.tokens
    q, k, v = s.qkv(n, dtype=torch.float64)
    for limit in s.check.limits:
        p, _ = weights(logits64(q, k, s.check.head_dim**-0.5), whole(limit["equals"], n, n), None)
        out = _run(_operator(s, **limit["arguments"]), q, k, v)
        same(f"with {limit['arguments']} it must be {limit['equals']} attention:", out, p @ v)


CHECKS = {
    f.__name__: f
    for f in (
        shape_and_dtype,
        precision,
        gradients,
        batch_rows,
        strides,
        grouped_heads,
        extreme_logits,
        deterministic,
        inputs_unchanged,
        prefix_causality,
        other_lengths,
        permutation,
        segments,
        limits,
    )
}
