"""ConViT: gated positional attention against its definition, its local initialisation, and the models' sizes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.vision import (
    GPSA,
    ConViT,
    attention_distance,
    convit_base,
    convit_small,
    convit_tiny,
    gated_positional_attention,
    locality_gates,
    multiply_adds,
    positional_factors,
)
from foveate.vision.backbone import parameters_of


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(dim=16, heads=4, *, stirred=True, **options):
    torch.manual_seed(0)
    layer = GPSA(dim, heads, **options).double().eval()
    if stirred:
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return layer


def defined(layer, x):
    """(A (B, heads, N, N), out) from the formula, pair by pair for the positions."""
    (b, h, w, c), heads = x.shape, layer.heads
    n, d = h * w, c // heads
    relative = torch.zeros(n, n, 3, dtype=x.dtype)
    for i in range(n):
        for j in range(n):
            dx, dy = j % w - i % w, j // w - i // w
            relative[i, j] = torch.tensor([dx, dy, dx * dx + dy * dy])
    positional = layer.position(relative).permute(2, 0, 1).softmax(-1)  # (heads, N, N), with the bias
    q, k = layer.qk(x).view(b, n, 2, heads, d).permute(2, 0, 3, 1, 4)
    v = layer.v(x).view(b, n, heads, d).transpose(1, 2)
    content = (q @ k.mT / d**0.5).softmax(-1)
    share = torch.sigmoid(layer.gate)[:, None, None]
    mixed = (1 - share) * content + share * positional
    mixed = mixed / mixed.sum(-1, keepdim=True)
    return mixed, layer.proj((mixed @ v).transpose(1, 2).reshape(b, h, w, c))


@pytest.mark.parametrize(("grid", "heads"), [((4, 4), 4), ((3, 5), 9), ((1, 11), 2), ((2, 1), 1)])
@pytest.mark.filterwarnings("ignore:GPSA")
def test_the_layer_is_its_definition(grid, heads):
    layer, x = made(heads * 4, heads, bias=True), normal(2, *grid, heads * 4)
    weights, out = defined(layer, x)
    torch.testing.assert_close(layer(x), out, atol=1e-12, rtol=1e-11)
    torch.testing.assert_close(layer.weights(x), weights, atol=1e-13, rtol=1e-11)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_its_gradients_are_the_definitions():
    layer, x = made(bias=True), normal(2, 3, 5, 16).requires_grad_()
    inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
    weight = normal(2, 3, 5, 16, seed=1)
    ours = torch.autograd.grad((layer(x) * weight).sum(), inputs)
    theirs = torch.autograd.grad((defined(layer, x)[1] * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


def test_non_contiguous_maps():
    layer, x = made(), normal(2, 16, 5, 3)
    torch.testing.assert_close(layer(x.permute(0, 3, 2, 1)), layer(x.permute(0, 3, 2, 1).contiguous()))


@pytest.mark.parametrize("heads", [9, 25])
def test_strong_locality_is_one_tap_per_head(heads):
    side = int(heads**0.5)
    layer = made(heads * 2, heads, stirred=False, locality_strength=50.0, gate=30.0)
    h, w = 7, 8
    weights = layer.weights(normal(1, h, w, heads * 2))[0]
    for a in range(side):
        for b in range(side):
            dx, dy = b - side // 2, a - side // 2
            for y in range(h):
                for x in range(w):
                    if 0 <= y + dy < h and 0 <= x + dx < w:
                        assert weights[a + side * b, y * w + x, (y + dy) * w + x + dx] > 0.999


def test_an_even_kernel_looks_between_four_cells():
    layer = made(8, 4, stirred=False, locality_strength=50.0, gate=30.0)
    weights = layer.weights(normal(1, 6, 6, 8))[0].unflatten(1, (6, 6)).unflatten(3, (6, 6))
    for head in range(4):
        dx, dy = head // 2 - 0.5, head % 2 - 0.5
        near = weights[
            head, 3, 3, [[int(3 + dy - 0.5)], [int(3 + dy + 0.5)]], [[int(3 + dx - 0.5), int(3 + dx + 0.5)]]
        ]
        torch.testing.assert_close(near, torch.full((2, 2), 0.25, dtype=near.dtype), atol=1e-6, rtol=0)


def test_a_strong_layer_is_a_convolution():
    heads, d = 9, 3
    layer = made(heads * d, heads, stirred=False, locality_strength=50.0, gate=30.0)
    nn.init.normal_(layer.proj.weight)
    x = normal(2, 7, 9, heads * d)
    kernel = torch.zeros(heads * d, heads * d, 3, 3, dtype=x.dtype)
    for head in range(heads):
        block = slice(head * d, (head + 1) * d)
        kernel[:, block, head % 3, head // 3] = layer.proj.weight[:, block]  # row a, column b
    want = F.conv2d(x.permute(0, 3, 1, 2), kernel, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x)[:, 1:-1, 1:-1], want[:, 1:-1, 1:-1], atol=1e-4, rtol=0)
    assert (layer(x) - want)[
        :, 0
    ].abs().max() > 1e-2  # at the border the mass goes to the nearest cell inside


def test_the_gates_ends():
    layer, x = made(), normal(2, 4, 5, 16)
    tokens = x.flatten(1, 2)
    q, k = layer.qk(tokens).unflatten(2, (2, 4, 4)).permute(2, 0, 3, 1, 4)
    v = layer.v(tokens).unflatten(2, (4, 4)).transpose(1, 2)
    with torch.no_grad():
        layer.gate.fill_(-30.0)
        plain = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(layer(x), layer.proj(plain), atol=1e-11, rtol=0)
        layer.gate.fill_(30.0)
        before = layer(x)
        layer.qk.weight.mul_(-3.0)
        torch.testing.assert_close(layer(x), before, atol=1e-11, rtol=0)
        torch.testing.assert_close(layer.weights(x), layer.weights(-2 * x), atol=1e-12, rtol=0)


def test_the_positional_part_depends_on_the_offset_up_to_the_border():
    weight = normal(3, 3, seed=2)
    rows, columns = positional_factors(weight, (6, 7))
    for factor in (rows, columns):
        n = factor.shape[1]
        torch.testing.assert_close(factor.sum(-1), torch.ones(3, n, dtype=factor.dtype))
        for i in range(n - 1):  # shifted by one, and normalised again over what both see
            one, other = factor[:, i, : n - 1], factor[:, i + 1, 1:]
            torch.testing.assert_close(one / one.sum(-1, keepdim=True), other / other.sum(-1, keepdim=True))


def test_mixing_logits_is_something_else():
    q, k, v = (normal(1, 4, 20, 4, seed=s) for s in range(3))
    weight, gate = normal(4, 3, seed=3), torch.zeros(4, dtype=torch.float64)
    rows, columns = positional_factors(weight, (4, 5))
    positional = torch.einsum("hyv,hxu->hyxvu", rows, columns).flatten(3).flatten(1, 2)
    added = torch.softmax(0.5 * q @ k.mT * 0.5 + 0.5 * positional.log(), -1) @ v
    assert (gated_positional_attention(q, k, v, weight, gate, (4, 5)) - added).abs().max() > 1e-2


def test_initialisation():
    layer = GPSA(36, 9)
    assert torch.equal(layer.v.weight, torch.eye(36))
    assert torch.equal(layer.gate, torch.ones(9))
    assert layer.position.weight[5].tolist() == [0.0, 2.0, -1.0]  # head 5 = 2 + 3 * 1: Delta = (0, 1)
    assert torch.equal(layer.local_init_(0.5).position.weight[0], torch.tensor([-1.0, -1.0, -0.5]))
    assert (GPSA(36, 9, locality_strength=None).v.weight - torch.eye(36)).abs().max() > 0.5
    with pytest.warns(UserWarning, match="12 heads are not a square number; heads from 9 on are not local"):
        layer = GPSA(24, 12)
    assert (layer.position.weight[9:, 2] != -1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GPSA(24, 4)


def test_distance_and_gates():
    uniform = torch.full((2, 3, 12, 12), 1 / 12, dtype=torch.float64)
    far = (
        sum(((i // 4 - j // 4) ** 2 + (i % 4 - j % 4) ** 2) ** 0.5 for i in range(12) for j in range(12))
        / 144
    )
    torch.testing.assert_close(
        attention_distance(uniform, (3, 4)), torch.full((3,), far, dtype=torch.float64)
    )
    swapped = torch.eye(12).roll(1, 1)[
        None
    ]  # each looks at the next token: one column, or a row and three columns
    want = (9 * 1 + 2 * 10**0.5 + 13**0.5) / 12
    assert attention_distance(swapped, (3, 4)).item() == pytest.approx(want, rel=1e-6)
    model = ConViT(dim=16, heads=4, depth=3, local=2, patch=4, size=16, num_classes=2)
    gates = locality_gates(model)
    assert list(gates) == ["blocks.0.attention", "blocks.1.attention"]
    assert gates["blocks.1.attention"].tolist() == pytest.approx([0.7310586] * 4)


@pytest.mark.parametrize(
    ("factory", "parameters", "c"),
    [(convit_tiny, 5_710_512, 192), (convit_small, 27_777_322, 432), (convit_base, 86_540_040, 768)],
)
def test_the_models_have_their_parameters(factory, parameters, c):
    with torch.device("meta"):
        model = factory()
    assert parameters_of(model) == parameters
    n, m = 196, 197
    local = 12 * n * c * c + 2 * n * n * c + 28 * n * c  # the positional part: 14 rows and 14 columns
    plain = 12 * m * c * c + 2 * m * m * c
    assert multiply_adds(model) == n * 768 * c + 10 * local + 2 * plain + 1000 * c


def tiny(**options):
    torch.manual_seed(0)
    return ConViT(dim=16, heads=4, depth=3, local=2, patch=4, size=16, num_classes=5, **options)


def test_the_class_token_joins_after_the_local_blocks():
    model = tiny().double().eval()
    images = normal(2, 3, 16, 24)
    x = model.embed(images) + F.interpolate(
        model.positions.permute(0, 3, 1, 2), (4, 6), mode="bicubic"
    ).permute(0, 2, 3, 1)
    for block in model.blocks[:2]:
        x = x + defined(block.attention, block.norm1(x))[1]
        x = x + block.mlp(block.norm2(x))
    x = torch.cat([model.class_token.expand(2, 1, 16), x.flatten(1, 2)], 1)
    last = model.blocks[2]
    q, k, v = last.attention.qkv(last.norm1(x)).view(2, 25, 3, 4, 4).permute(2, 0, 3, 1, 4)
    x = x + last.attention.proj(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(2, 25, 16))
    x = x + last.mlp(last.norm2(x))
    torch.testing.assert_close(model(images), model.head(model.norm(x[:, 0])), atol=1e-11, rtol=1e-11)
    (features,) = model.forward_features(images)
    torch.testing.assert_close(features.flatten(2).mT, x[:, 1:], atol=1e-11, rtol=1e-11)


def test_uses_of_the_model():
    images = torch.randn(2, 3, 17, 23)
    assert tiny()(images).shape == (2, 5)
    (features,) = tiny(features_only=True)(images)
    assert features.shape == (2, 16, 5, 6)
    pooled = ConViT(dim=16, heads=4, depth=2, local=1, patch=4, size=16, num_classes=0)
    assert pooled.eval()(images).shape == (2, 16)
    torch.testing.assert_close(pooled.forward_head(pooled.forward_features(images)), pooled(images))
    with pytest.raises(
        TypeError, match="ConViT: the class token is read out; maps must come from forward_feat"
    ):
        pooled.forward_head([features])


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="GPSA: dim must be a multiple of heads, got 16 and 3"):
        GPSA(16, 3)
    with pytest.raises(ValueError, match=r"GPSA: x must be \(B, H, W, 16\), got \(2, 9, 16\)"):
        GPSA(16, 4)(torch.zeros(2, 9, 16))
    with pytest.raises(ValueError, match=r"ConViT: local must be in \[0, depth = 2\], got 3"):
        ConViT(dim=16, heads=4, depth=2, local=3)
    with pytest.raises(ValueError, match=r"attention_distance: weights must be \(.., heads, 6, 6\)"):
        attention_distance(torch.eye(5)[None], (2, 3))
    with pytest.raises(ValueError, match=r"ConViT: images must be \(B, 3, H, W\), got \(1, 1, 16, 16\)"):
        tiny()(torch.zeros(1, 1, 16, 16))
