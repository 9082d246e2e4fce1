"""MSA-Conv against unfolding, its limits, and what shifts and pooled keys reach."""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
from torch.nn import functional as F

import foveate as fv
from foveate.patterns import Stencil
from foveate.vision import SelfAttentionConv2d, shifts, stencil_attention

ZEROS = torch.zeros(1, 1, 4, 4, 2)


def image(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(*args, seed: int = 0, **kwargs) -> SelfAttentionConv2d:
    torch.manual_seed(seed)
    return SelfAttentionConv2d(*args, **kwargs).double().eval()


def unfolded(x: torch.Tensor, kernel: tuple[int, int], dilation: tuple[int, int]) -> torch.Tensor:
    """(B, heads, H, W, d) -> (B, heads, H, W, k k, d), zeros outside."""
    b, h, height, width, d = x.shape
    padding = tuple(r * (k // 2) for k, r in zip(kernel, dilation, strict=True))
    flat = x.permute(0, 1, 4, 2, 3).reshape(b * h, d, height, width)
    cells = F.unfold(flat, kernel, dilation=dilation, padding=padding)  # (B h, d k k, H W)
    return cells.view(b, h, d, prod(kernel), height, width).permute(0, 1, 4, 5, 3, 2)


def by_unfolding(q, k, v, kernel=3, dilation=1, edge="zero"):
    """The definition: out, and the weight that falls on cells of the map."""
    kernel, dilation = (n if isinstance(n, tuple) else (n, n) for n in (kernel, dilation))
    real = unfolded(torch.ones_like(q[..., :1]), kernel, dilation)[..., 0]
    logits = (unfolded(k, kernel, dilation) @ q[..., None])[..., 0] * q.shape[-1] ** -0.5
    if edge == "mask":
        logits = logits.masked_fill(real == 0, -torch.inf)
    weights = logits.softmax(-1)
    return (weights[..., None, :] @ unfolded(v, kernel, dilation))[..., 0, :], (weights * real).sum(-1)


@pytest.mark.parametrize("edge", ["zero", "mask"])
@pytest.mark.parametrize(
    ("kernel", "dilation"), [(3, 1), (5, 2), (7, 1), ((1, 5), (1, 2)), (1, 1), ((3, 1), 4)]
)
def test_it_is_the_unfold_definition(kernel, dilation, edge):
    q, k, v = (image(2, 2, 7, 5, 3, seed=i) for i in range(3))
    out, _ = stencil_attention(q, k, v, kernel, dilation=dilation, edge=edge)
    expected, _ = by_unfolding(q, k, v, kernel, dilation, edge)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


def test_float32_and_its_gradients():
    q, k, v = (image(1, 2, 11, 7, 16, seed=i).float().requires_grad_() for i in range(3))
    for edge in ("zero", "mask"):
        found = torch.autograd.grad(stencil_attention(q, k, v, 5, edge=edge)[0].square().sum(), (q, k, v))
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        expected = torch.autograd.grad(by_unfolding(*wide, 5, 1, edge)[0].square().sum(), wide)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-4)


def test_the_weight_on_cells_of_the_map():
    q, k = image(1, 1, 6, 7, 3), image(1, 1, 6, 7, 3, seed=2)
    ones = torch.ones(1, 1, 6, 7, 1, dtype=torch.float64)
    mass, lse = stencil_attention(q, k, ones, 3)
    _, expected = by_unfolding(q, k, ones)
    torch.testing.assert_close(mass[..., 0], expected, atol=1e-12, rtol=0)
    border = torch.ones(6, 7, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert (mass[0, 0, :, :, 0][border] < 1 - 1e-6).all()
    torch.testing.assert_close(mass[0, 0, 1:-1, 1:-1, 0], torch.ones(4, 5).double(), atol=1e-12, rtol=0)
    # the log-sum-exp counts the cells outside, each with logit 0
    logits = (unfolded(k, (3, 3), (1, 1)) @ q[..., None])[..., 0] * 3**-0.5
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-12, rtol=0)
    mass, _ = stencil_attention(q, k, ones, 3, edge="mask")
    torch.testing.assert_close(mass, ones, atol=1e-12, rtol=0)


def test_a_stencil_that_covers_the_map_is_full_attention():
    q, k, v = (image(1, 2, 4, 5, 3, seed=i) for i in range(3))
    out, _ = stencil_attention(q, k, v, (7, 9), edge="mask")
    full = fv.attention(*(x.flatten(2, 3) for x in (q, k, v)))
    assert isinstance(full, torch.Tensor)
    torch.testing.assert_close(out.flatten(2, 3), full, atol=1e-12, rtol=0)


def test_a_torus_is_equivariant_and_clamped_windows_are_neighborhoods():
    q, k, v = (image(1, 2, 6, 7, 3, seed=i) for i in range(3))
    out, _ = stencil_attention(q, k, v, 3, dilation=(2, 1), edge="wrap")
    expected = sum_over_torus(q, k, v)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    clamped, _ = stencil_attention(q, k, v, 3, edge="clamp")
    fq, fk, fv_ = (x.flatten(2, 3) for x in (q, k, v))
    near = fv.attention(fq, fk, fv_, fv.patterns.Neighborhood((6, 7), 3))
    assert isinstance(near, torch.Tensor)
    torch.testing.assert_close(clamped.flatten(2, 3), near, atol=1e-12, rtol=0)


def sum_over_torus(q, k, v):
    """3 x 3 keys with dilation (2, 1), wrapped around: each as a roll of the whole map."""
    moves = [(2 * u, t) for u, t in itertools.product((-1, 0, 1), repeat=2)]
    keys, values = (torch.stack([x.roll(m, (2, 3)) for m in moves], 4) for x in (k, v))
    weights = ((keys @ q[..., None])[..., 0] * 3**-0.5).softmax(-1)
    return (weights[..., None, :] @ values)[..., 0, :]


@pytest.mark.parametrize(
    ("shape", "kernel", "dilation"), [((7,), 3, 2), ((5, 4), (3, 1), (1, 2)), ((3, 4, 2), 3, 1)]
)
def test_the_pattern_is_its_formula(shape, kernel, dilation):
    dense = Stencil(shape, kernel, dilation).layout(prod(shape)).to_dense()[0, 0]
    cells = list(itertools.product(*map(range, shape)))
    kernels, steps = (n if isinstance(n, tuple) else (n,) * len(shape) for n in (kernel, dilation))
    for i, query in enumerate(cells):
        for j, key in enumerate(cells):
            axes = zip(query, key, kernels, steps, strict=True)
            assert dense[i, j] == all((t - y) % r == 0 and abs(t - y) // r <= n // 2 for y, t, n, r in axes)


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_the_layer_is_the_module_of_the_release(heads):
    layer, x = made(6, 4, 3, stride=2, dilation=2, heads=heads), image(2, 6, 9, 5)
    qkv = F.conv2d(x, layer.qkv.weight, layer.qkv.bias).chunk(3, 1)
    q, k, v = (t.unflatten(1, (heads, -1)).permute(0, 1, 3, 4, 2) for t in qkv)
    y, _ = by_unfolding(q, k, v, 3, 2)
    y = y.permute(0, 1, 4, 2, 3).flatten(1, 2) + x
    assert layer.conv is not None
    expected = F.conv2d(y, layer.conv.weight, stride=2, padding=1).relu()
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 6 * 6 + 3 * 6 + 9 * 6 * 4


def test_kernel_1_is_the_value_and_the_residual():
    layer, x = made(6, kernel=1, heads=2, convolve=False), image(1, 6, 4, 3)
    assert layer.qkv.bias is not None
    value = F.conv2d(x, layer.qkv.weight[12:], layer.qkv.bias[12:])
    torch.testing.assert_close(layer(x), value + x, atol=1e-12, rtol=0)


def test_heads_with_kernels_and_dilations_of_their_own():
    kernels, dilations = [3, (1, 5), 5, 3], [1, 2, 1, 1]
    layer = made(
        8, heads=4, head_kernels=kernels, head_dilations=dilations, convolve=False, residual=False, pooled=2
    )
    plain, x = made(8, heads=4, convolve=False, residual=False), image(2, 8, 7, 8)
    layer.load_state_dict(plain.state_dict())
    q, k, v = (
        t.unflatten(1, (4, -1)).permute(0, 1, 3, 4, 2)
        for t in F.conv2d(x, layer.qkv.weight, layer.qkv.bias).chunk(3, 1)
    )
    pooled = [F.avg_pool2d(t.permute(0, 1, 4, 2, 3).flatten(0, 1), (4, 4), (3, 4)) for t in (k, v)]
    far_k, far_v = (p.flatten(2).mT.unflatten(0, (2, 4)) for p in pooled)  # (2, 4, 4, d); rows 0-3 and 3-6
    for h, (kernel, step) in enumerate(zip(kernels, dilations, strict=True)):
        size = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        keys, values = (unfolded(t[:, h : h + 1], size, (step, step))[:, 0] for t in (k, v))
        shape = (*keys.shape[:3], 4, 2)
        keys = torch.cat([keys, far_k[:, h, None, None].expand(shape)], 3)
        values = torch.cat([values, far_v[:, h, None, None].expand(shape)], 3)
        weights = ((keys @ q[:, h, ..., None])[..., 0] * 2**-0.5).softmax(-1)
        expected = (weights[..., None, :] @ values)[..., 0, :].permute(0, 3, 1, 2)
        torch.testing.assert_close(layer(x)[:, 2 * h : 2 * h + 2], expected, atol=1e-12, rtol=0)


def test_shifts():
    x = image(1, 8, 5, 7)
    plain = made(8, heads=4, convolve=False)
    still = made(8, heads=4, convolve=False, head_shifts=[(0, 0)] * 4)
    round_trip = made(8, heads=4, convolve=False, head_shifts=[(5, 0), (0, -7), (-5, 7), (0, 0)])
    shifted = made(8, heads=4, convolve=False, head_shifts=[(2, 0), (0, 0), (0, 0), (0, 0)])
    torch.testing.assert_close(still(x), plain(x), atol=0, rtol=0)
    torch.testing.assert_close(round_trip(x), plain(x), atol=0, rtol=0)
    assert (shifted(x) - plain(x))[:, :2].abs().max() > 1e-3
    torch.testing.assert_close(shifted(x)[:, 2:], plain(x)[:, 2:], atol=0, rtol=0)
    q, k, v = (
        t.unflatten(1, (4, -1)).permute(0, 1, 3, 4, 2)
        for t in F.conv2d(x, plain.qkv.weight, plain.qkv.bias).chunk(3, 1)
    )
    expected, _ = by_unfolding(q, k.roll((2, 0), (2, 3)), v.roll((2, 0), (2, 3)))
    torch.testing.assert_close(
        shifted(x)[:, :2], expected[:, 0].permute(0, 3, 1, 2) + x[:, :2], atol=1e-12, rtol=0
    )
    assert len(set(shifts(16, 5))) == 8
    assert shifts(2, 5, depth=1) == ((-4, 0), (4, 0))


def reach(layer: SelfAttentionConv2d, side: int, at: tuple[int, int]) -> torch.Tensor:
    x = image(1, layer.dim, side, side).requires_grad_()
    layer(x)[0, :, at[0], at[1]].sum().backward()
    assert x.grad is not None
    return x.grad[0].abs().sum(0) > 0


def test_what_gradients_reach():
    near = torch.zeros(11, 11, dtype=torch.bool)
    near[3:8, 3:8] = True  # attention and convolution, one cell each
    assert (reach(made(8, heads=8), 11, (5, 5)) <= near).all()
    assert (reach(made(8, heads=8, pooled=3), 11, (5, 5))).all()
    seen = reach(made(8, heads=8, head_shifts=shifts(8), convolve=False), 11, (5, 5))
    around = torch.zeros(11, 11, dtype=torch.bool)
    around[2:9, 2:9] = True  # shifts by 2 and one cell more
    assert (seen == around).all()


def test_interior_is_equivariant_and_sizes_are_free():
    layer, x = made(6, kernel=5, heads=2), image(1, 6, 13, 17)
    moved = layer(x.roll((1, 3), (2, 3)))
    torch.testing.assert_close(moved[:, :, 5:-4, 7:-4], layer(x)[:, :, 4:-5, 4:-7], atol=1e-12, rtol=0)
    for size in ((1, 1), (2, 19), (24, 24)):
        assert layer(image(1, 6, *size)).shape == (1, 6, *size)


def test_gradients_strides_and_dropout():
    layer = made(4, 3, heads=2, pooled=2)
    x = image(1, 4, 5, 4).transpose(2, 3)
    torch.testing.assert_close(layer(x), layer(x.contiguous()), atol=1e-14, rtol=0)
    assert torch.autograd.gradcheck(layer, (x[:, :, :3].detach().requires_grad_(),))
    x = image(1, 4, 6, 6)
    assert (layer.train()(x) != layer(x)).any()
    assert (layer.eval()(x) == layer(x)).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SelfAttentionConv2d(8, heads=3), "heads must divide dim, got 3 for 8"),
        (lambda: SelfAttentionConv2d(8, kernel=4), "kernels must be odd, got"),
        (lambda: SelfAttentionConv2d(8, edge="same"), "edge 'same'; accepted: zero, mask, clamp, wrap"),
        (lambda: SelfAttentionConv2d(8, 4, convolve=False), "out must be 8 and stride 1, got 4 and 1"),
        (lambda: SelfAttentionConv2d(8, heads=2, head_shifts=[(0, 0)]), "one entry per head, 2, got 1"),
        (lambda: SelfAttentionConv2d(8, pooled=-1), "pooled must be >= 0 and dropout in"),
        (lambda: SelfAttentionConv2d(8)(torch.zeros(1, 4, 4, 8)), r"x must be \(B, 8, H, W\)"),
        (lambda: stencil_attention(ZEROS, ZEROS, ZEROS, 2), "kernel must be odd"),
        (lambda: stencil_attention(ZEROS, ZEROS, ZEROS, edge="x"), "edge 'x'; accepted"),
        (
            lambda: stencil_attention(ZEROS, ZEROS, ZEROS, 5, edge="wrap"),
            "'wrap' needs a map of",
        ),
        (
            lambda: stencil_attention(ZEROS, ZEROS, ZEROS, 5, edge="clamp"),
            "Neighborhood: window",
        ),
        (lambda: shifts(0), "shifts: heads must be >= 1"),
        (lambda: Stencil(5, 2), "Stencil: kernel must be odd, got 2"),
    ],
)
def test_errors_name_the_argument(make, words):
    with pytest.raises(ValueError, match=words):
        make()
