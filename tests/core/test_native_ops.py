"""The native engine inside torch: opcheck, compilation, vmap, derivatives beyond the first."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.core.engines import native_library as library
from foveate.core.engines import native_ops
from foveate.core.engines.native_library import Scores, Where
from foveate.core.request import EngineRefusal
from foveate.core.scores import ALiBi, Bias, RelativeBias, SoftCap, Temperature, alibi_slopes
from foveate.patterns import Causal, PrefixLM, Sinks, SlidingWindow

WINDOW = Causal() & (SlidingWindow(30) | Sinks(4))
PREFIX = PrefixLM(20)


def make(n=70, heads=4, kv_heads=2, dim=16, grad=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (2, heads, n, dim), (2, kv_heads, n, dim), (2, kv_heads, n, dim)
    return tuple(torch.randn(shape, generator=g).requires_grad_(grad) for shape in shapes)


def window(n):
    layout = WINDOW.layout(n)
    arrays = layout.row_ptr, layout.tile_idx, layout.tile_id, layout.dictionary
    return Where(library.KINDS["layout"], *arrays, layout.batch, layout.heads)


def every_score(n, heads, grad):
    """One of each extra input, with a gradient where it may have one."""
    g = torch.Generator().manual_seed(1)
    _, q_code, k_code = ALiBi(alibi_slopes(heads)).codes(n, n)

    def leaf(*shape):
        return torch.randn(*shape, generator=g).requires_grad_(grad)

    return Scores(
        scale=0.25,
        softcap=5.0,
        sinks=leaf(heads),
        temperature=leaf(1, heads, n),
        bias=leaf(1, heads, n, n),
        table=leaf(heads, 2 * n - 1),
        q_code=q_code,
        k_code=k_code,
    )


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("pairs", ["full", "layout"])
def test_opcheck_of_both_ops(extras, pairs):
    n = 33
    q, k, v = make(n, grad=True)
    pairs = Where(library.KINDS["full"]) if pairs == "full" else window(n)
    scores = every_score(n, 4, True) if extras else Scores(scale=0.25)
    rest = native_ops.flat(pairs, scores)
    torch.library.opcheck(torch.ops.foveate.native_forward.default, (q, k, v, *rest))
    with torch.no_grad():
        out, lse = native_ops.forward(q, k, v, pairs, scores)
        plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in (q, k, v, out, lse, *rest)]
        arguments = (torch.ones_like(out), torch.ones_like(lse), *plain, [extras] * 4)
        torch.library.opcheck(torch.ops.foveate.native_backward.default, arguments)


def test_opcheck_where_there_is_no_lse():
    q, k, v = make(20, grad=True)
    rest = native_ops.flat(Where(library.KINDS["causal"]), Scores(normalizer=library.NORMALIZERS["sigmoid"]))
    torch.library.opcheck(torch.ops.foveate.native_forward.default, (q, k, v, *rest))


LAYOUT = WINDOW.layout(100)
CALLS = {
    "none": lambda q, k, v: fv.attention(q, k, v),
    "causal": lambda q, k, v: fv.attention(q, k, v, is_causal=True),
    "pattern": lambda q, k, v: fv.attention(q, k, v, WINDOW),
    "pattern and causal": lambda q, k, v: fv.attention(q, k, v, PREFIX, is_causal=True),
    "layout": lambda q, k, v: fv.attention(q, k, v, LAYOUT),
    "scores": lambda q, k, v: fv.attention(
        q, k, v, WINDOW, score=(SoftCap(5.0), Bias(torch.ones(q.shape[2], q.shape[2])))
    ),
    "alibi": lambda q, k, v: fv.attention(q, k, v, is_causal=True, score=ALiBi(alibi_slopes(4))),
    "sigmoid": lambda q, k, v: fv.attention(q, k, v, WINDOW, normalizer="sigmoid"),
    "dropout": lambda q, k, v: fv.attention(q, k, v, WINDOW, dropout_p=0.3, dropout_seed=11),
}


@pytest.mark.parametrize("who", CALLS)
def test_fullgraph_forward_and_backward(who):
    torch._dynamo.reset()
    run = CALLS[who]
    compiled = torch.compile(lambda *t: run(*t) * 2, fullgraph=True, backend="aot_eager")
    for n in (100,) if who == "layout" else (100, 65, 131):  # other lengths trace again, with another layout
        inputs, plain = make(n, grad=True, seed=n), make(n, grad=True, seed=n)
        out, want = compiled(*inputs), run(*plain) * 2
        assert torch.equal(out, want)
        out.square().sum().backward()
        want.square().sum().backward()
        for got, expected in zip(inputs, plain, strict=True):
            assert torch.equal(got.grad, expected.grad)


def test_a_seed_drawn_inside_a_compiled_function_is_new_at_each_call():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: fv.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    q, k, v = make()
    assert not torch.equal(compiled(q, k, v), compiled(q, k, v))


def test_what_cannot_be_traced_says_so():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: fv.attention(x, x, x, LAYOUT, is_causal=True), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match=r"under torch\.compile the pattern must be"):
        compiled(torch.randn(1, 2, 100, 8))


# ---------------------------------------- derivatives
def test_auto_trains_on_the_native_engine():
    q, k, v = make(grad=True)
    assert fv.explain(q, k, v, WINDOW).startswith("auto -> native")
    fv.attention(q, k, v, WINDOW).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


def test_only_the_lse_may_be_differentiated():
    q, k, v = make(grad=True)
    _, lse = fv.attention(q, k, v, WINDOW, return_lse=True, engine="native")
    got = torch.autograd.grad(lse.sum(), (q, k, v))
    _, lse = fv.attention(q, k, v, WINDOW, return_lse=True, engine="reference")
    want = torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True, materialize_grads=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_second_derivative_names_the_reference_engine():
    q, k, v = make(20, grad=True)
    (dq,) = torch.autograd.grad(fv.attention(q, k, v, engine="native").sum(), q, create_graph=True)
    with pytest.raises(EngineRefusal, match="engine='reference'"):
        dq.sum().backward()


def test_forward_mode_is_a_clear_error():
    q, k, v = make(20)
    with pytest.raises(EngineRefusal, match="jvp"):
        torch.func.jvp(lambda x: fv.attention(x, k, v, engine="native"), (q,), (torch.ones_like(q),))
    _, got = torch.func.jvp(lambda x: fv.attention(x, k, v), (q,), (torch.ones_like(q),))  # auto: reference
    step = 1e-3 * torch.ones_like(q)
    rise = (fv.attention(q + step, k, v) - fv.attention(q - step, k, v)) / 2e-3
    torch.testing.assert_close(got, rise, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 0), (None, 2, None)])
def test_vmap_is_a_longer_batch(in_dims):
    tensors = [
        t if dim is None else torch.stack([t, t * 2, -t], dim) for t, dim in zip(make(), in_dims, strict=True)
    ]
    run = CALLS["pattern"]
    got = torch.vmap(run, in_dims)(*tensors)
    for n in range(3):
        one = run(*(t if dim is None else t.select(dim, n) for t, dim in zip(tensors, in_dims, strict=True)))
        assert torch.equal(got[n], one)


def test_vmap_over_gradients_and_over_a_bias():
    q, k, v = make(33)
    g = torch.Generator().manual_seed(3)
    bias = torch.randn(3, 4, 33, 33, generator=g)

    def loss(q, bias):
        return fv.attention(q, k, v, score=Bias(bias), engine="native").square().sum()

    got = torch.vmap(torch.func.grad(loss, (0, 1)), (None, 0))(q, bias)
    for n in range(3):
        for a, b in zip(got, torch.func.grad(loss, (0, 1))(q, bias[n]), strict=True):
            torch.testing.assert_close(a[n], b)
    per_sample = torch.vmap(torch.func.grad(loss), (0, None))(torch.stack([q, q * 2]), bias[0])
    torch.testing.assert_close(per_sample[1], torch.func.grad(loss)(q * 2, bias[0]))


def test_vmap_over_a_layout_with_a_batch_of_its_own():
    q, k, v = make(40)
    mask = torch.rand(2, 4, 40, 40, generator=torch.Generator().manual_seed(2)) < 0.3
    got = torch.vmap(lambda q: fv.attention(q, k, v, mask, engine="native"))(torch.stack([q, -q]))
    assert torch.equal(got[1], fv.attention(-q, k, v, mask, engine="native"))


def test_dropout_under_vmap_needs_the_same_mask_for_all():
    q, k, v = make(40)

    def run(q):
        return fv.attention(q, k, v, dropout_p=0.5, dropout_seed=3, engine="native")

    with pytest.raises(EngineRefusal, match="randomness='same'"):
        torch.vmap(run, randomness="different")(torch.stack([q, -q]))
    got = torch.vmap(run, randomness="same")(torch.stack([q, -q]))
    assert torch.equal(got[1], run(-q))


def test_gradients_reach_every_parameter_of_the_scores():
    q, k, v = make(grad=True)
    g = torch.Generator().manual_seed(4)
    temperature = torch.rand(70, generator=g).requires_grad_()
    bias = torch.randn(1, 4, 70, 70, generator=g).requires_grad_()
    table, sinks = (torch.randn(*s, generator=g).requires_grad_() for s in ((4, 21), (4,)))
    leaves = (q, k, v, temperature, bias, table, sinks)
    score = Temperature(temperature), SoftCap(4.0), RelativeBias(table), Bias(bias)
    grads = {}
    for engine in ("native", "reference"):
        out = fv.attention(
            q, k, v, WINDOW, score=score, sinks=sinks, normalizer="softmax_plus_one", engine=engine
        )
        grads[engine] = torch.autograd.grad(out.square().sum(), leaves)
    for got, want in zip(grads["native"], grads["reference"], strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
