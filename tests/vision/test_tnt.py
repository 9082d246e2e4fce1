"""Transformer in Transformer: words and patches against their definition, what words see, and the models' sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.vision import (
    TNT,
    TNTBlock,
    WordAttention,
    WordEmbed,
    multiply_adds,
    parameters_of,
    tnt_base,
    tnt_small,
    tnt_tiny,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stirred(module):
    torch.manual_seed(1)
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def attended(layer, x):
    """Softmax attention of a set of tokens (n, C), head by head."""
    q, k, v = F.linear(x, layer.qkv.weight).chunk(3, -1)
    d, out = layer.head_dim, []
    for h in range(layer.heads):
        at = slice(h * d, (h + 1) * d)
        out.append(torch.softmax(q[:, at] @ k[:, at].T * d**-0.5, -1) @ v[:, at])
    return layer.proj(torch.cat(out, -1))


def block_of(block, words, patches):
    """One image: words (P, m, c), patches (1 + P, D); a loop over the patches."""
    new_words, new = [], [patches[0]]
    for p, y in enumerate(words):
        y = y + attended(block.inner_attention, block.inner_norm1(y))
        y = y + block.inner_mlp(block.inner_norm2(y))
        if block.legacy:
            told = block.word_proj(block.word_norm(y).reshape(-1))
        else:
            told = block.patch_norm(block.word_proj.weight @ block.word_norm(y.reshape(-1)))
        new_words.append(y)
        new.append(patches[1 + p] + told)
    z = torch.stack(new)
    z = z + attended(block.attention, block.norm1(z))
    return torch.stack(new_words), z + block.mlp(block.norm2(z))


def words_of(embed, image, positions):
    """Words (P, m, c) of one image (C, H, W), patch by patch, word by word."""
    (_, h, w), out = image.shape, []
    wide = F.pad(image, (3, 3, 3, 3))
    patch, step = embed.patch, embed.patch // embed.side
    for py in range(0, h, patch):
        for px in range(0, w, patch):
            if not embed.legacy:
                wide = torch.zeros(image.shape[0], h + 6, w + 6, dtype=image.dtype)
                inside = (slice(None), slice(py, py + patch), slice(px, px + patch))
                wide[:, 3 + py : 3 + py + patch, 3 + px : 3 + px + patch] = image[inside]
            found = []
            for y in range(py, py + patch, step):
                for x in range(px, px + patch, step):
                    around = wide[:, y : y + 7, x : x + 7]
                    found.append((embed.proj.weight * around).sum((1, 2, 3)) + embed.proj.bias)
            out.append(torch.stack(found) + positions)
    return torch.stack(out)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_block_is_its_definition(legacy):
    block = stirred(TNTBlock(12, 6, heads=3, inner_heads=2, words=5, legacy=legacy))
    words, patches = normal(2 * 3, 5, 6), normal(2, 4, 12, seed=1)
    got = block(words, patches)
    for b in range(2):
        want = block_of(block, words[3 * b : 3 * b + 3], patches[b])
        torch.testing.assert_close(got[0][3 * b : 3 * b + 3], want[0], atol=1e-12, rtol=1e-11)
        torch.testing.assert_close(got[1][b], want[1], atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_model_is_its_definition(legacy):
    model = stirred(
        TNT(
            dim=12,
            inner_dim=6,
            heads=3,
            inner_heads=2,
            depth=2,
            patch=8,
            size=16,
            num_classes=4,
            legacy=legacy,
        )
    )
    images = normal(2, 3, 16, 24)
    places = F.interpolate(model.positions.permute(0, 3, 1, 2), (2, 3), mode="bicubic")[0].flatten(1).T
    for b in range(2):
        words = words_of(model.embed, images[b], model.word_positions[0])
        first = model.patch_norm(model.word_proj(model.word_norm(words.flatten(1))))
        z = torch.cat([model.class_token[0] + model.class_position[0], first + places])
        for block in model.blocks:
            words, z = block_of(block, words, z)
        torch.testing.assert_close(model(images)[b], model.head(model.norm(z[0])), atol=1e-11, rtol=1e-10)
        (features,) = model.forward_features(images)
        torch.testing.assert_close(features[b].flatten(1).T, z[1:], atol=1e-11, rtol=1e-10)


def test_words_attend_within_their_patch():
    layer, words = stirred(WordAttention(8, 2)), normal(6, 4, 8)
    patch = torch.arange(24) // 4
    q, k, v = layer.qkv(words.flatten(0, 1)).view(1, 24, 3, 2, 4).permute(2, 0, 3, 1, 4)
    everything = F.scaled_dot_product_attention(q, k, v, patch[:, None] == patch)
    want = layer.proj(everything.transpose(1, 2).flatten(2)).view(6, 4, 8)
    torch.testing.assert_close(layer(words), want, atol=1e-12, rtol=1e-11)
    other = words.clone()
    other[2] += 1.0
    assert (layer(other) != layer(words)).any(-1).any(-1).tolist() == [p == 2 for p in range(6)]


def changed(legacy):
    """Which words (patch row, patch column, word row, word column) change when the pixels of patch (1, 1) do."""
    model = stirred(
        TNT(dim=12, inner_dim=6, heads=3, inner_heads=2, depth=2, size=48, num_classes=4, legacy=legacy)
    )
    images = normal(1, 3, 48, 48)
    other = images.clone()
    other[:, :, 16:32, 16:32] += normal(3, 16, 16, seed=1)
    found = []
    for x in (images, other):
        words = model.embed(x) + model.word_positions
        for block in model.blocks:
            words, _ = block(words, torch.zeros(1, 10, 12, dtype=x.dtype))
        found.append((model.embed(x).view(3, 3, 4, 4, 6), words.view(3, 3, 4, 4, 6)))
    return [(a - b).abs().amax(-1) > 1e-9 for a, b in zip(*found, strict=True)]


def test_words_never_see_other_patches():
    embedded, after = changed(legacy=False)
    want = torch.zeros(3, 3, 4, 4, dtype=torch.bool)
    want[1, 1] = True
    assert torch.equal(embedded, want)
    assert torch.equal(after, want)


def test_legacy_words_look_three_pixels_back():
    embedded, _ = changed(legacy=True)
    want = torch.zeros(3, 3, 4, 4, dtype=torch.bool)
    want[1, 1] = True
    want[2, 1, 0] = True  # the first word row of the patch below
    want[1, 2, :, 0] = True  # the first word column of the patch to the right
    want[2, 2, 0, 0] = True
    assert torch.equal(embedded, want)


def test_without_what_words_say_it_is_a_plain_transformer():
    model = stirred(
        TNT(dim=12, inner_dim=6, heads=3, inner_heads=2, depth=2, patch=8, size=16, num_classes=4)
    )
    for block in model.blocks:
        nn.init.zeros_(block.word_proj.weight)
        nn.init.zeros_(block.patch_norm.bias)
    images = normal(2, 3, 16, 16)
    words = model.embed(images) + model.word_positions
    z = model.patch_norm(model.word_proj(model.word_norm(words.flatten(1)))).view(2, 4, 12)
    z = torch.cat(
        [(model.class_token + model.class_position).expand(2, 1, 12), z + model.positions.flatten(1, 2)], 1
    )
    for block in model.blocks:
        z = z + torch.stack([attended(block.attention, one) for one in block.norm1(z)])
        z = z + block.mlp(block.norm2(z))
    out = model(images)
    torch.testing.assert_close(out, model.head(model.norm(z[:, 0])), atol=1e-11, rtol=1e-10)
    for block in model.blocks:
        nn.init.normal_(block.inner_mlp.fc1.weight)
        nn.init.normal_(block.inner_attention.qkv.weight)
    assert torch.equal(model(images), out)


@pytest.mark.parametrize(
    ("factory", "current", "legacy"),
    [(tnt_tiny, 6_076_408, 6_069_784), (tnt_small, 23_768_584, 23_755_336), (tnt_base, 65_428_680, None)],
)
def test_the_models_have_their_parameters(factory, current, legacy):
    with torch.device("meta"):
        assert parameters_of(factory()) == current
        if legacy is not None:
            assert parameters_of(factory(legacy=True)) == legacy


@pytest.mark.parametrize(("factory", "giga"), [(tnt_small, 5.2), (tnt_base, 14.1)])
def test_the_cost_is_the_published_one(factory, giga):
    with torch.device("meta"):
        model = factory()
    assert multiply_adds(model) / 1e9 == pytest.approx(giga, rel=0.01)


def test_the_cost_of_the_small_model():
    with torch.device("meta"):
        model = tnt_small()
    p, m, c, d = 196, 16, 24, 384
    inner = p * m * (12 * c * c + 2 * m * c) + p * m * c * d
    outer = (p + 1) * 12 * d * d + 2 * (p + 1) ** 2 * d
    assert multiply_adds(model) == p * m * 147 * c + p * m * c * d + 12 * (inner + outer) + 1000 * d


def test_the_entrys_count_of_the_inner_path():
    c, m, d = 24, 16, 384
    block = TNTBlock(d, c, words=m)
    inner = [p for name, p in block.named_parameters() if name.startswith(("inner", "word", "patch"))]
    assert sum(p.numel() for p in inner) == 12 * c * c + 10 * c + 2 * m * c + m * c * d + 2 * d


def tiny(**options):
    torch.manual_seed(0)
    return TNT(
        **{
            "dim": 12,
            "inner_dim": 6,
            "heads": 3,
            "inner_heads": 2,
            "depth": 2,
            "patch": 8,
            "size": 16,
            **options,
        }
    )


def test_uses_of_the_model():
    images = torch.randn(2, 3, 17, 23)
    assert tiny(num_classes=5)(images).shape == (2, 5)
    (features,) = tiny(features_only=True)(images)
    assert features.shape == (2, 12, 3, 3)
    assert tiny(num_classes=0, in_channels=1)(images[:, :1]).shape == (2, 12)
    model = tiny(num_classes=5).eval()
    torch.testing.assert_close(model(F.pad(images, (0, 1, 0, 7))), model(images))
    torch.testing.assert_close(model(images.mT.contiguous().mT), model(images))


def test_every_parameter_gets_a_gradient():
    model = stirred(tiny(num_classes=5)).train()
    (model(normal(2, 3, 17, 23)) * normal(2, 5, seed=1)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="WordEmbed: patch must be a multiple of stride, got 16 and 5"):
        WordEmbed(8, stride=5)
    with pytest.raises(ValueError, match="WordAttention: dim must be a multiple of heads, got 8 and 3"):
        WordAttention(8, 3)
    with pytest.raises(
        ValueError, match=r"TNTBlock: words must be \(6, 4, c\) for patches \(2, 4, 12\), got"
    ):
        TNTBlock(12, 6, heads=3, inner_heads=2, words=4)(torch.zeros(5, 4, 6), torch.zeros(2, 4, 12))
    with pytest.raises(ValueError, match=r"TNT: images must be \(B, 3, H, W\), got \(3, 16, 16\)"):
        tiny()(torch.zeros(3, 16, 16))
