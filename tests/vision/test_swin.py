"""Swin: the partition and its bias by the definition, costs, counts, and transformers' models with the same weights."""

from __future__ import annotations

import re

import pytest
import torch

import foveate as fv
from foveate.core.scores import RelativeBias
from foveate.patterns import Windows
from foveate.vision import (
    PatchMerging,
    ShiftedWindowAttention,
    Swin,
    SwinBlock,
    multiply_adds,
    parameters_of,
    swin_base,
    swin_from_timm,
    swin_from_transformers,
    swin_large,
    swin_small,
    swin_tiny,
)

CASES = [  # map, window, shift
    ((8, 8), 4, 0),
    ((8, 12), 4, 2),
    ((9, 8), 4, 0),
    ((9, 13), 4, 2),
    ((11, 7), 5, 2),
    ((7, 11), 7, 3),
    ((13, 5), (4, 3), (1, 2)),
    ((8, 9), 7, 3),
    ((1, 2), 3, 1),
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def noisy(module, seed=0):
    """The module in eval mode, in float64, with noise on every parameter."""
    g = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return module


def definition(layer, x):
    """The formula over all pairs of cells of the map, padded where padding is seen."""
    h, w = x.shape[1:3]
    window = [min(n, m) for n, m in zip((h, w), layer.window, strict=True)]
    shift = [s if n > m else 0 for n, m, s in zip((h, w), layer.window, layer.shift, strict=True)]
    rows, columns = h, w
    if layer.edge == "zero":
        rows, columns = -(-h // window[0]) * window[0], -(-w // window[1]) * window[1]
        padded = x.new_zeros(x.shape[0], rows, columns, x.shape[3])
        padded[:, :h, :w] = x
        x = padded
    at = [(y, z) for y in range(rows) for z in range(columns)]
    q, k, v = layer.qkv(x.flatten(1, 2)).unflatten(2, (3, layer.heads, -1)).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT / layer.head_dim**0.5  # (B, H, N, N)
    table = layer.position.table.view(2 * layer.window[0] - 1, 2 * layer.window[1] - 1, -1)
    bias = torch.full((layer.heads, len(at), len(at)), -torch.inf, dtype=x.dtype)
    for i, (yq, xq) in enumerate(at):
        for j, (yk, xk) in enumerate(at):
            same = (yq - shift[0]) // window[0] == (yk - shift[0]) // window[0]
            if same and (xq - shift[1]) // window[1] == (xk - shift[1]) // window[1]:
                bias[:, i, j] = table[yq - yk + layer.window[0] - 1, xq - xk + layer.window[1] - 1]
    out = ((logits + bias).softmax(3) @ v).transpose(1, 2).flatten(2)
    return layer.proj(out).unflatten(1, (rows, columns))[:, :h, :w]


@pytest.mark.parametrize("edge", ["mask", "zero"])
@pytest.mark.parametrize(("grid", "window", "shift"), CASES)
def test_the_layer_is_the_definition(grid, window, shift, edge):
    layer = noisy(ShiftedWindowAttention(8, 2, window, shift=shift, edge=edge))
    x = torch.randn(2, *grid, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, *grid, 8, dtype=torch.float64)
    results = []
    for out in (layer(x), definition(layer, x)):
        grads = torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])
        results.append([out, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("grid", "window", "shift"), [case for case in CASES if case[0] not in ((8, 9), (1, 2))]
)
def test_the_layer_is_attention_with_the_pattern_windows(grid, window, shift):
    """The same pairs as `Windows` and the same bias as `RelativeBias`, on the engines of `attention`."""
    layer = noisy(ShiftedWindowAttention(8, 2, window, shift=shift))
    w, s = layer.partition_of(grid)
    table = layer.position.table.T.unflatten(1, (2 * layer.window[0] - 1, -1))  # (H, 2w-1, 2w-1)
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    q, k, v = layer.qkv(x).flatten(1, 2).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    out = fv.attention(q, k, v, Windows(grid, w, shift=s), score=RelativeBias(table, shape=grid))
    out = layer.proj(out.transpose(1, 2).flatten(2)).unflatten(1, grid)
    torch.testing.assert_close(layer(x), out, rtol=1e-10, atol=1e-10)


def seen(layer, grid):
    """Which cells each output cell depends on, bool (N, N), from gradients."""
    x = torch.randn(1, *grid, layer.dim, dtype=torch.float64, requires_grad=True)
    out = layer(x).square().sum(3).flatten()
    rows = [torch.autograd.grad(y, x, retain_graph=True)[0].abs().sum(3).flatten() > 0 for y in out]
    return torch.stack(rows)


def test_keys_per_query():
    """w^2 keys inside, s w and (w - s) w at the sides, s^2 and the like in the corners; and nobody across a border."""
    w, s, n = 4, 1, 12
    reach = seen(noisy(ShiftedWindowAttention(4, 1, w, shift=s)), (n, n))
    lengths = [s] * s + [w] * (n - w) + [w - s] * (w - s)  # of the window of each row
    expected = torch.tensor(lengths)[:, None] * torch.tensor(lengths)
    assert torch.equal(reach.sum(1).view(n, n), expected)
    assert not reach.view(n, n, n, n)[0, :, n - 1].any()
    assert not reach.view(n, n, n, n)[:, n - 1, :, 0].any()


def test_the_roll_alone_wraps_around(monkeypatch):
    """Without the mask cells at opposite borders see each other."""
    layer = noisy(ShiftedWindowAttention(4, 1, 4, shift=2))
    right = layer(x := torch.randn(1, 8, 8, 4, dtype=torch.float64))
    monkeypatch.setattr(ShiftedWindowAttention, "mask", lambda *_, **__: None)
    wrong = layer(x)
    torch.testing.assert_close(wrong[:, 2:6, 2:6], right[:, 2:6, 2:6])  # the whole window in the middle
    assert (wrong - right)[:, :2].abs().min() > 1e-6
    assert seen(layer, (8, 8)).view(8, 8, 8, 8)[0, 0, 7, 7]


def test_a_window_of_the_whole_map_is_full_attention():
    layer = noisy(ShiftedWindowAttention(8, 2, 9, shift=4))
    assert seen(layer, (5, 7)).all()
    table = layer.position.table.T.unflatten(1, (17, 17))
    x = torch.randn(2, 5, 7, 8, dtype=torch.float64)
    q, k, v = layer.qkv(x).flatten(1, 2).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    out = fv.attention(q, k, v, score=RelativeBias(table, shape=(5, 7))).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.proj(out).unflatten(1, (5, 7)), rtol=1e-10, atol=1e-10)


