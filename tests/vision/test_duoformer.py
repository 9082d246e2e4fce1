"""DuoFormer: aligned tokens, attention over scales and regions by loops, ResNet against transformers'."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.vision import (
    DuoFormer,
    ResNet,
    ScalePatchAttention,
    ScaleTokens,
    duoformer,
    multiply_adds,
    parameters_of,
    resnet18,
    resnet50,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noisy(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=g))
    return module.double().eval()


def pyramid(channels=(2, 3, 4, 5), grid=(2, 3), seed=0):
    steps = [2 ** (len(channels) - 1 - i) for i in range(len(channels))]
    return [
        normal(2, c, grid[0] * s, grid[1] * s, seed=seed + s) for c, s in zip(channels, steps, strict=True)
    ]


def small(**options):
    made = {"scales": 2, "regions": (2, 3), "mlp_ratio": 2.0} | options
    return noisy(ScalePatchAttention(8, 2, 2, **made))


def attention_by_loops(x, layer):
    """Multi-head attention of tokens (n, C) with the layer's qkv and proj."""
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, 1)
    d = x.shape[1] // layer.heads
    out = torch.zeros_like(x)
    for h in range(layer.heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(len(x)):
            out[i, part] = torch.softmax(k[:, part] @ q[i, part] / math.sqrt(d), 0) @ v[:, part]
    return layer.proj(out)


def block_by_loops(x, layer):
    norm = lambda n, t: F.layer_norm(t, t.shape[1:], n.weight, n.bias, 1e-6)  # noqa: E731
    x = x + attention_by_loops(norm(layer.norm1, x), layer)
    return x + layer.mlp.fc2(F.gelu(layer.mlp.fc1(norm(layer.norm2, x))))


def by_loops(model, x, order, patch_block):
    """One image (h, w, T + 1, D), region by region."""
    h, w, _, dim = x.shape
    x = (x + model.scale_table).flatten(0, 1)  # (R, T + 1, D)
    over = block_by_loops if patch_block == "block" else attention_by_loops
    top = (model.class_token + model.class_position)[None]
    places = model.region_positions.view(h * w, dim)
    if order == "separate":
        for layer in model.scale_layers:
            x = torch.stack([block_by_loops(region, layer) for region in x])
        z = torch.cat([top, x[:, 0] + places])
        for layer in model.patch_layers:
            z = over(z, layer)
    else:
        for i, (scale, patch) in enumerate(zip(model.scale_layers, model.patch_layers, strict=True)):
            x = torch.stack([block_by_loops(region, scale) for region in x])
            z = over(torch.cat([top, x[:, 0] + (places if i == 0 else 0)]), patch)
            top = z[:1]
            x = torch.cat([z[1:, None], x[:, 1:]], 1)
    z = F.layer_norm(z, (dim,), model.norm.weight, model.norm.bias, 1e-6)
    return z[0], z[1:].view(h, w, dim)


@pytest.mark.parametrize("order", ["separate", "alternate"])
@pytest.mark.parametrize("patch_block", ["block", "attn"])
def test_it_is_its_formula(order, patch_block):
    model, x = small(order=order, patch_block=patch_block), normal(2, 2, 3, 6, 8)
    top, regions = model(x)
    for i in range(2):
        wanted = by_loops(model, x[i], order, patch_block)
        torch.testing.assert_close(top[i], wanted[0], atol=1e-11, rtol=1e-11)
        torch.testing.assert_close(regions[i], wanted[1], atol=1e-11, rtol=1e-11)


def test_tokens_are_aligned():
    """A map of coordinates: region (r, c) gets rows s r .. s r + s - 1 and columns s c .. of each level."""
    h, w = 3, 2
    maps = []
    for s in (8, 4, 2, 1):
        y, x = torch.meshgrid(torch.arange(h * s), torch.arange(w * s), indexing="ij")
        maps.append(torch.stack([torch.full_like(y, s), y, x])[None].double())
    layer = ScaleTokens((3, 3, 3, 3), 3, 4).double()
    for conv in layer.project:  # identities
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    out = layer(maps)
    assert out.shape == (1, h, w, 86, 3)
    for r in range(h):
        for c in range(w):
            assert torch.equal(out[0, r, c, 0], layer.token)
            wanted = [[s, s * r + i, s * c + j] for s in (1, 2, 4, 8) for i in range(s) for j in range(s)]
            assert out[0, r, c, 1:].tolist() == wanted


def test_content_tokens_come_from_pooled_levels():
    layer, maps = noisy(ScaleTokens((2, 3, 4, 5), 6, 2, scale_token="channel")), pyramid()
    pooled = torch.cat([F.avg_pool2d(maps[2], 2), maps[3]], 1)
    first, _, second = layer.content
    wanted = F.conv2d(F.conv2d(pooled, first.weight, first.bias, padding=1).relu(), second.weight, second.bias,
                      padding=1)  # fmt: skip
    torch.testing.assert_close(layer(maps)[:, :, :, 0], wanted.permute(0, 2, 3, 1))
    learned = noisy(ScaleTokens((2, 3, 4, 5), 6, 2))(maps)
    assert torch.equal(learned[0, 0, 0, 0], learned[1, 1, 2, 0])


def test_regions_meet_only_in_the_patch_stage():
    model = small()
    x = normal(1, 2, 3, 6, 8).requires_grad_()
    y = x
    for layer in model.scale_layers:
        y = model.over_scales(y, layer)
    (grad,) = torch.autograd.grad(y[0, 1, 1].sum(), x)
    assert (grad[0, 1, 1].abs().sum(-1) > 0).all()
    grad[0, 1, 1] = 0
    assert not grad.any()
    (grad,) = torch.autograd.grad(model(x)[1][0, 1, 1].square().sum(), x)
    assert (grad.abs().sum(-1) > 0).all()


def test_over_scales_is_full_attention_with_a_mask_of_regions():
    model, x = small(), normal(1, 2, 3, 6, 8)
    layer = model.scale_layers[0]
    flat = x.view(36, 8)
    region = torch.arange(36) // 6
    normed = layer.norm1(flat)
    q, k, v = layer.qkv(normed).view(36, 3, 2, 4).permute(1, 2, 0, 3)
    logits = (q @ k.mT / 2).masked_fill(region[:, None] != region, -torch.inf)
    y = flat + layer.proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
    wanted = y + layer.mlp(layer.norm2(y))
    torch.testing.assert_close(model.over_scales(x, layer).view(36, 8), wanted, atol=1e-12, rtol=1e-12)


def test_one_scale_is_a_vit_over_the_last_level():
    """Without scale layers' attention to others: a scale token and one cell per region."""
    tokens = noisy(ScaleTokens((4, 5), 8, 1))
    maps = pyramid((4, 5))
    x = tokens(maps)
    assert x.shape == (2, 2, 3, 2, 8)
    torch.testing.assert_close(x[:, :, :, 1], tokens.project[0](maps[1]).permute(0, 2, 3, 1))
    changed = [maps[0] + 1, maps[1]]
    assert torch.equal(tokens(changed), x)  # finer levels are not read


def test_other_grids_resize_the_positions():
    model, x = small(), normal(1, 4, 5, 6, 8)
    resized = small(regions=(4, 5))
    wide = F.interpolate(
        model.region_positions.permute(0, 3, 1, 2), (4, 5), mode="bicubic", align_corners=False
    )
    with torch.no_grad():
        for mine, other in zip(resized.parameters(), model.parameters(), strict=True):
            mine.copy_(wide.permute(0, 2, 3, 1) if mine is resized.region_positions else other)
    for got, wanted in zip(model(x), resized(x), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("maker", "wanted"), [(resnet18, 11_689_512), (resnet50, 25_557_032)])
def test_resnets_have_the_published_parameters(maker, wanted):
    with torch.device("meta"):
        model = maker()
    assert parameters_of(model) == wanted
    published = {resnet18: 1.82e9, resnet50: 4.09e9}[maker]  # torchvision's GFLOPs: 1.81 and 4.09
    assert multiply_adds(model, 224) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(("backbone", "scales"), [("resnet50", 4), ("resnet50", 2), ("resnet18", 3)])
def test_parameters_are_those_of_the_parts(backbone, scales):
    with torch.device("meta"):
        model = duoformer(backbone=backbone, scales=scales, num_classes=10)
    cnn = {"resnet50": 25_557_032 - 2_049_000, "resnet18": 11_689_512 - 513_000}[backbone]
    channels = (256, 512, 1024, 2048) if backbone == "resnet50" else (64, 128, 256, 512)
    layer = 12 * 768**2 + 13 * 768
    tokens = (4**scales - 1) // 3
    tables = (tokens + 1) * 768 + (49 + 1) * 768 + 2 * 768  # as the entry's cost.parameters
    project = sum(c * 768 + 768 for c in channels[4 - scales :])
    assert parameters_of(model) == cnn + project + tables + 24 * layer + 2 * 768 + 768 * 10 + 10


def test_resnet_equals_transformers():
    transformers = pytest.importorskip("transformers")
    for kind, bottleneck in (("basic", False), ("bottleneck", True)):
        widths = [8 * 2**i * (4 if bottleneck else 1) for i in range(4)]
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=widths, depths=[2, 1, 2, 1], layer_type=kind
        )
        theirs = transformers.ResNetModel(config).double().eval()
        g = torch.Generator().manual_seed(0)
        for name, t in theirs.state_dict().items():
            if t.is_floating_point():
                t.copy_(0.5 + torch.rand(t.shape, generator=g) if "norm" in name else
                        0.2 * torch.randn(t.shape, generator=g))  # fmt: skip
        ours = ResNet((2, 1, 2, 1), bottleneck=bottleneck, width=8, features_only=True).double().eval()
        state = {}
        for name, value in theirs.state_dict().items():
            name = name.replace("embedder.embedder.convolution", "conv1").replace(
                "embedder.embedder.normalization", "bn1"
            )
            parts = name.split(".")
            if parts[0] == "encoder":
                stage, block = int(parts[2]) + 1, parts[4]
                leaf = parts[-1]
                if parts[5] == "shortcut":
                    where = f"downsample.{0 if parts[6] == 'convolution' else 1}"
                else:
                    where = f"{'conv' if parts[7] == 'convolution' else 'bn'}{int(parts[6]) + 1}"
                name = f"layer{stage}.{block}.{where}.{leaf}"
            state[name] = value
        ours.load_torchvision(state)
        x = normal(2, 3, 65, 96)
        for mine, other in zip(ours(x), theirs(x, output_hidden_states=True).hidden_states[1:], strict=True):
            torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


