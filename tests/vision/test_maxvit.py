"""MaxViT: windows and grids against loops over the formula, what a block sees, the published sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import foveate as fv
from foveate.patterns import Grid, Windows
from foveate.vision import BlockAttention, GridAttention, MaxViT, MaxViTBlock, MBConv, multiply_adds

BOTH = [BlockAttention, GridAttention]


def place(kind, t: int, n: int, size: int) -> tuple[int, int]:
    """(group, coordinate within it) of cell t of an axis of n, from the entry's formulas."""
    if kind is BlockAttention:
        return t // size, t % size
    step = math.ceil(n / size)
    return t % step, t // step


def by_loops(layer, x):
    """softmax(q k^T / sqrt(d) + b) v among the tokens with equal labels, one query at a time."""
    kind, (batch, h, w, _), (rows, columns) = type(layer), x.shape, layer.size
    qkv = F.linear(x, layer.qkv.weight, layer.qkv.bias).view(batch, h, w, 3, layer.heads, -1)
    table = layer.position.table.view(2 * rows - 1, 2 * columns - 1, layer.heads)
    cells = [(y, z) for y in range(h) for z in range(w)]
    label = {}
    for y, z in cells:
        (gy, cy), (gz, cz) = place(kind, y, h, rows), place(kind, z, w, columns)
        label[y, z] = (gy, gz), (cy, cz)
    out = torch.empty_like(x)
    for b in range(batch):
        for y, z in cells:
            group, at = label[y, z]
            keys = [cell for cell in cells if label[cell][0] == group]
            parts = []
            for head in range(layer.heads):
                q = qkv[b, y, z, 0, head]
                logits = torch.stack(
                    [
                        q @ qkv[b, i, j, 1, head] / math.sqrt(len(q))
                        + table[
                            at[0] - label[i, j][1][0] + rows - 1,
                            at[1] - label[i, j][1][1] + columns - 1,
                            head,
                        ]
                        for i, j in keys
                    ]
                )
                values = torch.stack([qkv[b, i, j, 2, head] for i, j in keys])
                parts.append(logits.softmax(0) @ values)
            out[b, y, z] = F.linear(torch.cat(parts), layer.proj.weight, layer.proj.bias)
    return out


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(("shape", "size"), [((4, 6), 2), ((6, 6), (3, 2)), ((5, 7), 3), ((2, 3), 4)])
def test_it_is_the_formula_on_any_map(kind, shape, size):
    """Also where the size does not divide the map, or is larger than it."""
    torch.manual_seed(0)
    layer = kind(8, 2, size=size).double()
    torch.nn.init.normal_(layer.position.table)
    x = torch.randn(2, *shape, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_loops(layer, x), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kind", "pattern"), [(BlockAttention, Windows), (GridAttention, Grid)])
@pytest.mark.parametrize("shape", [(8, 8), (12, 4)])
def test_the_set_of_pairs_is_the_patterns(kind, pattern, shape):
    torch.manual_seed(1)
    layer = kind(16, 2, size=4, relative_bias=False).double()
    x = torch.randn(2, *shape, 16, dtype=torch.float64)
    q, k, v = layer.qkv(x).flatten(1, 2).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    out = fv.attention(q, k, v, pattern(shape, 4), engine="reference").transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), layer.proj(out), atol=1e-12, rtol=0)


def seen(forward, x, cell):
    """bool (H, W): inputs with a gradient from the outputs of one cell."""
    x = x.clone().requires_grad_()
    forward(x)[0, cell[0], cell[1]].square().sum().backward()
    return x.grad[0].abs().sum(2) > 0


def test_a_grid_of_four_on_eight_cells_sees_every_other_one():
    layer = GridAttention(8, 1, size=4)
    where = seen(layer, torch.randn(1, 8, 8, 8), (0, 0)).nonzero()
    assert where.unique().tolist() == [0, 2, 4, 6]
    assert len(where) == 16


@pytest.mark.parametrize("cell", [(0, 0), (3, 8), (11, 5)])
def test_window_and_grid_together_see_all_and_neither_alone_does(cell):
    torch.manual_seed(2)
    near, far = BlockAttention(8, 1, size=4), GridAttention(8, 1, size=3)  # 3 * 4 = 12 cells a side
    x = torch.randn(1, 12, 12, 8)
    assert seen(lambda t: far(near(t)), x, cell).all()
    assert seen(lambda t: near(far(t)), x, cell).all()
    assert seen(lambda t: near(near(t)), x, cell).sum() == 16
    assert seen(lambda t: far(far(t)), x, cell).sum() == 9


