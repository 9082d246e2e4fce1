"""Scores: each against its definition pair by pair, the codes that engines read, gradients, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate as fv
from foveate.core.patterns import hilbert, morton, row_major, tile_major
from foveate.core.request import make_request
from foveate.core.scores import Relative


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_codes(score, n, m):
    """The bias that an engine reads, (Ht, N, M), with every rule that the codes must obey checked."""
    table, q_code, k_code = score.codes(n, m, "cpu")
    assert table.ndim == 2
    assert q_code.dtype == k_code.dtype == torch.int32
    assert (tuple(q_code.shape), tuple(k_code.shape)) == ((n,), (m,))
    at = q_code[:, None].long() - k_code
    assert int(at.min()) >= 0
    assert int(at.max()) < table.shape[1]
    return table[:, at]


def consecutive(score, n, m):
    _, q_code, k_code = score.codes(n, m, "cpu")
    return bool((q_code.diff() == 1).all() and (k_code.diff() == 1).all())


def dense(score, heads, n, m):
    return score.apply(torch.zeros(1, heads, n, m, dtype=torch.float64))[0]


LENGTHS = {"n": st.integers(1, 20), "m": st.integers(1, 20)}


@settings(max_examples=60, deadline=None)
@given(**LENGTHS, heads=st.integers(1, 3), shared=st.booleans(), reach=st.integers(0, 25))
def test_a_table_on_a_line(n, m, heads, shared, reach):
    table = draw(1 if shared else heads, 2 * reach + 1)
    score = fv.RelativeBias(table)
    got = dense(score, heads, n, m)
    for h, i, j in itertools.product(range(heads), range(n), range(m)):
        distance = max(-reach, min(reach, (i + m - n) - j))
        assert got[h, i, j] == table[0 if shared else h, reach + distance]
    assert torch.equal(by_codes(score, n, m).expand(heads, n, m), got)
    assert consecutive(score, n, m)


GRIDS = [((5,), None), ((3, 4), None), ((4, 6), (2, 3)), ((5, 7), (3, 2)), ((2, 3, 4), (2, 2, 2))]


@pytest.mark.parametrize(("shape", "tile"), GRIDS)
@pytest.mark.parametrize("kind", ["row_major", "hilbert", "morton", "tile_major"])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("last", [None, 1, 4])
def test_a_table_on_a_grid(shape, tile, kind, whole, last):
    if kind == "tile_major" and tile is None:
        tile = shape
    order = {
        "row_major": row_major(shape),
        "hilbert": hilbert(shape),
        "morton": "morton",
        "tile_major": tile_major(shape, tile) if tile else None,
    }[kind]
    reach = [size - 1 if whole else max(0, size - 2) for size in shape]
    table = draw(2, *(2 * r + 1 for r in reach))
    score = fv.RelativeBias(table, shape=shape, order=order)
    m = math.prod(shape)
    n = m if last is None else last
    made = order if not isinstance(order, str) else morton(shape)
    cells = list(itertools.product(*map(range, shape)))
    places = [cells[number] for number in made.permutation.tolist()]
    got = dense(score, 2, n, m)
    for i, j in itertools.product(range(n), range(m)):
        steps = [a - b for a, b in zip(places[i + m - n], places[j], strict=True)]
        entry = tuple(r + max(-r, min(r, d)) for r, d in zip(reach, steps, strict=True))
        assert torch.equal(got[:, i, j], table[(slice(None), *entry)])
    assert torch.equal(by_codes(score, n, m), got)


def test_the_table_of_swin():
    """As Swin builds it: relative_position_index into a parameter of ((2h - 1) (2w - 1), heads)."""
    h, w, heads = 3, 5, 4
    parameter = draw((2 * h - 1) * (2 * w - 1), heads)
    coordinates = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).flatten(1)
    relative = coordinates[:, :, None] - coordinates[:, None, :]
    index = (relative[0] + h - 1) * (2 * w - 1) + relative[1] + w - 1
    want = parameter[index].permute(2, 0, 1)
    score = fv.RelativeBias(parameter.T.unflatten(1, (2 * h - 1, 2 * w - 1)), shape=(h, w))
    assert torch.equal(dense(score, heads, h * w, h * w), want)


@settings(max_examples=30, deadline=None)
@given(**LENGTHS, heads=st.integers(1, 3))
def test_alibi(n, m, heads):
    score = fv.ALiBi(draw(heads).abs())
    got = dense(score, heads, n, m)
    for h, i, j in itertools.product(range(heads), range(n), range(m)):
        assert got[h, i, j] == -score.slopes[h] * abs((i + m - n) - j)
    assert torch.equal(by_codes(score, n, m), got)
    assert consecutive(score, n, m)


def test_gradients_of_a_low_precision_table_add_up_in_float32():
    """1000 clipped distances of gradient 1 each; a bfloat16 sum would stop at 256."""
    for score in (
        fv.RelativeBias(torch.zeros(1, 3, dtype=torch.bfloat16, requires_grad=True)),
        fv.RelativeBias(torch.zeros(1, 3, dtype=torch.bfloat16, requires_grad=True), shape=(1001,)),
        fv.T5Bias(torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True), False, 2),
    ):
        (parameter,) = score.tensors.values()
        table, q_code, k_code = score.codes(1, 1001)
        assert table.dtype == torch.float32
        table[:, (q_code[:, None] - k_code).long()].sum().backward()
        assert parameter.grad.flatten()[-1] == 1000


def test_low_precision_slopes_do_not_round_distances():
    score = fv.ALiBi(torch.tensor([1.0], dtype=torch.bfloat16))
    assert score.codes(1, 1001)[0].amin() == -1000
    assert dense(score, 1, 1, 1001)[0, 0, 0] == -1000


def test_the_published_slopes():
    torch.testing.assert_close(fv.alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    sixteen = torch.tensor([2 ** (-i / 2) for i in range(1, 17)])
    torch.testing.assert_close(fv.alibi_slopes(16), sixteen)
    twelve = torch.cat([fv.alibi_slopes(8), sixteen[::2][:4]])
    torch.testing.assert_close(fv.alibi_slopes(12), twelve)
    assert fv.alibi_slopes(1).tolist() == [2.0**-8]
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="heads must be an int >= 1"):
            fv.alibi_slopes(wrong)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 20), (6, 7), (31, 100), (4, 200)])
def test_the_buckets_are_those_of_transformers(bidirectional, buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    relative = torch.arange(-700, 701)
    want = t5.T5Attention._relative_position_bucket(
        relative, bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
    )
    score = fv.T5Bias(draw(buckets, 2), bidirectional, max_distance)
    assert torch.equal(score.buckets(relative), want)
    at = torch.arange(13)[None, :] - (torch.arange(7)[:, None] + 6)
    assert torch.equal(
        dense(score, 2, 7, 13),
        score.weight[
            t5.T5Attention._relative_position_bucket(at, bidirectional, buckets, max_distance)
        ].permute(2, 0, 1),
    )
    assert torch.equal(by_codes(score, 7, 13), dense(score, 2, 7, 13))
    assert consecutive(score, 7, 13)


@pytest.mark.parametrize("shape", [(), (5,), (3, 1), (2, 1, 5), (2, 3, 5), (1, 5), (2, 1, 1)])
def test_a_temperature_of_each_query(shape):
    factor, logits = draw(*shape), draw(2, 3, 5, 7, seed=1)
    got = fv.Temperature(factor).apply(logits)
    want = torch.broadcast_to(factor, (2, 3, 5))
    for b, h, i in itertools.product(range(2), range(3), range(5)):
        assert torch.equal(got[b, h, i], logits[b, h, i] * want[b, h, i])


def test_a_forbidden_pair_stays_forbidden_whatever_the_temperature():
    q, k, v = draw(1, 2, 3, 4), draw(1, 2, 5, 4, seed=1), draw(1, 2, 5, 4, seed=2)
    bias = torch.zeros(5, dtype=torch.float64)
    bias[2] = -math.inf
    factor = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    score = (fv.Bias(bias), fv.Temperature(factor))
    out = fv.attention(q, k, v, score=score, engine="reference")
    mask = torch.isfinite(bias).expand(3, 5)
    want = fv.attention(q, k, v, mask, score=fv.Temperature(factor), engine="reference")
    torch.testing.assert_close(out, want)
    grads = [torch.autograd.grad(x.square().sum(), factor)[0] for x in (out, want)]
    torch.testing.assert_close(*grads)


SCORES = {
    "temperature": (lambda t: fv.Temperature(t), (2, 1, 4)),
    "line": (lambda t: fv.RelativeBias(t), (4, 7)),
    "line of one table": (lambda t: fv.RelativeBias(t), (1, 3)),
    "grid": (lambda t: fv.RelativeBias(t, shape=(2, 3), order="hilbert"), (4, 3, 5)),
    "alibi": (lambda t: fv.ALiBi(t), (4,)),
    "t5": (lambda t: fv.T5Bias(t, True), (6, 4)),
    "t5 decoder": (lambda t: fv.T5Bias(t, False, 5), (4, 1)),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("normalizer", ["softmax", "softmax_plus_one", "sigmoid", "relu"])
def test_gradcheck_of_every_score(name, normalizer):
    make, shape = SCORES[name]
    parameter = draw(*shape, seed=5).requires_grad_()
    q, k, v = (draw(2, h, t, 2, seed=h).requires_grad_() for h, t in ((4, 4), (2, 6), (2, 6)))
    mask = draw(2, 4, 4, 6, seed=9) > -0.3
    mask[:, :, 1] = False

    def run(q, k, v, parameter):
        score = (make(parameter), fv.SoftCap(3.0))
        return fv.attention(q, k, v, mask, score=score, normalizer=normalizer, engine="reference")

    assert torch.autograd.gradcheck(run, (q, k, v, parameter))
    assert torch.autograd.gradgradcheck(run, (q, k, v, parameter)) or normalizer == "relu"


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "relu"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_masked_reaches_no_gradient_of_a_score(normalizer, bad):
    q, k, v = draw(1, 2, 5, 3), draw(1, 2, 7, 3, seed=1), draw(1, 2, 7, 3, seed=2)
    mask = draw(1, 2, 5, 7, seed=3) > -0.5
    mask[..., 4] = False
    results = []
    for poison in (False, True):
        parameters = [draw(2, 5, seed=4), draw(5, 7, seed=5), draw(2, 9, seed=6)]
        keys = k.clone()
        if poison:
            keys[:, :, 4] = bad
            parameters[1][:, 4] = bad
        parameters = [t.requires_grad_() for t in parameters]
        factor, bias, table = parameters
        score = (fv.Temperature(factor), fv.Bias(bias), fv.SoftCap(2.0), fv.RelativeBias(table))
        out = fv.attention(q, keys, v, mask, score=score, normalizer=normalizer, engine="reference")
        results.append([out, *torch.autograd.grad(out.square().sum(), parameters)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("inside", [True, False])
def test_traced_as_one_graph(name, inside):
    """Also with the score made while tracing, as a module does that holds the parameter."""
    torch._dynamo.reset()
    make, shape = SCORES[name]
    parameter = draw(*shape).float().requires_grad_()
    q, k, v = (draw(2, h, t, 2, seed=h).float() for h, t in ((4, 4), (2, 6), (2, 6)))
    outside = make(parameter)

    def run(q, parameter):
        score = make(parameter) if inside else outside
        return fv.attention(q, k, v, score=score, normalizer="softmax_plus_one", engine="reference")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for one in (run, compiled):
        out = one(q, parameter)
        results.append([out, *torch.autograd.grad(out.square().sum(), parameter)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: fv.Temperature(1.0), TypeError, r"Temperature\.tensor must be a floating point.*float"),
        (lambda: fv.Temperature(torch.ones(1, 1, 1, 1)), ValueError, "at most 3 dimensions"),
        (lambda: fv.Temperature(torch.ones(6)), ValueError, r"\(6,\) does not broadcast to \(2, 4, 5\)"),
        (
            lambda: fv.RelativeBias(torch.ones(4, 5).int()),
            TypeError,
            r"RelativeBias\.table must be a floating.*int32",
        ),
        (lambda: fv.RelativeBias(torch.ones(4, 4)), ValueError, r"\(heads or 1, odd\), got \(4, 4\)"),
        (lambda: fv.RelativeBias(torch.ones(4)), ValueError, r"\(heads or 1, odd\), got \(4,\)"),
        (
            lambda: fv.RelativeBias(torch.ones(4, 3), shape=(2, 3)),
            ValueError,
            r"\(heads or 1, odd, odd\), got \(4, 3\)",
        ),
        (lambda: fv.RelativeBias(torch.ones(3, 3)), ValueError, r"is for 3 heads; q has 4 \(1 broadcasts\)"),
        (lambda: fv.RelativeBias(torch.ones(1, 3, 3), shape=(2, 4)), ValueError, "has 8 cells; q and k have"),
        (lambda: fv.RelativeBias(torch.ones(1, 3, 3), shape=(0, 4)), ValueError, "shape must be an int >= 1"),
        (lambda: fv.RelativeBias(torch.ones(1, 3), order="hilbert"), ValueError, "order is given with shape"),
        (
            lambda: fv.RelativeBias(torch.ones(1, 3, 3), (2, 3), "spiral"),
            ValueError,
            "order must be 'row_major'",
        ),
        (
            lambda: fv.RelativeBias(torch.ones(1, 3, 3), (2, 3), row_major((3, 2))),
            ValueError,
            "order must be of grid",
        ),
        (lambda: fv.RelativeBias(torch.ones(1, 1, 1), (40000, 40000)), ValueError, "too many distances"),
        (lambda: fv.ALiBi([0.5]), TypeError, r"ALiBi\.slopes must be a floating point tensor, got list"),
        (lambda: fv.ALiBi(torch.ones(1, 4)), ValueError, r"must have shape \(heads,\), got \(1, 4\)"),
        (lambda: fv.ALiBi(torch.ones(1)), ValueError, r"must have shape \(4,\), one per head; got \(1,\)"),
        (lambda: fv.T5Bias(torch.ones(32), True), ValueError, r"\(buckets >= 4, heads\), got \(32,\)"),
        (lambda: fv.T5Bias(torch.ones(1, 4), False), ValueError, r"\(buckets >= 2, heads\), got \(1, 4\)"),
        (lambda: fv.T5Bias(torch.ones(32, 4), True, 8), ValueError, "max_distance must be an int > 8"),
        (lambda: fv.T5Bias(torch.ones(32, 3), True), ValueError, r"T5Bias\.weight is for 3 heads"),
        (lambda: fv.Temperature(torch.ones(5, device="meta")), ValueError, "Temperature.tensor is on meta"),
        (lambda: fv.ALiBi(torch.ones(4, device="meta")), ValueError, "ALiBi.slopes is on meta"),
    ],
)
def test_mistakes_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make_request(Q, K, K, score=make())


def test_the_base_asks_for_codes():
    with pytest.raises(NotImplementedError, match="Odd does not define codes"):
        type("Odd", (Relative,), {})().codes(1, 1)


def test_every_score_counts_for_needs_grad():
    for make, shape in SCORES.values():
        q, k = torch.zeros(2, 4, 4, 2), torch.zeros(2, 2, 6, 2)
        assert not make_request(q, k, k, score=make(torch.zeros(shape))).needs_grad
        assert make_request(q, k, k, score=make(torch.zeros(shape, requires_grad=True))).needs_grad
