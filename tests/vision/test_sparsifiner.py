"""Sparsifiner: the predictor's formula, which links are kept, and what they cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import foveate as fv
from foveate.vision.backbone import parameters_of
from foveate.vision.sparsifiner import (
    LowRankConnectivity,
    Sparsifiner,
    SparsifinerAttention,
    reconstruct_attention,
    sparsifiner_small,
)

GRIDS = [(4, 4), (3, 7), (5, 5)]


def tensors(*shape: int, count: int = 2, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.double, generator=g) for _ in range(count)]


def noisy(module, seed=0):
    module.double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.5 * torch.randn(p.shape, dtype=torch.double, generator=g))
    return module


def predictor(dim=8, grid=(4, 4), **options) -> LowRankConnectivity:
    return noisy(LowRankConnectivity(dim, grid, **{"reduce_n": 3, "coefficients": 2, **options}))


def layer(dim=16, heads=2, grid=(4, 4), **options) -> SparsifinerAttention:
    return noisy(SparsifinerAttention(dim, heads, grid, **{"reduce_n": 3, "coefficients": 2, **options}))


def coefficients(made: LowRankConnectivity, q, k, scale):
    """Of one head, q and k (n, d): softmax over the basis, rows after the class token."""
    wq, wk = made.q_proj, made.k_proj
    narrow = (k @ wk.weight.T + wk.bias).T @ made.down  # (d', r)
    logits = ((q @ wq.weight.T + wq.bias)[made.lead :] @ narrow) * scale
    return logits.exp() / logits.exp().sum(1, keepdim=True)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("lead", "scale"), [(True, "heads"), (False, "width")])
def test_the_predictor_is_the_formula(grid, lead, scale):
    made = predictor(grid=grid, class_token=lead, scale=scale, threshold=0.3)
    n = grid[0] * grid[1] + lead
    q, k = tensors(2, 3, n, 8)
    factor = 3**-0.5 if scale == "heads" else 4**-0.5
    estimate, scores, mask = made.estimate(q, k), made.scores(q, k), made.mask(q, k)
    assert estimate.requires_grad and not scores.requires_grad  # noqa: PT018
    basis = made.up.abs() * (made.up.abs() > 0.3)
    assert (basis == 0).any()
    for b in range(2):
        for h in range(3):
            c = coefficients(made, q[b, h], k[b, h], factor)
            torch.testing.assert_close(estimate[b, h], c @ made.up.T, rtol=0, atol=1e-12)
            for i, row in enumerate(c.tolist()):
                best = sorted(range(len(row)), key=lambda r: -row[r])[:2]
                want = sum(row[r] * basis[:, r] for r in best)
                torch.testing.assert_close(scores[b, h, i], want, rtol=0, atol=1e-12)
                kept = sorted(range(n), key=lambda j: -float(want.detach()[j]))[: math.ceil(0.25 * n)]
                assert mask[b, h, i + lead].nonzero().flatten().tolist() == sorted(kept)
            if lead:
                assert mask[b, h, 0].all()


@pytest.mark.parametrize("engine", [None, "reference"])
@pytest.mark.parametrize("keep", [0.2, 0.25, 0.5, 1.0])
def test_the_layer_attends_to_the_mask(keep, engine):
    made = layer(keep=keep, engine=engine)
    (x,) = tensors(2, 17, 16, count=1)
    q, k, v = (x @ made.qkv.weight.T + made.qkv.bias).split(16, 2)
    out = torch.zeros_like(x)
    split = [t.unflatten(2, (2, 8)).transpose(1, 2) for t in (q, k)]
    mask = made.predictor.mask(*split)
    assert (mask[:, :, 1:].sum(-1) == math.ceil(keep * 17)).all()
    for h, part in enumerate((slice(0, 8), slice(8, 16))):
        logits = (q[..., part] @ k[..., part].mT) * 8**-0.5
        weights = logits.masked_fill(~mask[:, h], -math.inf).softmax(-1)
        assert (weights[~mask[:, h]] == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 17, dtype=torch.double))
        out[..., part] = weights @ v[..., part]
    torch.testing.assert_close(made(x), made.proj(out), rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", [None, "reference"])
@pytest.mark.parametrize("grid", GRIDS)
def test_keeping_all_is_dense(grid, engine):
    for seed in range(2):  # whatever the predictor
        made = noisy(layer(grid=grid, keep=1.0, engine=engine), seed)
        (x,) = tensors(2, grid[0] * grid[1] + 1, 16, count=1)
        q, k, v = made.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        want = made.proj(fv.attention(q, k, v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(made(x), want, rtol=0, atol=1e-12)
        torch.testing.assert_close(made.dense(x)[0], want, rtol=0, atol=1e-12)


def test_a_given_score_matrix_decides_the_mask():
    """One coefficient that is nearly 1 per row picks a row of the basis, which is a given matrix."""
    made = predictor(dim=8, grid=(2, 2), reduce_c=1, reduce_n=1, coefficients=5, threshold=0.0, keep=0.4)
    scores = torch.rand(4, 5, dtype=torch.double, generator=torch.Generator().manual_seed(3)) + 0.1
    with torch.no_grad():
        for linear in (made.q_proj, made.k_proj):
            linear.weight.copy_(torch.eye(8))
            linear.bias.zero_()
        made.down.copy_(torch.eye(5))
        made.up[:, 1:] = scores.T  # basis row j + 1 is row j of the scores
        made.up[:, 0] = 0
    tokens = 100 * torch.eye(5, 8, dtype=torch.double)[None, None]  # token i is like key i alone
    torch.testing.assert_close(made.scores(tokens, tokens)[0, 0], scores)
    want = scores.topk(math.ceil(0.4 * 5), 1).indices.sort(1).values
    assert torch.equal(made.select(tokens, tokens)[0, 0].sort(1).values, want)


def test_gradients_reach_the_predictor_by_reconstruction_only():
    made = layer()
    (x,) = tensors(2, 17, 16, count=1)
    made(x).square().sum().backward()
    assert all(p.grad is None for p in made.predictor.parameters())
    assert made.qkv.weight.grad.abs().max() > 0
    made.reconstruction(x, made.dense(x)[1]).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.predictor.parameters())


def test_reconstruction_is_the_summed_squared_error():
    made = layer()
    (x,) = tensors(2, 17, 16, count=1)
    weights = made.dense(x)[1].detach()
    q, k, _ = made.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    estimate = made.predictor.estimate(q, k).detach()
    want = sum(
        float((estimate[b, h, i] - weights[b, h, i + 1]).square().sum())
        for b in range(2)
        for h in range(2)
        for i in range(16)
    )
    assert float(made.reconstruction(x, weights).detach()) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("taught", [True, False])
def test_fitting_lowers_the_error_and_moves_only_the_predictors(taught):
    torch.manual_seed(0)
    model, teacher = (
        Sparsifiner(dim=16, depth=2, heads=2, image=16, patch=4, num_classes=3, reduce_n=3) for _ in range(2)
    )
    images = torch.randn(4, 3, 16, 16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = reconstruct_attention(
        model, lambda step: images, steps=10, lr=1e-2, teacher=teacher if taught else None
    )
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".predictor." in name}
    assert all(p.grad is None for name, p in model.named_parameters() if ".predictor." not in name)
    want = model.reconstruction(images, (teacher if taught else model).dense(images)[1])
    got = model.reconstruction(images, teacher.dense(images)[1] if taught else None)
    assert torch.equal(got, want)


def test_dense_is_what_keeping_all_gives():
    torch.manual_seed(0)
    model = Sparsifiner(dim=16, depth=2, heads=2, image=16, patch=4, num_classes=3, keep=1.0).double()
    images = torch.randn(2, 3, 16, 20, dtype=torch.double)
    torch.testing.assert_close(model.dense(images)[0], model(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lead", [True, False])
def test_other_grids_are_interpolated_over_the_patches(lead):
    made = predictor(grid=(4, 4), class_token=lead)
    for rows in (made.down, made.up):
        got = made._sized(rows, (3, 7))
        maps = rows[int(lead) :].T.reshape(1, -1, 4, 4)
        want = F.interpolate(maps, (3, 7), mode="bilinear", align_corners=False)[0].flatten(1).T
        torch.testing.assert_close(got[int(lead) :], want)
        assert torch.equal(got[: int(lead)], rows[: int(lead)])
    q, k = tensors(1, 2, 21 + lead, 8)
    assert made.select(q, k, grid=(3, 7)).shape == (1, 2, 21, math.ceil(0.25 * (21 + lead)))


@pytest.mark.parametrize("engine", [None, "reference"])
@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_tokens_that_are_gone(engine, keep):
    """They are no keys, give 0, and the others see what a mask without them says."""
    made = layer(keep=keep, engine=engine)
    (x,) = tensors(2, 17, 16, count=1)
    alive = torch.rand(2, 17, generator=torch.Generator().manual_seed(1)) < 0.4
    alive[:, 0] = True
    out = made(x, alive=alive)
    assert (out[~alive] == 0).all()
    q, k, v = made.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    chosen = made.predictor.select(q, k, alive=alive)
    mask = torch.zeros(2, 2, 17, 17, dtype=torch.bool)
    mask[:, :, 1:].scatter_(-1, chosen, True)
    mask[:, :, 0] = True
    mask &= alive[:, None, None]
    counts = mask[:, :, 1:].sum(-1)
    if keep == 0.5:
        assert (counts < 9).any()  # fewer are left than a row keeps
    else:
        assert (counts == 4).all()
    want = made.proj(fv.attention(q, k, v, mask).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out[alive], want[alive], rtol=0, atol=1e-12)
    changed = torch.where(alive[..., None], x, 5.0)
    torch.testing.assert_close(made(changed, alive=alive), out, rtol=0, atol=1e-12)


def test_pruning_keeps_what_the_class_token_attends_to():
    torch.manual_seed(0)
    model = Sparsifiner(
        dim=16, depth=3, heads=2, image=16, patch=4, num_classes=3, prune={0: 0.6, 1: 0.3}
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    seen = []
    hooks = [b.register_forward_hook(lambda m, a, o: seen.append(o)) for b in model.blocks]
    found = model.tokens(images)[0]
    for hook in hooks:
        hook.remove()
    left = (found[:, 1:] != 0).any(-1)
    assert (left.sum(1) == math.ceil(0.3 * 16)).all()
    assert ((seen[1][:, 1:] != 0).any(-1).sum(1) == math.ceil(0.6 * 16)).all()
    x = model.embed(images)[0]
    block = model.blocks[0]
    weights = block.attn.dense(block.norm1(x))[1][:, :, 0, 1:].mean(1)
    best = weights.topk(math.ceil(0.6 * 16)).indices.sort(1).values
    kept = (seen[1][:, 1:] != 0).any(-1)
    assert torch.equal(kept.nonzero()[:, 1].view(2, -1), best)


def test_published_parameters():
    with torch.device("meta"):
        model = sparsifiner_small()
    assert parameters_of(model) == 22_251_880
    assert sum(parameters_of(b.attn.predictor) for b in model.blocks) == 201_216


@pytest.mark.parametrize("size", [(16, 16), (23, 13), (5, 40)])
def test_any_size(size):
    torch.manual_seed(0)
    model = Sparsifiner(dim=16, depth=1, heads=2, image=16, patch=4, num_classes=3).eval()
    x = torch.randn(2, 3, *size)
    assert model(x).shape == (2, 3)
    other = Sparsifiner(dim=16, depth=1, heads=2, image=16, patch=4, features_only=True).eval()
    kept = {name: p for name, p in model.state_dict().items() if name in other.state_dict()}
    other.load_state_dict(kept)
    assert torch.equal(other(x)[0], model.forward_features(x)[0])
    assert model.forward_features(x)[0].shape == (2, 16, -(-size[0] // 4), -(-size[1] // 4))


def test_strides_batch_and_gradients():
    assert Sparsifiner(dim=16, depth=1, heads=2, image=16, patch=4, num_classes=0)(
        torch.zeros(2, 3, 16, 16)
    ).shape == (2, 16)
    made = layer(grid=(2, 3), keep=0.5)
    (x,) = tensors(3, 16, 7, count=1)
    x = x.mT
    torch.testing.assert_close(made(x), made(x.contiguous()), rtol=0, atol=1e-13)
    torch.testing.assert_close(made(x)[1:2], made(x[1:2]), rtol=0, atol=1e-13)
    small = layer(dim=4, grid=(2, 2), keep=0.5, reduce_c=1)
    assert torch.autograd.gradcheck(small, tensors(1, 5, 4, count=1)[0].requires_grad_(), atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 0"):
        LowRankConnectivity(8, 4, keep=0)
    with pytest.raises(ValueError, match="reduce_n must be an int from 1 to 17, got 18"):
        LowRankConnectivity(8, 4, reduce_n=18)
    with pytest.raises(ValueError, match="scale must be 'heads' or 'width', got 'dim'"):
        LowRankConnectivity(8, 4, scale="dim")
    with pytest.raises(ValueError, match="coefficients must be an int >= 1, got 0"):
        LowRankConnectivity(8, 4, coefficients=0)
    with pytest.raises(
        ValueError, match=r"q must be \(B, H, 17, 8\) for a grid of 4 x 4, got \(1, 2, 16, 8\)"
    ):
        LowRankConnectivity(8, 4).select(torch.zeros(1, 2, 16, 8), torch.zeros(1, 2, 17, 8))
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got 10 and 3"):
        SparsifinerAttention(10, 3, 4)
    with pytest.raises(ValueError, match=r"x must be \(B, n, 16\), got \(1, 17, 15\)"):
        SparsifinerAttention(16, 2, 4)(torch.zeros(1, 17, 15))
    with pytest.raises(ValueError, match="prune must map layers below 2 to rates"):
        Sparsifiner(dim=16, depth=2, heads=2, image=16, patch=4, prune={0: 0.3, 1: 0.6})