def test_the_model_reads_its_class_token():
    cnn = ResNet((1, 1, 1, 1), width=4, features_only=True)
    model = noisy(DuoFormer(cnn, dim=8, heads=2, depth=1, scales=3, regions=2, num_classes=3))
    images = normal(2, 3, 64, 96)
    maps = model.forward_features(images)
    top, regions = model.attention(model.tokens(model.cnn(images)))
    assert torch.equal(maps[0], regions.permute(0, 3, 1, 2))
    assert torch.equal(model(images), model.head(top))
    assert torch.equal(model(images), model.forward_head(maps))
    with pytest.raises(TypeError, match="from its forward_features"):
        model.forward_head([maps[0]])
    with pytest.raises(ValueError, match="multiples of 32, got \\(65, 96\\)"):
        model(normal(1, 3, 65, 96))


def test_errors_name_what_came():
    with pytest.raises(ValueError, match="at most 2 for"):
        ScaleTokens((4, 8), 8, 3)
    with pytest.raises(ValueError, match="'learned' or 'channel', got 'mean'"):
        ScaleTokens((4, 8), 8, 2, scale_token="mean")
    with pytest.raises(ValueError, match="halve from level to level, got \\[\\(5, 4\\), \\(2, 2\\)\\]"):
        ScaleTokens((4, 8), 8, 2)([torch.zeros(1, 4, 5, 4), torch.zeros(1, 8, 2, 2)])
    with pytest.raises(ValueError, match="maps must be at least 2, got 1"):
        ScaleTokens((4, 8), 8, 2)([torch.zeros(1, 8, 2, 2)])
    for option, value in [("order", "mixed"), ("patch_block", "mlp")]:
        with pytest.raises(ValueError, match=f"{option} must be .*, got '{value}'"):
            small(**{option: value})
    with pytest.raises(ValueError, match="depth must be >= 1, got 0"):
        ScalePatchAttention(8, 2, 0)
    with pytest.raises(ValueError, match="must be \\(B, h, w, 6, 8\\)"):
        small()(normal(1, 2, 3, 5, 8))
    with pytest.raises(ValueError, match="one of resnet18, resnet50, got 'vgg'"):
        duoformer(backbone="vgg")
    with pytest.raises(ValueError, match="features_only=True"):
        DuoFormer(ResNet((1, 1, 1, 1), width=4))
    with pytest.raises(ValueError, match="scales must be an int >= 1, got 0"):
        ScaleTokens((4, 8), 8, 0)
    with pytest.raises(ValueError, match="drop_path must be 0"):
        resnet18(drop_path=0.1)
