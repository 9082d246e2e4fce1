"""CrossFormer: strided groups against loops over the predicate, the bias by offset, the published sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import foveate as fv
from foveate.patterns import Grid
from foveate.vision import (
    CrossFormer,
    CrossFormerBlock,
    CrossScaleEmbed,
    DynamicPositionBias,
    GridAttention,
    LSDAttention,
    multiply_adds,
)


def by_mask(layer, x, group, interval):
    """Full attention over the whole map, masked by the predicate; the bias from floor-divided places."""
    batch, h, w, c = x.shape
    y, z = (t.flatten() for t in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    allowed = torch.ones(h * w, h * w, dtype=torch.bool)
    offsets = []
    for t in (y, z):
        tile, phase = t // (group * interval), t % interval
        allowed &= (tile[:, None] == tile) & (phase[:, None] == phase)
        local = t % (group * interval) // interval
        offsets.append(local[:, None] - local)  # query less key
    bias = (
        layer.position(torch.stack(offsets, -1).flatten(0, 1).to(x)).view(h * w, h * w, -1).permute(2, 0, 1)
    )
    q, k, v = (
        F.linear(x, layer.qkv.weight, layer.qkv.bias)
        .view(batch, h * w, 3, layer.heads, -1)
        .permute(2, 0, 3, 1, 4)
    )
    logits = q @ k.mT / math.sqrt(c / layer.heads) + bias
    out = logits.masked_fill(~allowed, -math.inf).softmax(-1) @ v
    return F.linear(out.transpose(1, 2).reshape(x.shape), layer.proj.weight, layer.proj.bias)


def made(group, interval, dim=16, heads=2):
    """A layer in float64 whose bias matters."""
    torch.manual_seed(0)
    layer = LSDAttention(dim, heads, group=group, interval=interval, hidden=4).double()
    for p in layer.position.parameters():
        torch.nn.init.normal_(p)
    return layer


@pytest.mark.parametrize(
    ("shape", "group", "interval"),
    [
        ((14, 14), 7, 2),  # one tile
        ((12, 18), 3, 2),  # tiles of 6 x 6
        ((8, 12), 4, 1),  # windows
        ((11, 13), 3, 2),  # prime sides: a part of the last tiles
        ((7, 20), 5, 4),  # rows that a group cannot fill
    ],
)
def test_it_is_full_attention_under_the_predicate(shape, group, interval):
    layer = made(group, interval)
    x = torch.randn(2, *shape, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_mask(layer, x, group, interval), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("shape", "side"), [((5, 13), 5), ((7, 7), 7), ((1, 3), 1)])
def test_on_a_map_no_larger_than_a_group_it_attends_in_windows_of_the_shorter_side(shape, side):
    layer = made(7, 3)
    x = torch.randn(2, *shape, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_mask(layer, x, side, 1), atol=1e-12, rtol=0)


def test_with_one_tile_it_is_grid_attention_and_with_more_it_is_not():
    layer = made(4, 3)
    grid = GridAttention(16, 2, size=4).double()
    grid.load_state_dict(
        {**grid.state_dict(), **{k: v for k, v in layer.state_dict().items() if "position" not in k}}
    )
    offsets = torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-3, 4)).double()
    grid.position.table.data = layer.position(offsets)
    x = torch.randn(1, 12, 12, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), grid(x), atol=1e-12, rtol=0)
    x = torch.randn(1, 24, 24, 16, dtype=torch.float64)
    assert (layer(x) - grid(x)).abs().max() > 1e-3


def test_without_bias_it_is_attention_under_the_pattern_grid():
    layer = LSDAttention(16, 2, group=4, interval=2, position=False).double()
    x = torch.randn(2, 8, 8, 16, dtype=torch.float64)
    q, k, v = layer.qkv(x).flatten(1, 2).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    out = fv.attention(q, k, v, Grid((8, 8), 4), engine="reference").transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), layer.proj(out), atol=1e-12, rtol=0)


def test_the_interval_one_is_windows_bit_for_bit():
    layer, x = made(4, 1), torch.randn(2, 8, 12, 16, dtype=torch.float64)
    cells = fv.vision.windows.partition(x, 4)  # each window as a map of its own
    alone = layer(cells.view(-1, 4, 4, 16))
    assert torch.equal(fv.vision.windows.partition(layer(x), 4), alone.flatten(1, 2))


def test_padding_reaches_nothing(monkeypatch):
    """Whatever stands beyond the map: the result is the same."""
    layer, x = made(3, 2), torch.randn(1, 7, 8, 16, dtype=torch.float64)
    want = layer(x)
    pad = fv.vision.windows.pad_to

    def dirty(t, multiple):
        out = pad(t, multiple).clone()
        if t.shape[3] == 16:
            out[:, t.shape[1] :], out[:, :, t.shape[2] :] = 1e3, -1e3
        return out

    monkeypatch.setattr(fv.vision.windows, "pad_to", dirty)
    assert torch.equal(layer(x), want)


def test_bias_is_the_mlp_by_hand_and_the_same_for_larger_groups():
    torch.manual_seed(1)
    bias = DynamicPositionBias(64, 3).double()
    assert [tuple(p.shape) for p in bias.parameters()][:2] == [(4, 2), (4,)]  # C / 16
    p = 4
    assert sum(t.numel() for t in bias.parameters()) == 2 * p * p + 11 * p + 3 * p + 3  # the entry's formula
    offset = torch.tensor([2.0, -1.0], dtype=torch.float64)
    x = bias.first.weight @ offset + bias.first.bias
    for linear in bias.maps:
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        x = linear.weight @ x.clamp(min=0) + linear.bias
    torch.testing.assert_close(bias(offset[None])[0], x, atol=1e-12, rtol=0)
    small, large = bias.table((7, 7)), bias.table((9, 9)).view(3, 9, 9, 9, 9)
    torch.testing.assert_close(large[:, :7, :7, :7, :7].reshape(3, 49, 49), small, atol=1e-14, rtol=0)
    assert torch.equal(
        bias.table((3, 5))[:, 13, 1], bias.table((3, 5))[:, 14, 2]
    )  # (2, 3) to (0, 1), (2, 4) to (0, 2)
    torch.testing.assert_close(bias.table((3, 5))[:, 13, 4], x)  # (2, 3) reads (0, 4): offset (2, -1)


def test_residual_bias():
    bias = DynamicPositionBias(32, 2, hidden=3, residual=True)
    x = bias.first(torch.tensor([[1.0, 2.0]]))
    for norm, linear in zip(bias.norms[:2], bias.maps[:2], strict=True):
        x = x + linear(F.relu(norm(x)))
    want = bias.maps[2](F.relu(bias.norms[2](x)))
    torch.testing.assert_close(bias(torch.tensor([[1.0, 2.0]])), want)


def test_embedding_is_convolutions_side_by_side():
    torch.manual_seed(2)
    embed = CrossScaleEmbed(3, 16).double()
    assert [c.out_channels for c in embed.convs] == [8, 4, 2, 2]
    x = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    got, at = embed(x), 0
    for conv, kernel in zip(embed.convs, (4, 8, 16, 32), strict=True):
        wide = F.pad(x, (kernel,) * 4)
        for i, j in ((0, 0), (2, 3), (3, 5)):
            top, left = (kernel + 4 * t - (kernel - 4) // 2 for t in (i, j))
            patch = wide[0, :, top : top + kernel, left : left + kernel]
            want = (conv.weight * patch).sum((1, 2, 3)) + conv.bias
            torch.testing.assert_close(got[0, at : at + len(want), i, j], want, atol=1e-12, rtol=0)
        at += conv.out_channels
    assert [c.out_channels for c in CrossScaleEmbed(16, 32, kernels=(2, 4), stride=2).convs] == [16, 16]
    assert CrossScaleEmbed(3, 16)(torch.randn(1, 3, 17, 3)).shape == (1, 16, 5, 1)


def test_strides_and_gradients():
    layer = made(2, 2, dim=4)
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64).permute(0, 2, 3, 1)  # (1, 5, 6, 4), not contiguous
    torch.testing.assert_close(layer(x), layer(x.contiguous()), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(layer, (x.contiguous().requires_grad_(),))


def test_a_block_with_cooling_ends_with_convolution_and_norm():
    torch.manual_seed(3)
    block, x = CrossFormerBlock(16, 2, group=2, interval=2, convolution=True).eval(), torch.randn(2, 5, 8, 16)
    y = x + block.attention(block.norm1(x))
    y = y + block.mlp(block.norm2(y))
    y = F.conv2d(y.permute(0, 3, 1, 2), block.conv.weight, block.conv.bias, padding=1, groups=16).permute(
        0, 2, 3, 1
    )
    torch.testing.assert_close(block(x), block.conv_norm(y))


SIZES = [
    (fv.vision.crossformer_tiny, 27_776_794, 2.9),
    (fv.vision.crossformer_small, 30_657_394, 4.9),
    (fv.vision.crossformer_base, 51_971_554, 9.2),
    (fv.vision.crossformer_large, 91_971_184, 16.1),
    (fv.vision.crossformer_pp_small, 23_325_340, None),
]


@pytest.mark.parametrize(("make", "parameters", "giga"), SIZES, ids=lambda v: getattr(v, "__name__", None))
def test_as_many_parameters_and_multiply_adds_as_published(make, parameters, giga):
    with torch.device("meta"):
        model = make()
    assert sum(p.numel() for p in model.parameters()) == parameters
    if giga in (4.9, 16.1):
        assert multiply_adds(model) / 1e9 == pytest.approx(giga, rel=0.01)


def test_blocks_alternate_and_every_third_cools():
    with torch.device("meta"):
        model = fv.vision.crossformer_pp_small()
    blocks = list(model.stages[2])
    assert [b.attention.interval for b in model.stages[0]] == [1, 4]
    assert [b.attention.group for b in blocks] == [14] * 18
    assert [i for i, b in enumerate(blocks) if b.conv is not None] == [2, 5, 8, 11, 14]  # not 17, the last
    with torch.device("meta"):
        model = fv.vision.crossformer_tiny()
    assert [b.attention.interval for b in model.stages[2]] == [1, 2] * 4
    rates = [b.drop.rate for stage in model.stages for b in stage]
    assert rates == pytest.approx([0.1 * i / 15 for i in range(16)])


def tiny(**options):
    torch.manual_seed(4)
    return CrossFormer(16, (1, 2), (1, 2), group=3, interval=(2, 2), **options).eval()


@pytest.mark.parametrize("shape", [(32, 64), (31, 37), (8, 5)])
def test_maps_of_any_image(shape):
    model = tiny(num_classes=3)
    images = torch.randn(2, 3, *shape)
    maps = model.forward_features(images)
    want = [tuple(math.ceil(n / s) for n in shape) for s in (4, 8)]
    assert [tuple(m.shape) for m in maps] == [(2, 16, *want[0]), (2, 32, *want[1])]
    logits = model.head(model.norm(maps[-1].permute(0, 2, 3, 1)).mean((1, 2)))
    torch.testing.assert_close(model(images), logits)


def test_a_norm_follows_the_first_embedding_and_goes_before_the_others():
    model, images = tiny(), torch.randn(1, 3, 24, 16)
    first, second = model.forward_features(images)
    x = model.stages[0](model.norms[0](model.embeds[0](images).permute(0, 2, 3, 1)))
    torch.testing.assert_close(first, x.permute(0, 3, 1, 2))
    x = model.stages[1](model.embeds[1](model.norms[1](x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    torch.testing.assert_close(second, x.permute(0, 3, 1, 2))


def test_names_of_the_released_code():
    released = {
        "patch_embed.projs.3.weight": "embeds.0.convs.3.weight",
        "patch_embed.norm.bias": "norms.0.bias",
        "layers.0.downsample.norm.bias": "norms.1.bias",
        "layers.0.downsample.reductions.1.weight": "embeds.1.convs.1.weight",
        "layers.1.blocks.1.attn.qkv.weight": "stages.1.1.attention.qkv.weight",
        "layers.1.blocks.1.attn.pos.pos_proj.weight": "stages.1.1.attention.position.first.weight",
        "layers.1.blocks.1.attn.pos.pos2.0.weight": "stages.1.1.attention.position.norms.1.weight",
        "layers.1.blocks.1.attn.pos.pos3.2.bias": "stages.1.1.attention.position.maps.2.bias",
        "layers.1.blocks.0.mlp.fc2.weight": "stages.1.0.mlp.fc2.weight",
        "norm.weight": "norm.weight",
        "head.bias": "head.bias",
    }
    got = fv.vision.crossformer_from_official(dict.fromkeys(released, torch.zeros(1)))
    assert list(got) == list(released.values())
    assert set(got) <= set(tiny().state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSDAttention(10, 3), "LSDAttention: dim must be a multiple of heads, got 10 and 3"),
        (lambda: LSDAttention(16, 2, group=0), "LSDAttention: group must be an int >= 1, got 0"),
        (lambda: LSDAttention(16, 2, interval=1.5), "LSDAttention: interval must be an int >= 1, got 1.5"),
        (lambda: LSDAttention(16, 2)(torch.zeros(1, 4, 4, 8)), r"LSDAttention: x must be \(B, H, W, 16\)"),
        (lambda: DynamicPositionBias(8, 2), r"hidden \(default dim / 16\) must be >= 1, got 0"),
        (lambda: CrossScaleEmbed(3, 16, kernels=(4, 7)), "CrossScaleEmbed: kernels must be at least stride"),
        (
            lambda: CrossScaleEmbed(3, 12),
            "CrossScaleEmbed: dim must be a multiple of 8 for 4 kernels, got 12",
        ),
        (
            lambda: CrossFormer(16, (1, 2), (1,)),
            "CrossFormer: depths, heads, group and interval must be as many",
        ),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
