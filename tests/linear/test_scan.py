"""The chunked scan against the token loop, written here once more from the formulas, and against itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.linear import LinearState, linear_attention, recurrence, scan

DECAYS = ("none", "head", "token", "channel", "fast channel", "forgets")


def drawn(decay: str, *, b=2, h=4, g=2, n=75, d=5, e=7, seed=0, beta=False, dtype=torch.float64):
    """q, k, v, log decay, beta of a case; keys are normal vectors, of norm 1 for the delta rule."""
    r = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(*shape, generator=r, dtype=dtype) for shape in ((b, h, n, d), (b, g, n, d), (b, g, n, e))
    )
    if beta:
        k = torch.nn.functional.normalize(k, dim=-1)
    rate = lambda *shape: -torch.rand(*shape, generator=r, dtype=dtype)  # noqa: E731
    log = {
        "none": lambda: None,
        "head": lambda: rate(g),
        "token": lambda: rate(b, g, n),
        "channel": lambda: rate(b, g, n, d),
        "fast channel": lambda: rate(b, g, n, d) * 30,
        "forgets": lambda: rate(b, g, n),
    }[decay]()
    if decay == "forgets" and n:
        log[:, :, n // 3] = -torch.inf
    return q, k, v, log, torch.rand(b, g, n, generator=r, dtype=dtype) if beta else None


def loop(q, k, v, log=None, beta=None, normalize=False, eps=1e-6, scale=1.0, start=None):
    """Every row, head and token by itself, in float64: (out, states after the last token)."""
    q, k, v = q.double(), k.double(), v.double()
    b, h, n, d = q.shape
    group = h // k.shape[1]
    out = torch.zeros(b, h, n, v.shape[3], dtype=torch.float64)
    last = torch.zeros(b, k.shape[1], d, v.shape[3], dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            c = j // group
            s = (
                torch.zeros(d, v.shape[3], dtype=torch.float64)
                if start is None
                else start[i, c].double().clone()
            )
            z = torch.zeros(d, dtype=torch.float64)
            for t in range(n):
                if log is not None:
                    a = log[c] if log.ndim == 1 else log[i, c, t]
                    a = a.double().exp() * torch.ones(d, dtype=torch.float64)
                    s, z = a[:, None] * s, a * z
                u = v[i, c, t] if beta is None else beta[i, c, t].double() * (v[i, c, t] - k[i, c, t] @ s)
                s, z = s + torch.outer(k[i, c, t], u), z + k[i, c, t]
                o = q[i, j, t] @ s
                out[i, j, t] = o / (q[i, j, t] @ z + eps) if normalize else o * scale
            last[i, c] = s
    return out, last


@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("engine", ["recurrent", "chunked", "quadratic"])
def test_equals_the_loop(engine, decay, beta):
    if engine == "quadratic" and beta:
        pytest.skip("refused, see below")
    q, k, v, log, strength = drawn(decay, n=23, beta=beta)
    want, last = loop(q, k, v, log, strength, scale=0.3)
    for chunk in (1, 5, 8, 64) if engine == "chunked" else (64,):
        got, state = linear_attention(
            q, k, v, log_decay=log, beta=strength, scale=0.3, chunk=chunk, return_state=True, engine=engine
        )
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state.kv, last, rtol=1e-10, atol=1e-10)
        assert state.position == 23
        assert state.k is None


@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
def test_normalised(decay):
    q, k, v, log, _ = drawn(decay, n=37)
    q, k = q.abs(), k.abs()
    want, _ = loop(q, k, v, log, normalize=True, eps=1e-3)
    for engine in scan.ENGINES:
        got = linear_attention(q, k, v, log_decay=log, normalize=True, eps=1e-3, chunk=8, engine=engine)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    ones = linear_attention(q, k, torch.ones_like(v), log_decay=log, normalize=True, eps=0.0)
    torch.testing.assert_close(ones, torch.ones_like(ones))  # the weights of a row sum to 1


@pytest.mark.parametrize(
    ("decay", "beta"), [("none", False), ("head", True), ("token", False), ("channel", True)]
)
def test_gradients(decay, beta):
    q, k, v, log, strength = drawn(decay, b=1, h=2, g=1, n=11, d=3, e=2, beta=beta)
    start = torch.randn(1, 1, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    given_ = [t.requires_grad_() for t in (q, k, v, start, log, strength) if t is not None]

    def call(*args):
        rest = list(args[4:])
        decay_ = rest.pop(0) if log is not None else None
        state = LinearState(args[3], None, 0)
        out, after = linear_attention(
            *args[:3],
            log_decay=decay_,
            beta=rest.pop(0) if rest else None,
            chunk=4,
            state=state,
            return_state=True,
        )
        return out, after.kv

    assert torch.autograd.gradcheck(call, given_, atol=1e-7)


@pytest.mark.parametrize("beta", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_of_segments_that_are_computed_again(decay, beta, monkeypatch):
    monkeypatch.setattr(scan, "WORKING", 1)  # segments of one chunk
    q, k, v, log, strength = drawn(decay, n=61, beta=beta)
    given_ = [t.requires_grad_() for t in (q, k, v, log, strength) if t is not None]
    weigh = torch.randn(2, 4, 61, 7, dtype=torch.float64)

    def gradients(**options):
        out = linear_attention(q, k, v, log_decay=log, beta=strength, **options)
        return torch.autograd.grad((out * weigh).sum(), given_)

    for got, want in zip(gradients(chunk=7), gradients(engine="recurrent"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(0, 50), chunk=st.integers(1, 40), cut=st.floats(0, 1), decay=st.sampled_from(DECAYS),
    beta=st.booleans(), normalize=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_pieces_give_the_whole(n, chunk, cut, decay, beta, normalize, seed):
    beta = beta and not normalize
    q, k, v, log, strength = drawn(decay, b=1, n=n, seed=seed, beta=beta)
    if normalize:
        q, k = q.abs() + 0.1, k.abs() + 0.1
    options = {"normalize": normalize, "chunk": chunk, "return_state": True}
    whole, state = linear_attention(q, k, v, log_decay=log, beta=strength, **options)
    at = round(cut * n)
    one = lambda t, a, z: None if t is None else t if t.ndim == 1 else t[:, :, a:z]  # noqa: E731
    parts, carried = [], LinearState.empty(k, v, normalize=normalize)
    for a, z in ((0, at), (at, n)):
        qkv = [one(t, a, z) for t in (q, k, v)]
        part, carried = linear_attention(
            *qkv, log_decay=one(log, a, z), beta=one(strength, a, z), state=carried, **options
        )
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(carried.kv, state.kv, rtol=1e-8, atol=1e-8)
    assert carried.position == state.position == n


@pytest.mark.parametrize("decay", DECAYS)
def test_float32_and_bfloat16_keep_a_float32_state(decay):
    q, k, v, log, _ = drawn(decay, n=500, dtype=torch.float32)
    q, k, v = q[:1], k[:1], v[:1]
    log = log[:1] if log is not None and log.ndim > 1 else log
    want, _ = loop(q, k, v, log)
    got, state = linear_attention(q, k, v, log_decay=log, return_state=True)
    # products of 5 numbers, sums of up to 500: the error of a row stays near sqrt(500) roundings of its largest part
    limit = 4e-7 * math.sqrt(500) * float(want.abs().max())
    assert float((got - want).abs().max()) < limit
    low = [t[:1].bfloat16() for t in (q, k, v)]
    out, state = linear_attention(
        *low, log_decay=log[:1] if log is not None and log.ndim > 1 else log, return_state=True
    )
    exact, _ = loop(*low, log[:1] if log is not None and log.ndim > 1 else log)
    assert out.dtype == torch.bfloat16
    assert state.kv.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=limit)  # one rounding, at the end


def test_later_tokens_change_nothing_before():
    for decay in DECAYS:
        q, k, v, log, strength = drawn(decay, n=50, beta=True)
        first = linear_attention(q, k, v, log_decay=log, beta=strength, chunk=16)
        for t in (q, k, v):
            t[:, :, 33:] = torch.nan
        again = linear_attention(q, k, v, log_decay=log, beta=strength, chunk=1)
        torch.testing.assert_close(again[:, :, :33], first[:, :, :33])


def test_strides_and_grouped_heads():
    q, k, v, log, strength = drawn("token", beta=True)
    k2, v2, log2, strength2 = (t.repeat_interleave(2, 1) for t in (k, v, log, strength))
    want = linear_attention(q, k2, v2, log_decay=log2, beta=strength2)
    other = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(linear_attention(*other, log_decay=log, beta=strength), want)


def test_the_delta_rule_replaces_what_a_key_holds():
    k = torch.nn.functional.normalize(torch.randn(1, 1, 3, 8), dim=-1)
    k[:, :, 2] = k[:, :, 0]
    v = torch.randn(1, 1, 3, 4)
    out = linear_attention(k, k, v, beta=torch.ones(1, 1, 3))
    torch.testing.assert_close(out[0, 0, 2], v[0, 0, 2])
    assert not torch.allclose(linear_attention(k, k, v)[0, 0, 2], v[0, 0, 2], atol=0.1)  # plain sums both


def test_state_and_memory_do_not_grow_with_the_tokens():
    sizes = set()
    for n in (64, 1000):
        q, k, v, log, _ = drawn("head", n=n, dtype=torch.float32)
        sizes.add(linear_attention(q, k, v, log_decay=log, return_state=True)[1].nbytes)
    assert sizes == {2 * 2 * 5 * 7 * 4}
    # what a backward pass holds besides inputs and outputs: states between segments, no N x N matrix
    held = []
    for n in (2**14, 2**15):
        q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for _ in range(3))
        kept = 0

        def pack(t):
            nonlocal kept
            kept += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            linear_attention(q, k, v)
        held.append(kept)
    assert held[1] < 2.2 * held[0]


def test_slow_channels_take_the_short_way_and_give_the_same(monkeypatch):
    q, k, v, log, _ = drawn("channel", n=50)
    short = linear_attention(q, k, v, log_decay=log)
    monkeypatch.setattr(scan, "NO_FLOW", -1.0)
    torch.testing.assert_close(linear_attention(q, k, v, log_decay=log), short, rtol=1e-10, atol=1e-10)


def test_recurrence():
    r = torch.Generator().manual_seed(0)
    a, b = (
        torch.rand(2, 3, 29, generator=r, dtype=torch.float64),
        torch.randn(2, 3, 29, 4, generator=r, dtype=torch.float64),
    )
    a[0, 0, 7] = 0.0
    start = torch.randn(2, 3, 4, generator=r, dtype=torch.float64)
    h, want = start, []
    for t in range(29):
        h = a[..., t, None] * h + b[..., t, :]
        want.append(h)
    for chunk in (1, 5, 64):
        torch.testing.assert_close(recurrence(a, b, start, chunk=chunk), torch.stack(want, -2))
    torch.testing.assert_close(recurrence(a, b), recurrence(a, b, torch.zeros_like(start)))
    some = [t.requires_grad_() for t in (a[:1, :1, :9].clone(), b[:1, :1, :9].clone(), start[:1, :1].clone())]
    assert torch.autograd.gradcheck(lambda *t: recurrence(*t, chunk=4), some)
    assert recurrence(a[..., :0], b[..., :0, :]).shape == (2, 3, 0, 4)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"q": torch.zeros(1, 3, 9, 5)}, ValueError, "multiple of Hkv"),
        ({"k": torch.zeros(1, 2, 8, 5)}, ValueError, "q must be"),
        ({"v": torch.zeros(2, 9, 5)}, ValueError, "v must be"),
        ({"q": torch.zeros(1, 2, 9, 5, dtype=torch.int64)}, TypeError, "q must be a floating-point"),
        ({"k": torch.zeros(1, 2, 9, 5).double()}, TypeError, "k is torch.float64"),
        ({"log_decay": torch.ones(2)}, ValueError, "log_decay must be <= 0"),
        ({"log_decay": -torch.ones(3)}, ValueError, r"log_decay must have shape \(2,\)"),
        ({"log_decay": -0.5}, TypeError, "log_decay must be a floating"),
        ({"beta": torch.ones(1, 2, 8)}, ValueError, "beta must have shape"),
        ({"beta": torch.ones(1, 2, 9), "normalize": True}, ValueError, "does not go with beta"),
        ({"beta": torch.ones(1, 2, 9), "engine": "quadratic"}, ValueError, "takes no beta"),
        ({"engine": "triton"}, ValueError, "engine must be one of"),
        ({"chunk": 0}, ValueError, "chunk must be an int >= 1"),
        ({"state": 3}, TypeError, "state must be a LinearState"),
        ({"state": LinearState(torch.zeros(1, 2, 5, 4), None, 0)}, ValueError, "state must hold kv"),
        ({"state": LinearState(torch.zeros(1, 2, 5, 5), None, 0), "normalize": True}, ValueError, "and k"),
    ],
)
def test_errors(change, error, says):
    args = {
        "q": torch.zeros(1, 2, 9, 5),
        "k": torch.zeros(1, 2, 9, 5),
        "v": torch.zeros(1, 2, 9, 5),
        **change,
    }
    with pytest.raises(error, match=says):
        linear_attention(**args)


def test_recurrence_errors():
    with pytest.raises(ValueError, match="do not fit"):
        recurrence(torch.rand(3), torch.rand(4, 2))
    with pytest.raises(ValueError, match="chunk"):
        recurrence(torch.rand(3), torch.rand(3, 2), chunk=0)
