"""BiFormer: the formula region by region, what the choice sees, and the published sizes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import foveate as fv
from foveate.core.patterns.orders import tile_major
from foveate.selectors import RegionTopK
from foveate.vision.backbone import parameters_of
from foveate.vision.biformer import (
    BiFormer,
    BiLevelRoutingAttention,
    InputPositionAttention,
    biformer_base,
    biformer_small,
    biformer_stl,
    biformer_tiny,
    convert_biformer,
)
from foveate.vision.count import multiply_adds

SHAPES = [(8, 8), (7, 11), (3, 5), (1, 7)]


def layer(dim=24, heads=3, *, seed=0, **options) -> BiLevelRoutingAttention:
    torch.manual_seed(seed)
    made = BiLevelRoutingAttention(dim, heads, **options).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.3)
    return made


def image(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def members(height: int, width: int, regions: int) -> list[list[int]]:
    """Tokens of each region, regions and tokens row by row."""
    rows, columns = -(-height // regions), -(-width // regions)
    return [
        [
            y * width + x
            for y in range(top, min(top + rows, height))
            for x in range(left, min(left + columns, width))
        ]
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]


def choices(q: torch.Tensor, k: torch.Tensor, groups: list[list[int]], most: int) -> list[list[int]]:
    """Of one image, q and k (N, C): the chosen regions of each region."""
    found = []
    for mine in groups:
        affinity = [float(q[mine].detach().mean(0) @ k[other].detach().mean(0)) for other in groups]
        found.append(sorted(range(len(groups)), key=lambda s: -affinity[s])[:most])
    return found


def definition(made: BiLevelRoutingAttention, x: torch.Tensor, regions: int) -> torch.Tensor:
    out = torch.zeros_like(x)
    batch, height, width, dim = x.shape
    d = dim // made.heads
    groups = members(height, width, regions)
    for b in range(batch):
        q, k, v = (x[b].reshape(-1, dim) @ made.qkv.weight.T + made.qkv.bias).split(dim, 1)
        mixed = torch.zeros_like(q)
        for mine, others in zip(groups, choices(q, k, groups, made.k), strict=True):
            seen = [j for s in others for j in groups[s]]
            for h in range(made.heads):
                part = slice(h * d, (h + 1) * d)
                for i in mine:
                    weights = ((k[seen, part] @ q[i, part]) * dim**-0.5).softmax(0)
                    mixed[i, part] = weights @ v[seen, part]
        if made.lepe is not None:
            half = made.lepe.kernel_size[0] // 2
            values = F.pad(v.view(height, width, dim), (0, 0, half, half, half, half))
            for y in range(height):
                for z in range(width):
                    patch = values[y : y + 2 * half + 1, z : z + 2 * half + 1]  # (5, 5, C)
                    local = (patch * made.lepe.weight[:, 0].permute(1, 2, 0)).sum((0, 1))
                    mixed[y * width + z] += local + made.lepe.bias
        out[b] = (mixed @ made.proj.weight.T + made.proj.bias).view(height, width, dim)
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("engine", [None, "reference"])
def test_the_layer_is_the_formula(shape, engine):
    made = layer(regions=4, k=3, engine=engine)
    x = image(2, *shape, 24)
    torch.testing.assert_close(made(x), definition(made, x, 4), rtol=0, atol=1e-12)


def test_head_scale_and_other_heads():
    made, other = (layer(regions=2, k=2, scale=name) for name in ("dim", "head"))
    assert made.scale == 24**-0.5
    assert other.scale == 8**-0.5
    x = image(1, 6, 6, 24)
    assert (made(x) - other(x)).abs().max() > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_all_regions_are_full_attention(shape):
    made = layer(regions=4, k=16, lepe=0)
    x = image(2, *shape, 24)
    q, k, v = made.qkv(x).flatten(1, 2).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    want = fv.attention(q, k, v, scale=24**-0.5).transpose(1, 2).flatten(2).unflatten(1, shape)
    torch.testing.assert_close(made(x), made.proj(want), rtol=0, atol=1e-7)


def test_one_region_that_matches_itself_best_is_window_attention():
    made = layer(dim=16, heads=2, regions=4, k=1, lepe=0)
    with torch.no_grad():  # queries and keys are the input, whose regions have orthogonal means
        made.qkv.weight[:32] = torch.eye(16, dtype=torch.double).repeat(2, 1)
        made.qkv.bias[:32] = 0
    means = 4 * torch.eye(16, dtype=torch.double).view(4, 4, 16)
    x = means.repeat_interleave(3, 0).repeat_interleave(3, 1)[None] + 0.1 * image(1, 12, 12, 16)
    assert made.chosen(x)[0, :, 0].tolist() == list(range(16))
    q, k, v = made.qkv(x).flatten(1, 2).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    want = fv.attention(q, k, v, fv.patterns.Windows((12, 12), 3), scale=0.25)
    want = made.proj(want.transpose(1, 2).flatten(2).view(1, 12, 12, 16))
    torch.testing.assert_close(made(x), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_support(shared):
    """k regions of equal size: so many keys per row, the same for a region's tokens, and for heads that share."""
    q, k = image(2, 3, 14 * 21, 8), image(2, 3, 14 * 21, 8, seed=2)
    chooser = RegionTopK((14, 21), 7, 4, shared=shared)
    seen = chooser.layout(q, k).to_dense()
    assert seen.shape[1] == (1 if shared else 3)
    assert (seen.sum(-1) == 4 * 6).all()
    for r in range(49):
        rows = seen[:, :, chooser.blocks == r]
        assert (rows == rows[:, :, :1]).all()
    if not shared:
        assert (seen[:, 0] != seen[:, 1]).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_choice_is_the_formulas(shape):
    q, k = image(2, 2, shape[0] * shape[1], 8), image(2, 2, shape[0] * shape[1], 8, seed=2)
    found = RegionTopK(shape, 4, 3).select(q, k)[:, 0].tolist()
    groups = members(*shape, 4)
    for b in range(2):
        flat = [t[b].transpose(0, 1).flatten(1) for t in (q, k)]
        assert found[b] == choices(*flat, groups, 3)


