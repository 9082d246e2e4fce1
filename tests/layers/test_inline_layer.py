"""The InLine layer written out, and its predicted kernels, sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from foveate.layers import InLineAttention2d, PredictedDepthwiseConv
from foveate.linear import inline_weights


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy(module):
    module.double()
    torch.manual_seed(3)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return module


def kernels_of(predictor, token, groups, size):
    """(C, size, size) of one sample's token (C,), group by group."""
    first, _, second = predictor
    c = len(token)
    hidden = torch.cat([
        first.weight[g : g + c // groups, :, 0] @ token[g : g + c // groups] for g in range(0, c, c // groups)
    ]) + first.bias  # fmt: skip
    hidden = F.gelu(hidden)
    wide = size**2 * c // groups
    made = torch.cat([
        second.weight[g * wide : (g + 1) * wide, :, 0] @ hidden[g * c // groups : (g + 1) * c // groups]
        for g in range(groups)
    ]) + second.bias  # fmt: skip
    return made.view(c, size, size)


def convolved(image, kernels):
    """One sample (C, h, w) with kernels (C, s, s), zeros around it."""
    r, (h, w) = kernels.shape[1] // 2, image.shape[1:]
    padded, out = F.pad(image, (r, r, r, r)), torch.zeros_like(image)
    for dy in range(2 * r + 1):
        for dx in range(2 * r + 1):
            out += kernels[:, dy, dx, None, None] * padded[:, dy : dy + h, dx : dx + w]
    return out


@pytest.mark.parametrize(
    ("dim", "groups", "size", "grid"), [(8, 2, 3, (5, 7)), (6, 1, 5, (3, 4)), (6, 6, 1, (2, 2))]
)
def test_every_sample_is_convolved_with_kernels_of_its_own(dim, groups, size, grid):
    conv = noisy(PredictedDepthwiseConv(dim, groups, size))
    values, token = normal(3, dim, *grid), normal(3, dim, seed=1)
    got = conv(values, token)
    for b in range(3):
        want = convolved(values[b], kernels_of(conv.predictor, token[b], groups, size))
        torch.testing.assert_close(got[b], want, atol=1e-12, rtol=0)
    shared = convolved(values[1], kernels_of(conv.predictor, token[0], groups, size))
    assert (got[1] - shared).abs().max() > 1e-2


def test_a_predictor_that_gives_zero_adds_nothing():
    layer = noisy(InLineAttention2d(16, 2))
    bare = noisy(InLineAttention2d(16, 2, local=False))
    bare.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("near")})
    x = normal(2, 25, 16)
    assert (layer(x) - bare(x)).abs().max() > 1e-2
    torch.nn.init.zeros_(layer.near.predictor[2].weight)
    torch.nn.init.zeros_(layer.near.predictor[2].bias)
    assert torch.equal(layer(x), bare(x))


@pytest.mark.parametrize("feature", ["identity", "relu"])
@pytest.mark.parametrize("lead", [0, 1])
@pytest.mark.parametrize("grid", [(7, 7), (3, 11)])
def test_the_layer_is_its_formula(grid, lead, feature):
    layer = noisy(InLineAttention2d(12, 3, grid, class_token=bool(lead), feature=feature, bias=True))
    x = normal(2, grid[0] * grid[1] + lead, 12)
    q, k, v = (p(x) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    heads = []
    for h in range(3):
        own = slice(4 * h, 4 * h + 4)
        w = inline_weights(q[:, None, :, own], k[:, None, :, own], feature=feature)[:, 0]
        heads.append(w @ v[..., own])
    out = torch.cat(heads, 2)
    for b in range(2):
        kernels = kernels_of(layer.near.predictor, x[b].mean(0), 3, 3)  # the class token is part of the mean
        near = convolved(v[b, lead:].T.reshape(12, *grid), kernels)
        out[b, lead:] += near.flatten(1).T
    torch.testing.assert_close(layer(x), layer.o_proj(out), atol=1e-11, rtol=1e-11)


def test_resolutions():
    layer, x = noisy(InLineAttention2d(8, 2)), normal(1, 36, 8)
    assert torch.equal(layer(x), layer(x, resolution=(6, 6)))
    assert (layer(x) - layer(x, resolution=(4, 9))).abs().max() > 1e-3
    fixed = InLineAttention2d(8, 2, (4, 9)).double()
    fixed.load_state_dict(layer.state_dict())
    assert torch.equal(fixed(x), layer(x, resolution=(4, 9)))
    layer.near = None
    assert layer(x[:, :35]).shape == (1, 35, 8)  # without the convolution, any number of tokens


def test_parameters_are_as_the_entry_says():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    layer, bare = InLineAttention2d(24, 4), InLineAttention2d(24, 4, local=False)
    assert count(bare) == 4 * 24 * 24 + 24
    assert count(layer) - count(bare) == 10 * 24 * 24 // 4 + 10 * 24


def test_errors_name_the_argument():
    for made, says in (
        (lambda: InLineAttention2d(16, 3), "dim must be a multiple of heads, got 16 and 3"),
        (lambda: InLineAttention2d(16, 2, feature="x"), "feature must be one of identity, .*, got 'x'"),
        (lambda: PredictedDepthwiseConv(16, 3), "dim must be a multiple of groups, got 16 and 3"),
        (lambda: PredictedDepthwiseConv(16, 2, 4), "kernel must be an odd int >= 1, got 4"),
        (lambda: InLineAttention2d(16, 2)(torch.zeros(1, 24, 16)), "24 tokens .* do not make a square"),
        (lambda: InLineAttention2d(16, 2, (4, 4))(torch.zeros(1, 25, 16)), "25 tokens .* do not make 4 x 4"),
        (lambda: InLineAttention2d(16, 2)(torch.zeros(25, 16)), r"x must be \(B, N, C\), got \(25, 16\)"),
        (
            lambda: PredictedDepthwiseConv(4, 2)(torch.zeros(2, 4, 3), torch.zeros(2, 4)),
            r"values must be \(2, 4, h, w\)",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            made()