@pytest.mark.parametrize("kind", BOTH)
def test_a_group_as_large_as_the_map_is_full_attention(kind):
    torch.manual_seed(3)
    layer = kind(16, 2, size=5).double()
    x = torch.randn(2, 5, 5, 16, dtype=torch.float64)
    q, k, v = layer.qkv(x).flatten(1, 2).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    full = F.scaled_dot_product_attention(q, k, v, attn_mask=layer.position())
    want = layer.proj(full.transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(layer(x), want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", BOTH)
def test_a_group_of_one_mixes_nothing(kind):
    layer, x = kind(8, 2, size=1), torch.randn(2, 5, 7, 8)
    want = layer.proj(layer.qkv(x)[..., 16:])
    torch.testing.assert_close(layer(x), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", BOTH)
def test_strides_and_gradients(kind):
    torch.manual_seed(4)
    layer = kind(4, 2, size=2).double()
    x = torch.randn(1, 4, 5, 3, dtype=torch.float64).permute(0, 2, 3, 1)  # (1, 5, 3, 4), not contiguous
    torch.testing.assert_close(layer(x), layer(x.contiguous()), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(layer, (x.contiguous().requires_grad_(),))
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize(("stride", "shape"), [(1, (5, 6)), (2, (8, 6)), (2, (5, 7))])
def test_the_convolution_block_step_by_step(stride, shape):
    """An even side is padded by a zero at its end only, an odd one at both; the shortcut takes means of real pixels."""
    torch.manual_seed(5)
    c = 6 if stride == 1 else 4
    block = MBConv(c, 6, stride=stride).double().eval()
    for norm in (block.norm0, block.norm1, block.norm2):
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, c, *shape, dtype=torch.float64)

    def norm(t, n):
        scale = n.weight / (n.running_var + 1e-3).sqrt()
        return (t - n.running_mean[:, None, None]) * scale[:, None, None] + n.bias[:, None, None]

    gelu = lambda t: 0.5 * t * (1 + torch.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3)))  # noqa: E731
    y = gelu(norm(F.conv2d(norm(x, block.norm0), block.conv1.weight), block.norm1))
    h, w = shape
    ends = (0, 1, 0, 1) if stride == 2 and h % 2 == 0 else (1, 1, 1, 1)
    y = gelu(norm(F.conv2d(F.pad(y, ends), block.conv2.weight, None, stride, groups=24), block.norm2))
    gate = block.squeeze
    means = y.mean((2, 3))
    inner = F.silu(F.linear(means, gate.reduce.weight[..., 0, 0], gate.reduce.bias))
    assert inner.shape == (2, 1)  # a quarter of 6, cut off
    y = y * F.linear(inner, gate.expand.weight[..., 0, 0], gate.expand.bias).sigmoid()[:, :, None, None]
    y = F.conv2d(y, block.conv3.weight, block.conv3.bias)
    kept = x
    if stride == 2:
        rows = [x[:, :, i : i + 2].mean(2) for i in range(0, h, 2)]
        kept = torch.stack(rows, 2)
        kept = torch.stack([kept[..., i : i + 2].mean(3) for i in range(0, w, 2)], 3)
        kept = F.conv2d(kept, block.shortcut.weight, block.shortcut.bias)
    torch.testing.assert_close(block(x), y + kept, atol=1e-12, rtol=0)


def test_a_block_is_convolution_then_windows_then_grid_each_with_its_mlp():
    torch.manual_seed(6)
    block = MaxViTBlock(8, 16, heads=2, stride=2, partition=2).eval()
    x = torch.randn(2, 8, 7, 8)
    y = block.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    for part, kind in ((block.block, BlockAttention), (block.grid, GridAttention)):
        assert isinstance(part.attention, kind)
        y = y + part.attention(part.norm1(y))
        y = y + part.mlp(part.norm2(y))
    torch.testing.assert_close(block(x), y)
    assert y.shape == (2, 4, 4, 16)


SIZES = [
    (fv.vision.maxvit_tiny, 224, 30_916_528),
    (fv.vision.maxvit_small, 224, 68_927_956),
    (fv.vision.maxvit_base, 224, 119_467_708),
    (fv.vision.maxvit_large, 224, 211_785_560),
    (fv.vision.maxvit_xlarge, 384, 475_323_472),
    (fv.vision.maxvit_tiny, 384, 30_977_008),
]


@pytest.mark.parametrize(("make", "side", "parameters"), SIZES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_as_many_parameters_as_published(make, side, parameters):
    with torch.device("meta"):
        model = make(img_size=side)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_multiply_adds_as_published():
    with torch.device("meta"):
        model = fv.vision.maxvit_tiny()
    assert multiply_adds(model) / 1e9 == pytest.approx(5.6, rel=0.01)


def tiny(**options):
    torch.manual_seed(7)
    return MaxViT(8, (8, 16), (1, 2), partition=2, head_dim=8, **options).eval()


@pytest.mark.parametrize("shape", [(32, 32), (31, 37), (17, 8)])
def test_maps_of_any_image(shape):
    model = tiny(num_classes=3)
    maps = model.forward_features(torch.randn(2, 3, *shape))
    for found, width, stride in zip(maps, model.channels, model.strides, strict=True):
        assert found.shape == (2, width, *(math.ceil(n / stride) for n in shape))
    assert model(torch.randn(2, 3, *shape)).shape == (2, 3)


def test_heads():
    images = torch.randn(2, 3, 24, 16)
    model = tiny(num_classes=5)
    pooled = model.norm(model.forward_features(images)[-1].mean((2, 3)))
    torch.testing.assert_close(model(images), model.head(model.hidden(pooled).tanh()))
    assert tiny(num_classes=0)(images).shape == (2, 16)
    bare = tiny(features_only=True)
    assert not any(name.startswith(("norm", "head", "hidden")) for name, _ in bare.named_parameters())
    bare.load_state_dict(model.state_dict(), strict=False)
    maps = bare(images)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 6, 4), (2, 16, 3, 2)]
    torch.testing.assert_close(maps[1], model.forward_features(images)[1])