def test_grouped_heads_and_orders_give_the_same_set():
    q, k = image(1, 4, 10 * 9, 8), image(1, 2, 10 * 9, 8, seed=2)
    chooser = RegionTopK((10, 9), 4, 3)
    assert torch.equal(chooser.select(q, k), chooser.select(q, k.repeat_interleave(2, 1)))
    order = tile_major((10, 9), chooser.cells)
    moved = RegionTopK((10, 9), 4, 3, order=order)
    assert torch.equal(chooser.select(q, k), moved.select(order.apply(q), order.apply(k)))
    one, other = (
        chooser.layout(q, k).to_dense()[0, 0],
        moved.layout(order.apply(q), order.apply(k)).to_dense(),
    )
    assert torch.equal(other[0, 0], one[order.permutation][:, order.permutation])


def test_regions_of_64_tokens_are_whole_tiles():
    chooser = RegionTopK((32, 24), (4, 3), 2)
    ordered = RegionTopK((32, 24), (4, 3), 2, order=tile_major((32, 24), chooser.cells))
    q = image(1, 2, 32 * 24, 4)
    layout = ordered.layout(q, q)
    assert (layout.nnz, len(layout.dictionary)) == (12 * 2, 0)


def test_tokens_of_a_region_may_be_permuted():
    made = layer(regions=3, k=2, lepe=0)
    x = image(1, 9, 12, 24)
    order = tile_major((9, 12), (3, 4))
    within = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    places = torch.arange(108)
    places[48:60] = 48 + within  # the fifth region
    shuffle = lambda t: order.undo(order.apply(t.flatten(1, 2), 1)[:, places], 1).view_as(t)  # noqa: E731
    assert torch.equal(made.chosen(x), made.chosen(shuffle(x)))
    torch.testing.assert_close(made(shuffle(x)), shuffle(made(x)), rtol=0, atol=1e-12)


def test_the_choice_has_no_gradient():
    """With the choice fixed from outside, the gradient is the same."""
    made = layer(regions=3, k=2, lepe=0)
    x = image(2, 6, 7, 24).requires_grad_()
    pull = image(2, 6, 7, 24, seed=4)
    (got,) = torch.autograd.grad(made(x), x, pull)
    q, k, v = made.qkv(x).flatten(1, 2).unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    fixed = made.selector((6, 7)).layout(q.detach(), k.detach())
    out = fv.attention(q, k, v, fixed, scale=made.scale).transpose(1, 2).flatten(2).unflatten(1, (6, 7))
    (want,) = torch.autograd.grad(made.proj(out), x, pull)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert not made.chosen(x).is_floating_point()


def test_gradients():
    made = layer(dim=4, heads=2, regions=2, k=2, lepe=3)
    assert torch.autograd.gradcheck(made, image(1, 3, 4, 4).requires_grad_(), atol=1e-6)


def test_strides_and_batch():
    made = layer(regions=4, k=3)
    x = image(3, 24, 11, 13).permute(0, 2, 3, 1)
    torch.testing.assert_close(made(x), made(x.contiguous()), rtol=0, atol=1e-13)
    torch.testing.assert_close(made(x)[1:2], made(x[1:2]), rtol=0, atol=1e-13)