def test_twice_the_side_costs_four_times():
    with torch.device("meta"):
        model = Swin(dim=16, depths=(2, 2), heads=(1, 2), window=7, features_only=True)
    assert multiply_adds(model, 112) == 4 * multiply_adds(model, 56)
    assert multiply_adds(model, 224) == 16 * multiply_adds(model, 56)


COUNTS = [
    (swin_tiny, 7, 28_288_354, 4.5e9),
    (swin_small, 7, 49_606_258, 8.7e9),
    (swin_base, 7, 87_768_224, 15.4e9),
    (swin_base, 12, 87_903_584, 47.0e9),
    (swin_large, 7, 196_532_476, 34.5e9),
    (swin_large, 12, 196_735_516, 103.9e9),
]


@pytest.mark.parametrize(("make", "window", "parameters", "published"), COUNTS)
def test_parameters_and_multiply_adds_are_the_published_ones(make, window, parameters, published):
    with torch.device("meta"):
        model = make(window=window)
    assert parameters_of(model) == parameters
    assert multiply_adds(model, 224 if window == 7 else 384) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("make", "rate"), [(swin_tiny, 0.2), (swin_small, 0.3), (swin_base, 0.5), (swin_large, 0.2)]
)
def test_drop_path_grows_to_the_rate(make, rate):
    with torch.device("meta"):
        rates = [part.drop_path.rate for part in make().modules() if isinstance(part, SwinBlock)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0, pytest.approx(rate))


def test_patch_merging_takes_rows_first():
    layer = noisy(PatchMerging(3))
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    out = layer(x)
    assert out.shape == (2, 3, 2, 6)
    cells = [x[:, 2 * i + dy, 2 * j + dx] if 2 * i + dy < 5 else torch.zeros(2, 3, dtype=x.dtype)
             for i, j in ((0, 1), (2, 0)) for dx in (0, 1) for dy in (0, 1)]  # fmt: skip
    for at, four in (((0, 1), cells[:4]), ((2, 0), cells[4:])):
        torch.testing.assert_close(out[:, at[0], at[1]], layer.reduction(layer.norm(torch.cat(four, 1))))


