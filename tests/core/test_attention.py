"""attention() and explain() against a loop in Python floats: every argument, every gradient, every error."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import create_block_mask

import foveate as fv
from foveate.catalogue.conformance.budget import assert_within_budget
from foveate.catalogue.conformance.oracle import logits64, loop_attention, loop_keep_mask, weights
from foveate.core import engines
from foveate.core.engines import reference
from foveate.core.layout import BlockLayout
from foveate.core.request import EngineRefusal, make_request
from foveate.core.selectors import Selector


def tensors(batch=1, heads=2, kv_heads=1, n=5, m=7, dim=4, v_dim=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, n, dim), (batch, kv_heads, m, dim), (batch, kv_heads, m, v_dim)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def random_mask(*shape, density=0.5, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def compare(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


# ---------------------------------------- the definition, in float64
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    dim=st.integers(1, 5),
    v_dim=st.integers(1, 4),
    density=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    causal=st.booleans(),
    with_sinks=st.booleans(),
    scale=st.sampled_from([None, 0.0, -0.7, 3.0]),
    score=st.sampled_from(["none", "cap", "bias", "cap then bias", "bias then cap"]),
    seed=st.integers(0, 999),
)
def test_equals_the_loop(
    batch, kv_heads, groups, n, m, dim, v_dim, density, causal, with_sinks, scale, score, seed
):
    heads = kv_heads * groups
    q, k, v = tensors(batch, heads, kv_heads, n, m, dim, v_dim, seed=seed)
    mask = random_mask(batch, heads, n, m, density=density, seed=seed)
    sinks = torch.randn(heads, dtype=torch.float64) if with_sinks else None
    bias = torch.randn(heads, 1, m, dtype=torch.float64)
    bias[:, :, 0] = -math.inf
    cap = 1.5
    names = [] if score == "none" else score.split(" then ")
    scores = tuple(fv.SoftCap(cap) if name == "cap" else fv.Bias(bias) for name in names)

    def change(logit, b, h, i, j):
        for name in names:
            logit = cap * math.tanh(logit / cap) if name == "cap" else logit + float(bias[h, 0, j])
        return logit

    want = loop_attention(
        q,
        k,
        v,
        mask & torch.ones(n, m, dtype=torch.bool).tril(m - n) if causal else mask,
        scale=scale,
        change=change if names else None,
        sinks=sinks,
    )
    got = fv.attention(
        q,
        k,
        v,
        mask,
        is_causal=causal,
        score=scores,
        sinks=sinks,
        scale=scale,
        return_lse=True,
        engine="reference",
    )
    compare(got, want)
    only_out = fv.attention(
        q, k, v, mask, is_causal=causal, score=scores, sinks=sinks, scale=scale, engine="reference"
    )
    assert torch.equal(only_out, got[0])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.sampled_from([(1, 1, 1), (2, 1, 2), (1, 2, 3)]),
    n=st.integers(1, 7),
    m=st.integers(1, 9),
    density=st.sampled_from([None, 0.0, 0.4, 0.9]),
    names=st.lists(
        st.sampled_from(["cap", "bias", "temperature", "line", "grid", "alibi", "t5"]), max_size=3
    ),
    normalizer=st.sampled_from(
        [fv.Softmax(), fv.SoftmaxPlusOne(), fv.Sigmoid(), fv.Sigmoid(-1.5), fv.ReLU()]
    ),
    with_sinks=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**63 - 1),
)
def test_every_score_normaliser_and_dropout_equals_the_loop(
    sizes, n, m, density, names, normalizer, with_sinks, dropout_p, seed
):
    batch, kv_heads, groups = sizes
    heads, small = kv_heads * groups, seed % 1000
    q, k, v = tensors(batch, heads, kv_heads, n, m, 3, 2, seed=small)
    generator = torch.Generator().manual_seed(small)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {
        "cap": lambda: fv.SoftCap(1.5),
        "bias": lambda: fv.Bias(draw(heads, 1, m)),
        "temperature": lambda: fv.Temperature(draw(batch, 1, n)),
        "line": lambda: fv.RelativeBias(draw(heads, 5)),
        "grid": lambda: fv.RelativeBias(draw(1, 3, 2 * m - 1), shape=(1, m), order="morton"),
        "alibi": lambda: fv.ALiBi(draw(heads)),
        "t5": lambda: fv.T5Bias(draw(8, heads), small % 2 == 0, 6),
    }
    scores = tuple(made[name]() for name in names if name != "grid" or n <= m)
    mask = None if density is None else random_mask(batch, heads, n, m, density=density, seed=small)
    softmax = isinstance(normalizer, (fv.Softmax, fv.SoftmaxPlusOne))
    sinks = draw(heads) if with_sinks and softmax else None
    keep = loop_keep_mask(seed, dropout_p, batch, heads, n, m) if dropout_p else None
    want, want_lse = loop_attention(
        q, k, v, mask, scores=scores, sinks=sinks, normalizer=normalizer, keep=keep, dropout_p=dropout_p
    )
    options = {"score": scores, "sinks": sinks, "normalizer": normalizer, "return_lse": softmax}
    got = fv.attention(q, k, v, mask, dropout_p=dropout_p, dropout_seed=seed, engine="reference", **options)
    compare(got if softmax else [got], [want, want_lse] if softmax else [want])
    dense, dense_lse = weights(logits64(q, k, 3**-0.5, scores), mask, sinks, normalizer)
    if keep is not None:
        dense = dense * keep / (1 - dropout_p)
    compare([dense @ v.repeat_interleave(groups, 1), dense_lse], [want, want_lse])  # the other oracle


@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 8), (8, 3), (1, 6), (6, 1)])
def test_causality_is_aligned_bottom_right(n, m):
    """The last query sees the last key; with more queries than keys the first ones see nothing."""
    q, k, v = tensors(n=n, m=m)
    mask = torch.tensor([[j - (m - 1) <= i - (n - 1) for j in range(m)] for i in range(n)])
    want = loop_attention(q, k, v, mask)
    compare(fv.attention(q, k, v, is_causal=True, return_lse=True, engine="reference"), want)
    compare(fv.attention(q, k, v, fv.patterns.Causal(), return_lse=True, engine="reference"), want)
    assert torch.isneginf(want[1]).sum() == 2 * max(0, n - m)


def forms(mask):
    """The same set of pairs, (2, 3, 70, 90), in every form that a pattern may have."""
    batch, heads, n, m = mask.shape

    class Chosen(Selector):
        def layout(self, q, k, *, scale=None, is_causal=True):
            return BlockLayout.from_mask(mask)

    def rule(b, h, q, k):
        return mask[b, h, q, k]

    return {
        "tensor": mask,
        "layout": BlockLayout.from_mask(mask),
        "function": rule,
        "BlockMask": create_block_mask(rule, batch, heads, n, m, device="cpu", BLOCK_SIZE=32),
        "Selector": Chosen(),
        "Mask": fv.patterns.Mask(mask),
    }


@pytest.mark.parametrize("form", ["tensor", "layout", "function", "BlockMask", "Selector", "Mask"])
def test_every_form_of_a_pattern_means_the_same(form):
    q, k, v = tensors(2, 3, 3, 70, 90, 4, 4)
    mask = random_mask(2, 3, 70, 90)
    want = reference.dense_attention(q, k, v, mask)
    got = fv.attention(q, k, v, forms(mask)[form], return_lse=True, engine="reference")
    compare(got, want)
    causal = mask & torch.ones(70, 90, dtype=torch.bool).tril(20)
    if form != "Selector":
        got = fv.attention(q, k, v, forms(mask)[form], is_causal=True, return_lse=True, engine="reference")
        compare(got, reference.dense_attention(q, k, v, causal))


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (5, 1), (2, 5, 7), (1, 5, 7), (2, 1, 5, 7), (1, 2, 1, 7)])
def test_boolean_tensors_broadcast(shape):
    q, k, v = tensors(batch=2)
    mask = random_mask(*shape)
    want = loop_attention(q, k, v, mask)
    compare(fv.attention(q, k, v, mask, return_lse=True, engine="reference"), want)


def test_patterns_per_head_and_dense_ones():
    q, k, v = tensors(n=70, m=70)
    first, second = fv.patterns.Causal(), fv.patterns.SlidingWindow(3)
    got = fv.attention(q, k, v, (first, second), engine="reference")
    assert torch.equal(got[:, :1], fv.attention(q[:, :1], k, v, first, engine="reference"))
    assert torch.equal(got[:, 1:], fv.attention(q[:, 1:], k, v, second, engine="reference"))
    full = fv.attention(q, k, v, engine="reference")
    assert torch.equal(full, fv.attention(q, k, v, fv.patterns.Full(), engine="reference"))


def test_strides_do_not_matter():
    q, k, v = tensors(2, 4, 2, 33, 65, 8, 6)
    mask = random_mask(33, 65)
    want = fv.attention(q, k, v, mask, engine="reference")
    moved = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    compare([fv.attention(*moved, mask, engine="reference")], [want])
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    compare([fv.attention(*turned, mask, engine="reference")], [want])
    padded = [torch.cat([t, t], -1)[..., : t.shape[-1]] for t in (q, k, v)]
    compare([fv.attention(*padded, mask.t().contiguous().t(), engine="reference")], [want])
    repeated = k[:, :1].expand(2, 4, 65, 8), v[:, :1].expand(2, 4, 65, 6)
    got = fv.attention(q, *repeated, mask, engine="reference")
    compare([got], [fv.attention(q, k[:, :1], v[:, :1], mask, engine="reference")])


def test_a_row_that_sees_nothing():
    q, k, v = (t.requires_grad_() for t in tensors())
    mask = random_mask(5, 7)
    mask[2] = False
    out, lse = fv.attention(q, k, v, mask, return_lse=True, engine="reference")
    assert (out[:, :, 2] == 0).all()
    assert torch.isneginf(lse[:, :, 2]).all()
    assert torch.isfinite(lse[:, :, [0, 1, 3, 4]]).all()
    grads = torch.autograd.grad(out.sum() + lse[torch.isfinite(lse)].sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0][:, :, 2] == 0).all()


BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
WHERE = pytest.mark.parametrize("where", ["k", "v", "both"])


@BAD
@WHERE
def test_what_is_masked_for_all_reaches_neither_result_nor_gradient(bad, where):
    clean = tensors(1, 4, 2, 9, 12, 4, 3)
    mask = random_mask(1, 4, 9, 12)
    mask[..., 5] = False
    mask[:, :2, :, 8] = False  # hidden from the query heads of the first kv head
    mask[:, :, 3] = False
    poisoned = [t.clone() for t in clean]
    for head, j in ((slice(None), 5), (0, 8)):
        if where != "v":
            poisoned[1][:, head, j] = bad
        if where != "k":
            poisoned[2][:, head, j] = bad
    results = []
    for inputs in (clean, poisoned):
        inputs = [t.requires_grad_() for t in inputs]
        out, lse = fv.attention(*inputs, mask, return_lse=True, engine="reference")
        loss = out.square().sum() + lse[torch.isfinite(lse)].sum()
        results.append([out, lse, *torch.autograd.grad(loss, inputs)])
    compare(results[1], results[0])


@BAD
@WHERE
def test_only_rows_that_may_see_it_are_spoilt(bad, where):
    q, k, v = tensors(1, 4, 2, 9, 12, 4, 3)
    mask = random_mask(1, 4, 9, 12)
    mask[:, :, 0, 11] = False
    mask[:, :, 1:, 11] = True
    want = loop_attention(q, k, v, mask)
    if where != "v":
        k[:, :, 11] = bad
    if where != "k":
        v[:, :, 11] = bad
    out, lse = fv.attention(q, k, v, mask, return_lse=True, engine="reference")
    compare([out[:, :, 0], lse[:, :, 0]], [want[0][:, :, 0], want[1][:, :, 0]])
    if where != "k" or math.isnan(bad):  # an infinite logit may also be -inf, which is a weight of 0
        assert not torch.isfinite(out[:, :, 1:]).any()


def test_extreme_logits():
    q, k, v = tensors(n=9, m=9)
    for factor in (1e3, 1e150, 1e-150):
        got = fv.attention(q * factor, k, v, is_causal=True, return_lse=True, engine="reference")
        compare(got, loop_attention(q * factor, k, v, torch.ones(9, 9, dtype=torch.bool).tril()))
    for shift in (-1e4, 1e4):
        sinks = torch.tensor([shift, 0.0], dtype=torch.float64)
        got = fv.attention(q, k, v, sinks=sinks, return_lse=True, engine="reference")
        compare(got, loop_attention(q, k, v, sinks=sinks))


def test_a_sink_alone_takes_everything():
    q, k, v = tensors()
    nothing = torch.zeros(5, 7, dtype=torch.bool)
    sinks = torch.tensor([0.3, -2.0], dtype=torch.float64)
    out, lse = fv.attention(q, k, v, nothing, sinks=sinks, return_lse=True, engine="reference")
    assert (out == 0).all()
    torch.testing.assert_close(lse, sinks.view(1, 2, 1).expand(1, 2, 5))


# ---------------------------------------- low precision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["full", "causal", "mask", "scores"])
@pytest.mark.parametrize("engine", ["reference", "auto"])
def test_low_precision_stays_within_its_budget(dtype, kind, engine):
    q, k, v = tensors(2, 4, 2, 111, 133, 24, 17, dtype=dtype)
    mask, options, known = None, {}, {}
    if kind == "causal":
        options["is_causal"] = True
        mask = torch.ones(111, 133, dtype=torch.bool).tril(22)
    elif kind == "mask":
        mask = options["pattern"] = random_mask(2, 4, 111, 133, density=0.2)
        mask[..., 50, :] = False
    elif kind == "scores":
        known = {"scores": (fv.SoftCap(3.0), fv.Bias(torch.randn(111, 1).to(dtype))), "scale": 0.3}
        known["sinks"] = torch.randn(4)
        options = {"score": known["scores"], "scale": 0.3, "sinks": known["sinks"]}
    out, lse = fv.attention(q, k, v, return_lse=True, engine=engine, **options)
    assert_within_budget(out, q, k, v, mask, lse=lse, **known)


def test_the_budget_notices_what_it_should():
    """One key too many, a wrong scale, a bfloat16 accumulator, a NaN: each is far outside."""
    q, k, v = tensors(1, 2, 1, 65, 130, 16, 8, dtype=torch.float32)
    mask = random_mask(65, 130)
    mask[7] = False
    good, lse = reference.dense_attention(q, k, v, mask)
    assert assert_within_budget(good, q, k, v, mask, lse=lse) < 1
    wider = mask.clone()
    wider[0, (~mask[0]).nonzero()[0, 0]] = True
    bad = {
        "one key more": reference.dense_attention(q, k, v, wider)[0],
        "scale": reference.dense_attention(q, k, v, mask, scale=0.2501)[0],
        "low precision": reference.dense_attention(*(t.bfloat16() for t in (q, k, v)), mask)[0].float(),
        "not zero": torch.where(mask.any(-1)[:, None], good, 1e-30),
        "nan": torch.where(torch.arange(8) == 3, torch.nan, good),
    }
    for out in bad.values():
        with pytest.raises(AssertionError, match="out exceeds its error budget"):
            assert_within_budget(out, q, k, v, mask)
    with pytest.raises(AssertionError, match="lse exceeds its error budget"):
        assert_within_budget(good, q, k, v, mask, lse=lse + 1e-3)
    with pytest.raises(AssertionError, match="lse other than -inf"):
        assert_within_budget(good, q, k, v, mask, lse=torch.where(torch.isneginf(lse), -1e30, lse))
    v[0, 0, 3] = torch.nan
    with pytest.raises(AssertionError, match="was lost"):
        assert_within_budget(good, q, k, v, mask)


# ---------------------------------------- gradients
def leaves(seed=0, **sizes):
    q, k, v = tensors(seed=seed, **sizes)
    sinks = torch.randn(q.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    bias = torch.randn(
        q.shape[1], 1, k.shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return [t.requires_grad_() for t in (q, k, v, sinks, bias)]


def with_everything(q, k, v, sinks, bias, mask):
    return fv.attention(
        q,
        k,
        v,
        mask,
        score=(fv.SoftCap(2.0), fv.Bias(bias)),
        sinks=sinks,
        return_lse=True,
        engine="reference",
    )


@pytest.mark.parametrize("blank", [False, True])
def test_gradcheck_of_every_input(blank):
    inputs = leaves(batch=2, heads=4, kv_heads=2, n=3, m=4, dim=2, v_dim=2)
    mask = random_mask(2, 4, 3, 4, density=0.6)
    if blank:
        mask[:, :, 1] = False
    assert torch.autograd.gradcheck(lambda *xs: with_everything(*xs, mask), inputs)


def test_second_order_and_forward_mode():
    q, k, v, sinks, bias = leaves(heads=2, n=2, m=3, dim=2, v_dim=1)
    mask = torch.tensor([[True, False, True], [True, True, True]])

    layout = BlockLayout.from_mask(mask)

    def run(*xs):
        return with_everything(*xs, layout)

    assert torch.autograd.gradgradcheck(run, (q, k, v, sinks, bias))
    fixed = tuple(t.detach() for t in (q, k, v, sinks, bias))
    steps = tuple(torch.randn_like(t) for t in fixed)
    with forward_ad.dual_level():
        duals = run(*(forward_ad.make_dual(t, step) for t, step in zip(fixed, steps, strict=True)))
        slopes = [forward_ad.unpack_dual(t).tangent for t in duals]
    h = 1e-6
    ahead = run(*(t + h * s for t, s in zip(fixed, steps, strict=True)))
    behind = run(*(t - h * s for t, s in zip(fixed, steps, strict=True)))
    for slope, a, b in zip(slopes, ahead, behind, strict=True):
        torch.testing.assert_close(slope, (a - b) / (2 * h), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_functional_jvp(masked):
    q, k, v = tensors()
    pattern = BlockLayout.from_mask(torch.ones(5, 7, dtype=torch.bool).tril(2)) if masked else None

    def run(q):
        return fv.attention(q, k, v, pattern, is_causal=not masked, engine="reference")

    step = torch.randn_like(q)
    _, slope = torch.func.jvp(run, (q,), (step,))
    h = 1e-6
    torch.testing.assert_close(slope, (run(q + h * step) - run(q - h * step)) / (2 * h), atol=1e-7, rtol=1e-6)


def test_gradients_are_those_of_the_loop():
    """Central differences of the loop oracle, for one random direction per input."""
    inputs = leaves(heads=2, n=3, m=4, dim=2, v_dim=2)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
    weight = torch.randn(1, 2, 3, 2, dtype=torch.float64)
    grads = torch.autograd.grad((with_everything(*inputs, mask)[0] * weight).sum(), inputs)
    fixed = [t.detach() for t in inputs]

    def loop(q, k, v, sinks, bias):
        out, _ = loop_attention(
            q,
            k,
            v,
            mask,
            sinks=sinks,
            change=lambda x, b, h, i, j: 2.0 * math.tanh(x / 2.0) + float(bias[h, 0, j]),
        )
        return float((out * weight).sum())

    for number, grad in enumerate(grads):
        step = torch.randn_like(fixed[number])
        moved = [[*fixed] for _ in range(2)]
        for side, sign in zip(moved, (1e-6, -1e-6), strict=True):
            side[number] = fixed[number] + sign * step
        slope = (loop(*moved[0]) - loop(*moved[1])) / 2e-6
        assert float((grad * step).sum()) == pytest.approx(slope, abs=1e-7), number


def test_dropout_keeps_the_mean_and_the_seed():
    q, k, v = tensors(1, 2, 2, 40, 50, 4, 3)
    torch.manual_seed(3)
    first = fv.attention(q, k, v, dropout_p=0.5, engine="reference")
    torch.manual_seed(3)
    assert torch.equal(first, fv.attention(q, k, v, dropout_p=0.5, engine="reference"))
    plain = fv.attention(q, k, v, engine="reference")
    many = torch.stack([fv.attention(q, k, v, dropout_p=0.5, engine="reference") for _ in range(400)])
    assert not torch.allclose(first, plain)
    assert (many.mean(0) - plain).abs().max() < 6 * many.std(0).max() / 20


# ---------------------------------------- errors
Q, K, V = tensors(1, 4, 2, 5, 7, 4, 3, dtype=torch.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((Q.numpy(), K, V), {}, TypeError, "q must be a tensor, got ndarray"),
        ((Q, K[0], V), {}, ValueError, r"k must have shape \(batch, heads, length, dim\), got \(2, 7, 4\)"),
        ((Q.int(), K, V), {}, TypeError, "q has dtype torch.int32; accepted are float32, bfloat16"),
        ((Q, K, V.double()), {}, TypeError, "share one dtype; v is torch.float64, q is torch.float32"),
        ((Q, K.to("meta"), V), {}, ValueError, "on one device; k is on meta, q on cpu"),
        ((Q[:, :, :0], K, V), {}, ValueError, "lengths and head dims must be at least 1"),
        ((Q, K, V[..., :0]), {}, ValueError, "lengths and head dims must be at least 1"),
        ((Q, K.repeat(2, 1, 1, 1), V), {}, ValueError, "share the batch size; got 1, 2, 1"),
        ((Q, K[..., :3], V), {}, ValueError, "q and k must share the head dim; got 4 and 3"),
        ((Q, K, V[:, :, :6]), {}, ValueError, "k and v must share heads and length"),
        ((Q, K, V[:, :1]), {}, ValueError, "k and v must share heads and length"),
        (
            (Q[:, :3], K, V),
            {},
            ValueError,
            r"heads of q \(3\) must be a multiple of the heads of k and v \(2\)",
        ),
        ((Q, K, V), {"scale": math.inf}, ValueError, "scale must be a finite number or None"),
        ((Q, K, V), {"scale": "1"}, ValueError, "scale must be a finite number"),
        ((Q, K, V), {"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), got 1.0"),
        (
            (Q, K, V),
            {"normalizer": "sigmod"},
            ValueError,
            "normalizer must be one of 'softmax', 'softmax_plus_one', 'sigmoid', 'relu' or a .*; got 'sigmod'",
        ),
        ((Q, K, V), {"normalizer": None}, TypeError, "normalizer must be one of .*; got None"),
        (
            (Q, K, V),
            {"normalizer": "relu", "sinks": torch.zeros(4)},
            ValueError,
            r"sinks belongs to a sum of exponentials; ReLU\(\) has none",
        ),
        (
            (Q, K, V),
            {"normalizer": "sigmoid", "return_lse": True},
            ValueError,
            "return_lse belongs to a sum of exponentials; Sigmoid",
        ),
        (
            (Q, K, V),
            {"dropout_seed": 1.0},
            TypeError,
            "dropout_seed must be an int or an int64 tensor.*float",
        ),
        (
            (Q, K, V),
            {"dropout_seed": True},
            TypeError,
            "dropout_seed must be an int or an int64 tensor.*bool",
        ),
        ((Q, K, V), {"dropout_seed": -1}, ValueError, r"dropout_seed must lie in \[0, 2 \*\* 63\), got -1"),
        (
            (Q, K, V),
            {"dropout_seed": torch.zeros(2, dtype=torch.int64)},
            TypeError,
            r"int64 tensor of one element, got torch.int64 \(2,\)",
        ),
        (
            (Q, K, V),
            {"score": 30.0},
            TypeError,
            "score must be one of SoftCap, Bias, .*T5Bias or a tuple of them, got float",
        ),
        ((Q, K, V), {"score": (fv.SoftCap(1.0), None)}, TypeError, "got NoneType"),
        ((Q, K, V), {"score": fv.Bias(torch.zeros(5, 6))}, ValueError, r"\(5, 6\) does not broadcast to"),
        (
            (Q, K, V),
            {"score": fv.Bias(torch.zeros(5, 7, device="meta"))},
            ValueError,
            "Bias.tensor is on meta",
        ),
        ((Q, K, V), {"sinks": [0.0] * 4}, TypeError, "sinks must be a floating point tensor, got list"),
        (
            (Q, K, V),
            {"sinks": torch.zeros(4, dtype=torch.int64)},
            TypeError,
            "sinks must be a floating point",
        ),
        ((Q, K, V), {"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \(4,\).*got \(2,\)"),
        ((Q, K, V), {"sinks": torch.zeros(4, device="meta")}, ValueError, "sinks is on meta"),
        ((Q, K, V), {"pattern": torch.zeros(5, 7)}, TypeError, "An additive mask goes to score=Bias"),
        ((Q, K, V), {"pattern": torch.ones(7, dtype=torch.bool)}, TypeError, "2 to 4 dimensions"),
        (
            (Q, K, V),
            {"pattern": torch.ones(7, 5, dtype=torch.bool)},
            ValueError,
            r"does not broadcast to \(5, 7\)",
        ),
        ((Q, K, V), {"pattern": torch.ones(2, 5, 7, dtype=torch.bool)}, ValueError, "does not broadcast"),
        ((Q, K, V), {"pattern": "causal"}, TypeError, "pattern must be a Pattern, a BlockLayout.*got str"),
        (
            (Q, K, V),
            {"pattern": BlockLayout.from_mask(torch.ones(6, 7, dtype=torch.bool))},
            ValueError,
            "layout is for 6 queries and 7 keys; q and k have 5 and 7",
        ),
        (
            (Q, K, V),
            {"pattern": BlockLayout.from_mask(torch.ones(3, 5, 7, dtype=torch.bool))},
            ValueError,
            "layout is for batch 1 and 3 heads; q has batch 1 and 4 heads",
        ),
        (
            (Q, K, V),
            {"engine": "cuda"},
            ValueError,
            "engine must be 'auto' or one of .*reference; got 'cuda'",
        ),
        ((Q, K, V), {"is_casual": True}, TypeError, "unexpected keyword argument"),
    ],
)
@pytest.mark.parametrize("function", [fv.attention, fv.explain])
def test_mistakes_are_named(function, arguments, options, error, words):
    with pytest.raises(error, match=words):
        function(*arguments, **options)


@pytest.mark.parametrize("cap", [0, -1.0, math.inf, math.nan, "1"])
def test_a_soft_cap_is_positive(cap):
    with pytest.raises(ValueError, match=r"SoftCap\.cap must be a positive finite number"):
        fv.SoftCap(cap)


def test_a_bias_is_a_floating_point_tensor():
    with pytest.raises(TypeError, match=r"Bias\.tensor must be a floating point tensor, got torch\.bool"):
        fv.Bias(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="got list"):
        fv.Bias([1.0])
    with pytest.raises(ValueError, match="at most 4 dimensions"):
        fv.Bias(torch.ones(1, 1, 1, 1, 1))


# ---------------------------------------- choosing and explaining
def test_a_named_engine_never_falls_back():
    with pytest.raises(EngineRefusal, match=r"engine 'sdpa' cannot run this: it takes no score") as refusal:
        fv.attention(Q, K, V, score=fv.SoftCap(1.0), engine="sdpa")
    for name in engines.ENGINES:
        assert name in str(refusal.value)
    with pytest.raises(EngineRefusal, match="top-left aligned"):
        fv.attention(Q, K, V, is_causal=True, engine="sdpa")
    with pytest.raises(EngineRefusal, match="does not return lse"):
        fv.attention(Q, K, V, return_lse=True, engine="sdpa")
    with pytest.raises(EngineRefusal, match="full and causal attention only"):
        fv.attention(Q, K, V, random_mask(5, 7), engine="sdpa")
    assert issubclass(EngineRefusal, ValueError)


def test_sdpa_runs_what_it_says():
    for q, options, mask in (
        (Q, {}, None),
        (torch.cat([Q, Q], 2)[:, :, :7], {"is_causal": True}, torch.ones(7, 7, dtype=torch.bool).tril()),
    ):
        out = fv.attention(q, K, V, engine="sdpa", scale=0.3, **options)
        assert_within_budget(out, q, K, V, mask, scale=0.3)


def test_the_reference_has_a_size_guard():
    q = torch.zeros(1, 1, 1, 1).expand(1, 4096, 1 << 14, 1)
    k = v = torch.zeros(1, 1, 8, 1)
    with pytest.raises(EngineRefusal, match=r"would hold 536870912 logits.*its guard is 268435456"):
        fv.attention(q, k, v, engine="reference")
    with pytest.raises(ValueError, match="the limit is 10"):
        reference.dense_attention(Q, K, V, limit=10)


def test_nothing_can_run_it(monkeypatch):
    for module in engines.ENGINES.values():
        monkeypatch.setattr(module, "why_not", lambda request: "no")
    with pytest.raises(EngineRefusal, match="no engine can run this"):
        fv.attention(Q, K, V)
    assert fv.explain(Q, K, V).startswith("auto -> none")


def test_explain_lists_every_engine_and_the_layout():
    mask = random_mask(5, 7)
    text = fv.explain(Q, K, V, mask, score=fv.SoftCap(2.0), return_lse=True)
    lines = text.splitlines()
    picked = engines.choose(make_request(Q, K, V, mask, score=fv.SoftCap(2.0)), return_lse=True).name
    assert lines[0] == f"auto -> {picked}"
    for name in engines.ENGINES:
        (line,) = [x for x in lines if x.split()[0] == name and x.split()[1] in ("yes", "no:")]
        if name == "sdpa":
            assert "it does not return lse" in line
        elif name == "reference":
            assert line.split()[1] == "yes"
    layout = BlockLayout.from_mask(mask)
    assert f"1 tiles, 1 bitmaps, density {layout.density:.4f}, {layout.nbytes} bytes" in text
    named = fv.explain(Q, K, V, engine="reference")
    assert named.splitlines()[0] == "reference -> reference"
    assert "layout" not in named
    assert fv.explain(Q, K, V, mask, engine="sdpa").startswith("sdpa -> none")


def test_explain_says_what_attention_does():
    for options in ({}, {"is_causal": True}, {"pattern": random_mask(5, 7)}, {"dropout_p": 0.1}):
        picked = fv.explain(Q, K, V, **options).splitlines()[0].removeprefix("auto -> ")
        torch.manual_seed(0)
        out = fv.attention(Q, K, V, **options)
        torch.manual_seed(0)
        assert torch.equal(out, fv.attention(Q, K, V, engine=picked, **options))


def test_dense_requests_never_build_a_layout():
    for options in ({}, {"is_causal": True}):
        request = make_request(Q, K, V, **options)
        engines.choose(request).run(request)
        assert request.made == []


def test_meta_tensors_of_any_length_have_a_shape():
    q = torch.empty(1, 8, 12_544, 32, device="meta")  # to count a model's work at a high resolution
    assert fv.attention(q, q, q).shape == q.shape
