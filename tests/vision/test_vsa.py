"""Varied-size windows: the sampled rectangles by the definition, and what offsets and scales make of them."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.vision import (
    SwinVSA,
    VariedSizeWindowAttention,
    VSABlock,
    multiply_adds,
    parameters_of,
    swin_vsa_small,
    swin_vsa_tiny,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def noisy(module, scale=0.3, seed=0):
    """The module in eval mode, in float64, with noise on every parameter."""
    g = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return module


def layer_of(*arguments, scale=0.3, **options):
    return noisy(VariedSizeWindowAttention(*arguments, **options), scale)


def bilinear(image, y, x):
    """image (h, w, d) at a place, zero outside."""
    total = torch.zeros(image.shape[2], dtype=image.dtype)
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
                total = total + (1 - abs(y - i)) * (1 - abs(x - j)) * image[i, j]
    return total


def definition(layer, x):
    """Window by window, head by head, slot by slot, in normalised coordinates as the paper's code has them."""
    (b, h, w, c), (wh, ww), d = x.shape, layer.window, layer.head_dim
    rows, columns = -(-h // wh), -(-w // ww)
    high, wide = rows * wh, columns * ww
    padded, qkv = x.new_zeros(b, high, wide, c), x.new_zeros(b, high, wide, 3 * c)
    padded[:, :h, :w], qkv[:, :h, :w] = x, layer.qkv(x)
    table = layer.position.table.view(2 * wh - 1, 2 * ww - 1, -1)
    out = x.new_zeros(b, high, wide, c)
    slots = [(y, z) for y in range(wh) for z in range(ww)]
    for n, r, s, head in [(n, r, s, head) for n in range(b) for r in range(rows) for s in range(columns)
                          for head in range(layer.heads)]:  # fmt: skip
        top, left = r * wh, s * ww
        z = torch.nn.functional.leaky_relu(padded[n, top : top + wh, left : left + ww].mean((0, 1)), 0.01)
        ox, oy = layer.offset(z)[2 * head : 2 * head + 2].tolist()
        sx, sy = layer.scale(z)[2 * head : 2 * head + 2].tolist()
        ox, oy = ox / max(w // ww, 1), oy / max(h // wh, 1)
        step_x, step_y = 2 / (wide - 1), 2 / (high - 1)
        mid_x, mid_y = -1 + (left + (ww - 1) / 2) * step_x, -1 + (top + (wh - 1) / 2) * step_y
        k, v = (qkv[n, :, :, part * c + head * d : part * c + (head + 1) * d] for part in (1, 2))
        keys, values = [], []
        for y, xx in slots:
            px = mid_x + (xx - (ww - 1) / 2) * step_x * (1 + sx) + ox
            py = mid_y + (y - (wh - 1) / 2) * step_y * (1 + sy) + oy
            keys.append(bilinear(k, (py + 1) / step_y, (px + 1) / step_x))
            values.append(bilinear(v, (py + 1) / step_y, (px + 1) / step_x))
        for y, xx in slots:
            q = qkv[n, top + y, left + xx, head * d : (head + 1) * d]
            bias = torch.stack([table[y - ky + wh - 1, xx - kx + ww - 1, head] for ky, kx in slots])
            weights = (torch.stack(keys) @ q / d**0.5 + bias).softmax(0)
            out[n, top + y, left + xx, head * d : (head + 1) * d] = weights @ torch.stack(values)
    return layer.proj(out[:, :h, :w])


@pytest.mark.parametrize(("grid", "window"), [((4, 8), 4), ((7, 5), 3), ((5, 4), (2, 3)), ((3, 2), 4)])
def test_the_layer_is_the_definition(grid, window):
    layer = layer_of(4, 2, window)
    x = torch.randn(2, *grid, 4, dtype=torch.float64)
    found = layer.predict_windows(x)
    assert found["offset"].abs().max() > 0.3
    assert found["scale"].abs().max() > 0.1
    torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-9, atol=1e-9)


def fixed(layer, x):
    """Attention inside the fixed windows of a padded map, keys and values of the padding zero."""
    (b, h, w, _), (wh, ww), d = x.shape, layer.window, layer.head_dim
    rows, columns = -(-h // wh), -(-w // ww)
    qkv = x.new_zeros(b, rows * wh, columns * ww, 3 * layer.dim)
    qkv[:, :h, :w] = layer.qkv(x)
    cells = qkv.view(b, rows, wh, columns, ww, 3, layer.heads, d).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = cells.flatten(5, 6)  # (b, rows, columns, H, n, d)
    out = (q @ k.mT / d**0.5 + layer.position()).softmax(5) @ v
    out = out.unflatten(4, (wh, ww)).permute(0, 1, 4, 2, 5, 3, 6).reshape(b, rows * wh, columns * ww, -1)
    return layer.proj(out[:, :h, :w])


def still(layer):
    """The layer with regressors of zero."""
    with torch.no_grad():
        for part in (layer.offset, layer.scale):
            part.weight.zero_()
            part.bias.zero_()
    return layer


@pytest.mark.parametrize("grid", [(14, 21), (13, 9), (5, 17), (1, 1)])
def test_regressors_of_zero_are_fixed_windows(grid):
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    layer = still(layer_of(8, 2, 7))
    torch.testing.assert_close(layer(x), fixed(layer, x), rtol=1e-9, atol=1e-9)
    new = VariedSizeWindowAttention(8, 2, 7)  # as it is made
    torch.testing.assert_close(new(x.float()), fixed(new, x.float()), rtol=1e-6, atol=1e-6)


class Constant(torch.nn.Module):
    """The same tensor for any input."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, _):
        return self.value


def test_an_offset_of_one_window_reads_the_neighbour():
    """Queries of a window with the keys and values of the window to its right; beyond the border, zeros."""
    layer, w, wide = still(layer_of(8, 2, 4)), 4, 16
    x = torch.randn(2, 8, wide, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.offset.bias.copy_(
            torch.tensor([2 * w / (wide - 1) * (wide // w), 0.0], dtype=torch.float64).repeat(2)
        )
    torch.testing.assert_close(
        layer.predict_windows(x)["offset"][..., 0], torch.full((2, 2, 2, 4), 4.0, dtype=torch.float64)
    )
    moved = layer.qkv(x).roll(-w, 2)  # keys and values of the right neighbour
    moved[:, :, -w:] = 0
    mixed = torch.cat([layer.qkv(x)[..., :8], moved[..., 8:]], 3)
    result = layer(x)
    still(layer).qkv = Constant(mixed)
    torch.testing.assert_close(result, fixed(layer, x), rtol=1e-9, atol=1e-9)


def test_a_scale_of_minus_one_collapses_the_window():
    """All slots are the centre: every query gets the value there, whatever the bias and the query."""
    layer = still(layer_of(8, 2, 4))
    with torch.no_grad():
        layer.scale.bias.fill_(-1)
    x = torch.randn(2, 8, 12, 8, dtype=torch.float64)
    v = layer.qkv(x)[..., 16:]
    centre = v.view(2, 2, 4, 3, 4, 8)[:, :, 1:3, :, 1:3].mean((2, 4))  # (2, rows, columns, C)
    expected = layer.proj(centre).repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_heads_have_windows_of_their_own():
    layer = layer_of(8, 2, 4)
    layer.proj = torch.nn.Identity()
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.offset.bias[2:] += 0.3  # of the second head
        layer.scale.bias[2:] -= 0.2
    after = layer(x)
    assert after[..., :4].equal(before[..., :4])
    assert (after - before)[..., 4:].abs().min(3).values.median() > 1e-4


def test_regressors_learn():
    layer = layer_of(8, 2, 4, scale=0.05)
    (layer(torch.randn(2, 9, 11, 8, dtype=torch.float64)) ** 2).sum().backward()
    for part in (layer.offset, layer.scale):
        assert (part.weight.grad.abs() > 0).all()
        assert (part.bias.grad.abs() > 0).all()


def test_gradients():
    layer = layer_of(2, 1, 2)
    x = torch.randn(1, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_counting_the_windows_that_padding_completes():
    """Offsets are divided by whole windows in the released code: 1 of 2 here."""
    x = torch.randn(1, 7, 7, 8, dtype=torch.float64)
    released, other = layer_of(8, 2, 4), layer_of(8, 2, 4, count_padding=True)
    a, b = (layer.predict_windows(x)["offset"] for layer in (released, other))
    torch.testing.assert_close(a, 2 * b)


def test_low_precision_samples_in_float32():
    """Places of a wide map need more than the 8 bits of bfloat16."""
    layer = VariedSizeWindowAttention(8, 2, 4)
    x = torch.randn(1, 4, 200, 8)
    exact = layer(x)
    rough = layer.bfloat16()(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().max() < 0.02 * exact.abs().max()


def test_strided_inputs():
    layer = layer_of(8, 2, 4)
    x = torch.randn(8, 9, 11, 2, dtype=torch.float64).permute(3, 1, 2, 0)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("size", [(61, 47), (31, 97), (3, 5)])
def test_any_image_size_works(size):
    model = SwinVSA(dim=8, depths=(1, 1), heads=(1, 2), window=4, num_classes=5).eval()
    assert model(torch.randn(2, 3, *size)).isfinite().all()


def test_parameters_and_multiply_adds():
    with torch.device("meta"):
        tiny, small = swin_vsa_tiny(), swin_vsa_small()
    # Swin's, and per block a convolution and the two regressors
    blocks = [(96, 3)] * 2 + [(192, 6)] * 2 + [(384, 12)] * 6 + [(768, 24)] * 2
    more = sum(50 * c + 4 * h * (c + 1) for c, h in blocks)
    assert parameters_of(tiny) == 28_288_354 + more == 28_779_274
    assert parameters_of(small) == 49_606_258 + more + 12 * (50 * 384 + 48 * 385)
    assert multiply_adds(tiny) == pytest.approx(4.6e9, rel=0.02)  # published without its convention
    layers = [block.attention for block in tiny.modules() if isinstance(block, VSABlock)]
    assert len(layers) == 12


def test_arguments_are_checked():
    with pytest.raises(
        ValueError, match="VariedSizeWindowAttention: dim must be a multiple of heads, got 8 and 3"
    ):
        VariedSizeWindowAttention(8, 3)
    with pytest.raises(ValueError, match="VariedSizeWindowAttention: window must be an int >= 1"):
        VariedSizeWindowAttention(8, 2, 0)
    with pytest.raises(ValueError, match=r"x must be \(B, h, w, 8\), got \(1, 5, 8\)"):
        VariedSizeWindowAttention(8, 2)(torch.zeros(1, 5, 8))
    with pytest.raises(ValueError, match="SwinVSA: windows cannot be changed, got 12"):
        SwinVSA(dim=8, depths=(1,), heads=(1,), window=4).resize_window_(12)