@pytest.mark.parametrize("edge", ["mask", "zero"])
@pytest.mark.parametrize("size", [(61, 47), (31, 97), (3, 5), (64, 1)])
def test_any_image_size_works(size, edge):
    model = Swin(dim=8, depths=(2, 2, 2), heads=(1, 2, 2), window=4, num_classes=5, edge=edge).eval()
    assert model(torch.randn(2, 3, *size)).isfinite().all()
    maps = model.forward_features(torch.randn(1, 3, *size))
    expected = [tuple(-(-n // stride) for n in size) for stride in model.strides]
    assert [tuple(x.shape[2:]) for x in maps] == expected


def test_what_padding_holds_does_not_matter_under_a_mask():
    """The result at the right border is that of the map's mirror at the left border."""
    layer = noisy(ShiftedWindowAttention(8, 2, 4))
    x = torch.randn(1, 8, 10, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[:, :, 8:], layer(x[:, :, 8:]))
    layer.edge = "zero"
    assert (layer(x)[:, :, 8:] - layer(x[:, :, 8:])).abs().max() > 1e-3


def test_strided_inputs():
    layer = noisy(ShiftedWindowAttention(8, 2, 4, shift=2))
    x = torch.randn(8, 9, 11, 2, dtype=torch.float64).permute(3, 1, 2, 0)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_resized_windows():
    model = Swin(dim=8, depths=(2, 2), heads=(1, 2), window=4, num_classes=3)
    old = model.stages[0][1].attention.position.table.detach().clone()
    model.resize_window_(6)
    assert [block.attention.shift for block in model.stages[0]] == [(0, 0), (3, 3)]
    new = model.stages[0][1].attention.position.table
    image = old.T.reshape(1, 1, 7, 7)
    expected = torch.nn.functional.interpolate(image, (11, 11), mode="bicubic", align_corners=False)
    torch.testing.assert_close(new, expected.reshape(1, 121).T)
    assert model(torch.randn(1, 3, 50, 50)).shape == (1, 3)
    assert model.resize_window_(6).stages[0][1].attention.position.table.equal(new)


def test_other_blocks_can_be_put_in():
    made = []

    def block(dim, heads, index, rate):
        made.append((dim, heads, index, round(rate, 3)))
        return SwinBlock(dim, heads, 4, attention=torch.nn.Linear(dim, dim), drop_path=rate)

    model = Swin(dim=8, depths=(2, 1), heads=(1, 2), num_classes=3, drop_path=0.2, block=block)
    assert made == [(8, 1, 0, 0.0), (8, 1, 1, 0.1), (16, 2, 0, 0.2)]
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"heads": 3}, "dim must be a multiple of heads, got 8 and 3"),
        ({"window": 0}, "window must be an int >= 1"),
        ({"window": 4, "shift": 4}, r"shift must be less than window, got \(4, 4\) for \(4, 4\)"),
        ({"edge": "wrap"}, 'edge must be "mask" or "zero", got \'wrap\''),
    ],
)
def test_arguments_are_checked(arguments, error):
    with pytest.raises(ValueError, match=f"ShiftedWindowAttention: {error}"):
        ShiftedWindowAttention(**{"dim": 8, "heads": 2, **arguments})


def test_models_and_inputs_are_checked():
    with pytest.raises(ValueError, match=r"Swin: one number of heads per stage, got \(1,\) for \(2, 2\)"):
        Swin(depths=(2, 2), heads=(1,))
    with pytest.raises(ValueError, match="Swin: map_norms needs features_only=True"):
        Swin(map_norms=True)
    with pytest.raises(ValueError, match=r"x must be \(B, h, w, 8\), got \(1, 5, 8\)"):
        ShiftedWindowAttention(8, 2)(torch.zeros(1, 5, 8))
    for convert in (swin_from_timm, swin_from_transformers):
        with pytest.raises(ValueError, match=r"no weights of a Swin, got \['foo.weight'\]"):
            convert({"foo.weight": torch.zeros(1)})


