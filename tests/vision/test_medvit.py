"""MedViTV2: dilated neighbourhoods, pooled keys and KAN layers against their formulas; parameter counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

import foveate as fv
from foveate import vision
from foveate.patterns import Neighborhood
from foveate.vision import (
    FasterKAN,
    MedViTGlobalBlock,
    MedViTLocalBlock,
    MedViTV2,
    NeighborhoodAttention2d,
    PooledKeyAttention,
)


def image(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(*args, seed: int = 0, **kwargs) -> NeighborhoodAttention2d:
    torch.manual_seed(seed)
    layer = NeighborhoodAttention2d(*args, **kwargs).double().eval()
    if layer.table is not None:
        torch.nn.init.normal_(layer.table)
    return layer


def keys(i: int, side: int, kernel: int, dilation: int) -> list[int]:
    """The keys of coordinate i on one axis."""
    grid = list(range(i % dilation, side, dilation))
    first = min(max(i // dilation - kernel // 2, 0), len(grid) - kernel)
    return grid[first : first + kernel]


def by_query(layer: NeighborhoodAttention2d, x: torch.Tensor, dilation: tuple[int, int]) -> torch.Tensor:
    """The definition, one query at a time."""
    b, height, width, _ = x.shape
    q, k, v = layer.qkv(x).unflatten(3, (3, layer.heads, -1)).unbind(3)
    out = torch.zeros_like(q)
    kernel = [min(layer.kernel, n) for n in (height, width)]
    for n, h, y, w in itertools.product(range(b), range(layer.heads), range(height), range(width)):
        logits, values = [], []
        for i in keys(y, height, kernel[0], dilation[0]):
            for j in keys(w, width, kernel[1], dilation[1]):
                logit = q[n, y, w, h] @ k[n, i, j, h] * q.shape[4] ** -0.5
                if layer.table is not None:
                    at = (i - y) // dilation[0] + layer.kernel - 1, (j - w) // dilation[1] + layer.kernel - 1
                    logit = logit + layer.table[h, at[0], at[1]]
                logits.append(logit)
                values.append(v[n, i, j, h])
        out[n, y, w, h] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return layer.proj(out.flatten(3))


@pytest.mark.parametrize(
    ("shape", "kernel", "dilation"),
    [
        ((2, 4, 5), 3, (1, 1)),
        ((1, 7, 9), 3, (2, 3)),
        ((1, 8, 6), 3, (1, 2)),
        ((1, 5, 5), 5, (1, 1)),
        ((1, 2, 4), 3, (1, 1)),
    ],
)
def test_it_is_the_definition_query_by_query(shape, kernel, dilation):
    layer, x = made(6, 2, kernel, dilation=dilation), image(*shape, 6)
    with torch.no_grad():
        expected = by_query(layer, x, dilation)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_the_bias_counts_key_minus_query():
    layer, x = made(6, 2, 3), image(1, 5, 5, 6)
    y = layer(x)
    with torch.no_grad():
        layer.table.copy_(layer.table.flip(1, 2))
    assert (layer(x) - y).abs().max() > 1e-3


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_every_query_has_k_squared_keys_of_its_residue(dilation):
    height, width, kernel = 11, 9, 3
    x = image(1, height, width, 4).requires_grad_()
    layer = made(4, 1, kernel, dilation=dilation)
    for y, w in ((0, 0), (5, 4), (10, 8), (3, 7)):
        layer.zero_grad()
        (grad,) = torch.autograd.grad(layer(x)[0, y, w].sum(), x)
        seen = (grad[0].abs().sum(2) > 0).nonzero().tolist()
        expected = itertools.product(keys(y, height, kernel, dilation), keys(w, width, kernel, dilation))
        assert sorted(map(tuple, seen)) == sorted(set(expected) | {(y, w)})
        assert len(seen) == kernel**2


def test_dilation_is_as_many_neighbourhoods_without_it():
    layer, near, x = made(6, 2, 3, dilation=2), made(6, 2, 3), image(2, 7, 8, 6)
    near.load_state_dict(layer.state_dict())
    y = layer(x)
    for a, b in itertools.product(range(2), repeat=2):
        torch.testing.assert_close(y[:, a::2, b::2], near(x[:, a::2, b::2]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dilation", [1, 2])
def test_it_is_attention_under_the_dilated_pattern(dilation):
    layer, x = made(6, 2, 3, dilation=dilation, relative_bias=False), image(2, 7, 8, 6)
    q, k, v = layer.qkv(x).flatten(1, 2).unflatten(2, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    out = fv.attention(q, k, v, Neighborhood((7, 8), 3, dilation=dilation))
    assert isinstance(out, torch.Tensor)
    expected = layer.proj(out.transpose(1, 2).flatten(2).unflatten(1, (7, 8)))
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_a_kernel_as_large_as_the_map_is_full_attention():
    layer, x = made(6, 2, 5, relative_bias=False), image(1, 5, 5, 6)
    q, k, v = layer.qkv(x).flatten(1, 2).unflatten(2, (3, 2, 3)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x).flatten(1, 2), layer.proj(out), atol=1e-12, rtol=0)


def test_the_widest_dilation_and_strides_and_gradients():
    wide, x = made(4, 2, 3, dilation="widest"), image(1, 4, 7, 10).permute(0, 3, 2, 1)
    fixed = made(4, 2, 3, dilation=(3, 2))
    torch.testing.assert_close(wide(x), fixed(x), atol=0, rtol=0)
    torch.testing.assert_close(wide(x), wide(x.contiguous()), atol=1e-14, rtol=0)
    x = x[:, :6, :4].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, _: wide(x), (x, wide.table))


@pytest.mark.parametrize("sr", [1, 2, 4])
def test_pooled_keys_are_means_along_the_sequence(sr):
    torch.manual_seed(0)
    layer, x = PooledKeyAttention(8, 2, sr=sr).double().train(), image(2, 5, 3, 8)
    flat = x.flatten(1, 2)
    few = flat
    if sr > 1:
        size = min(sr * sr, 15)
        few = torch.stack([flat[:, i * size : (i + 1) * size].mean(1) for i in range(15 // size)], 1)
        few = (few - few.mean((0, 1))) / (few.var((0, 1), correction=0) + 1e-5).sqrt()
    q, k, v = layer.q(flat), layer.k(few), layer.v(few)
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        heads.append((q[..., h] @ k[..., h].mT * 0.5).softmax(2) @ v[..., h])
    expected = layer.proj(torch.cat(heads, 2)).view_as(x)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_kan():
    torch.manual_seed(0)
    kan, x = FasterKAN((3, 5, 2)).double(), image(4, 3)
    knots = [-2 + 4 * g / 7 for g in range(8)]
    y = x
    for norm, part in zip(kan.norms, kan.maps, strict=True):
        u = norm(y)
        phi = [[1 - torch.tanh((u[:, i] - t) / 0.33) ** 2 for t in knots] for i in range(u.shape[1])]
        y = sum(part.weight[:, 8 * i + g] * phi[i][g][:, None] for i in range(u.shape[1]) for g in range(8))
    torch.testing.assert_close(kan(x), y, atol=1e-6, rtol=0)  # the knots are float32
    basis = kan.basis(torch.linspace(-3, 3, 100, dtype=torch.float64))
    assert (basis > 0).all()
    assert (basis <= 1).all()
    assert kan.basis(kan.knots.double()).diagonal().eq(1).all()
    same = kan(torch.zeros(6, 3).double())
    torch.testing.assert_close(same, same[:1].expand(6, 2), atol=1e-14, rtol=0)


def test_blocks():
    torch.manual_seed(0)
    block = MedViTLocalBlock(8, 16, stride=2, kernel=3, head_dim=8).double().eval()
    x = image(2, 8, 7, 9)
    e = block.embed(x)
    assert e.shape == (2, 16, 4, 5)
    a = e + block.attention((e / (1 + 1e-5) ** 0.5).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    n = a / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(block(x), a + n + block.feed(n), atol=1e-12, rtol=0)
    assert block.feed[2].reduce.out_channels == 3
    block = MedViTGlobalBlock(8, 32, sr=2, head_dim=8).double().eval()
    e = block.embed(x)
    a = e + block.attention((e / (1 + 1e-5) ** 0.5).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    b = block.projection(a)
    y = torch.cat([a, b + block.local(b)], 1)
    assert (a.shape[1], b.shape[1]) == (24, 8)
    y = y + block.kan((y / (1 + 1e-5) ** 0.5).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x), y, atol=1e-12, rtol=0)


def unused(dims: tuple[int, ...], depths: tuple[int, ...]) -> int:
    """Parameters of the feed-forwards that the released global blocks hold and do not use, and of their knots."""
    blocks = ((dims[1], 1), (dims[2], depths[2] // 3), (dims[3], depths[3]))
    total = 0
    for c, count in blocks:
        hidden = 2 * c
        squeeze = 2 * (2 * hidden) + 2 + hidden  # two hidden units, with biases
        convs = 2 * c * hidden + 9 * hidden
        total += count * (convs + 2 * (2 * hidden) + 2 * c + squeeze + 2 * 8)
    return total


@pytest.mark.parametrize(
    ("name", "dims", "depths", "millions"),
    [
        ("tiny", (64, 128, 192, 384), (2, 2, 6, 1), 11.72),
        ("small", (64, 128, 256, 512), (2, 2, 6, 2), 30.09),
        ("base", (96, 192, 384, 768), (2, 2, 6, 2), 67.00),
        ("large", (96, 256, 512, 1024), (2, 2, 6, 2), 118.29),
    ],
)
def test_parameter_counts(name, dims, depths, millions):
    with torch.device("meta"):
        model = getattr(vision, f"medvit_v2_{name}")()
    assert model.channels == dims
    assert round((vision.parameters_of(model) + unused(dims, depths)) / 1e6, 2) == millions


def test_maps_and_dilations():
    torch.manual_seed(0)
    options = {"kernel": 3, "head_dim": 8}
    net = MedViTV2((16, 32, 32, 32), (2, 2, 6, 1), **options, num_classes=4).eval()
    images = torch.randn(2, 3, 67, 50)
    assert [tuple(m.shape) for m in net.forward_features(images)] == [
        (2, 16, 17, 13), (2, 32, 9, 7), (2, 32, 5, 4), (2, 32, 3, 2)
    ]  # fmt: skip
    assert net(images).shape == (2, 4)
    layers = [m.dilation for m in net.modules() if isinstance(m, NeighborhoodAttention2d)]
    assert layers == [(1, 1), None, (1, 1), (1, 1), None, (1, 1), None]
    plain = MedViTV2((16, 32, 32, 32), (2, 2, 6, 1), **options, num_classes=4, dilation="release").eval()
    plain.load_state_dict(net.state_dict())
    assert (plain(images) - net(images)).abs().max() > 1e-6
    mixed = MedViTV2((16, 32, 32, 32), (2, 2, 6, 1), **options, num_classes=4, layout="release").eval()
    mixed.load_state_dict(net.state_dict())
    assert (mixed(images) - net(images)).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NeighborhoodAttention2d(8, 3), "heads must divide dim, got 3 for 8"),
        (lambda: NeighborhoodAttention2d(8, 2, 4), "kernel must be odd, got 4"),
        (lambda: NeighborhoodAttention2d(8, 2, dilation="wide"), "dilation 'wide'; accepted: 'widest'"),
        (lambda: NeighborhoodAttention2d(8, 2, 3, dilation=0), "dilation must be an int >= 1"),
        (
            lambda: NeighborhoodAttention2d(8, 2, 3, dilation=3)(torch.zeros(1, 9, 8, 8)),
            r"at least \(9, 9\) cells",
        ),
        (lambda: NeighborhoodAttention2d(8, 2)(torch.zeros(1, 9, 9, 4)), r"x must be \(B, H, W, 8\)"),
        (lambda: PooledKeyAttention(8, 3), "heads must divide dim and sr be >= 1, got 3 for 8 and 1"),
        (lambda: FasterKAN((4,)), r"at least two widths and one knot, got \(4,\) and 8"),
        (lambda: MedViTLocalBlock(8, 12, head_dim=8), "head_dim must divide out, got 8 for 12"),
        (
            lambda: MedViTGlobalBlock(8, 8, head_dim=8),
            "out must exceed 8, its three quarters in heads of 8, by a multiple",
        ),
        (lambda: MedViTV2((8, 8)), "dims and depths must be four each"),
        (lambda: MedViTV2(dilation="none"), "dilation 'none'; accepted: alternate, release"),
        (lambda: MedViTV2(layout="nchw"), "layout 'nchw'; accepted: map, release"),
    ],
)
def test_errors_name_the_argument(make, words):
    with pytest.raises(ValueError, match=words):
        make()
