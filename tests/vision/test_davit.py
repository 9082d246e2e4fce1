"""DaViT: channel attention by its definition, windows and blocks written out, parameter counts, transformers' tower."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import foveate as fv
from foveate.vision.backbone import parameters_of


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shaken(module, std=0.3, seed=1):
    """The module in float64 with every parameter drawn anew, so that nothing is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for p in module.parameters():
        p.data = std * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module


def by_channels(layer, x, *, axis=-1, factor=1.0):
    """Channel attention as loops over groups and pairs of channels; (B, N, C)."""
    _, n, c = x.shape
    width = c // layer.groups
    qkv = x @ layer.qkv.weight.T + layer.qkv.bias
    q, k, v = (qkv[..., i * c : (i + 1) * c] for i in range(3))
    scale = factor * (width if layer.scale == "head" else n) ** -0.5
    out = torch.zeros_like(x)
    for g in range(layer.groups):
        at = slice(g * width, (g + 1) * width)
        logits = torch.stack([(q[..., at][..., i : i + 1] * k[..., at]).sum(1) for i in range(width)], 1)
        weights = torch.softmax(scale * logits, axis)  # (B, width, width)
        for i in range(width):
            out[..., g * width + i] = (weights[:, i, None] * v[..., at]).sum(-1)
    return out @ layer.proj.weight.T + layer.proj.bias, weights


@pytest.mark.parametrize("scale", ["head", "tokens"])
@pytest.mark.parametrize(("n", "groups"), [(1, 1), (7, 2), (31, 3)])
def test_channel_attention_is_its_definition(n, groups, scale):
    layer = shaken(fv.vision.ChannelGroupAttention(12, groups, scale=scale))
    x = normal(2, n, 12)
    expected, weights = by_channels(layer, x)
    torch.testing.assert_close(weights.sum(2), torch.ones_like(weights.sum(2)))  # rows sum to 1
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)
    if n > 1:
        wrong, _ = by_channels(layer, x, axis=1)
        assert (wrong - expected).abs().max() > 1e-3  # the other axis is another function


def test_permuted_tokens_give_the_permuted_result_and_maps_are_tokens():
    layer = shaken(fv.vision.ChannelGroupAttention(16, 2))
    x = normal(2, 35, 16)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(layer(x.view(2, 5, 7, 16)), layer(x).view(2, 5, 7, 16), atol=0, rtol=0)
    rows = normal(2, 7, 5, 16).transpose(1, 2)  # not contiguous
    torch.testing.assert_close(layer(rows), layer(rows.contiguous()), atol=1e-13, rtol=1e-12)


def test_one_far_pixel_changes_every_pixel_of_channel_attention_but_only_its_window_of_the_spatial_one():
    torch.manual_seed(0)
    layer = fv.vision.DualAttentionLayer(8, 2, window=4).double()
    x = normal(1, 12, 12, 8).requires_grad_()
    seen = torch.autograd.grad(layer.channel.attention(x)[0, 0, 0].sum(), x)[0].abs().sum(3)[0] > 0
    assert seen.all()
    seen = torch.autograd.grad(layer.spatial.attention(x)[0, 0, 0].sum(), x)[0].abs().sum(3)[0] > 0
    assert seen[:4, :4].all()
    assert seen.sum() == 16


def test_maps_wider_than_any_head():
    layer = shaken(fv.vision.ChannelGroupAttention(24, 2), 0.1)
    x = normal(1, 24, 30, 24)
    torch.testing.assert_close(layer.float()(x.float()).double(), layer.double()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("scale", "factor"), [("head", 2.0), ("tokens", 2.0**0.5)])
def test_twice_the_tokens(scale, factor):
    layer = shaken(fv.vision.ChannelGroupAttention(12, 2, scale=scale))
    x = normal(1, 9, 12)
    twice = layer(torch.cat([x, x], 1))[:, :9]
    expected, _ = by_channels(layer, x, factor=factor)
    torch.testing.assert_close(twice, expected, atol=1e-12, rtol=1e-12)


