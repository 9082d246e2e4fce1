"""Gaussian adaptive attention: the product of densities, its invariants, padding, the block, the probe, importance."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.layers import (
    FrozenEncoderProbe,
    GaussianAdaptiveAttention,
    GaussianAdaptiveBlock,
    importance_factor,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(axis=-1, heads=1, gaussians=1, *, seed=0, offsets=None, widths=None, **options):
    made = GaussianAdaptiveAttention(axis, heads, gaussians, **options).double()
    with torch.no_grad():
        made.offsets.copy_(0.5 * normal(heads, gaussians, seed=seed) if offsets is None else offsets)
        made.widths.copy_(0.5 + normal(heads, gaussians, seed=seed + 1).abs() if widths is None else widths)
    return made


def densities(row, offsets, widths):
    """The weights of one piece (a list) as the paper has them: a product of densities, divided by its sum."""
    n = len(row)
    mean = sum(row) / n
    var = sum((x - mean) ** 2 for x in row) / (n - 1) + 1e-8
    product = []
    for x in row:
        g = 1.0
        for delta, c in zip(offsets, widths, strict=True):
            y = (x - (mean + delta)) / math.sqrt(var)
            g *= math.exp(-y * y / (2 * c * c)) / math.sqrt(2 * math.pi * c * c)
        product.append(g)
    return [g / sum(product) for g in product]


@pytest.mark.parametrize(("n", "heads", "gaussians"), [(13, 1, 1), (13, 3, 2), (31, 5, 4), (4, 2, 3)])
def test_equals_the_product_of_densities(n, heads, gaussians):
    made, x = layer(heads=heads, gaussians=gaussians), normal(3, n)
    size = n // heads
    for row, got in zip(x.tolist(), made.weights(x), strict=True):
        want = []
        for h in range(heads):
            piece = row[h * size : n if h == heads - 1 else (h + 1) * size]
            want += densities(piece, made.offsets[h].tolist(), made.widths[h].tolist())
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(made(x), x * made.weights(x))


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
def test_weights_are_positive_and_sum_to_1_per_piece(axis):
    x = normal(14, 15, 13)
    weights = layer(axis, 3, 2).weights(x)
    size = x.shape[axis] // 3
    assert (weights > 0).all()
    for piece in weights.split([size, size, x.shape[axis] - 2 * size], axis):
        torch.testing.assert_close(piece.sum(axis), torch.ones_like(piece.sum(axis)), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        weights.movedim(axis, -1), layer(-1, 3, 2).weights(x.movedim(axis, -1)), atol=1e-12, rtol=0
    )


def test_narrow_curves_stay_finite():
    x = normal(5, 17).float()
    for width in (1e-3, 1e-20, 0.0):
        made = layer(gaussians=2, offsets=0.0 * normal(1, 2), widths=torch.full((1, 2), width)).float()
        weights = made.weights(x.requires_grad_())
        weights.square().sum().backward()
        assert weights.isfinite().all()
        assert made.widths.grad.isfinite().all()
        assert x.grad.isfinite().all()
        nearest = (x - x.mean(-1, keepdim=True)).abs().argmin(-1)
        assert torch.equal(weights.argmax(-1), nearest)
        assert weights.amax(-1).min() > 0.99


def test_a_constant_added_and_a_factor_change_no_weights():
    x = normal(5, 17)
    made = layer(heads=2, gaussians=3)
    torch.testing.assert_close(made.weights(x + 7.0), made.weights(x), atol=1e-9, rtol=0)
    assert (made.weights(3 * x) - made.weights(x)).abs().max() > 1e-3  # offsets are not scaled with x
    centred = layer(heads=2, gaussians=3, offsets=torch.zeros(2, 3))
    torch.testing.assert_close(centred.weights(3 * x), centred.weights(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("gaussians", [2, 3, 5])
def test_equal_curves_are_one_narrower_one(gaussians):
    x = normal(5, 17)
    many = layer(
        gaussians=gaussians, offsets=torch.full((1, gaussians), 0.4), widths=torch.full((1, gaussians), 1.3)
    )
    one = layer(offsets=torch.tensor([[0.4]]), widths=torch.tensor([[1.3 / math.sqrt(gaussians)]]))
    torch.testing.assert_close(many.weights(x), one.weights(x), atol=1e-7, rtol=0)


def test_any_curves_are_one():
    """The product of bell curves is a bell curve: precisions add up, and the offset is their weighted mean."""
    x, many = normal(5, 17), layer(gaussians=4)
    precision = many.widths.square().reciprocal()
    one = layer(
        offsets=(many.offsets * precision).sum(1, keepdim=True) / precision.sum(),
        widths=precision.sum(1, keepdim=True).rsqrt(),
    )
    torch.testing.assert_close(many.weights(x), one.weights(x), atol=1e-12, rtol=0)


def test_pieces_do_not_see_each_other():
    made, x = layer(heads=3, gaussians=2), normal(4, 17)
    other = x.clone()
    other[:, 5:10] = normal(4, 5, seed=3)
    got, changed = made.weights(x), made.weights(other)
    assert torch.equal(got[:, :5], changed[:, :5])
    assert torch.equal(got[:, 10:], changed[:, 10:])
    assert (got[:, 5:10] != changed[:, 5:10]).any()
    same = layer(heads=2, offsets=torch.zeros(2, 1), widths=torch.ones(2, 1))
    one = layer(offsets=torch.zeros(1, 1), widths=torch.ones(1, 1))
    assert (same.weights(x) - one.weights(x)).abs().max() > 0.01


def test_padding_counts_as_0_and_comes_back():
    x = normal(4, 9)
    x[:, 6:] = -1.0
    out = layer(padding_value=-1.0)(x)
    assert torch.equal(out[:, 6:], x[:, 6:])
    zeros = torch.where(x == -1.0, 0.0, x)
    var, mean = torch.var_mean(zeros, -1, keepdim=True)
    made = layer()
    logits = -((x - mean - made.offsets[0, 0]) ** 2) / (2 * made.widths[0, 0] ** 2 * (var + 1e-8))
    torch.testing.assert_close(out[:, :6], (x * logits.softmax(-1))[:, :6], atol=1e-12, rtol=0)


def test_gradients_strides_and_low_precision():
    x, made = normal(3, 5, 7), layer(1, 2, 3)
    leaves = [x.requires_grad_(), *made.parameters()]

    def run(x, offsets, widths):
        return torch.func.functional_call(made, {"offsets": offsets, "widths": widths}, (x,))

    assert torch.autograd.gradcheck(run, leaves)
    turned = x.detach().transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(made(turned), made(x))
    low = made.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), made.double()(x), atol=0.02, rtol=0.05)


def test_inits():
    torch.manual_seed(0)
    widths = {
        name: GaussianAdaptiveAttention(-1, 100, 100, init=name).widths
        for name in ("normal", "lognormal", "ones")
    }
    assert 0.07 < (widths["normal"].abs() < 0.1).double().mean() < 0.09
    assert (widths["lognormal"] > 0).all()
    assert abs(float(widths["lognormal"].detach().log().std()) - 1) < 0.03
    assert (widths["ones"] == 1).all()


def test_the_block_adds_each_layer():
    block, x = GaussianAdaptiveBlock([-1, 1], [2, 1], [3, 2]).double(), normal(2, 5, 8)
    one = x + block.layers[0](x)
    torch.testing.assert_close(block(x), one + block.layers[1](one))
    assert sum(p.numel() for p in block.parameters()) == 2 * 3 * 2 + 2 * 2


def test_the_probe_mixes_layers_and_pools():
    torch.manual_seed(0)
    probe, x = FrozenEncoderProbe(8, 3, 2, GaussianAdaptiveBlock([-1], [2], [3])).double(), normal(4, 2, 5, 8)
    with torch.no_grad():
        probe.mix.copy_(torch.tensor([0.0, math.log(3.0)]))
    want = probe.head(probe.block(0.25 * x[:, 0] + 0.75 * x[:, 1]).mean(1))
    torch.testing.assert_close(probe(x), want)
    with pytest.raises(ValueError, match=r"features must be \(B, 2, N, dim\), got \(4, 3, 5, 8\)"):
        probe(normal(4, 3, 5, 8))


def test_importance_is_the_mean_weight_between_0_and_1():
    weights = normal(6, 5, 7).softmax(-1)
    mean = weights.mean((0, 1))
    got = importance_factor(weights, -1)
    torch.testing.assert_close(got, (mean - mean.min()) / (mean.max() - mean.min()))
    assert got.min() == 0
    assert got.max() == 1
    assert not importance_factor(torch.full((3, 4), 0.25), 1).any()
    with pytest.raises(ValueError, match=r"axis 2 of weights \(3, 4\)"):
        importance_factor(torch.zeros(3, 4), 2)


def test_errors_name_the_argument():
    for options, says in (
        ({"heads": 0}, "heads must be an int >= 1, got 0"),
        ({"gaussians": 1.5}, "gaussians must be an int >= 1, got 1.5"),
        ({"init": "zeros"}, "init must be one of normal, lognormal, ones, got 'zeros'"),
    ):
        with pytest.raises(ValueError, match=says):
            GaussianAdaptiveAttention(-1, **options)
    for axis, shape in ((2, (3, 4)), (-3, (3, 4)), (0, (4,))):
        with pytest.raises(ValueError, match=rf"axis {axis} of an input"):
            GaussianAdaptiveAttention(axis)(torch.zeros(shape))
    with pytest.raises(ValueError, match="must be at least 2 heads = 6 long, got 5"):
        GaussianAdaptiveAttention(-1, 3)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="one entry per layer, got 2, 1 and 1"):
        GaussianAdaptiveBlock([-1, 1], [1], [1])
