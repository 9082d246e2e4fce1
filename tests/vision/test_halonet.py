"""Halo attention against its formula, its limits, and the parameter counts of the family."""

from __future__ import annotations

import itertools

import pytest
import torch

import foveate as fv
from foveate import vision
from foveate.patterns import Halo
from foveate.vision import HaloAttention, HaloBlock, HaloNet, HaloStage, WindowAttention

COUNTS = {
    "halonet_h0": 5_502_248,
    "halonet_h1": 8_101_352,
    "halonet_h2": 9_405_608,
    "halonet_h3": 11_842_792,
    "halonet_h4": 19_103_464,
    "halonet_h5": 30_718_952,
    "halonet_h6": 43_458_280,
    "halonet_h7": 67_434_728,
    "halonet26t": 12_480_288,
    "halonet50ts": 22_733_280,
    "sehalonet33ts": 13_691_712,
}


def made(*args, seed: int = 0, **kwargs) -> HaloAttention:
    torch.manual_seed(seed)
    return HaloAttention(*args, **kwargs).double().eval()


def image(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_query(layer: HaloAttention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula, one query at a time: results, and the weight that falls on cells of the image."""
    _, height, width, _ = x.shape
    heads, d, block, halo, win = layer.heads, layer.head_dim, layer.block, layer.halo, layer.window
    q = layer.q(x).unflatten(3, (heads, d))
    k, v = layer.kv(x).unflatten(3, (heads, -1)).split([d, layer.out // heads], 4)
    ys, xs = range(0, height, layer.step), range(0, width, layer.step)
    out = x.new_zeros(len(x), len(ys), len(xs), layer.out)
    mass = x.new_zeros(len(x), len(ys), len(xs), heads)
    for b, h, (i, y), (j, w) in itertools.product(range(len(x)), range(heads), enumerate(ys), enumerate(xs)):
        top, left = y // block * block, w // block * block
        iy, ix = y - top, w - left
        if layer.positions == "cells":
            iy, ix = iy // layer.step, ix // layer.step
        logits, values, real = [], [], []
        for ky, kx in itertools.product(range(win), range(win)):
            at = top - halo + ky, left - halo + kx
            inside = 0 <= at[0] < height and 0 <= at[1] < width
            if not inside and layer.edge == "mask":
                continue
            place = q[b, y, w, h] @ (layer.rows[win - 1 + ky - iy] + layer.columns[win - 1 + kx - ix])
            if layer.scale_positions:
                place = place * d**-0.5
            content = q[b, y, w, h] @ k[b, at[0], at[1], h] * d**-0.5 if inside else 0.0
            logits.append(content + place)
            values.append(v[b, at[0], at[1], h] if inside else torch.zeros_like(v[b, 0, 0, h]))
            real.append(float(inside))
        weights = torch.stack(logits).softmax(0)
        out[b, i, j].view(heads, -1)[h] = weights @ torch.stack(values)
        mass[b, i, j, h] = weights @ weights.new_tensor(real)
    return out, mass


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 6, 3, 6), {"block": 3, "halo": 1}),
        ((1, 7, 5, 6), {"block": 3, "halo": 2, "edge": "mask"}),
        ((1, 7, 5, 6), {"block": 4, "halo": 1, "scale_positions": True}),
        ((1, 7, 10, 6), {"block": 4, "halo": 1, "stride": 2}),
        ((1, 8, 8, 6), {"block": 4, "halo": 1, "stride": 2, "positions": "cells"}),
        ((1, 2, 3, 6), {"block": 4, "halo": 1, "head_dim": 5, "out": 8}),
    ],
)
def test_it_is_the_formula_query_by_query(shape, options):
    layer, x = made(6, 2, **options), image(*shape)
    expected, _ = by_query(layer, x)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_blocks_that_the_stride_does_not_divide_are_averaged():
    layer, x = made(6, 2, block=3, halo=1, stride=2), image(1, 9, 5, 6)
    full, _ = by_query(layer, x)
    means = [[full[:, y : y + 2, w : w + 2].mean((1, 2)) for w in range(0, 5, 2)] for y in range(0, 9, 2)]
    expected = torch.stack([torch.stack(row, 1) for row in means], 1)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=0)


def test_without_halo_and_positions_it_is_window_attention():
    layer, x = made(8, 2, block=4, halo=0), image(2, 8, 12, 8)
    windows = WindowAttention(8, 2, 4, bias=False, relative_bias=False).double()
    with torch.no_grad():
        layer.rows.zero_()
        layer.columns.zero_()
        k, v = layer.kv.weight.unflatten(0, (2, 8)).split(4, 1)
        windows.qkv.weight.copy_(torch.cat([layer.q.weight, k.flatten(0, 1), v.flatten(0, 1)]))
        windows.proj.weight.copy_(torch.eye(8))
        windows.proj.bias.zero_()
    torch.testing.assert_close(layer(x), windows(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("shape", "block", "halo"), [((5, 7), 3, 1), ((6, 6), 6, 0), ((4, 5), 2, 9)])
def test_without_positions_it_is_attention_under_the_pattern(shape, block, halo):
    layer, x = made(8, 2, block=block, halo=halo, edge="mask"), image(2, *shape, 8)
    with torch.no_grad():
        layer.rows.zero_()
        layer.columns.zero_()
    q = layer.q(x).flatten(1, 2).unflatten(2, (2, 4)).transpose(1, 2)
    k, v = layer.kv(x).flatten(1, 2).unflatten(2, (2, 8)).transpose(1, 2).split(4, 3)
    pattern = Halo(shape, block, halo)
    seen = fv.attention(q, k, v, pattern)
    assert isinstance(seen, torch.Tensor)
    seen = seen.transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), seen, atol=1e-12, rtol=0)
    if block + halo > max(shape):
        assert pattern.layout(shape[0] * shape[1]).area == (shape[0] * shape[1]) ** 2


@pytest.mark.parametrize(
    ("shape", "block", "halo"), [((7,), 3, 1), ((5, 7), (2, 3), (1, 0)), ((3, 4, 2), 2, 1)]
)
def test_the_pattern_is_its_formula(shape, block, halo):
    dense = Halo(shape, block, halo).layout(int(torch.tensor(shape).prod())).to_dense()[0, 0]
    cells = list(itertools.product(*map(range, shape)))
    blocks = block if isinstance(block, tuple) else (block,) * len(shape)
    halos = halo if isinstance(halo, tuple) else (halo,) * len(shape)
    for i, query in enumerate(cells):
        for j, key in enumerate(cells):
            axes = zip(query, key, blocks, halos, strict=True)
            assert dense[i, j] == all(y // b * b - h <= t < y // b * b + b + h for y, t, b, h in axes)


def test_the_weight_on_cells_of_the_image():
    x = image(1, 8, 8, 6)
    for edge in ("zero", "mask"):
        layer = made(6, 2, block=4, halo=1, edge=edge)
        _, mass = by_query(layer, x)
        constant = by_constant_values(layer, x)
        torch.testing.assert_close(constant, mass, atol=1e-12, rtol=0)
        if edge == "mask":
            torch.testing.assert_close(constant, torch.ones_like(constant), atol=1e-12, rtol=0)
        else:  # every block of this image reaches over its border
            assert (constant < 1 - 1e-6).all()


def by_constant_values(layer: HaloAttention, x: torch.Tensor) -> torch.Tensor:
    """What comes out when every cell has the value 1: (B, H, W, heads)."""
    ones = torch.cat([x, torch.ones_like(x[..., :1])], 3)
    wider = HaloAttention(
        layer.dim + 1, layer.heads, out=layer.heads, head_dim=layer.head_dim, block=layer.block, halo=layer.halo,
        edge=layer.edge,
    ).double()  # fmt: skip
    with torch.no_grad():
        wider.rows.copy_(layer.rows)
        wider.columns.copy_(layer.columns)
        wider.q.weight.zero_()[:, : layer.dim] = layer.q.weight
        keys = layer.kv.weight.unflatten(0, (layer.heads, -1))[:, : layer.head_dim]
        weight = wider.kv.weight.zero_().unflatten(0, (layer.heads, -1))
        weight[:, : layer.head_dim, : layer.dim] = keys
        weight[:, layer.head_dim, layer.dim] = 1
    return wider(ones)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_reach_just_the_window(stride):
    layer, x = made(6, 2, block=4, halo=1, stride=stride), image(1, 12, 12, 6).requires_grad_()
    y, w = 4 // stride, 7 // stride  # in the middle block, rows and columns 4 .. 7
    layer(x)[0, y, w].sum().backward()
    assert x.grad is not None
    touched = x.grad[0].abs().sum(2) > 0
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[3:9, 3:9] = True
    assert (touched == expected).all()


def test_shifts_by_a_block_and_by_less():
    layer, x = made(6, 2, block=4, halo=2), image(1, 24, 24, 6)
    y = layer(x)
    for shift in (4, 1):
        moved = layer(x.roll(shift, 2)).roll(-shift, 2)
        apart = (moved - y)[:, :, 8:16].abs().max()  # away from the borders
        assert apart < 1e-12 if shift == 4 else apart > 1e-3


def test_strides_and_gradients():
    layer = made(4, 2, block=2, halo=1)
    x = image(2, 4, 3, 5).permute(0, 3, 2, 1)  # (2, 5, 3, 4), not contiguous
    torch.testing.assert_close(layer(x), layer(x.contiguous()), atol=0, rtol=0)
    x = x[:1, :3].detach().requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = getattr(vision, name)()
    assert vision.parameters_of(model) == count
    assert model.strides == (4, 8, 16, 32)


def test_maps_and_head():
    stages = (
        HaloStage("a", 8, 16, 12, stride=1, heads=2, block=4, halo=1),
        HaloStage("ca", 8, 24, heads=4, block=3, halo=1),
    )
    torch.manual_seed(0)
    net = HaloNet(
        stages, stem="tiered", pool=False, width=20, squeeze=True, num_classes=3, drop_path=0.1
    ).eval()
    images = torch.randn(2, 3, 37, 41)
    maps = net.forward_features(images)
    assert [tuple(m.shape) for m in maps] == [(2, 16, 10, 11), (2, 24, 5, 6)]
    assert net(images).shape == (2, 3)
    only = HaloNet(stages, stem="tiered", pool=False, squeeze=True, features_only=True).eval()
    only.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith(("head", "final"))})
    for a, b in zip(only(images), maps, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_a_block_is_a_bottleneck():
    torch.manual_seed(0)
    stage = HaloStage("a", 8, 12, 16, heads=2, block=2, halo=1)
    block = HaloBlock(6, stage, "a", stride=2).double().train()
    with torch.no_grad():
        block.conv3.norm.weight.fill_(1)
    x = image(2, 6, 6, 4)
    act = torch.nn.functional.silu

    def norm(z):  # batch norm in train mode with weights 1 and 0
        z = z - z.mean((0, 2, 3), keepdim=True)
        return z / (z.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()

    def conv(part, z, stride=1):
        return torch.einsum("oi,bihw->bohw", part.conv.weight[:, :, 0, 0], z[:, :, ::stride, ::stride])

    y = act(norm(conv(block.conv1, x)))
    y = act(norm(block.attention(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))
    expected = act(norm(conv(block.shortcut, x, 2)) + norm(conv(block.conv3, y)))
    torch.testing.assert_close(block(x), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HaloAttention(8, 3), "HaloAttention: heads must divide out, got 3 for 8"),
        (lambda: HaloAttention(8, 2, block=0), "block must be >= 1 and halo >= 0, got 0 and 3"),
        (lambda: HaloAttention(8, 2, stride=3), "stride must be 1 or 2, got 3"),
        (lambda: HaloAttention(8, 2, edge="wrap"), "edge 'wrap'; accepted: zero, mask"),
        (lambda: HaloAttention(8, 2, positions="none"), "positions 'none'; accepted: pixels, cells"),
        (lambda: HaloAttention(8, 2)(torch.zeros(2, 8, 8)), r"x must be \(B, H, W, 8\), got \(2, 8, 8\)"),
        (lambda: HaloStage("ab", 8, 8), "kinds must be letters a and c, one per block, got 'ab'"),
        (lambda: HaloNet([], stem="5x5"), "stem '5x5'; accepted: 7x7, tiered"),
        (lambda: HaloNet([], pool=False), "pool must be True with stem '7x7'"),
        (lambda: Halo(4, 5, 1), "Halo: block must be an int"),
    ],
)
def test_errors_name_the_argument(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("edge", ["zero", "mask"])
def test_float32_and_its_gradients(edge):
    wide = made(16, 2, block=4, halo=2, edge=edge)
    layer = HaloAttention(16, 2, block=4, halo=2, edge=edge)
    layer.load_state_dict({name: value.float() for name, value in wide.state_dict().items()})
    x = image(2, 9, 7, 16)
    for one, z in ((wide, x), (layer, x.float())):
        one(z).square().sum().backward()
    for (name, a), b in zip(layer.named_parameters(), wide.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-4, rtol=1e-4, msg=name)
