"""The native engine with scores, normalisers and dropout, forward and backward, against float64: every instruction set,
dtype, shape, mask and poison. Budgets are those of `foveate.catalogue.conformance.budget`.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pattern_strategies import expressions
from test_native import CAUSAL, COARSE, FULL, make, shapes, where

import foveate as fv
from foveate.catalogue.conformance.budget import assert_grads_within_budget, assert_within_budget
from foveate.core.dropout import keep_mask
from foveate.core.engines import native_library as library
from foveate.core.engines.native_library import Scores
from foveate.core.layout import BlockLayout
from foveate.core.normalizers import ReLU, Sigmoid, Softmax, SoftmaxPlusOne
from foveate.core.scores import ALiBi, Bias, RelativeBias, SoftCap, T5Bias, Temperature
from foveate.patterns import Causal, SlidingWindow

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}
SOFTMAX = (Softmax, SoftmaxPlusOne)
SIZES = [1, 2, 3, 4, 5, 63, 64, 65, 111, 130, 257]


def factor_of(dtype, isa=None):
    return COARSE.get(isa or library.best_isa(), 1.0) if dtype == torch.bfloat16 else 1.0


def random(g, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=g).to(dtype)


@st.composite
def extras(draw, n, m, batch, heads, dtype):
    """Keyword arguments of `attention` beyond q, k, v and the pattern; every tensor wants a gradient."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = []
    if draw(st.integers(0, 3)) == 0:
        shape = draw(st.sampled_from([(n,), (heads, 1), (batch, heads, n), (1, 1, 1)]))
        scores.append(Temperature((torch.rand(shape, generator=g) + 0.5).requires_grad_()))
    if draw(st.integers(0, 3)) == 0:
        scores.append(SoftCap(draw(st.sampled_from([1.0, 5.0, 30.0]))))
    biases = []
    if draw(st.booleans()):
        shape = [full if draw(st.booleans()) else 1 for full in (batch, heads, n, m)]
        tensor = random(
            g, *shape, dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        )
        biases.append(Bias(tensor.requires_grad_()))
    if draw(st.booleans()):
        held = draw(st.sampled_from([1, heads]))
        biases.append(
            draw(
                st.sampled_from(
                    [
                        ALiBi(torch.rand(heads, generator=g).requires_grad_()),
                        RelativeBias(
                            random(g, held, 2 * draw(st.sampled_from([0, 3, 200])) + 1).requires_grad_()
                        ),
                        T5Bias(random(g, 32, heads).requires_grad_(), bidirectional=draw(st.booleans())),
                    ]
                )
            )
        )
    normalizer = draw(
        st.sampled_from([Softmax(), Softmax(), SoftmaxPlusOne(), Sigmoid(), Sigmoid(-2.5), ReLU()])
    )
    made = {"score": (*scores, *draw(st.permutations(biases))), "normalizer": normalizer}
    if isinstance(normalizer, SOFTMAX) and draw(st.booleans()):
        made["sinks"] = random(g, heads).requires_grad_()
    if draw(st.integers(0, 2)) == 0:
        made["dropout_p"] = draw(st.sampled_from([0.1, 0.5, 0.9]))
        made["dropout_seed"] = draw(st.integers(0, 2**63 - 1))
    return made


