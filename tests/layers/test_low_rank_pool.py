"""LAMA: the bilinear form of every head written out, padding, order, and what the classifier may not see."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.layers import GRULamaClassifier, LowRankMultiHeadPool


def states(n=13, dim=6, batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, dim, n, generator=g, dtype=torch.float64).transpose(1, 2)  # any strides


def pool(**arguments):
    torch.manual_seed(1)
    return LowRankMultiHeadPool(6, **arguments).double()


def mask_of(lengths, n):
    return torch.arange(n) < torch.tensor(lengths)[:, None]


def by_hand(layer, h, mask, context):
    """f, A and R of one text, by loops over heads, tokens and ranks."""
    h, valid = h.tolist(), [t for t, keep in enumerate(mask.tolist()) if keep]
    dim, r = len(h[0]), layer.rank
    c = (
        layer.c.tolist()
        if context == "learned"
        else [math.fsum(h[t][d] for t in valid) / len(valid) for d in range(dim)]
    )
    columns = lambda m: [[m[d][j] for d in range(dim)] for j in range(layer.heads * r)]  # noqa: E731
    p, q = columns(layer.P.tolist()), columns(layer.Q.tolist())
    dot = lambda a, b: math.fsum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    f = [[math.fsum(dot(p[i * r + s], row) * dot(q[i * r + s], c) for s in range(r)) for row in h]
         for i in range(layer.heads)]  # fmt: skip
    if layer.normalize:
        norms = [math.sqrt(math.fsum(f[i][t] ** 2 for i in range(layer.heads))) for t in range(len(h))]
        f = [[x / n for x, n in zip(row, norms, strict=True)] for row in f]
    weights = []
    for row in f:
        e = [math.exp(row[t]) if t in valid else 0.0 for t in range(len(h))]
        weights.append([x / math.fsum(e) for x in e])
    pooled = [[math.fsum(w[t] * h[t][d] for t in valid) for d in range(dim)] for w in weights]
    return torch.tensor(weights).double(), torch.tensor(pooled).double()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("context", ["learned", "mean"])
@pytest.mark.parametrize(("heads", "rank"), [(1, 1), (8, 1), (3, 2), (2, 5)])
def test_the_pool_is_the_formula(heads, rank, context, normalize):
    layer, h, mask = (
        pool(heads=heads, rank=rank, context=context, normalize=normalize),
        states(),
        mask_of([13, 5, 1], 13),
    )
    pooled, weights = layer(h, mask)
    for b in range(3):
        want_weights, want = by_hand(layer, h[b], mask[b], context)
        torch.testing.assert_close(weights[b], want_weights, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(pooled[b], want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, heads, dtype=torch.float64))
    assert not weights.masked_select(~mask[:, None]).any()


@pytest.mark.parametrize(("heads", "rank"), [(4, 1), (3, 2)])
def test_every_head_is_one_form_of_its_rank(heads, rank):
    layer, h = pool(heads=heads, rank=rank), states()
    f = layer.scores(h)
    for i in range(heads):
        own = slice(i * rank, (i + 1) * rank)
        w = layer.P[:, own] @ layer.Q[:, own].T
        assert torch.linalg.matrix_rank(w) == rank
        torch.testing.assert_close(f[:, i], h @ w @ layer.c)


@pytest.mark.parametrize("context", ["learned", "mean"])
def test_padding_changes_nothing(context):
    layer, h, mask = pool(context=context), states(), mask_of([13, 5, 1], 13)
    pooled, weights = layer(h, mask)
    alone, own = layer(h[1:2, :5])
    torch.testing.assert_close(pooled[1:2], alone)
    torch.testing.assert_close(weights[1:2, :, :5], own)
    dirty = h.masked_fill(~mask.unsqueeze(2), float("nan"))
    torch.testing.assert_close(layer(dirty, mask)[0], pooled)
    none = layer(h, mask_of([0, 5, 1], 13))
    assert not none[0][0].any()
    assert not none[1][0].any()


def test_the_opposite_context_turns_the_order_around():
    layer, h = pool(heads=1), states()
    before = layer(h)[1].argsort(-1)
    layer.c.data.neg_()
    assert torch.equal(layer(h)[1].argsort(-1), before.flip(-1))


@pytest.mark.parametrize("context", ["learned", "mean"])
def test_the_pool_has_no_order(context):
    layer, h, order = pool(rank=2, context=context), states(), torch.randperm(13)
    pooled, weights = layer(h)
    moved, of_moved = layer(h[:, order])
    torch.testing.assert_close(moved, pooled)
    torch.testing.assert_close(of_moved, weights[..., order])


@pytest.mark.parametrize(("heads", "rank", "context"), [(8, 1, "learned"), (3, 4, "learned"), (3, 4, "mean")])
def test_parameters(heads, rank, context):
    count = sum(p.numel() for p in LowRankMultiHeadPool(10, heads, rank, context).parameters())
    assert count == 2 * 10 * heads * rank + 10 * (context == "learned")


def test_bfloat16_scores_in_float32():
    layer, h = pool(rank=4).float(), states().float()
    low, weights = layer(h.bfloat16())
    assert low.dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    torch.testing.assert_close(low.float(), layer(h)[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients(normalize):
    layer, h, mask = (
        pool(heads=2, rank=2, context="mean", normalize=normalize),
        states(),
        mask_of([13, 5, 1], 13),
    )
    assert torch.autograd.gradcheck(lambda x: layer(x, mask)[0], (h.requires_grad_(),), fast_mode=True)
    layer(h, mask)[0].square().sum().backward()
    assert layer.P.grad.any()
    assert layer.Q.grad.any()


# --------------------------------------------------------------------------------------------------- the classifier
def test_the_classifier_does_not_see_padding():
    torch.manual_seed(0)
    model = GRULamaClassifier(50, 4, dim=16, heads=3).eval()
    ids = torch.randint(1, 50, (3, 11))
    padded = torch.cat([ids, torch.zeros(3, 4, dtype=torch.int64)], 1)
    torch.testing.assert_close(model(padded), model(ids))
    assert not model.weights(padded)[..., 11:].any()
    cut = padded.clone()
    cut[1, 6:] = 0
    torch.testing.assert_close(model(cut)[1:2], model(ids[1:2, :6]))
    assert not torch.allclose(model(ids.flip(1)), model(ids))  # the encoder has an order


def test_the_classifier_is_its_parts():
    torch.manual_seed(0)
    model = GRULamaClassifier(50, 4, dim=16, heads=3, rank=2, context="mean").eval()
    ids = torch.randint(1, 50, (2, 7))
    h = model.encoder(model.embed(ids))[0]
    want = model.pool(h)[0].flatten(1) @ model.out.weight.T + model.out.bias
    torch.testing.assert_close(model(ids), want)
    model.train()(ids).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_errors_name_the_argument():
    for arguments in ({"heads": 0}, {"rank": 0}):
        with pytest.raises(ValueError, match="heads and rank must be >= 1, got"):
            LowRankMultiHeadPool(6, **arguments)
    with pytest.raises(ValueError, match="context must be one of learned, mean, got 'last'"):
        LowRankMultiHeadPool(6, context="last")
    h = states()
    for mask in (torch.ones(3, 12).bool(), torch.ones(3, 13)):
        with pytest.raises(ValueError, match=r"mask must be bool \(3, 13\), got"):
            pool()(h, mask)
    with pytest.raises(ValueError, match="dim must be even"):
        GRULamaClassifier(50, 4, dim=15)
    for ids in ([[1, 0, 2]], [[0, 0, 0]]):
        with pytest.raises(ValueError, match="a token in every row, and padding"):
            GRULamaClassifier(50, 4)(torch.tensor(ids))
