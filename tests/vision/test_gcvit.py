"""GC ViT: shared queries by their definition, what a window depends on, parameter counts, sizes and windows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import foveate as fv
from foveate.vision.backbone import parameters_of


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(module, std=0.3, seed=1):
    """The module in float64 with every parameter drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for p in module.parameters():
        p.data = std * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module


def window_by_window(layer, x, q_global=None):
    """Image by image, window by window, head by head, query by query; only cells of the map are keys."""
    b, h, w, c = x.shape
    side, heads = layer.window[0], layer.heads
    d, out = c // heads, torch.zeros_like(x)
    for image in range(b):
        for y0 in range(0, h, side):
            for x0 in range(0, w, side):
                cells = [(y, z) for y in range(y0, min(y0 + side, h)) for z in range(x0, min(x0 + side, w))]
                parts = torch.stack([layer.qkv(x[image, y, z]) for y, z in cells]).chunk(
                    3 - layer.use_global, 1
                )
                k, v = parts[-2:]
                for y, z in cells:
                    at = y - y0, z - x0
                    q = q_global[image][at] if layer.use_global else layer.qkv(x[image, y, z])[:c]
                    made = []
                    for i in range(heads):
                        here = slice(i * d, (i + 1) * d)
                        apart = [
                            (at[0] - (u - y0) + side - 1) * (2 * side - 1) + at[1] - (t - x0) + side - 1
                            for u, t in cells
                        ]
                        logits = k[:, here] @ q[here] * d**-0.5 + layer.relative.table[apart, i]
                        made.append(torch.softmax(logits, 0) @ v[:, here])
                    out[image, y, z] = layer.proj(torch.cat(made))
    return out