def check(q, k, v, pattern, allowed, made, *, seed, factor, engine="native"):
    """Forward and every gradient of one request against the definition."""
    g = torch.Generator().manual_seed(seed)
    scores, sinks, normalizer = made.get("score", ()), made.get("sinks"), made.get("normalizer", Softmax())
    leaves = {
        "q": q.detach().requires_grad_(),
        "k": k.detach().requires_grad_(),
        "v": v.detach().requires_grad_(),
    }
    if sinks is not None:
        leaves["sinks"] = sinks
    for number, score in enumerate(scores):
        for tensor in score.tensors.values():
            leaves["score", number] = tensor
    softmax = isinstance(normalizer, SOFTMAX)
    result = fv.attention(
        leaves["q"], leaves["k"], leaves["v"], pattern, return_lse=softmax, engine=engine, **made
    )
    out, lse = result if softmax else (result, None)
    dout = random(g, *out.shape, dtype=out.dtype)
    dlse = random(g, *lse.shape) if softmax and bool(torch.rand((), generator=g) < 0.5) else None
    total = (out.float() * dout.float()).sum()
    if dlse is not None:
        total = total + torch.where(torch.isneginf(lse), 0.0, lse * dlse).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    keep = None
    if "dropout_p" in made:
        keep = keep_mask(made["dropout_seed"], made["dropout_p"], *out.shape[:3], k.shape[2])
    shared = {
        "scores": scores,
        "sinks": sinks,
        "normalizer": normalizer,
        "keep": keep,
        "dropout_p": made.get("dropout_p", 0.0),
        "factor": factor,
    }
    assert_within_budget(out.detach(), q, k, v, allowed, lse=None if lse is None else lse.detach(), **shared)
    grads = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }
    assert_grads_within_budget(grads, q, k, v, allowed, dout=dout, dlse=dlse, **shared)


def gradients_of_a_pattern(data):
    pattern, n, m, dense = data.draw(expressions(depth=2))
    batch, heads, kv_heads, dim, v_dim, dtype, seed = data.draw(shapes(pattern.heads, pattern.batch))
    order = data.draw(st.sampled_from(["bhnd", "bnhd", "slice", "last"]))
    q, k, v = make(batch, heads, kv_heads, n, m, dim, v_dim, dtype, seed, order)
    check(q, k, v, pattern, dense, {}, seed=seed, factor=factor_of(dtype))


def scores_normalisers_and_dropout(data):
    n, m = data.draw(st.sampled_from(SIZES)), data.draw(st.sampled_from(SIZES))
    batch, heads, kv_heads, dim, v_dim, dtype, seed = data.draw(shapes())
    q, k, v = make(batch, heads, kv_heads, n, m, dim, v_dim, dtype, seed)
    allowed = None
    if data.draw(st.booleans()):
        g = torch.Generator().manual_seed(seed)
        allowed = torch.rand(batch, heads, n, m, generator=g) < data.draw(st.floats(0.0, 1.0))
    made = data.draw(extras(n, m, batch, heads, dtype))
    check(q, k, v, allowed, allowed, made, seed=seed, factor=factor_of(dtype))


@settings(max_examples=80, **QUIET)
@given(st.data())
def test_gradients_of_pattern_expressions(data):
    gradients_of_a_pattern(data)


@settings(max_examples=80, **QUIET)
@given(st.data())
def test_scores_normalisers_and_dropout(data):
    scores_normalisers_and_dropout(data)


@pytest.mark.slow
@settings(max_examples=500, **QUIET)
@given(st.data())
def test_more_pattern_expressions(data):
    gradients_of_a_pattern(data)


@pytest.mark.slow
@settings(max_examples=500, **QUIET)
@given(st.data())
def test_more_scores_normalisers_and_dropout(data):
    scores_normalisers_and_dropout(data)


@st.composite
def requests(draw):
    n, m = (draw(st.sampled_from(SIZES)) for _ in range(2))
    kind = draw(st.sampled_from(["full", "causal", "layout"]))
    return n, m, kind, draw(st.floats(0.0, 1.0)), draw(shapes()), draw(st.integers(1, 7))


@pytest.mark.parametrize("isa", library.ISAS)
@settings(max_examples=25, **QUIET)
@given(case=requests())
def test_every_instruction_set(isa, case):
    if isa not in library.available():
        pytest.skip(f"this CPU has no {isa}")
    n, m, kind, density, (batch, heads, kv_heads, dim, v_dim, dtype, seed), threads = case
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    q, k, v = make(batch, heads, kv_heads, n, m, dim, v_dim, dtype, seed)
    allowed, pairs = None, CAUSAL if kind == "causal" else FULL
    g = torch.Generator().manual_seed(seed)
    if kind == "causal":
        allowed = torch.arange(n)[:, None] + (m - n) >= torch.arange(m)[None, :]
    if kind == "layout":
        allowed = torch.rand(batch, heads, n, m, generator=g) < density
        pairs = where(BlockLayout.from_mask(allowed))
    scores = Scores(scale=dim**-0.5)
    out, lse = library.call(q, k, v, pairs, scores, isa=isa, threads=threads)
    dout, dlse = random(g, *out.shape, dtype=dtype), random(g, *lse.shape)
    runs = [
        library.call_backward(dout, dlse, q, k, v, out, lse, pairs, scores, isa=isa, threads=threads)
        for _ in range(2)
    ]
    assert all(torch.equal(getattr(runs[0], x), getattr(runs[1], x)) for x in "qkv"), (
        "not the same bits twice"
    )
    grads = {x: getattr(runs[0], x) for x in "qkv"}
    assert_grads_within_budget(grads, q, k, v, allowed, dout=dout, dlse=dlse, factor=factor_of(dtype, isa))


