"""L2ViT: linear attention against its quadratic form, the floor, blocks written out, counts, sizes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from foveate.vision import (
    L2ViT,
    LGABlock,
    LocalConcentration,
    LWABlock,
    ReluLinearAttention,
    l2vit_base,
    l2vit_small,
    l2vit_tiny,
    multiply_adds,
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


def quadratic(layer, x):
    """All pairs of weights, row by row: (B, N, C)."""
    n, d, out = x.shape[1], layer.head_dim, torch.zeros_like(x)
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).split(layer.dim, -1)
    for b in range(x.shape[0]):
        for h in range(layer.heads):
            cut = slice(h * d, h * d + d)
            for i in range(n):
                weights = q[b, i, cut].relu() @ k[b, :, cut].relu().T
                share = weights / weights.sum().clamp(min=layer.denom_min)
                out[b, i, cut] = layer.temperature[h, 0, 0] * share @ v[b, :, cut]
    return layer.proj(out)


@pytest.mark.parametrize("denom_min", [1e-6, 3.0, 100.0])
def test_linear_attention_is_its_quadratic_form(denom_min):
    layer, x = made(ReluLinearAttention, 12, 3, denom_min=denom_min), normal(2, 17, 12)
    torch.testing.assert_close(layer(x), quadratic(layer, x), atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(layer(x.unflatten(1, (1, 17)))[:, 0], layer(x), atol=1e-13, rtol=0)


def test_under_the_floor_it_is_linear_in_the_queries():
    q, k, v = (normal(1, 2, 40, 8, seed=s) for s in range(3))
    most = float((q.relu() @ k.relu().sum(2)[..., None]).max())
    floored = ReluLinearAttention(16, 2, denom_min=1.01 * most).double()
    normed = ReluLinearAttention(16, 2, denom_min=1e-9).double()
    torch.testing.assert_close(floored.mixed(q / 2, k, v), floored.mixed(q, k, v) / 2, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(normed.mixed(q / 2, k, v), normed.mixed(q, k, v), atol=1e-14, rtol=1e-12)
    assert not torch.allclose(floored.mixed(q, k, v), normed.mixed(q, k, v))


def test_rows_sum_to_the_temperature_above_the_floor():
    q, k = normal(1, 2, 40, 8).abs() + 1, normal(1, 2, 40, 8, seed=1).abs() + 1
    layer = ReluLinearAttention(16, 2).double()
    ones = torch.ones(1, 2, 40, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.temperature[1] = 3.0
    got = layer.mixed(q, k, ones)
    torch.testing.assert_close(got[:, 0], ones[:, 0] * 8**-0.5, atol=1e-7, rtol=0)
    torch.testing.assert_close(got[:, 1], ones[:, 1] * 3, atol=1e-12, rtol=0)
    fixed = ReluLinearAttention(16, 2, temperature=0.5).double()
    torch.testing.assert_close(fixed.mixed(q, k, ones), ones / 2, atol=1e-12, rtol=0)
    assert len(list(fixed.parameters())) == len(list(layer.parameters())) - 1


def test_permuted_tokens_give_permuted_results_without_convolutions_alone():
    x, order = normal(1, 4, 6, 16), torch.randperm(24, generator=torch.Generator().manual_seed(1))
    moved = x.flatten(1, 2)[:, order].view_as(x)
    layer, local = made(ReluLinearAttention, 16, 2), made(LocalConcentration, 16)
    turned = lambda f: f(x).flatten(1, 2)[:, order].view_as(x)  # noqa: E731
    torch.testing.assert_close(layer(moved), turned(layer), atol=1e-12, rtol=0)
    both = lambda t: local(layer(t))  # noqa: E731
    assert float((both(moved) - turned(both)).detach().abs().max()) > 1e-2


def test_four_times_the_tokens_cost_four_times_as_much():
    layer = ReluLinearAttention(32, 2)
    work = [multiply_adds(layer_on(layer), side) for side in (16, 32, 64)]
    assert work[1] == 4 * work[0]
    assert work[2] == 4 * work[1]


def layer_on(layer):
    """The layer on images of as many channels as it has."""

    class Mapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.expand, self.layer = torch.nn.Conv2d(3, layer.dim, 1), layer

        def forward(self, images):
            return self.layer(self.expand(images).permute(0, 2, 3, 1))

    return Mapped()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_tokens_do_not_overflow_in_half_precision(dtype):
    q = k = torch.full((1, 1, 4096, 8), 20.0, dtype=dtype)  # k^T v sums to 1.6e6 > 65,504
    out = ReluLinearAttention(8, 1).mixed(q, k, k)
    torch.testing.assert_close(out, torch.full_like(out, 20 * 8**-0.5), atol=1e-4, rtol=1e-4)


def convolved(x, conv):
    """A depthwise convolution of (B, H, W, C) by shifts."""
    r, (h, w) = conv.kernel_size[0] // 2, x.shape[1:3]
    padded, out = F.pad(x, (0, 0, r, r, r, r)), torch.zeros_like(x) + conv.bias
    for dy in range(2 * r + 1):
        for dx in range(2 * r + 1):
            out = out + padded[:, dy : dy + h, dx : dx + w] * conv.weight[:, 0, dy, dx]
    return out


def normed(x, norm):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-5)


def mlp(x, block):
    h = normed(x, block.norm2)
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(h)))


def test_the_global_block_is_its_formula():
    block, x = made(LGABlock, 12, 3, kernel=5, mlp_ratio=2, denom_min=1.0), normal(2, 5, 7, 12)
    y = x + convolved(x, block.positions.conv)
    y = y + quadratic(block.attn, normed(y, block.norm1).flatten(1, 2)).view_as(y)
    h, n = F.gelu(convolved(normed(y, block.norm3), block.local.conv1)), block.local.norm
    h = (h - n.running_mean) / torch.sqrt(n.running_var + n.eps) * n.weight + n.bias
    y = y + convolved(h, block.local.conv2)
    torch.testing.assert_close(block(x), mlp(y, block), atol=1e-10, rtol=1e-10)
    bare = made(LGABlock, 12, 3, kernel=None)
    assert bare.local is None
    assert bare(x).shape == x.shape


@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (2, 4), (3, 1)])
def test_the_local_block_is_its_formula(grid):
    block, x = made(LWABlock, 8, 2, window=3, mlp_ratio=2), normal(2, *grid, 8)
    y = x + convolved(x, block.positions1.conv)
    more = [-n % 3 for n in grid]
    seen = F.pad(normed(y, block.norm1), (0, 0, 0, more[1], 0, more[0]))  # zeros are keys
    out = torch.zeros_like(seen)
    for top in range(0, seen.shape[1], 3):
        for left in range(0, seen.shape[2], 3):
            cell = seen[:, top : top + 3, left : left + 3].reshape(2, 9, 8)
            q, k, v = block.attn.qkv(cell).split(8, -1)
            heads = [
                torch.softmax(q[..., c] @ k[..., c].mT / 2, -1) @ v[..., c]
                for c in (slice(0, 4), slice(4, 8))
            ]
            out[:, top : top + 3, left : left + 3] = block.attn.proj(torch.cat(heads, -1)).view(2, 3, 3, 8)
    y = y + out[:, : grid[0], : grid[1]]
    y = y + convolved(y, block.positions2.conv)
    torch.testing.assert_close(block(x), mlp(y, block), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("factory", "parameters", "published"),
    [(l2vit_tiny, 28_596_781, 4.7), (l2vit_small, 50_199_157, 9.0), (l2vit_base, 88_577_188, 15.9)],
)
def test_parameters_and_multiply_adds(factory, parameters, published):
    with torch.device("meta"):
        model = factory()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert abs(multiply_adds(model) / 1e9 - published) < 0.01 * published
    kinds = [[type(block).__name__[1] for block in stage] for stage in model.stages]
    assert kinds == [["W", "G"] * (len(stage) // 2) for stage in model.stages]


def test_the_entry_counts_temperature_and_local_concentration():
    block = LGABlock(24, 3, kernel=5)
    added = sum(p.numel() for p in block.local.parameters()) + block.attn.temperature.numel()
    assert added == 3 + 2 * 24 * (25 + 1) + 2 * 24


def test_initial_weights():
    torch.manual_seed(0)
    model = L2ViT((32, 64), (2, 2), (2, 4), num_classes=10)
    for m in model.modules():
        if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)):
            assert m.bias is None or not m.bias.any()
            if m.weight.numel() > 1000:
                assert 0.0185 < float(m.weight.detach().std()) < 0.0215
        if isinstance(m, ReluLinearAttention):
            assert m.temperature.flatten().tolist() == pytest.approx([16**-0.5] * m.heads)


def small(**options):
    return L2ViT(
        (8, 16), (2, 2), **{"heads": (2, 2), "window": 3, "mlp_ratio": 2, "num_classes": 5, **options}
    )


@pytest.mark.parametrize("size", [(32, 32), (61, 37), (1, 1), (5, 97)])
def test_any_size(size):
    model, x = made(small), normal(2, 3, *size).requires_grad_()
    maps = model.forward_features(x)
    h, w = (-(-n // 4) for n in size)
    assert maps[0].shape == (2, 8, h, w)
    assert maps[1].shape == (2, 16, -(-h // 2), -(-w // 2))
    pooled = normed(maps[1].permute(0, 2, 3, 1), model.norm).mean((1, 2))
    torch.testing.assert_close(model(x), model.head(pooled), atol=1e-12, rtol=1e-12)
    model(x).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_strides_of_the_input_do_not_matter():
    x = normal(2, 6, 5, 8)
    for layer in (made(LGABlock, 8, 2), made(LWABlock, 8, 2, window=4)):
        strided = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
        assert not strided.is_contiguous()
        torch.testing.assert_close(layer(strided), layer(x), atol=1e-11, rtol=1e-11)


def test_gradients():
    x = normal(1, 2, 3, 4).requires_grad_()
    for denom_min in (1e-3, 100.0):
        assert torch.autograd.gradcheck(made(ReluLinearAttention, 4, 2, denom_min=denom_min), (x,))
    assert torch.autograd.gradcheck(made(LocalConcentration, 4, 3), (x,))


def test_errors_name_the_argument():
    for call, says in (
        (lambda: ReluLinearAttention(10, 4), "dim must be a multiple of heads, got 10 and 4"),
        (lambda: ReluLinearAttention(8, 2, denom_min=0.0), "denom_min must be > 0, got 0"),
        (lambda: ReluLinearAttention(8, 2, temperature="fixed"), "temperature must be 'learned' or a number"),
        (lambda: ReluLinearAttention(8, 2)(torch.zeros(3, 8)), r"x must be \(B, ..., 8\), got \(3, 8\)"),
        (lambda: LocalConcentration(8, 4), "kernel must be odd, got 4"),
        (lambda: small(heads=(2,)), "heads must have one value per stage"),
        (lambda: L2ViT((8, 16), (1,), (1, 1)), "depths must have one value per stage"),
        (lambda: small()(torch.zeros(1, 1, 8, 8)), r"images must be \(B, 3, H, W\)"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
