"""SpectFormer: the spectral gate against convolution and a slow Fourier transform, and the models' blocks and sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from foveate.vision import (
    SpectFormer,
    SpectFormerH,
    SpectralBlock,
    SpectralGate,
    multiply_adds,
    parameters_of,
    spectformer_base,
    spectformer_h_base,
    spectformer_h_large,
    spectformer_h_small,
    spectformer_small,
    spectformer_tiny,
    spectformer_xsmall,
)
from foveate.vision.spectformer import AttentionBlock, ClassAttention


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gate(dim, grid, std=1.0):
    torch.manual_seed(0)
    return SpectralGate(dim, grid, std=std).double()


def fourier(n):
    """(n, n) matrix of the orthonormal transform."""
    at = torch.arange(n, dtype=torch.float64)
    return torch.exp(-2j * math.pi * at[:, None] * at / n) / n**0.5


def defined(layer, x):
    """Multiplied in the whole spectrum: where the half is not stored it is the conjugate of the opposite frequency."""
    h, w = x.shape[1:3]
    spectrum = torch.einsum("uy,vx,byxc->buvc", fourier(h), fourier(w), x.to(torch.complex128))
    half = torch.view_as_complex(layer.weight)
    full = torch.zeros(h, w, x.shape[3], dtype=torch.complex128)
    for u in range(h):
        for v in range(w):
            other = half[-u % h, -v % w].conj() if -v % w <= w // 2 else None
            own = half[u, v] if v <= w // 2 else None
            found = [part for part in (own, other) if part is not None]
            full[u, v] = sum(found) / len(found)  # both stored: only their mean is the filter of a real map
    back = torch.einsum("uy,vx,buvc->byxc", fourier(h).conj(), fourier(w).conj(), spectrum * full)
    assert back.imag.abs().max() < 1e-12
    return back.real


def convolved(kernel, x):
    """Circular convolution (H, W, C) of (B, H, W, C), place by place."""
    out, (h, w) = torch.zeros_like(x), x.shape[1:3]
    for y in range(h):
        for z in range(w):
            out += kernel[y, z] * x.roll((y, z), (1, 2))
    return out


GRIDS = [(4, 6), (5, 7), (3, 4), (1, 5), (6, 1)]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_gate_is_its_definition(grid):
    layer, x = gate(3, grid), normal(2, *grid, 3)
    torch.testing.assert_close(layer(x), defined(layer, x), atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_gate_is_a_circular_convolution(grid):
    layer, x, kernel = gate(3, grid), normal(2, *grid, 3), normal(*grid, 3, seed=1)
    layer.weight.data = torch.view_as_real(torch.fft.rfft2(kernel, dim=(0, 1)))  # not normalised
    torch.testing.assert_close(layer(x), convolved(kernel, x), atol=1e-11, rtol=1e-10)
    layer.weight.data = torch.stack(
        [torch.ones(layer.weight.shape[:3]), torch.zeros(layer.weight.shape[:3])], 3
    )
    torch.testing.assert_close(layer(x), x, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.float()(x.float()), x.float(), atol=1e-5, rtol=0)


def test_gradients():
    layer, x = gate(2, (3, 4)), normal(2, 3, 4, 2).requires_grad_()
    weight = layer.weight
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(layer, {"weight": w}, x), (x, weight)
    )


def test_shifts_pass_through_permutations_do_not():
    torch.manual_seed(0)
    x, order = normal(1, 5, 6, 8), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    spectral, attending = SpectralBlock(8, (5, 6)).double(), AttentionBlock(8, 2).double()
    with torch.no_grad():
        for p in (*spectral.parameters(), *attending.parameters()):
            p.add_(0.3 * torch.randn_like(p))
    for shift in ((1, 0), (0, 1), (3, 4)):
        torch.testing.assert_close(spectral(x.roll(shift, (1, 2))), spectral(x).roll(shift, (1, 2)))
    mixed = x.flatten(1, 2)[:, order].view_as(x)
    torch.testing.assert_close(attending(mixed), attending(x).flatten(1, 2)[:, order].view_as(x))
    assert (spectral(mixed) - spectral(x).flatten(1, 2)[:, order].view_as(x)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_transformed_in_float32(dtype):
    layer, x = gate(4, (5, 6)).float(), normal(1, 5, 6, 4).to(dtype)
    out = layer(x)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert torch.equal(out, layer(x.float()).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), out)
    assert torch.equal(layer.to(dtype)(x).float().isfinite(), torch.ones_like(x, dtype=torch.bool))


def test_other_grids_interpolate_the_filter():
    layer = gate(3, (4, 6))
    weight = layer.weight.detach().clone()
    assert torch.equal(layer.filter((4, 6)), torch.view_as_complex(weight))
    assert torch.equal(layer.filter((4, 7)).real, weight[..., 0])  # 4 columns of frequencies, too
    wide = layer.filter((7, 13))  # (7, 7): every second row and column is old
    torch.testing.assert_close(wide[::2, ::2], torch.view_as_complex(weight))
    torch.testing.assert_close(wide[1, 0], (wide[0, 0] + wide[2, 0]) / 2)
    x = normal(1, 7, 13, 3)
    before = layer(x)
    assert layer.resize_((7, 13)).weight.shape == (7, 7, 3, 2)
    torch.testing.assert_close(layer(x), before)
    assert layer.grid == (7, 13)


def test_non_contiguous_maps():
    layer, x = gate(3, (4, 6)), normal(2, 3, 6, 4)
    torch.testing.assert_close(layer(x.permute(0, 3, 2, 1)), layer(x.permute(0, 3, 2, 1).contiguous()))


@pytest.mark.parametrize(
    ("factory", "parameters"),
    [
        (spectformer_tiny, 9_158_376),
        (spectformer_xsmall, 20_028_520),
        (spectformer_small, 32_449_768),
        (spectformer_base, 57_159_656),
    ],
)
def test_the_vanilla_models_have_their_parameters(factory, parameters):
    with torch.device("meta"):
        model = factory()
    assert parameters_of(model) == parameters
    assert [type(block).__name__ for block in model.blocks[3:5]] == ["SpectralBlock", "AttentionBlock"]
    assert {block.attention.head_dim for block in model.blocks[4:]} == {64}


@pytest.mark.parametrize(
    ("factory", "labelled", "plain"),
    [
        (spectformer_h_small, 22_226_928, 21_777_928),
        (spectformer_h_base, 33_052_880, 32_539_880),
        (spectformer_h_large, 54_675_792, 54_162_792),
    ],
)
def test_the_hierarchical_models_have_their_parameters(factory, labelled, plain):
    with torch.device("meta"):
        model = factory()
        assert parameters_of(factory(token_labels=True)) == labelled
    assert parameters_of(model) == plain
    gates = [m.weight.shape[:2] for m in model.modules() if isinstance(m, SpectralGate)]
    assert gates == [(56, 29)] * 3 + [(28, 15)] * len(model.stages[1])


def test_the_cost_of_the_tiny_model():
    with torch.device("meta"):
        model = spectformer_tiny()
    n, c = 196, 256
    want = n * 768 * c + 4 * 8 * n * c * c + 8 * (12 * n * c * c + 2 * n * n * c) + 1000 * c
    assert multiply_adds(model) == want  # transforms are not matrix products


@pytest.mark.parametrize(
    ("factory", "giga"), [(spectformer_h_small, 3.9), (spectformer_h_base, 6.3), (spectformer_h_large, 12.7)]
)
def test_the_cost_is_the_published_one_which_leaves_out_the_pairs(factory, giga):
    with torch.device("meta"):
        model = factory()
    pairs = sum(
        2 * (14 // 2**i) ** 4 * channels * len(stage)
        for i, (channels, stage) in enumerate(zip(model.channels[2:], model.stages[2:], strict=True))
    )
    assert (multiply_adds(model) - pairs) / 1e9 == pytest.approx(giga, rel=0.01)


def stirred(model):
    torch.manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def attended(layer, x):
    """Softmax attention among (B, N, C) with the maps of a `TokenAttention`."""
    q, k, v = (t.unflatten(2, (layer.heads, -1)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    return layer.proj((torch.softmax(q @ k.mT / q.shape[3] ** 0.5, -1) @ v).transpose(1, 2).flatten(2))


def test_the_vanilla_model_is_its_definition():
    model = stirred(SpectFormer(dim=12, depth=3, heads=3, alpha=2, patch=4, size=16, num_classes=5))
    images = normal(2, 3, 16, 16)
    x = model.embed.proj(images).permute(0, 2, 3, 1) + model.positions
    for block in model.blocks[:2]:
        x = x + block.mlp(block.norm2(defined(block.gate, block.norm1(x))))
    x, block = x.flatten(1, 2), model.blocks[2]
    x = x + attended(block.attention, block.norm1(x))
    x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(model(images), model.head(model.norm(x).mean(1)), atol=1e-11, rtol=1e-10)


def small(**options):
    torch.manual_seed(0)
    return SpectFormerH(
        **{
            "dims": (8, 12, 16),
            "heads": (1, 2, 2),
            "depths": (1, 1, 2),
            "mlp_ratios": (2, 2, 2),
            "stem": 6,
            "size": 32,
            "num_classes": 5,
            **options,
        }
    )


def test_the_hierarchical_model_is_its_definition():
    model = stirred(small(token_labels=True))
    images = normal(2, 3, 32, 32)
    x = images
    for part, stride in zip(model.stem, (2, 1, 1), strict=True):
        x = F.conv2d(x, part.conv.weight, stride=stride, padding=part.conv.kernel_size[0] // 2)
        x = F.relu(
            F.batch_norm(x, part.norm.running_mean, part.norm.running_var, part.norm.weight, part.norm.bias)
        )
    for i in range(3):
        down = model.down[i]
        x = down.norm(F.conv2d(x, down.conv.weight, down.conv.bias, stride=2, padding=1).permute(0, 2, 3, 1))
        for block in model.stages[i]:
            y = block.norm1(x)
            x = x + (defined(block.mix, y) if i < 2 else attended(block.mix, y.flatten(1, 2)).view_as(y))
            y, mlp = block.norm2(x), block.mlp
            y = F.conv2d(
                mlp.fc1(y).permute(0, 3, 1, 2),
                mlp.conv.weight,
                mlp.conv.bias,
                padding=1,
                groups=2 * y.shape[3],
            )
            x = x + mlp.fc2(F.gelu(y.permute(0, 2, 3, 1)))
        if i < 2:
            x = model.norms[i](x).permute(0, 3, 1, 2)
    x, post = x.flatten(1, 2), model.post  # (B, 4, 16)
    token = x.mean(1, keepdim=True)
    all_tokens = post.norm1(torch.cat([token, x], 1))
    cut = lambda t: t.unflatten(2, (2, -1)).transpose(1, 2)  # noqa: E731
    q, (k, v) = cut(post.attention.q(all_tokens[:, :1])), map(cut, post.attention.kv(all_tokens).chunk(2, -1))
    told = (torch.softmax(q @ k.mT / 8**0.5, -1) @ v).transpose(1, 2).flatten(2)
    token = token + post.attention.proj(told)
    token = token + post.mlp(post.norm2(token))
    scores = model.head(model.norm(token[:, 0]))
    of_tokens = model.token_head(model.norm(x))
    torch.testing.assert_close(model(images), scores + 0.5 * of_tokens.max(1)[0], atol=1e-11, rtol=1e-10)
    model.train()
    both = model(images)
    assert both[0].shape == (2, 5)
    assert both[1].shape == (2, 4, 5)


def test_uses_of_the_models():
    images = torch.randn(2, 3, 37, 59)
    vanilla = {"dim": 12, "depth": 2, "heads": 3, "alpha": 1, "patch": 8, "size": 32}
    assert SpectFormer(**vanilla, num_classes=5)(images).shape == (2, 5)
    (features,) = SpectFormer(**vanilla, features_only=True)(images)
    assert features.shape == (2, 12, 5, 8)
    assert [tuple(m.shape[1:]) for m in small(features_only=True)(images)] == [
        (8, 10, 15),
        (12, 5, 8),
        (16, 3, 4),
    ]
    assert small(num_classes=0)(images).shape == (2, 16)
    assert small()(images).shape == (2, 5)  # without token labels also in train mode
    for alpha, kinds in ((0, {"AttentionBlock"}), (2, {"SpectralBlock"})):
        model = SpectFormer(**{**vanilla, "alpha": alpha})
        assert {type(block).__name__ for block in model.blocks} == kinds


def test_initialisation():
    torch.manual_seed(0)
    layer = SpectralGate(64, 14)
    assert layer.weight.shape == (14, 8, 64, 2)
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    model = small(dims=(32, 64, 64), stem=32)
    conv = model.stages[0][0].mlp.conv.weight  # depthwise: 9 per output
    assert conv.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.1)
    assert model.stages[0][0].mlp.fc1.weight.std().item() < 0.03
    assert model.stages[0][0].mix.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="SpectralGate: grid must be an int >= 1 or two of them, got 0"):
        SpectralGate(8, 0)
    with pytest.raises(ValueError, match=r"SpectralGate: x must be \(B, H, W, 8\), got \(2, 9, 8\)"):
        SpectralGate(8, 3)(torch.zeros(2, 9, 8))
    with pytest.raises(ValueError, match=r"SpectFormer: alpha must be in \[0, depth = 2\], got 3"):
        SpectFormer(dim=8, heads=1, depth=2, alpha=3)
    with pytest.raises(ValueError, match="ClassAttention: dim must be a multiple of heads, got 8 and 3"):
        ClassAttention(8, 3)
    with pytest.raises(
        ValueError, match="SpectFormerH: dims, heads, depths and mlp_ratios must be equally many"
    ):
        small(depths=(1, 1))
    with pytest.raises(ValueError, match="SpectFormerH: token_labels needs classes and features_only=False"):
        small(token_labels=True, num_classes=0)
    with pytest.raises(ValueError, match="SpectFormerH: made without token_labels"):
        small().token_scores([torch.zeros(1, 16, 2, 2)])