def windows(layer, x):
    """Window by window, with whole windows of zeros beyond the border."""
    b, h, w, c = x.shape
    side, heads = layer.window[0], layer.heads
    out = torch.zeros_like(x)
    for y0 in range(0, h, side):
        for x0 in range(0, w, side):
            cell = torch.zeros(b, side, side, c, dtype=x.dtype)
            part = x[:, y0 : y0 + side, x0 : x0 + side]
            cell[:, : part.shape[1], : part.shape[2]] = part
            q, k, v = (cell.flatten(1, 2) @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, 2)
            made = []
            for i in range(heads):
                at = slice(i * c // heads, (i + 1) * c // heads)
                logits = q[..., at] @ k[..., at].mT * (c // heads) ** -0.5
                made.append(torch.softmax(logits, 2) @ v[..., at])
            y = torch.cat(made, 2) @ layer.proj.weight.T + layer.proj.bias
            y = y.view(b, side, side, c)[:, : part.shape[1], : part.shape[2]]
            out[:, y0 : y0 + side, x0 : x0 + side] = y
    return out


def block(layer, x, attention):
    def conv(m, t):
        padded = t.permute(0, 3, 1, 2)
        return t + F.conv2d(padded, m.weight, m.bias, padding=1, groups=t.shape[3]).permute(0, 2, 3, 1)

    norm = lambda m, t: F.layer_norm(t, t.shape[-1:], m.weight, m.bias)  # noqa: E731
    x = conv(layer.position1.conv, x)
    x = x + attention(norm(layer.norm1, x))
    x = conv(layer.position2.conv, x)
    hidden = F.gelu(norm(layer.norm2, x) @ layer.mlp.fc1.weight.T + layer.mlp.fc1.bias)
    return x + hidden @ layer.mlp.fc2.weight.T + layer.mlp.fc2.bias


@pytest.mark.parametrize("size", [(4, 8), (7, 5), (3, 2), (13, 11)])
def test_the_layer_is_windows_then_channels(size):
    layer = shaken(fv.vision.DualAttentionLayer(8, 2, window=4))
    x = normal(2, *size, 8)
    expected = block(layer.spatial, x, lambda t: windows(layer.spatial.attention, t))
    channels = lambda t: by_channels(layer.channel.attention, t.flatten(1, 2))[0].view(t.shape)  # noqa: E731
    expected = block(layer.channel, expected, channels)
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=1e-10)


def test_gradients():
    layer = shaken(fv.vision.DualAttentionLayer(4, 2, window=2))
    assert torch.autograd.gradcheck(layer, normal(1, 3, 3, 4).requires_grad_())


COUNTS = {
    "tiny": 28_360_168,
    "small": 49_745_896,
    "base": 87_954_408,
    "large": 196_811_752,
    "huge": 348_922_856,
    "giant": 1_406_470_120,
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    with torch.device("meta"):
        model = getattr(fv.vision, f"davit_{name}")()
    assert parameters_of(model) == COUNTS[name]


def test_parameters_of_florence_towers():
    with torch.device("meta"):
        assert parameters_of(fv.vision.davit_base_fl(num_classes=0)) == 90_370_048


@pytest.mark.parametrize(("name", "published"), [("tiny", 4.5), ("small", 8.8), ("base", 15.5)])
def test_multiply_adds_are_the_published_ones(name, published):
    with torch.device("meta"):
        model = getattr(fv.vision, f"davit_{name}")()
    assert fv.vision.multiply_adds(model, 224) / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(("size", "window"), [((64, 64), 4), ((61, 83), 3), ((32, 40), 12)])
def test_transformers_tower(size, window):
    florence = pytest.importorskip("transformers.models.florence2.modeling_florence2")
    dims, depths, heads = (8, 16, 32), (1, 2, 1), (2, 4, 2)
    config = florence.Florence2VisionConfig(
        embed_dim=dims, depths=depths, num_heads=heads, num_groups=heads, window_size=window,
        patch_size=(7, 3, 3), patch_stride=(4, 2, 2), patch_padding=(3, 1, 1), patch_prenorm=(False, True, True),
    )  # fmt: skip
    theirs = florence.Florence2VisionBackbone(config).eval()
    for p in theirs.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    ours = fv.vision.DaViT(
        dims, depths, heads, window=window, scale="tokens", down_kernel=3, features_only=True
    ).eval()
    ours.load_state_dict(fv.vision.davit_state(theirs.state_dict(), depths=depths, scale="tokens"))
    images = normal(2, 3, *size, dtype=torch.float32)
    a, b = images.clone().requires_grad_(), images.clone().requires_grad_()
    expected, got = theirs(a).last_hidden_state, ours(b)[-1]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    weight = normal(*got.shape, dtype=torch.float32)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    torch.testing.assert_close(b.grad, a.grad, atol=1e-5 * float(a.grad.abs().max()), rtol=1e-5)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, grad in fv.vision.davit_state(grads, depths=depths, scale="tokens").items():
        top = float(grad.abs().max())
        torch.testing.assert_close(ours.get_parameter(name).grad, grad, atol=1e-5 * top, rtol=1e-5)


def test_released_names_and_roles():
    """timm's names; with "head" their k^T v applied to q becomes our Q^T K applied to V."""
    x = normal(2, 9, 8)
    layer = shaken(fv.vision.ChannelGroupAttention(8, 2))
    weight, bias = normal(24, 8, seed=5), normal(24, seed=6)
    q, k, v = (x @ weight.T + bias).view(2, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
    theirs = ((k.mT * 0.5 @ v).softmax(-1) @ q.mT).mT.transpose(1, 2).reshape(2, 9, 8)
    names = {"stages.1.blocks.0.1.attn.qkv.weight": weight, "stages.1.blocks.0.1.attn.qkv.bias": bias}
    state = fv.vision.davit_state(names, depths=(1, 1))
    assert list(state) == [f"stages.1.1.channel.attention.qkv.{n}" for n in ("weight", "bias")]
    layer.qkv.weight.data, layer.qkv.bias.data = state.values()
    layer.proj.weight.data, layer.proj.bias.data = torch.eye(8).double(), torch.zeros(8).double()
    torch.testing.assert_close(layer(x), theirs, atol=1e-12, rtol=1e-12)


def test_maps_and_head():
    model = shaken(fv.vision.DaViT((8, 16), (1, 1), (1, 2), window=3, num_classes=5), 0.1)
    images = normal(2, 3, 35, 61)
    maps = model.forward_features(images)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 9, 16), (2, 16, 5, 8)]
    pooled = F.layer_norm(maps[-1].mean((2, 3)), (16,), model.norm.weight, model.norm.bias)
    torch.testing.assert_close(model(images), pooled @ model.head.weight.T + model.head.bias)
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


def test_what_is_refused():
    with pytest.raises(ValueError, match="dim must be a multiple of groups, got 10 and 4"):
        fv.vision.ChannelGroupAttention(10, 4)
    with pytest.raises(ValueError, match="scale must be one of head, tokens, got 'n'"):
        fv.vision.ChannelGroupAttention(8, 4, scale="n")
    with pytest.raises(ValueError, match=r"x must be \(B, ..., 8\), got \(2, 8\)"):
        fv.vision.ChannelGroupAttention(8, 4)(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="of one length"):
        fv.vision.DaViT((8, 16), (1,), (1, 2))
    with pytest.raises(ValueError, match=r"depths must cover layer 1 of stage 0"):
        fv.vision.davit_state({"blocks.0.1.spatial_block.norm1.weight": torch.ones(1)}, depths=(1, 1))