@pytest.mark.parametrize("use_global", [False, True])
@pytest.mark.parametrize("size", [(4, 4), (5, 2), (7, 3)])
def test_attention_is_its_definition(size, use_global):
    layer = shaken(fv.vision.GlobalWindowAttention(6, 2, 2, use_global=use_global))
    x, shared = normal(2, *size, 6), normal(2, 2, 2, 6, seed=3)
    expected = window_by_window(layer, x, shared)
    torch.testing.assert_close(layer(x, shared), expected, atol=1e-12, rtol=1e-12)
    turned = x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)  # not contiguous
    torch.testing.assert_close(layer(turned, shared), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_the_generator_is_its_definition(levels):
    maker = shaken(fv.vision.GlobalQueryGenerator(8, levels))
    x = normal(2, 8, 12, 16)
    expected = x
    for block in maker.blocks:
        y = F.gelu(F.conv2d(expected, block.depthwise.weight, padding=1, groups=8))
        means = y.mean((2, 3))  # (B, C)
        hidden = F.gelu(means @ block.gate.reduce.weight[:, :, 0, 0].T)
        gate = torch.sigmoid(hidden @ block.gate.expand.weight[:, :, 0, 0].T)
        expected = expected + F.conv2d(y * gate[:, :, None, None], block.pointwise.weight)
        if levels:
            expected = F.max_pool2d(expected, 3, stride=2, padding=1)
    assert len(maker.blocks) == max(1, levels)
    torch.testing.assert_close(maker(x), expected.permute(0, 2, 3, 1), atol=1e-12, rtol=1e-12)
    assert all(p.ndim == 4 for p in maker.parameters())  # no biases
    fitted = shaken(fv.vision.GlobalQueryGenerator(8, levels, window=5))
    same = F.adaptive_avg_pool2d(expected, 5).permute(0, 2, 3, 1)
    torch.testing.assert_close(fitted(x), same, atol=1e-12, rtol=1e-12)


def tiny(**options):
    return fv.vision.GCViT(16, (2, 2), (2, 4), image_size=32, num_classes=5, **options)


def test_a_batch_row_alone_gives_the_same():
    model = shaken(tiny(), 0.2)
    a, b = normal(1, 3, 32, 32), normal(1, 3, 32, 32, seed=1)
    both = model(torch.cat([a, b]))
    torch.testing.assert_close(both[:1], model(a), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(both[1:], model(b), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("use_global", [False, True])
def test_equal_keys_get_equal_weights_whatever_the_window_asks(use_global):
    """Two windows with the same keys and values but other queries: keys do not read the channel that queries do."""
    layer = shaken(fv.vision.GlobalWindowAttention(4, 2, 2, use_global=use_global))
    layer.qkv.weight.data[-8:, 0] = 0  # keys and values do not read channel 0
    window = normal(1, 2, 2, 4)
    other = window.clone()
    other[..., 0] += 3.0
    out = layer(torch.cat([window, other], 2), normal(1, 2, 2, 4, seed=3))
    apart = (out[:, :, :2] - out[:, :, 2:]).abs().max()
    assert apart < 1e-12 if use_global else apart > 1e-3


def test_other_windows_reach_a_global_block_through_the_shared_queries_alone():
    torch.manual_seed(0)
    layer = fv.vision.GlobalWindowAttention(8, 2, 4, use_global=True).double()
    maker = shaken(fv.vision.GlobalQueryGenerator(8, 1, window=4))
    x = normal(1, 8, 8, 8).requires_grad_()

    def reach(shared):
        grad = torch.autograd.grad(layer(x, shared)[0, :4, :4].square().sum(), x)[0]
        return grad.abs().sum(3)[0] > 0

    shared = maker(x.permute(0, 3, 1, 2))
    alone = reach(shared.detach())
    assert alone[:4, :4].all()
    assert not alone[4:].any()
    assert not alone[:, 4:].any()
    assert reach(shared).all()


def test_padding_is_not_seen():
    layer = shaken(fv.vision.GlobalWindowAttention(6, 2, 4, use_global=True))
    x, shared = normal(1, 4, 3, 6), normal(1, 4, 4, 6, seed=2)
    expected = window_by_window(layer, x, shared)
    torch.testing.assert_close(layer(x, shared), expected, atol=1e-12, rtol=1e-12)
    layer.qkv.bias.data[:] = 0
    zeros = torch.cat([x, x.new_zeros(1, 4, 1, 6)], 2)  # real cells of zeros are seen
    assert (layer(zeros, shared)[:, :, :3] - layer(x, shared)).abs().max() > 1e-3


@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("use_global", [False, True])
def test_single_precision_with_and_without_padding(size, use_global):
    layer = shaken(fv.vision.GlobalWindowAttention(16, 2, 4, use_global=use_global), 0.2)
    x, shared = normal(2, *size, 16), normal(2, 4, 4, 16, seed=3)
    expected = layer(x, shared)
    for _ in range(2):  # masks are kept between calls
        got = layer.float()(x.float(), shared.float()).double()
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    shared = shared.float().requires_grad_()
    layer(x.float(), shared).square().sum().backward()
    layer.double().zero_grad()
    again = normal(2, 4, 4, 16, seed=3).requires_grad_()
    layer(x, again).square().sum().backward()
    if use_global:
        torch.testing.assert_close(shared.grad.double(), again.grad, atol=1e-5, rtol=1e-4)


def test_gradients():
    layer = shaken(fv.vision.GlobalWindowAttention(4, 2, 2, use_global=True))
    inputs = normal(1, 3, 2, 4).requires_grad_(), normal(1, 2, 2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(layer, inputs)


COUNTS = {
    "xxtiny": (11_995_428, 2.1),
    "xtiny": (19_981_294, None),
    "tiny": (28_221_974, 4.7),
    "small": (51_092_173, 8.5),
    "base": (90_320_836, 14.8),
    "large": (202_075_570, 32.6),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_multiply_adds(name):
    """The published 2.6 G of XT is not met: the released code of that size counts 2.91 G, too."""
    with torch.device("meta"):
        model = getattr(fv.vision, f"gcvit_{name}")()
    parameters, published = COUNTS[name]
    assert parameters_of(model) == parameters
    if published is not None and name in ("xxtiny", "tiny"):
        counted = fv.vision.multiply_adds(model, 224) / 1e9
        assert counted == pytest.approx(published, rel=0.014)  # one digit after the point is published


def test_windows_follow_the_image_size():
    with torch.device("meta"):
        model = fv.vision.gcvit_xxtiny(image_size=(384, 512))
    windows = [stage.blocks[0].attention.window for stage in model.stages]
    assert windows == [(12, 16), (12, 16), (24, 32), (12, 16)]
    assert [stage.queries.levels for stage in model.stages] == [3, 2, 0, 0]
    kinds = [block.attention.use_global for block in model.stages[2].blocks]
    assert kinds == [False, True, False, True, False, True]


def test_resized_for_another_image():
    model = shaken(tiny(), 0.2)
    table = model.stages[0].blocks[0].attention.relative.table.detach().clone()
    same = model.resize_(32).stages[0].blocks[0].attention.relative.table
    torch.testing.assert_close(same.detach(), table, atol=1e-6, rtol=1e-6)
    model.resize_(96)
    assert model.stages[1].blocks[1].attention.window == (3, 3)
    images = normal(2, 3, 96, 96)
    assert model(images).isfinite().all()
    fresh = fv.vision.GCViT(16, (2, 2), (2, 4), image_size=96, num_classes=5).double().eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(images), model(images), atol=0, rtol=0)


@pytest.mark.parametrize("size", [(37, 61), (32, 96), (17, 19)])
def test_any_size(size):
    model = tiny().double().eval()
    maps = model.forward_features(normal(2, 3, *size))
    expected = [tuple(-(-n // s) for n in size) for s in (4, 8)]
    assert [tuple(m.shape[2:]) for m in maps] == expected


def test_released_names():
    model = tiny(layer_scale=0.1)
    ours = {
        "stem.weight": "patch_embed.proj.weight",
        "downs.0.block.gate.reduce.weight": "patch_embed.conv_down.conv.2.fc.0.weight",
        "downs.1.conv.weight": "levels.0.downsample.reduction.weight",
        "stages.0.queries.blocks.1.pointwise.weight": "levels.0.q_global_gen.to_q_global.1.conv.3.weight",
        "stages.1.blocks.0.attention.relative.table": "levels.1.blocks.0.attn.relative_position_bias_table",
        "stages.1.blocks.1.scale2.gamma": "levels.1.blocks.1.gamma2",
    }
    for name, theirs in ours.items():
        value = model.state_dict()[name]
        state = fv.vision.gcvit_state({theirs: value.flatten(1) if ".fc." in theirs else value})
        assert list(state) == [name]
        assert state[name].equal(value)


def test_what_is_refused():
    layer = fv.vision.GlobalWindowAttention(8, 2, 2, use_global=True)
    with pytest.raises(ValueError, match=r"q_global must be \(1, 2, 2, 8\) for x .*, got None"):
        layer(torch.zeros(1, 4, 4, 8))
    with pytest.raises(ValueError, match=r"q_global must be \(2, 2, 2, 8\) .*, got \(1, 2, 2, 8\)"):
        layer(torch.zeros(2, 4, 4, 8), torch.zeros(1, 2, 2, 8))
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, 8\), got \(1, 4, 8\)"):
        layer(torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got 8 and 3"):
        fv.vision.GlobalWindowAttention(8, 3, 2)
    with pytest.raises(ValueError, match="levels must be an int >= 0, got -1"):
        fv.vision.GlobalQueryGenerator(8, -1)
    with pytest.raises(ValueError, match="image_size must be a multiple of 32"):
        fv.vision.gcvit_xxtiny(image_size=100)
    with pytest.raises(ValueError, match="of one length, 1 to 4"):
        fv.vision.GCViT(16, (1, 1), (2,))