def test_where_it_starts():
    torch.manual_seed(8)
    block = MaxViTBlock(32, 64, stride=2)
    table = torch.cat([block.block.attention.position.table, block.grid.attention.position.table])
    assert 0.015 < table.std() < 0.025
    assert table.abs().max() > 0.041  # not cut off
    model = tiny()
    assert not any(
        p.any() for name, p in model.named_parameters() if name.endswith(("proj.bias", "conv3.bias"))
    )


def test_names_of_timm():
    timm = {
        "stem.conv1.bias": "stem1.bias",
        "stem.norm1.running_mean": "stem_norm.running_mean",
        "stem.conv2.weight": "stem2.weight",
        "stages.0.blocks.0.conv.pre_norm.weight": "stages.0.0.conv.norm0.weight",
        "stages.0.blocks.0.conv.norm1.weight": "stages.0.0.conv.norm1.weight",
        "stages.1.blocks.0.conv.shortcut.expand.bias": "stages.1.0.conv.shortcut.bias",
        "stages.1.blocks.1.conv.conv1_1x1.weight": "stages.1.1.conv.conv1.weight",
        "stages.1.blocks.1.conv.conv2_kxk.weight": "stages.1.1.conv.conv2.weight",
        "stages.1.blocks.1.conv.se.fc2.bias": "stages.1.1.conv.squeeze.expand.bias",
        "stages.1.blocks.1.attn_block.attn.qkv.weight": "stages.1.1.block.attention.qkv.weight",
        "stages.1.blocks.1.attn_grid.mlp.fc1.weight": "stages.1.1.grid.mlp.fc1.weight",
        "head.pre_logits.fc.weight": "hidden.weight",
        "head.norm.bias": "norm.bias",
        "head.fc.weight": "head.weight",
    }
    assert list(fv.vision.maxvit_from_timm(dict.fromkeys(timm, torch.zeros(1)))) == list(timm.values())
    assert set(timm.values()) <= set(tiny().state_dict())
    name = "stages.0.blocks.0.attn_grid.attn.rel_pos.relative_position_bias_table"
    table = torch.randn(2, 5, 3)  # heads, rows, columns: by the key's place less the query's
    found = fv.vision.maxvit_from_timm({name: table})["stages.0.0.grid.attention.position.table"]
    assert found.view(5, 3, 2)[4, 0].tolist() == table[:, 0, 2].tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GridAttention(10, 3), "GridAttention: dim must be a multiple of heads, got 10 and 3"),
        (lambda: BlockAttention(8, 1, size=0), "BlockAttention: size must be an int >= 1"),
        (lambda: GridAttention(8, 1)(torch.zeros(2, 5, 8)), r"GridAttention: x must be \(B, H, W, 8\)"),
        (lambda: MBConv(8, 16), "MBConv: stride must be 2, or 1 with dim_out = dim_in, got 1 with 8 and 16"),
        (lambda: MBConv(8, 8, stride=3), "MBConv: stride must be 2"),
        (lambda: MaxViTBlock(8, 40, stride=2), "MaxViTBlock: dim_out must be a multiple of 32 without heads"),
        (lambda: MaxViT(8, (8,), (1, 2)), "MaxViT: dims and depths must be as many"),
        (lambda: MaxViT(8, (40,), (1,)), "MaxViT: dims must be multiples of head_dim"),
        (lambda: fv.vision.maxvit_tiny(img_size=100), "maxvit: img_size must be multiples of 32, got 100"),
        (lambda: tiny()(torch.zeros(1, 4, 32, 32)), "MaxViT: images must be"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
