"""SMT: modulation and attention written out, supports, grouping, counts, sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from foveate.vision import (
    SMT,
    ConvMlp,
    ConvValueAttention,
    ScaleAwareModulation,
    SMTBlock,
    multiply_adds,
    smt_base,
    smt_large,
    smt_small,
    smt_tiny,
)


def made(kind, *arguments, seed=0, **options):
    """A module in float64 and eval mode with random weights and statistics."""
    torch.manual_seed(seed)
    module = kind(*arguments, **options).double().eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    for name, b in module.named_buffers():
        if name.endswith("running_mean"):
            b.normal_()
        elif name.endswith("running_var"):
            b.uniform_(0.5, 2.0)
    return module


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def depthwise(x, conv):
    """A depthwise convolution of (B, H, W, C) by shifts."""
    k, (h, w) = conv.kernel_size[0], x.shape[1:3]
    r = k // 2
    padded, out = F.pad(x, (0, 0, r, r, r, r)), torch.zeros_like(x) + conv.bias
    for dy in range(k):
        for dx in range(k):
            out = out + padded[:, dy : dy + h, dx : dx + w] * conv.weight[:, 0, dy, dx]
    return out


def modulated(layer, x):
    """The layer channel by channel: head n of channel j is channel n C/h + j of s, and 4 channels make a group."""
    heads, part, v, s = layer.heads, layer.dim // layer.heads, layer.v_proj(x), layer.s_proj(x)
    seen = [depthwise(s[..., n * part : (n + 1) * part], layer.scales[n]) for n in range(heads)]
    hidden, wide = [], layer.fuse.out_channels // part
    for j in range(part):
        group = torch.stack([seen[n][..., j] for n in range(heads)], -1)  # (B, H, W, heads)
        for c in range(j * wide, (j + 1) * wide):
            hidden.append(group @ layer.fuse.weight[c, :, 0, 0] + layer.fuse.bias[c])
    h, norm = torch.stack(hidden, -1), layer.norm
    h = (h - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias
    h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return layer.o_proj(v * (h @ layer.mix.weight[:, :, 0, 0].T + layer.mix.bias))


@pytest.mark.parametrize(("dim", "heads", "grid"), [(8, 4, (7, 5)), (12, 2, (3, 11)), (6, 1, (1, 4))])
def test_modulation_is_its_formula(dim, heads, grid):
    layer, x = made(ScaleAwareModulation, dim, heads), normal(2, *grid, dim)
    torch.testing.assert_close(layer(x), modulated(layer, x), atol=1e-11, rtol=1e-11)


def test_attention_is_its_formula():
    layer, x = made(ConvValueAttention, 12, 3), normal(2, 5, 7, 12)
    q, k, v = layer.q_proj(x).flatten(1, 2), *layer.kv_proj(x).flatten(1, 2).split(12, -1)
    out = torch.zeros_like(q)
    for h in range(3):
        cut = slice(4 * h, 4 * h + 4)
        out[..., cut] = torch.softmax(q[..., cut] @ k[..., cut].mT / 2, -1) @ v[..., cut]
    want = layer.o_proj(out.view(x.shape) + depthwise(v.view(x.shape), layer.dwc))
    torch.testing.assert_close(layer(x), want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("mixer", ["sam", "attn"])
def test_the_block_is_its_formula(mixer):
    block, x = made(SMTBlock, 8, mixer=mixer, heads=2, mlp_ratio=2, layer_scale=0.5), normal(2, 5, 3, 8)
    norm = lambda t, n: F.layer_norm(t, (8,), n.weight, n.bias, 1e-6)  # noqa: E731
    y = x + block.scale1.gamma * block.mixer(norm(x, block.norm1))
    h = block.mlp.fc1(norm(y, block.norm2))
    want = y + block.scale2.gamma * block.mlp.fc2(F.gelu(h + depthwise(h, block.mlp.dwc)))
    torch.testing.assert_close(block(x), want, atol=1e-11, rtol=1e-11)


def test_head_n_sees_a_square_of_side_3_plus_2n():
    layer, s = made(ScaleAwareModulation, 16), torch.zeros(1, 16, 13, 13, dtype=torch.float64)
    with torch.no_grad():
        for scale in layer.scales:
            scale.bias.zero_()
        for n in range(4):
            impulse = s.clone()
            impulse[0, 4 * n + 1, 6, 6] = 1.0  # channel 1 of head n
            out = layer.convolved(impulse)[0]
            assert (out != 0).flatten(1).any(1).nonzero().flatten().tolist() == [4 + n]  # group 1, place n
            where, r = out[4 + n] != 0, 1 + n
            assert where[6 - r : 7 + r, 6 - r : 7 + r].all()
            assert int(where.sum()) == (3 + 2 * n) ** 2


def test_a_channel_reaches_its_own_group_of_the_fusion_alone():
    layer, s = made(ScaleAwareModulation, 16), normal(1, 16, 5, 5)
    before = layer.fuse(layer.convolved(s))
    for n in range(4):
        for j in range(4):
            other = s.clone()
            other[0, 4 * n + j] += 1.0
            changed = (layer.fuse(layer.convolved(other)) != before)[0].flatten(1).any(1)
            assert changed.nonzero().flatten().tolist() == list(range(8 * j, 8 * j + 8))


def test_modulation_is_linear_in_the_values():
    layer, x = made(ScaleAwareModulation, 16), normal(2, 5, 5, 16)
    with torch.no_grad():
        layer.o_proj.bias.zero_()
        once = layer(x)
        layer.v_proj.weight.mul_(2), layer.v_proj.bias.mul_(2)
        torch.testing.assert_close(layer(x), 2 * once, atol=1e-12, rtol=1e-12)
        assert torch.equal(layer(x), layer.o_proj(layer.v_proj(x) * layer.modulator(x)))
    assert float(layer.modulator(x).detach().abs().max()) > 1  # no sigmoid
    assert float(layer.modulator(x).detach().min()) < 0


def test_stages_alternate_as_the_paper_says():
    with torch.device("meta"):
        model = smt_tiny()
    kinds = [[type(block.mixer).__name__[0] for block in stage] for stage in model.stages]
    assert kinds == [["S", "S"], ["S", "S"], ["S", "C"] * 4, ["C"]]
    assert [block.mixer.heads for block in model.stages[2]] == [4, 8] * 4
    assert model.stages[3][0].mixer.heads == 16


@pytest.mark.parametrize(
    ("factory", "parameters", "published"),
    [
        (smt_tiny, 11_506_536, 2.4),
        (smt_small, 22_550_952, 4.7),
        (smt_base, 32_037_352, 7.7),
        (smt_large, 80_589_544, 17.6),
    ],
)
def test_parameters_and_multiply_adds(factory, parameters, published):
    with torch.device("meta"):
        model = factory()
    assert sum(p.numel() for p in model.parameters()) == parameters
    # the published figures leave out the products of queries, keys, weights and values
    pairs = 2 * sum(
        block.mixer.dim * (14 * 14, 7 * 7)[i - 2] ** 2
        for i in (2, 3)
        for block in model.stages[i]
        if isinstance(block.mixer, ConvValueAttention)
    )
    count = multiply_adds(model) - pairs
    assert abs(count / 1e9 - published) < 0.01 * published + 0.05  # printed with one decimal


def test_the_entry_counts_a_modulation():
    for c in (16, 64):
        assert sum(p.numel() for p in ScaleAwareModulation(c).parameters()) == 5 * c * c + 60 * c


def test_initial_weights():
    torch.manual_seed(0)
    model = SMT((32, 64), (1, 2), (2, 2), mixers=("sam", "hybrid"), heads=(None, 2), num_classes=10)
    for m in model.modules():
        if isinstance(m, torch.nn.Linear) and m.weight.numel() > 1000:
            assert 0.018 < float(m.weight.detach().std()) < 0.022
        if isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 500:
            want = math.sqrt(2 * m.groups / (m.kernel_size[0] ** 2 * m.out_channels))
            assert 0.85 * want < float(m.weight.detach().std()) < 1.15 * want
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and m.bias is not None:
            assert not m.bias.any()


def small(**options):
    given = {"mixers": ("sam", "hybrid"), "heads": (None, 2), "num_classes": 5}
    return SMT((8, 16), (1, 2), (2, 1), **{**given, **options})


@pytest.mark.parametrize("size", [(32, 32), (61, 37), (4, 4), (5, 97)])
def test_any_size_from_four_pixels(size):
    model = made(small)
    x = normal(2, 3, *size).requires_grad_()
    maps = model.forward_features(x)
    h, w = ((n + 1) // 2 // 2 for n in size)
    assert maps[0].shape == (2, 8, h, w)
    assert maps[1].shape == (2, 16, -(-h // 2), -(-w // 2))
    out = model(x)
    torch.testing.assert_close(out, model.head(maps[1].mean((2, 3))), atol=1e-12, rtol=1e-12)
    out.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_maps_are_normalised_and_free_of_heads():
    model = made(small, features_only=True)
    assert model.head is None
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.fill_(1), norm.bias.zero_()
        for m in model(normal(1, 3, 32, 32)):
            torch.testing.assert_close(m.mean(1), torch.zeros_like(m[:, 0]), atol=1e-9, rtol=0)
    assert made(small, num_classes=0)(normal(1, 3, 32, 32)).shape == (1, 16)


def test_strides_of_the_input_do_not_matter():
    x = normal(2, 6, 5, 16)
    for layer in (made(ScaleAwareModulation, 16), made(ConvValueAttention, 16, 2), made(ConvMlp, 16, 32)):
        strided = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        assert not strided.is_contiguous()
        torch.testing.assert_close(layer(strided), layer(x), atol=1e-12, rtol=1e-12)


def test_gradients():
    for layer in (made(ScaleAwareModulation, 4, 2), made(ConvValueAttention, 4, 2)):
        assert torch.autograd.gradcheck(layer, (normal(1, 2, 3, 4).requires_grad_(),))


def test_errors_name_the_argument():
    for call, says in (
        (lambda: ScaleAwareModulation(10), "dim must be a multiple of heads >= 1, got 10 and 4"),
        (lambda: ScaleAwareModulation(8, expand=0), "expand must be an int >= 1, got 0"),
        (lambda: ConvValueAttention(8, 0), "dim must be a multiple of heads >= 1, got 8 and 0"),
        (lambda: SMTBlock(8, mixer="conv"), "mixer must be one of sam, attn, got 'conv'"),
        (lambda: small(mixers=("sam", "both")), "mixers must be of sam, hybrid, attn"),
        (lambda: small(mixers=("sam",)), "mixers must have one value per stage"),
        (lambda: small(heads=(None, None)), r"heads\[1\] is None, but stage 1 has attention"),
        (lambda: small(stem_kernel=4), "stem_kernel must be odd, got 4"),
        (lambda: small()(torch.zeros(1, 3, 3, 9)), r"images must have sides >= 4, got \(3, 9\)"),
        (lambda: small()(torch.zeros(1, 1, 8, 8)), r"images must be \(B, 3, H, W\)"),
        (lambda: ScaleAwareModulation(8)(torch.zeros(1, 5, 8)), r"x must be \(B, H, W, 8\), got \(1, 5, 8\)"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