# ----------------------------------------------------------------------------------------- weights of others
def theirs(kind, **more):
    """A small random model of transformers in eval mode, with noise on every parameter."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[2, 2, 2],
        num_heads=[1, 2, 4],
        window_size=4,
        num_labels=7,
        **more,
    )
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


SIZES = [(128, 128), (90, 122), (107, 89)]  # maps that windows divide, then ones that need padding


def close(ours, others, x):
    """Outputs, and gradients of the images, to 1e-5 of their size."""
    g = torch.Generator().manual_seed(1)
    total = [0.0, 0.0]
    for mine, other in zip(ours, others, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
        assert other.std() > 0.05
        weight = torch.randn(mine.shape, generator=g)
        total = [total[0] + (mine * weight).sum(), total[1] + (other * weight).sum()]
    grads = [torch.autograd.grad(t, x, retain_graph=True)[0] for t in total]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5 * float(grads[1].abs().max()))


@pytest.mark.parametrize("size", SIZES)
def test_classifier_of_transformers(size):
    their = theirs("SwinForImageClassification")
    x = torch.randn(2, 3, *size, requires_grad=True)
    ours = swin_from_transformers(their)
    close([ours(x)], [their(x).logits], x)
    different = (swin_from_transformers(their, edge="mask")(x) - their(x).logits).abs().max()
    assert (different < 1e-5) == (size == SIZES[0])  # padding is seen in theirs


def test_parameter_gradients_are_those_of_transformers():
    their = theirs("SwinForImageClassification")
    ours = swin_from_transformers(their)
    x, weight = torch.randn(2, 3, *SIZES[1]), torch.randn(2, 7)
    (ours(x) * weight).sum().backward()
    (their(x).logits * weight).sum().backward()
    gradients = {name: p.grad for name, p in their.named_parameters()}
    moved = swin_from_transformers(gradients).state_dict()  # gradients find their place as weights do
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, moved[name], rtol=1e-5, atol=1e-5 * float(moved[name].abs().max()))


@pytest.mark.parametrize("size", SIZES[1:])
def test_model_of_transformers(size):
    their = theirs("SwinModel", qkv_bias=False)
    x = torch.randn(2, 3, *size, requires_grad=True)
    ours, result = swin_from_transformers(their.state_dict()), their(x)
    last = ours.norm(ours.forward_features(x)[-1].permute(0, 2, 3, 1)).flatten(1, 2)
    close([ours(x), last], [result.pooler_output, result.last_hidden_state], x)


@pytest.mark.parametrize("size", [*SIZES, (40, 56)])
def test_backbone_of_transformers(size):
    """It shifts windows on maps no larger than them, too: (40, 56) has one of 3 x 4."""
    their = theirs("SwinBackbone", out_features=["stage1", "stage2", "stage3"])
    x = torch.randn(2, 3, *size, requires_grad=True)
    ours = swin_from_transformers(their)
    close(ours(x), their(x).feature_maps, x)


def test_older_names_of_transformers():
    their = theirs("SwinForImageClassification")
    older = {}
    for name, value in their.state_dict().items():
        name = re.sub(r"_proj\.", ".", name).replace(".relative_position_bias.", ".self.")
        for letter, word in (
            ("q", "self.query"),
            ("k", "self.key"),
            ("v", "self.value"),
            ("o", "output.dense"),
        ):
            name = name.replace(f".attention.{letter}.", f".attention.{word}.")
        name = name.replace(".mlp.fc1.", ".intermediate.dense.").replace(".mlp.fc2.", ".output.dense.")
        older[name] = value
    assert "swin.encoder.layers.0.blocks.0.attention.self.query.weight" in older
    x = torch.randn(1, 3, 64, 64)
    assert swin_from_transformers(older)(x).equal(swin_from_transformers(their)(x))


@pytest.mark.parametrize("new", [True, False])
def test_names_of_timm(new):
    """In its newer files a stage begins with its merging, in older ones and the authors' it ends with it."""
    model = noisy(Swin(dim=8, depths=(2, 1, 2), heads=(1, 2, 4), window=4, num_classes=5, edge="zero"))
    names = [
        (r"^embed\.", "patch_embed.proj."),
        (r"^embed_norm\.", "patch_embed.norm."),
        (r"^stages\.(\d+)\.", r"layers.\1.blocks."),
        (r"\.attention\.position\.table", ".attn.relative_position_bias_table"),
        (r"\.attention\.", ".attn."),
        (r"^merges\.(\d+)\.", lambda m: f"layers.{int(m[1]) + new}.downsample."),
        (r"^head\.", "head.fc." if new else "head."),
    ]
    state = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16)}
    for name, value in model.state_dict().items():
        for pattern, other in names:
            name = re.sub(pattern, other, name)
        state[name] = value
    x = torch.randn(1, 3, 50, 64, dtype=torch.float64)
    assert swin_from_timm(state if new else {"model": state})(x).equal(model(x))
