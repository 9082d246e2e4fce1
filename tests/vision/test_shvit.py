"""SHViT: the partial head by its definition, what passes by, folding, parameter counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import foveate as fv
from foveate.vision.backbone import parameters_of
from foveate.vision.shvit import SHViTBlock, SHViTMerging


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module, std=0.3, seed=1):
    """The module in float64 with every parameter and every running statistic drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.data = 0.5 + drawn.abs() if "running_var" in name else std * drawn
    return module


def normed(x, norm):
    """Batch norm in eval mode, on (.., C)."""
    return (x - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps) * norm.weight + norm.bias


def by_pixels(layer, x):
    """The layer, cell by cell, on (B, H, W, C); and what goes into the output map, after ReLU."""
    b, h, w, _ = x.shape
    p, d = layer.partial_dim, layer.qk_dim
    out, before = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(b):
        part = x[i, ..., :p]
        part = (part - part.mean()) / torch.sqrt(part.var(correction=0) + layer.norm.eps)  # one group
        part = part * layer.norm.weight + layer.norm.bias
        qkv = normed(part @ layer.qkv.conv.weight[:, :, 0, 0].T, layer.qkv.norm).flatten(0, 1)  # (N, 2 d + p)
        q, k, v = qkv[:, :d], qkv[:, d : 2 * d], qkv[:, 2 * d :]
        for n in range(h * w):
            weights = torch.softmax(k @ q[n] / d**0.5, 0)
            mixed = torch.cat([weights @ v, x[i, n // w, n % w, p:]]).clamp(min=0)
            before[i, n // w, n % w] = mixed
            out[i, n // w, n % w] = normed(layer.proj.conv.weight[:, :, 0, 0] @ mixed, layer.proj.norm)
    return out, before


@pytest.mark.parametrize(("dim", "partial", "size"), [(12, 3, (3, 5)), (10, 10, (2, 2)), (9, 1, (7, 1))])
def test_the_layer_is_its_definition(dim, partial, size):
    layer = shaken(fv.vision.SingleHeadPartialAttention(dim, partial, qk_dim=4))
    x = normal(2, *size, dim)
    expected, _ = by_pixels(layer, x)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(layer(turned), expected, atol=1e-12, rtol=1e-12)
    maps = layer.forward_maps(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(maps, expected, atol=1e-12, rtol=1e-12)


def test_it_is_ordinary_attention_of_one_head():
    layer = shaken(fv.vision.SingleHeadPartialAttention(24, 6))
    x = normal(2, 5, 4, 24)
    maps = x.permute(0, 3, 1, 2)
    parts = layer.qkv(F.group_norm(maps[:, :6], 1, layer.norm.weight, layer.norm.bias)).flatten(2).mT[:, None]
    q, k, v = parts.split([16, 16, 6], 3)
    y = F.scaled_dot_product_attention(q, k, v, scale=0.25)[:, 0]  # (B, N, p)
    torch.testing.assert_close(layer.mixed(maps)[:, :6].flatten(2).mT, y, atol=1e-12, rtol=1e-12)


def test_the_other_channels_pass_by_untouched():
    layer = shaken(fv.vision.SingleHeadPartialAttention(12, 3))
    seen = []
    layer.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = normal(2, 5, 4, 12)
    layer(x)
    assert seen[0][:, 3:].equal(x.permute(0, 3, 1, 2)[:, 3:].relu())
    assert not seen[0][:, :3].equal(x.permute(0, 3, 1, 2)[:, :3].relu())
    _, before = by_pixels(layer, x)
    torch.testing.assert_close(seen[0].permute(0, 2, 3, 1), before, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("partial", [None, 5])
def test_a_new_block_is_the_identity(partial, training):
    torch.manual_seed(0)
    block = SHViTBlock(24, partial).train(training)
    x = torch.randn(2, 24, 5, 7)
    assert block(x).equal(x)
    assert not torch.equal(SHViTMerging(24, 32)(x), x)  # its depthwise convolutions start with weight 1
    moved = shaken(SHViTBlock(24, partial))(x.double())
    assert (moved - x).abs().max() > 0.1


def folded(layer, x, **options):
    """Convolution and batch norm, written out."""
    y = F.conv2d(x, layer.conv.weight, **options)
    return normed(y.permute(0, 2, 3, 1), layer.norm).permute(0, 3, 1, 2)


def test_what_lies_between_stages_is_its_definition():
    layer, x = shaken(SHViTMerging(8, 12)), normal(2, 8, 5, 7)
    for part in layer.before, layer.after:
        if part is layer.after:
            x = folded(layer.up, x).relu()
            x = folded(layer.pool, x, stride=2, padding=1, groups=32).relu()
            hidden = F.conv2d(x.mean((2, 3), keepdim=True), layer.gate.reduce.weight, layer.gate.reduce.bias)
            gate = F.conv2d(hidden.relu(), layer.gate.expand.weight, layer.gate.expand.bias)
            x = folded(layer.down, x * gate.sigmoid())
        x = x + folded(part[0].conv, x, padding=1, groups=x.shape[1])
        x = x + folded(part[1].down, folded(part[1].up, x).relu())
    torch.testing.assert_close(layer(normal(2, 8, 5, 7)), x, atol=1e-12, rtol=1e-12)


def tiny(**options):
    return fv.vision.SHViT((16, 24, 32), (1, 2, 1), (None, 5, 7), num_classes=5, **options)


def test_folding_changes_nothing():
    model = shaken(tiny(), 0.3)
    images = normal(2, 3, 70, 101)
    fused = copy.deepcopy(model).fuse_()
    for a, b in zip(model.forward_features(images), fused.forward_features(images), strict=True):
        torch.testing.assert_close(b, a, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(fused(images), model(images), atol=1e-10, rtol=1e-10)
    left = [part for part in fused.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert left == []
    again = copy.deepcopy(fused).fuse_()
    assert again(images).equal(fused(images))
    in_float = copy.deepcopy(model).float()
    before = in_float(images.float())
    assert (in_float.fuse_()(images.float()) - before).abs().max() < 1e-4
    maps = shaken(tiny(features_only=True))
    expected = maps(images)[-1]
    torch.testing.assert_close(maps.fuse_()(images)[-1], expected, atol=1e-10, rtol=1e-10)


def test_gradients():
    layer = shaken(fv.vision.SingleHeadPartialAttention(4, 2, qk_dim=3))
    assert torch.autograd.gradcheck(layer, normal(1, 3, 2, 4).requires_grad_())


SIZES = {
    "s1": (6_330_808, 224, 241),
    "s2": (11_483_072, 224, 366),
    "s3": (14_245_273, 224, 601),
    "s4": (16_588_484, 256, 986),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds_are_the_published_ones(name):
    parameters, size, published = SIZES[name]
    with torch.device("meta"):
        model = getattr(fv.vision, f"shvit_{name}")()
    assert parameters_of(model) == parameters
    if name in ("s2", "s4"):  # the slow part
        assert fv.vision.multiply_adds(model, size) / 1e6 == pytest.approx(published, rel=0.002)


@pytest.mark.parametrize("size", [(64, 64), (61, 131), (17, 40)])
def test_any_size_and_every_row_alone(size):
    model = shaken(tiny(), 0.2)
    images = normal(2, 3, *size)
    maps = model.forward_features(images)
    assert [tuple(m.shape[2:]) for m in maps] == [tuple(-(-n // s) for n in size) for s in (16, 32, 64)]
    torch.testing.assert_close(model(images)[:1], model(images[:1]), atol=1e-10, rtol=1e-10)
    pooled = normed(maps[-1].mean((2, 3)), model.norm)
    torch.testing.assert_close(model(images), pooled @ model.head.weight.T + model.head.bias)


def test_released_names():
    state = tiny().state_dict()
    theirs = {
        "patch_embed.2.c.weight": "stem.1.conv.weight",
        "blocks1.0.conv.m.bn.running_var": "stages.0.0.conv.conv.norm.running_var",
        "blocks2.0.1.m.pw2.c.weight": "merging.0.before.1.down.conv.weight",
        "blocks2.1.se.conv_reduce.bias": "merging.0.gate.reduce.bias",
        "blocks2.2.0.m.c.weight": "merging.0.after.0.conv.conv.weight",
        "blocks2.4.mixer.m.proj.1.bn.weight": "stages.1.1.attention.proj.norm.weight",
        "stages.2.downsample.2.conv3.c.weight": "merging.1.down.conv.weight",
        "stages.2.blocks.0.ffn.m.pw1.bn.bias": "stages.2.0.feed.up.norm.bias",
        "head.bn.running_mean": "norm.running_mean",
        "head.l.weight": "head.weight",
    }
    for name, ours in theirs.items():
        assert list(fv.vision.shvit_state({name: state[ours]})) == [ours]


def test_what_is_refused():
    with pytest.raises(ValueError, match="partial_dim must be 1 to 8, got 9"):
        fv.vision.SingleHeadPartialAttention(8, 9)
    with pytest.raises(ValueError, match="qk_dim must be >= 1, got 0"):
        fv.vision.SingleHeadPartialAttention(8, 4, qk_dim=0)
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, 8\), got \(2, 8\)"):
        fv.vision.SingleHeadPartialAttention(8, 4)(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="of one length"):
        fv.vision.SHViT((16, 24), (1, 1), (None,))
    with pytest.raises(ValueError, match="begin with a multiple of 8"):
        fv.vision.SHViT((12, 24), (1, 1), (None, 4))
