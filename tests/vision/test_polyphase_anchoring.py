"""Polyphase anchoring: the definition by loops, exact equivariance, PolyTwins."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import foveate as fv
from foveate.vision import (
    Anchored,
    PolyTwins,
    PolyTwinsBlock,
    SubsampledAttention,
    polyphase_anchor,
    polytwins_base,
    shift_consistency,
    shifted_predictions,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noisy(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return module.double().eval()


def small(**options):
    made = {"reductions": (2, 1), "window": 3, "patch": 2, "num_classes": 5} | options
    return noisy(PolyTwins((8, 16), (1, 2), (2, 2), **made))


def by_loops(image, s):
    """One image (H, W, C): the phase of the largest norm, and the image read from there."""
    h, w, _ = image.shape
    norms = {}
    for a in range(s):
        for b in range(s):
            squares = [
                image[y, x].square().sum() for y in range(h) for x in range(w) if (y % s, x % s) == (a, b)
            ]
            norms[a, b] = torch.stack(squares).sum().sqrt()
    a, b = max(norms, key=lambda at: float(norms[at]))
    rows = [torch.stack([image[(y + a) % h, (x + b) % w] for x in range(w)]) for y in range(h)]
    return torch.stack(rows), [a, b]


@pytest.mark.parametrize(("grid", "s"), [((6, 4), 2), ((9, 6), 3), ((8, 4), 4), ((5, 7), 1)])
def test_it_is_the_definition(grid, s):
    x = normal(3, *grid, 2)
    out, at = polyphase_anchor(x, s, return_index=True)
    for i in range(3):
        wanted, where = by_loops(x[i], s)
        assert torch.equal(out[i], wanted)
        assert at[i].tolist() == where
        assert torch.equal(out[i], x[i].roll((-where[0], -where[1]), (0, 1)))


def test_all_144_shifts_move_it_by_multiples_of_the_stride():
    x = normal(1, 12, 12, 2)
    anchored = polyphase_anchor(x, 4)
    allowed = [anchored.roll(by, (1, 2)) for by in itertools.product(range(0, 12, 4), repeat=2)]
    for by in itertools.product(range(12), repeat=2):
        moved = polyphase_anchor(x.roll(by, (1, 2)), 4)
        assert any(torch.equal(moved, one) for one in allowed)


def test_idempotent_and_values_kept():
    x = normal(2, 9, 6, 4, dtype=torch.float32)
    out, at = polyphase_anchor(x, 3, return_index=True)
    assert at.any()
    again, none = polyphase_anchor(out, 3, return_index=True)
    assert torch.equal(again, out)
    assert not none.any()
    assert torch.equal(out.flatten(1).sort()[0], x.flatten(1).sort()[0])
    assert not list(Anchored(nn.Identity(), 3).parameters())


def test_ties_take_the_first():
    assert polyphase_anchor(torch.ones(2, 6, 6, 1), 3, return_index=True)[1].tolist() == [[0, 0]] * 2
    x = torch.zeros(1, 4, 4, 1)
    x[0, 0, 1] = x[0, 3, 2] = 1.0  # phases (0, 1) and (1, 0)
    assert polyphase_anchor(x, 2, return_index=True)[1].tolist() == [[0, 1]]


def test_rectangles_strides_and_low_precision():
    x = normal(2, 3, 6, 8).permute(0, 2, 3, 1)  # not contiguous
    out, at = polyphase_anchor(x, (3, 2), return_index=True)
    assert torch.equal(out, polyphase_anchor(x.contiguous(), (3, 2)))
    assert (at < torch.tensor([3, 2])).all()
    big = torch.full((1, 4, 4, 64), 100.0, dtype=torch.float16)  # sums of squares overflow float16
    big[0, 1, 1] = 101.0
    half, at = polyphase_anchor(big, 2, return_index=True)
    assert half.dtype == torch.float16
    assert at.tolist() == [[1, 1]]


def test_the_gradient_is_rolled_back():
    x = normal(2, 6, 3, 1)
    x[0, 1, 2] = x[1, 5, 1] = 9.0
    x.requires_grad_()
    weight = normal(2, 6, 3, 1, seed=1)
    out, at = polyphase_anchor(x, 3, return_index=True)
    assert at.tolist() == [[1, 2], [2, 1]]
    (grad,) = torch.autograd.grad((out * weight).sum(), x)
    for i in range(2):
        assert torch.equal(grad[i], weight[i].roll(at[i].tolist(), (0, 1)))
    assert torch.autograd.gradgradcheck(lambda t: polyphase_anchor(t, 3).pow(3), x)


def test_subsampled_attention_is_its_formula():
    layer = noisy(SubsampledAttention(8, 2, 2))
    assert layer.smaller is not None and layer.smaller.bias is not None and layer.norm is not None  # noqa: PT018
    x = normal(2, 4, 6, 8)
    read = torch.zeros(2, 2, 3, 8, dtype=x.dtype)
    for i in range(2):
        for j in range(3):
            cell = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]  # (B, 2, 2, C)
            read[:, i, j] = torch.einsum("byxc,ocyx->bo", cell, layer.smaller.weight) + layer.smaller.bias
    k, v = layer.kv(layer.norm(read)).flatten(1, 2).chunk(2, -1)
    q, outs = layer.q(x).flatten(1, 2), []
    for one in (slice(0, 4), slice(4, 8)):
        outs.append((q[..., one] @ k[..., one].mT / 2).softmax(-1) @ v[..., one])
    wanted = layer.proj(torch.cat(outs, -1)).view(2, 4, 6, 8)
    torch.testing.assert_close(layer(x), wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("options", "s"), [({"window": 3}, 3), ({"window": None, "reduction": 2}, 2)])
def test_a_block_is_equivariant_up_to_its_stride(options, s):
    block = noisy(PolyTwinsBlock(8, 2, **options))
    x = normal(1, 6, 12, 8)
    out = block(x)
    frames = [out.roll(by, (1, 2)) for by in itertools.product(range(0, 6, s), range(0, 12, s))]
    for by in [(1, 0), (2, 5), (3, 7), (5, 11)]:
        moved = block(x.roll(by, (1, 2)))
        assert min((moved - frame).abs().max() for frame in frames) < 1e-12


@pytest.mark.parametrize("reductions", [(2, 1), (1, 1), (3, 2)])
def test_two_stages_give_the_same_logits_for_every_shift(reductions):
    model = small(reductions=reductions)
    side = model.multiple
    image = normal(1, 3, side, side)
    shifts = [(dy, dx) for dy in range(side) for dx in range(side)][:: max(1, side**2 // 40)]
    logits = model(torch.cat([image.roll(by, (2, 3)) for by in shifts]))
    assert (logits - model(image)).abs().max() < 1e-10


@pytest.mark.parametrize("options", [{"anchor": False}, {"padding": "zeros"}])
def test_without_anchors_or_circular_padding_it_does_not(options):
    model, image = small(**options), normal(1, 3, 12, 12)
    assert model.multiple == 12
    logits = model(torch.cat([image.roll(by, (2, 3)) for by in [(0, 1), (1, 1), (5, 4)]]))
    assert (logits - model(image)).abs().max() > 1e-3


def test_anchored_convolutions_take_channels_first():
    embed = Anchored(noisy(nn.Conv2d(3, 4, 4, stride=4)), 4, channels_first=True)
    image = normal(2, 3, 12, 8)
    wanted = embed.module(polyphase_anchor(image.permute(0, 2, 3, 1), 4).permute(0, 3, 1, 2))
    assert torch.equal(embed(image), wanted)


def test_base_has_the_published_parameters_and_cost():
    with torch.device("meta"):
        model = polytwins_base()
        plain = polytwins_base(anchor=False, padding="zeros")
    assert fv.vision.parameters_of(model) == fv.vision.parameters_of(plain) == 56_070_952
    assert fv.vision.multiply_adds(model, 224) == pytest.approx(
        8.59e9, rel=0.01
    )  # timm's table: twins_svt_base
    assert model.multiple == 224
    assert model.settled == [
        False,
        True,
        True,
        True,
    ]  # as the authors: only the image is anchored before patches


def test_maps_and_names_of_timm():
    model = small(features_only=True)
    maps = model(normal(2, 3, 12, 24))
    assert [tuple(m.shape) for m in maps] == [(2, 8, 6, 12), (2, 16, 3, 6)]
    assert not hasattr(model.head, "weight")
    with pytest.raises(RuntimeError, match="positions"):
        small().load_timm({"head.bias": torch.zeros(5)})
    source = small()
    theirs = {}
    for name, value in source.state_dict().items():
        kind, rest = name.split(".", 1)
        if kind in ("embeds", "norms"):
            stage, leaf = rest.split(".", 1)
            name = f"patch_embeds.{stage}.{'proj' if kind == 'embeds' else 'norm'}.{leaf}"
        elif kind == "positions":
            name = f"pos_block.{rest.replace('conv', 'proj.0')}"
        elif kind == "stages":
            name = "blocks." + rest.replace("attention.smaller", "attn.sr").replace("attention", "attn")
        theirs[name] = value
    image = normal(1, 3, 12, 12)
    assert torch.equal(small(in_channels=3).load_timm(theirs)(image), source(image))


def test_consistency_counts_pairs():
    class Corner(nn.Module):
        """Says where in the 2 x 2 image the largest pixel is."""

        def forward(self, x):
            return x.flatten(1)

    image = torch.tensor([[[[3.0, 2.0], [1.0, 0.0]]]])
    shifts, labels = shifted_predictions(Corner(), image)
    assert shifts.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert labels[:, 0].tolist() == [0, 1, 2, 3]
    assert shift_consistency(Corner(), image) == 0.0
    assert shift_consistency(Corner(), torch.ones(1, 1, 2, 2)) == 1.0  # ties: the first
    assert shift_consistency(Corner(), torch.cat([image, torch.ones(1, 1, 2, 2)])) == 0.5
    wide = torch.zeros(1, 1, 5, 5)
    wide[0, 0, 2, 2] = 1.0
    _, labels = shifted_predictions(Corner(), wide, 1, "crop")  # 3 x 3 pixels; the dot moves against the crop
    assert labels[:, 0].tolist() == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert shifted_predictions(Corner(), wide, 1)[1][:, 0].tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]


def test_errors_name_what_came():
    with pytest.raises(ValueError, match="H a multiple of 4 and W of 4, got \\(1, 8, 6, 2\\)"):
        polyphase_anchor(torch.zeros(1, 8, 6, 2), 4)
    with pytest.raises(ValueError, match="stride must be an int >= 1"):
        polyphase_anchor(torch.zeros(1, 8, 8, 2), 0)
    with pytest.raises(ValueError, match="multiples of 12, got \\(13, 17\\)"):
        small()(normal(1, 3, 13, 17))
    with pytest.raises(ValueError, match="one entry per stage, got 2, 1, 2 and 2"):
        PolyTwins((8, 16), (1,), (2, 2), reductions=(2, 1))
    with pytest.raises(ValueError, match="padding must be 'circular' or 'zeros', got 'reflect'"):
        small(padding="reflect")
    with pytest.raises(ValueError, match="H and W multiples of 2"):
        SubsampledAttention(8, 2, 2)(torch.zeros(1, 5, 4, 8))
    with pytest.raises(ValueError, match="multiple of heads, got 8 and 3"):
        SubsampledAttention(8, 3)
    for shifts, mode in [("some", "circular"), (3, "circular"), ("all", "crop"), (0, "crop")]:
        with pytest.raises(ValueError, match="shifts must be an int"):
            shifted_predictions(nn.Flatten(), torch.zeros(1, 1, 5, 5), shifts, mode)
    with pytest.raises(ValueError, match="mode must be"):
        shifted_predictions(nn.Flatten(), torch.zeros(1, 1, 5, 5), 1, "zoom")