@pytest.mark.parametrize("isa", library.ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_poison_reaches_no_gradient(isa, dtype, poison):
    """Keys, values, queries and output gradients that are not finite, wherever the mask keeps them apart."""
    if isa not in library.available():
        pytest.skip(f"this CPU has no {isa}")
    q, k, v = make(1, 2, 1, 130, 200, 32, 32, dtype, 0)
    allowed = torch.rand(130, 200, generator=torch.Generator().manual_seed(1)) < 0.4
    keys, rows = [0, 64, 70, 199], [3, 66, 129]
    allowed[:, keys] = False
    allowed[rows] = False
    clean = [t.clone() for t in (q, k, v)]
    pairs, scores = where(BlockLayout.from_mask(allowed)), Scores(scale=0.2)
    dout = random(torch.Generator().manual_seed(2), 1, 2, 130, 32, dtype=dtype)
    wrong = dout.clone()
    k[:, :, keys], v[:, :, keys], q[:, :, rows], wrong[:, :, rows] = (poison,) * 4
    out, lse = library.call(q, k, v, pairs, scores, isa=isa)
    got = library.call_backward(wrong, None, q, k, v, out, lse, pairs, scores, isa=isa)
    assert (got.q[:, :, rows] == 0).all()
    assert (got.k[:, :, keys] == 0).all()
    assert (got.v[:, :, keys] == 0).all()
    grads = {x: getattr(got, x) for x in "qkv"}
    assert_grads_within_budget(grads, *clean, allowed, scale=0.2, dout=dout, factor=factor_of(dtype, isa))


def test_a_visible_nan_is_seen():
    q, k, v = make(1, 1, 1, 70, 70, 16, 16, torch.float32, 0)
    k[0, 0, 5, 3] = float("nan")
    k.requires_grad_()
    out = fv.attention(q, k, v, Causal(), engine="native")
    assert torch.isfinite(out[:, :, :5]).all()
    assert torch.isnan(out[:, :, 5:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-30, 40.0])
def test_extreme_logits(dtype, magnitude):
    q, k, v = make(1, 2, 2, 100, 150, 32, 32, dtype, 3)
    allowed = torch.arange(100)[:, None] + 50 >= torch.arange(150)[None, :]
    check(q * magnitude, k, v, Causal(), allowed, {}, seed=0, factor=factor_of(dtype))


def test_rows_that_see_nothing_have_no_gradient_even_through_a_bias_of_minus_infinity():
    q, k, v = make(1, 2, 1, 70, 80, 16, 16, torch.float32, 0)
    bias = torch.zeros(70, 80)
    bias[13] = -float("inf")
    bias[:, 17] = -float("inf")
    bias[20, :40] = -float("inf")
    leaves = [t.requires_grad_() for t in (q, k, v, bias)]
    out, lse = fv.attention(q, k, v, score=Bias(bias), return_lse=True, engine="native")
    assert (out[:, :, 13] == 0).all()
    assert torch.isneginf(lse[:, :, 13]).all()
    dq, dk, dv, dbias = torch.autograd.grad(out.square().sum(), leaves)
    assert (dq[:, :, 13] == 0).all()
    assert (dk[:, :, 17] == 0).all()
    assert (dv[:, :, 17] == 0).all()
    assert (dbias[13] == 0).all()
    allowed = ~torch.isneginf(bias.detach())
    want = fv.attention(q, k, v, allowed, engine="reference")
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_float16_is_computed_in_float32():
    q, k, v = make(1, 2, 1, 90, 90, 32, 32, torch.float16, 0)
    check(q, k, v, SlidingWindow(20), SlidingWindow(20).layout(90).to_dense(), {}, seed=0, factor=1.0)


# ---------------------------------------- repeatable, whoever does the work
def gradients(threads, *, kind=CAUSAL, isa=None, bias=False):
    q, k, v = make(2, 6, 3, 300, 300, 64, 48, torch.float32, 1)
    scores = Scores(scale=0.125)
    wanted = ()
    if bias:
        g = torch.Generator().manual_seed(5)
        table = random(g, 6, 599)
        codes = torch.arange(300, dtype=torch.int32)
        scores = Scores(
            scale=0.125, bias=random(g, 1, 1, 300, 300), table=table, q_code=codes + 299, k_code=codes
        )
        wanted = ("bias", "table")
    out, lse = library.call(q, k, v, kind, scores, threads=threads, isa=isa)
    got = library.call_backward(out, lse, q, k, v, out, lse, kind, scores, wanted, threads=threads, isa=isa)
    return [t for t in (got.q, got.k, got.v, got.bias, got.table) if t is not None]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_the_same_bits_for_the_same_number_of_threads(threads, bias):
    first = gradients(threads, bias=bias)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(threads, bias=bias), strict=True))
    for a, b in zip(first, gradients(1, bias=bias), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


def test_the_same_dropout_for_any_tiling_and_thread_count():
    q, k, v = make(1, 4, 2, 200, 150, 16, 16, torch.float32, 1)
    scores = Scores(scale=0.25, dropout_p=0.4, seed=torch.tensor([99]))
    full = library.call(q, k, v, FULL, scores, threads=1)[0]
    layout = where(BlockLayout.from_mask(torch.ones(200, 150, dtype=torch.bool)))
    for threads in (1, 3):
        assert torch.equal(library.call(q, k, v, layout, scores, threads=threads)[0], full)
    for isa in library.available():
        torch.testing.assert_close(
            library.call(q, k, v, FULL, scores, isa=isa)[0], full, atol=1e-5, rtol=1e-5
        )


def test_split_rows_merge_exactly():
    """Few heads and many threads: each row of key tiles is cut, and the parts are joined in the order of the keys."""
    for n in (3, 70):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = make(1, 1, 1, n, 3000, 32, 32, dtype, 2)
            allowed = torch.rand(n, 3000, generator=torch.Generator().manual_seed(3)) < 0.01
            allowed[0] = False
            pairs = where(BlockLayout.from_mask(allowed))
            for isa in library.available():
                out, lse = library.call(q, k, v, pairs, Scores(scale=0.2), threads=8, isa=isa)
                assert_within_budget(out, q, k, v, allowed, scale=0.2, lse=lse, factor=factor_of(dtype, isa))


def test_heads_that_share_keys_decode_together():
    """One query per head: the heads of a group are read as queries of one."""
    q, k, v = make(2, 12, 3, 1, 777, 64, 64, torch.float32, 4)
    out, lse = fv.attention(q, k, v, is_causal=True, return_lse=True, engine="native")
    assert_within_budget(out, q, k, v, lse=lse)
    wide = q.new_zeros(2, 1, 12, 64).transpose(1, 2)
    wide.copy_(q)
    assert torch.equal(fv.attention(wide, k, v, engine="native"), out)


# ---------------------------------------- what the library refuses
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (Scores(dropout_p=1.0, seed=torch.tensor([1])), "dropout"),
        (Scores(normalizer=7), "normalizer"),
        (Scores(normalizer=1, sinks=torch.zeros(1)), "sinks"),
        (
            Scores(table=torch.zeros(1, 5), q_code=torch.arange(10), k_code=torch.arange(10)),
            "outside the table",
        ),
        (Scores(table=torch.zeros(1, 30)), "codes"),
    ],
)
def test_the_library_checks_scores(scores, message):
    x = torch.randn(1, 1, 10, 8)
    with pytest.raises(RuntimeError, match=message):
        library.call(x, x, x, FULL, scores)