def test_last_stage_attention():
    torch.manual_seed(0)
    made = InputPositionAttention(16, 2, lepe=3).double()
    x = image(2, 3, 5, 16)
    q, k, v = (x.flatten(1, 2) @ made.qkv.weight.T).split(16, 2)
    out = torch.cat(
        [(q[..., p] @ k[..., p].mT * 8**-0.5).softmax(-1) @ v[..., p] for p in (slice(0, 8), slice(8, 16))],
        2,
    ).view(2, 3, 5, 16)
    near = F.conv2d(x.permute(0, 3, 1, 2), made.lepe.weight, made.lepe.bias, padding=1, groups=16)
    torch.testing.assert_close(made(x), made.proj(out + near.permute(0, 2, 3, 1)), rtol=0, atol=1e-12)
    assert made.qkv.bias is None


@pytest.mark.parametrize(
    ("make", "parameters", "giga"),
    [
        (biformer_tiny, 13_142_760, 2.2),
        (biformer_small, 25_536_232, None),
        (biformer_base, 56_804_968, 9.8),
        (biformer_stl, 28_372_552, None),
    ],
)
def test_published_sizes(make, parameters, giga):
    with torch.device("meta"):
        model = make()
    assert parameters_of(model) == parameters
    if giga is not None:
        assert abs(multiply_adds(model, 224) / 1e9 - giga) < 0.05  # published with one decimal


@pytest.mark.parametrize("stem", ["conv", "patch"])
def test_any_size(stem):
    torch.manual_seed(0)
    model = BiFormer(
        dims=(32, 32, 64, 64), depths=(1, 1, 1, 1), stem=stem, num_classes=5, features_only=False
    ).eval()
    for size in ((64, 96), (37, 61), (5, 3)):
        x = torch.randn(2, 3, *size)
        maps = model.forward_features(x)
        assert [m.shape[1:] for m in maps] == [
            (c, -(-size[0] // s), -(-size[1] // s))
            for c, s in zip(model.channels, model.strides, strict=True)
        ]
        assert model(x).shape == (2, 5)


def test_released_names():
    old = {
        "downsample_layers.0.1.running_mean": "downsamples.0.1.running_mean",
        "stages.2.7.pos_embed.weight": "stages.2.7.position.conv.weight",
        "stages.2.7.attn.qkv.qkv.bias": "stages.2.7.attn.qkv.bias",
        "stages.3.0.attn.qkv.weight": "stages.3.0.attn.qkv.weight",
        "stages.1.blocks.0.attn.wo.weight": "stages.1.0.attn.proj.weight",
        "stages.1.blocks.0.mlp.2.weight": "stages.1.0.mlp.fc2.weight",
    }
    assert list(convert_biformer(dict.fromkeys(old, torch.zeros(1)))) == list(old.values())
    with torch.device("meta"):
        names = set(biformer_tiny().state_dict())
    assert {"downsamples.0.1.running_mean", "stages.2.7.position.conv.weight", "head.bias"} <= names


def test_errors():
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got 10 and 3"):
        BiLevelRoutingAttention(10, 3)
    with pytest.raises(ValueError, match="k must be an int >= 1, got 0"):
        BiLevelRoutingAttention(12, 3, k=0)
    with pytest.raises(ValueError, match="lepe must be 0 or an odd int, got 4"):
        BiLevelRoutingAttention(12, 3, lepe=4)
    with pytest.raises(ValueError, match="scale must be 'dim' or 'head', got 'width'"):
        BiLevelRoutingAttention(12, 3, scale="width")
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, 12\), got \(1, 4, 12\)"):
        BiLevelRoutingAttention(12, 3)(torch.zeros(1, 4, 12))
    with pytest.raises(ValueError, match="needs 12 queries and keys, got 11 and 12"):
        RegionTopK((3, 4)).select(torch.zeros(1, 1, 11, 2), torch.zeros(1, 1, 12, 2))
    with pytest.raises(ValueError, match="k must be an int >= 1, got 0"):
        RegionTopK((3, 4), k=0)
    with pytest.raises(ValueError, match="accepted is False"):
        RegionTopK((3, 4)).layout(torch.zeros(1, 1, 12, 2), torch.zeros(1, 1, 12, 2), is_causal=True)
    with pytest.raises(ValueError, match="stem must be 'conv' or 'patch'"):
        BiFormer(stem="pool")
    with pytest.raises(ValueError, match="must have four entries"):
        BiFormer(dims=(32, 64))
