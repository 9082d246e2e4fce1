"""Varying window attention: the places of the contexts, both forms by hand, costs, the decoder."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import foveate as fv
from foveate.patterns import QueryContextWindows, Windows
from foveate.vision import VaryingWindowAttention, VWFormerDecoder, context_places, multiply_adds


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_contexts_are_the_clamped_square_in_either_order(ratio):
    clamped, copied = (context_places(32, 4, ratio, edge) for edge in ("clamped", "copy-shift"))
    for i in range(8):
        first = max(0, min(i * 4 - (ratio - 1) * 2, 32 - ratio * 4))
        assert clamped[i].tolist() == list(range(first, first + ratio * 4))
        assert sorted(copied[i].tolist()) == clamped[i].tolist()
    assert copied[0].tolist() != clamped[0].tolist() or ratio == 8


@pytest.mark.parametrize(
    ("cells", "window", "ratio"), [(24, 3, 2), (40, 5, 4), (9, 3, 3), (12, 2, 5), (6, 3, 1)]
)
def test_copy_shift_is_the_padding_of_the_paper(cells, window, ratio):
    """Columns (R + 1) p / 2 .. R p - 1 on the left, -R p .. -(R + 1) p / 2 - 1 on the right, then windows."""
    x = torch.arange(cells)
    cut = (ratio + 1) * window // 2
    padded = torch.cat([x[cut : ratio * window], x, x[len(x) - ratio * window : len(x) - cut]])
    want = padded.unfold(0, ratio * window, window)
    got = context_places(cells, window, ratio, "copy-shift")
    assert torch.equal(got, want[: cells // window])
    assert torch.equal(got.sort(1)[0], context_places(cells, window, ratio))


def test_zeros_surround_a_map_smaller_than_the_context():
    assert context_places(4, 2, 3).tolist() == [[-1, 0, 1, 2, 3, -1]] * 2
    assert context_places(4, 1, 7)[0].tolist() == [-1, 0, 1, 2, 3, -1, -1]


def by_loops(layer, x):
    """One query window at a time, from the entry's steps."""
    batch, h, w, c = x.shape
    (nh, nw), r = layer.windows, layer.ratio
    ph, pw = h // nh, w // nw
    context = x
    if layer.rescale:
        pad = (r // 2 - 1, r // 2) if r % 2 == 0 else (r // 2,) * 2
        conv, norm = layer.scaling[0], layer.scaling[1]
        y = F.conv2d(F.pad(x.permute(0, 3, 1, 2), pad + pad), conv.weight)
        shape = (1, -1, 1, 1)
        y = (y - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt()
        context = (y * norm.weight.view(shape) + norm.bias.view(shape)).clamp(min=0).permute(0, 2, 3, 1)
        assert context.shape == (batch, h, w, c // r**2)
    rows, columns = context_places(h, ph, r, layer.edge), context_places(w, pw, r, layer.edge)
    out = torch.empty_like(x)
    for i in range(nh):
        for j in range(nw):
            keys = []
            step = r if layer.rescale else 1
            for a in range(0, r * ph, step):
                for e in range(0, r * pw, step):
                    parts = [
                        context[:, rows[i, a + s], columns[j, e + t]]
                        * float(min(rows[i, a + s], columns[j, e + t]) >= 0)
                        for s in range(step)
                        for t in range(step)
                    ]
                    keys.append(torch.cat(parts, 1))
            keys = torch.stack(keys, 1)  # (batch, keys, C)
            assert keys.shape == (batch, ph * pw * (1 if layer.rescale else r * r), c)
            own = (slice(None), slice(i * ph, (i + 1) * ph), slice(j * pw, (j + 1) * pw))
            q, k, v = layer.q_proj(x[own].flatten(1, 2)), layer.k_proj(keys), layer.v_proj(keys)
            heads = []
            for q1, k1, v1 in zip(*(t.chunk(layer.heads, 2) for t in (q, k, v)), strict=True):
                heads.append((q1 @ k1.mT / math.sqrt(c // layer.heads)).softmax(2) @ v1)
            out[own] = layer.o_proj(torch.cat(heads, 2)).view(batch, ph, pw, c)
    return out + x if layer.shortcut else out


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(
    ("shape", "windows", "ratio", "edge"),
    [
        ((8, 12), 4, 2, "clamped"),
        ((8, 12), 4, 2, "copy-shift"),
        ((9, 6), (3, 3), 3, "clamped"),  # an odd ratio, an odd and an even window
        ((4, 8), (2, 4), 4, "copy-shift"),  # a context larger than the rows
    ],
)
def test_it_is_the_papers_steps(shape, windows, ratio, edge, rescale):
    torch.manual_seed(0)
    dim = 2 * ratio**2
    layer = VaryingWindowAttention(
        dim, 2, windows=windows, ratio=ratio, rescale=rescale, edge=edge, shortcut=rescale
    ).double()
    if rescale:
        layer.scaling[1].running_mean.normal_(), layer.scaling[1].running_var.uniform_(0.5, 2)
        nn.init.normal_(layer.scaling[1].weight), nn.init.normal_(layer.scaling[1].bias)
    layer.eval()
    x = torch.randn(2, *shape, dim, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_loops(layer, x), atol=1e-12, rtol=0)


def naive(windows, ratio, **options):
    torch.manual_seed(1)
    return VaryingWindowAttention(
        16, 2, windows=windows, ratio=ratio, rescale=False, shortcut=False, **options
    ).double()


@pytest.mark.parametrize(
    ("ratio", "pattern"),
    [
        (1, Windows((8, 8), 2)),
        (2, QueryContextWindows((8, 8), 2, 2)),
        (4, None),  # the whole map
    ],
)
@pytest.mark.parametrize("edge", ["clamped", "copy-shift"])
def test_the_naive_form_is_attention_under_the_pattern(ratio, pattern, edge):
    layer, x = naive(4, ratio, edge=edge), torch.randn(2, 8, 8, 16, dtype=torch.float64)
    q, k, v = (
        f(x).flatten(1, 2).unflatten(2, (2, 8)).transpose(1, 2)
        for f in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    out = fv.attention(q, k, v, pattern, engine="reference").transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), layer.o_proj(out), atol=1e-12, rtol=0)


def test_no_padding_enters_where_the_context_fits():
    x = torch.randn(16, dtype=torch.float64).expand(1, 8, 12, 16)
    out = naive(4, 4)(x)
    torch.testing.assert_close(out, out[:, 4:5, 5:6].expand_as(out), atol=1e-12, rtol=0)
    layer = naive(4, 4)
    torch.testing.assert_close(out, layer.o_proj(layer.v_proj(x)), atol=1e-12, rtol=0)
    layer = naive(2, 4)  # a context of 16 rows on a map of 8: zeros are among the keys
    assert (layer(x) - layer.o_proj(layer.v_proj(x))).abs().max() > 1e-3


class Nchw(nn.Module):
    """So that multiply_adds can run a layer of maps."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.permute(0, 2, 3, 1))


def test_packed_costs_the_same_for_all_ratios_and_naive_grows_as_the_square():
    def count(ratio, rescale):
        with torch.device("meta"):
            layer = Nchw(VaryingWindowAttention(64, windows=4, ratio=ratio, rescale=rescale))
            return multiply_adds(layer, 32, in_channels=64)

    n, p, c = 32 * 32, 8, 64
    linear = 4 * n * c * c
    assert {count(r, True) for r in (1, 2, 4)} == {linear + n * c * c + 2 * n * p * p * c}
    kv = 2 * n * c * c  # k and v of the context, of R^2 as many tokens
    assert [count(r, False) for r in (1, 2, 4)] == [
        linear - kv + r * r * (kv + 2 * n * p * p * c) for r in (1, 2, 4)
    ]


def test_strides_and_gradients():
    torch.manual_seed(2)
    layer = VaryingWindowAttention(4, windows=2, ratio=2).double().eval()
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64).permute(0, 2, 3, 1)  # (1, 4, 8, 4), not contiguous
    torch.testing.assert_close(layer(x), layer(x.contiguous()), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(layer, (x.contiguous().requires_grad_(),))


def test_an_output_norm_starts_as_nothing():
    layer, x = VaryingWindowAttention(16, windows=2, ratio=4, output_norm=True), torch.randn(2, 8, 8, 16)
    assert torch.equal(layer(x), x)
    assert layer.o_proj.bias is None


def decoder(**options):
    torch.manual_seed(3)
    return VWFormerDecoder(
        (4, 8, 6, 8), dim=16, low=4, ratios=(2, 4), windows=2, num_classes=5, **options
    ).eval()


def pyramid(batch=2, h=16, w=24):
    torch.manual_seed(4)
    return [torch.randn(batch, c, h >> i, w >> i) for i, c in enumerate((4, 8, 6, 8))]


def test_the_decoder_step_by_step():
    model, maps = decoder(output_norm=False), pyramid()
    linear = lambda f, t: F.conv2d(t, f.weight[..., None, None], f.bias)  # noqa: E731
    up = lambda t, like: F.interpolate(t, like.shape[2:], mode="bilinear", align_corners=False)  # noqa: E731
    c4, c3, c2 = (linear(model.lateral[i], maps[i + 1]) for i in (2, 1, 0))
    x = model.fuse(torch.cat([up(c4, c2), up(c3, c2), c2], 1))
    branches = [model.short(x), model.pooled(F.adaptive_avg_pool2d(x, 1)).expand_as(x)]
    branches += [a(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for a in model.attentions]
    x = up(model.join(torch.cat(branches, 1)), maps[0])
    x = model.refine(torch.cat([x, linear(model.low, maps[0])], 1))
    torch.testing.assert_close(model(maps), model.head(x))
    assert model(maps).shape == (2, 5, 16, 24)
    assert [a.ratio for a in model.attentions] == [2, 4]


def test_decoders_without_image_pool_and_as_large_as_released():
    assert decoder(image_pool=False).join[0].in_channels == 3 * 16
    with torch.device("meta"):
        model = VWFormerDecoder((96, 192, 384, 768))
    assert sum(p.numel() for p in model.parameters()) == 7_624_726  # of the released code, counted


def test_it_decodes_a_backbone():
    backbone = fv.vision.MaxViT(8, (8,) * 4, (1,) * 4, partition=2, head_dim=8, features_only=True)
    model = VWFormerDecoder((8, 8, 8, 8), dim=16, low=4, ratios=(2,), windows=2, num_classes=3)
    assert model(backbone(torch.randn(2, 3, 64, 64))).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VaryingWindowAttention(10, 3), "dim must be a multiple of heads, got 10 and 3"),
        (lambda: VaryingWindowAttention(24, ratio=4), r"dim must be a multiple of ratio\^2 = 16, got 24"),
        (lambda: VaryingWindowAttention(16, ratio=0), "ratio must be an int >= 1, got 0"),
        (lambda: VaryingWindowAttention(16, windows=0), "windows must be an int >= 1"),
        (
            lambda: VaryingWindowAttention(16, edge="zeros"),
            "edge must be one of clamped, copy-shift, got 'zeros'",
        ),
        (lambda: VaryingWindowAttention(16)(torch.zeros(1, 8, 8, 4)), r"x must be \(B, H, W, 16\)"),
        (
            lambda: VaryingWindowAttention(16)(torch.zeros(1, 16, 13, 16)),
            "H and W must be multiples of the 8 x 8 windows, got 16 x 13",
        ),
        (lambda: context_places(8, 2, 2, "wrap"), "edge must be one of"),
        (lambda: VWFormerDecoder((8, 8, 8)), "in_channels must be four"),
        (lambda: decoder()(pyramid()[:3]), "maps must be four, got 3"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
