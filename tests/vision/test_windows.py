"""Cutting maps, attention in small groups, relative bias: against loops over single cells."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.vision import RelativePositionBias2d, WindowAttention, multiply_adds
from foveate.vision.backbone import Backbone, parameters_of
from foveate.vision.blocks import ConvNorm, DropPath, LayerNorm2d, drop_path_rates, init_, sincos_2d
from foveate.vision.windows import (
    attend,
    grid_merge,
    grid_partition,
    merge,
    pad_to,
    partition,
    relative_index,
)


@pytest.mark.parametrize(("shape", "cell"), [((2, 6, 15, 3), (3, 5)), ((1, 7, 7, 2), (7, 1))])
def test_windows_hold_the_cells_that_the_pattern_joins_and_merge_inverts(shape, cell):
    b, h, w, c = shape
    x = torch.arange(b * h * w * c).view(shape)
    for cut, back, pattern in (
        (partition, merge, fv.patterns.Windows((h, w), cell)),
        (grid_partition, grid_merge, fv.patterns.Grid((h, w), cell)),
    ):
        cells = cut(x, cell)
        assert torch.equal(back(cells, cell, (h, w)), x)
        seen = pattern.layout(h * w).to_dense()[0, 0]
        number = cut(torch.arange(h * w).view(1, h, w, 1), cell)[..., 0]  # (groups, n): cell numbers
        want = torch.zeros(h * w, h * w, dtype=torch.bool)
        for group in number:
            want[group[:, None], group[None]] = True
        assert torch.equal(want, seen)
        per_image = cells.view(b, -1, *cells.shape[1:])
        assert torch.equal(per_image[1 % b], cut(x[1 % b][None], cell))  # windows of an image stay together


def test_padding_is_zeros_after_the_last_row_and_column():
    x = torch.ones(1, 5, 3, 2)
    padded = pad_to(x, (4, 3))
    assert padded.shape == (1, 8, 3, 2)
    assert torch.equal(padded[:, :5], x)
    assert not padded[:, 5:].any()
    assert pad_to(x, (5, 1)) is x


def test_attend_is_softmax_attention_per_group():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 2, n, d, generator=g).double() for n, d in ((5, 3), (7, 3), (7, 4)))
    bias = torch.randn(2, 5, 7, generator=g).double()
    mask = torch.rand(3, 5, 7, generator=g) < 0.5
    mask[1, 2] = False  # a row that sees nothing
    for tensors in (q, k, v, bias):
        tensors.requires_grad_()
    got = attend(q, k, v, bias=bias, mask=mask, scale=0.7)
    for group in range(6):
        for head in range(2):
            for row in range(5):
                logits = 0.7 * (k[group, head] @ q[group, head, row]) + bias[head, row]
                seen = mask[group % 3, row]
                want = torch.zeros(4).double()
                if seen.any():
                    want = logits[seen].softmax(0) @ v[group, head][seen]
                assert torch.allclose(got[group, head, row], want, atol=1e-12)
    grads = torch.autograd.grad(got.square().sum(), (q, k, v, bias))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert not grads[0][1, :, 2].any()
    assert torch.autograd.gradcheck(lambda *t: attend(*t[:3], bias=t[3], mask=mask), (q, k, v, bias))
    with pytest.raises(ValueError, match="divisor of 6"):
        attend(q, k, v, mask=torch.ones(4, 5, 7, dtype=torch.bool))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["none", "tensor", "relative"])
def test_both_engines_give_the_same_forward_and_gradients(masked, kind):
    g = torch.Generator().manual_seed(1)
    n = 15 if kind == "relative" else 13
    q, k, v = (torch.randn(8, n, 3, 2, 5, generator=g).permute(2, 0, 3, 1, 4)[i] for i in range(3))
    table = torch.randn(2, 5, 9, generator=g)
    tensor = torch.randn(2, n, n, generator=g)
    mask = None
    if masked:
        mask = torch.rand(4, n, n, generator=g) < 0.4
        mask[2, 5] = False
    found = {}
    for engine, dtype in (("native", torch.float32), ("dense", torch.float64), ("auto", torch.float32)):
        own = [t.to(dtype).requires_grad_() for t in (q, k, v, table, tensor)]
        bias = {"none": None, "tensor": own[4], "relative": fv.RelativeBias(own[3], shape=(3, 5))}[kind]
        out = attend(*own[:3], bias=bias, mask=mask, engine=engine)
        used = own[:3] + {"none": [], "tensor": own[4:], "relative": own[3:4]}[kind]
        found[engine] = [out, *torch.autograd.grad(out.sin().sum(), used)]
    for got, want, auto in zip(*found.values(), strict=True):
        assert torch.allclose(got.double(), want, atol=2e-5)
        assert torch.equal(got, auto)
    if masked:
        assert not found["native"][0][2, :, 5].any()


def test_heads_wider_than_the_native_engine_takes_are_multiplied_densely():
    q = torch.randn(1, 1, 9, 513)
    assert torch.equal(attend(q, q, q), attend(q, q, q, engine="dense"))


def test_a_mask_that_was_written_to_counts_anew():
    q, mask = torch.randn(2, 1, 9, 4), torch.ones(1, 9, 9, dtype=torch.bool)
    before = attend(q, q, q, mask=mask)
    assert torch.equal(before, attend(q, q, q, mask=mask))
    mask[:, :, 4:] = False
    after = attend(q, q, q, mask=mask)
    assert torch.allclose(after, attend(q, q[:, :, :4], q[:, :, :4], engine="dense"), atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(attend(q, q, q, mask=mask.clone()), after)
    with pytest.raises(ValueError, match="engine must be"):
        attend(q, q, q, engine="flex")


def test_relative_bias_reads_the_table_by_distance_and_smaller_windows_read_its_middle():
    bias = RelativePositionBias2d((3, 5), heads=2)
    full, table = bias(), bias.table.view(5, 9, 2)
    for i in range(15):
        for j in range(15):
            dy, dx = i // 5 - j // 5, i % 5 - j % 5
            assert torch.equal(full[:, i, j], table[dy + 2, dx + 4])
    small = bias((2, 3))
    for i in range(6):
        for j in range(6):
            assert torch.equal(small[:, i, j], table[i // 3 - j // 3 + 2, i % 3 - j % 3 + 4])
    assert torch.equal(bias.score((2, 3)).apply(torch.zeros(1, 2, 6, 6))[0], small)
    with pytest.raises(ValueError, match="at most"):
        bias((4, 5))
    same = RelativePositionBias2d(4, heads=1)
    with torch.no_grad():
        same.table.copy_(relative_index(1).flatten().float().expand(49)[:, None])
    assert same.resize_(6).table.shape == (121, 1)
    assert same.window == (6, 6)


@pytest.mark.parametrize("edge", ["mask", "zero"])
def test_window_attention_equals_masked_attention_over_the_map(edge):
    torch.manual_seed(0)
    layer = WindowAttention(8, heads=2, window=(3, 4), edge=edge).double()
    x = torch.randn(2, 7, 10, 8).double()
    room = torch.zeros(2, 9, 12, 8).double()
    room[:, :7, :10] = x
    qkv = layer.qkv(room).view(2, 108, 3, 2, 4).permute(2, 0, 3, 1, 4)
    y, x_ = torch.arange(108) // 12, torch.arange(108) % 12
    seen = (y[:, None] // 3 == y // 3) & (x_[:, None] // 4 == x_ // 4)
    if edge == "mask":
        seen &= (y < 7) & (x_ < 10)
    index = (y[:, None] - y + 2).clamp(0, 4) * 7 + (x_[:, None] - x_ + 3).clamp(0, 6)
    assert layer.relative is not None
    logits = qkv[0] @ qkv[1].mT / 2 + layer.relative.table[index].permute(2, 0, 1)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(3).nan_to_num()
    want = layer.proj((weights @ qkv[2]).transpose(1, 2).reshape(2, 9, 12, 8))[:, :7, :10]
    assert torch.allclose(layer(x), want, atol=1e-12)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="must divide the map of 5 x 4"):
        partition(torch.zeros(1, 5, 4, 1), 2)
    with pytest.raises(ValueError, match="window must be an int >= 1 or two"):
        WindowAttention(8, 2, window=0)
    with pytest.raises(ValueError, match="edge must be"):
        WindowAttention(8, 2, edge="pad")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rate must be"):
        DropPath(1.0)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_2d(6, (2, 2))


def test_drop_path_drops_whole_rows_and_keeps_the_mean():
    torch.manual_seed(0)
    layer = DropPath(0.25).train()
    out = layer(torch.ones(4000, 3))
    assert out.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (out[:, :1] == out).all()
    assert out.mean() == pytest.approx(1, abs=0.05)
    assert drop_path_rates(0.3, (1, 2, 1)) == [
        [0.0],
        [pytest.approx(0.1), pytest.approx(0.2)],
        [pytest.approx(0.3)],
    ]


def test_a_fused_convolution_equals_convolution_and_norm():
    torch.manual_seed(0)
    both = ConvNorm(6, 4, 3, stride=2, groups=2).double()
    assert both.norm.running_mean is not None
    assert both.norm.running_var is not None
    both.norm.running_mean.normal_()
    both.norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(both.norm.weight)
    nn.init.normal_(both.norm.bias)
    x = torch.randn(2, 6, 7, 5).double()
    assert torch.allclose(both.eval().fused()(x), both(x), atol=1e-12)


def test_init_keeps_the_first_weight_of_branches_that_start_as_nothing():
    model = nn.Sequential(ConvNorm(3, 4, 1, norm_init=0.0), ConvNorm(4, 4, 1), LayerNorm2d(4))
    init_(model)
    assert not model[0].norm.weight.any()
    assert model[1].norm.weight.eq(1).all()
    assert model[0].conv.weight.abs().max() <= 0.04


class Small(Backbone):
    def __init__(self, **options):
        super().__init__(channels=(4, 6), strides=(2, 4), **options)
        self.one = nn.Conv2d(self.in_channels, 4, 2, stride=2)
        self.two = nn.Conv2d(4, 6, 2, stride=2)
        self.make_head(nn.LayerNorm(6))

    def forward_features(self, images):
        self.check(images)
        fine = self.one(images)
        return [fine, self.two(fine)]


def test_a_backbone_gives_maps_scores_or_pooled_features():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 12)
    model = Small(num_classes=5)
    maps = model.forward_features(x)
    assert [tuple(m.shape) for m in maps] == [(2, 4, 4, 6), (2, 6, 2, 3)]
    pooled = nn.functional.layer_norm(maps[1].permute(0, 2, 3, 1), (6,)).mean((1, 2))
    assert torch.allclose(model(x), model.head(pooled), atol=1e-6)
    assert torch.allclose(Small(num_classes=0).pool(maps), pooled, atol=1e-6)
    assert isinstance(Small(features_only=True)(x), list)
    assert Small(features_only=True).head is None
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        model(torch.zeros(1, 1, 8, 8))
    with pytest.raises(TypeError, match="floating"):
        model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_counting_takes_products_convolutions_and_the_pairs_that_attention_visits():
    model = Small(num_classes=5)
    want = 4 * 6 * 4 * 3 * 4 + 2 * 3 * 6 * 4 * 4 + 6 * 5
    assert multiply_adds(model, (8, 12)) == want
    with torch.device("meta"):
        assert multiply_adds(Small(num_classes=5), (8, 12)) == want
    assert parameters_of(model) == sum(p.numel() for p in model.parameters())

    class Near(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            tokens = x.flatten(2).mT[:, None]
            out = fv.attention(tokens, tokens, tokens, fv.patterns.Neighborhood((9, 11), 3))
            return fv.attention(out, out, out, is_causal=True)

    pairs = 99 * 9 + 99 * 100 // 2
    assert multiply_adds(Near(), (9, 11), in_channels=8) == pairs * 16


def test_windows_are_counted_by_their_pairs():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = WindowAttention(8, 2, 4)

        def forward(self, x):
            return self.layer(x.permute(0, 2, 3, 1))

    for device in ("cpu", "meta"):
        with torch.device(device):
            assert multiply_adds(Images(), (8, 12), in_channels=8) == 96 * (4 * 8 * 8 + 2 * 16 * 8)


def test_masks_need_no_values():
    """On the meta device too, and without asking the device whether a row sees nothing."""
    q = torch.empty(6, 2, 4, 8, device="meta")
    mask = torch.empty(3, 4, 4, dtype=torch.bool, device="meta")
    assert attend(q, q, q, mask=mask).shape == q.shape


def test_an_index_first_asked_for_elsewhere_can_be_used():
    with torch.device("meta"):
        RelativePositionBias2d((5, 11), 1)()
    with torch.inference_mode():
        RelativePositionBias2d((11, 5), 1)()
    for window in ((5, 11), (11, 5)):
        bias = RelativePositionBias2d(window, 1)
        bias().sum().backward()
        assert bias.table.grad is not None
        assert float(bias.table.grad.sum()) == 55**2


@pytest.mark.parametrize("masked", [False, True])
def test_a_bias_of_its_own_per_group(masked):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 2, n, 8, generator=g) for n in (9, 12, 12))
    bias = torch.randn(6, 2, 9, 12, generator=g).requires_grad_()
    mask = torch.rand(3, 9, 12, generator=g) > 0.3 if masked else None
    logits = q @ k.mT * 8**-0.5 + bias
    if mask is not None:
        logits = logits.masked_fill(~mask.repeat(2, 1, 1)[:, None], -torch.inf)
    expected = logits.softmax(3) @ v
    for engine in ("native", "dense"):
        out = attend(q, k, v, bias=bias, mask=mask, engine=engine)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        (found,) = torch.autograd.grad(out.square().sum(), bias)
        (wanted,) = torch.autograd.grad(expected.square().sum(), bias, retain_graph=True)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
