"""Shifted-window learning: the two passes, when they swap, windows as rows of the batch, transformers' ViT and CLIP."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from foveate.vision import (
    ShiftedWindowEnsemble,
    ViTLayer,
    WindowedLayers,
    WindowedViT,
    parameters_of,
    roll_similarity,
    window_bias,
    windowed_vit,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noisy(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=g))
    return module.double().eval()


def body(*, positions=0.0, k=2, depth=3, global_layers=(1,)):
    made = noisy(WindowedLayers([ViTLayer(8, 2) for _ in range(depth)], torch.zeros(1, 4, 4, 8), windows_per_side=k,
                                global_layers=global_layers))  # fmt: skip
    with torch.no_grad():
        made.positions.mul_(positions)
    return made


def layer_by_loops(layer, x):
    """ViTLayer on one set of tokens (n, C), head by head and query by query."""
    normed = F.layer_norm(x, x.shape[1:], layer.norm1.weight, layer.norm1.bias, 1e-6)
    q, k, v = (normed @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, 1)
    d = x.shape[1] // layer.heads
    out = torch.zeros_like(x)
    for h in range(layer.heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(len(x)):
            weights = torch.softmax(k[:, part] @ q[i, part] / math.sqrt(d), 0)
            out[i, part] = weights @ v[:, part]
    x = x + layer.proj(out)
    normed = F.layer_norm(x, x.shape[1:], layer.norm2.weight, layer.norm2.bias, 1e-6)
    return x + layer.mlp.fc2(F.gelu(layer.mlp.fc1(normed)))


def pass_by_loops(g, image, shift):
    """One pass over one image (H, W, C): rolled, positions in the rolled frame, windows one by one, rolled back."""
    x = image.roll((-shift, shift), (0, 1)) + g.positions[0]
    h, w, c = x.shape
    for i, layer in enumerate(g.layers):
        k = 1 if i in g.global_layers else g.windows_per_side
        out = torch.empty_like(x)
        for a in range(k):
            for b in range(k):
                at = slice(a * h // k, (a + 1) * h // k), slice(b * w // k, (b + 1) * w // k)
                cell = x[at]
                out[at] = layer_by_loops(layer, cell.reshape(-1, c)).view(cell.shape)
        x = out
    return x.roll((shift, -shift), (0, 1))


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_it_is_the_mean_of_two_passes(shift):
    g, x = body(positions=1.0), normal(2, 4, 4, 8)
    out = ShiftedWindowEnsemble(g, shift)(x)
    for i in range(2):
        wanted = (pass_by_loops(g, x[i], 0) + pass_by_loops(g, x[i], shift)) / 2
        torch.testing.assert_close(out[i], wanted, atol=1e-11, rtol=1e-11)


def test_no_shift_and_a_whole_window_are_the_plain_model():
    x = normal(2, 6, 4, 8)
    assert torch.equal(ShiftedWindowEnsemble(body(positions=1.0), 0)(x), body(positions=1.0)(x))
    plain = body()
    torch.testing.assert_close(ShiftedWindowEnsemble(plain, (3, 2))(x), plain(x), atol=1e-12, rtol=0)
    assert (ShiftedWindowEnsemble(body(positions=1.0), (3, 2))(x) - body(positions=1.0)(x)).abs().max() > 0.01
    assert (ShiftedWindowEnsemble(plain, (2, 1))(x) - plain(x)).abs().max() > 0.01


def test_half_a_window_makes_it_equivariant_to_half_a_window():
    x, g = normal(1, 8, 8, 8), body()  # windows of 4 x 4
    both = ShiftedWindowEnsemble(g, 2)
    rolled = lambda t: t.roll((-2, 2), (1, 2))  # noqa: E731
    torch.testing.assert_close(both(rolled(x)), rolled(both(x)), atol=1e-12, rtol=0)  # the two passes swap
    assert (g(rolled(x)) - rolled(g(x))).abs().max() > 0.01
    with_positions = ShiftedWindowEnsemble(body(positions=1.0), 2)
    assert (with_positions(rolled(x)) - rolled(with_positions(x))).abs().max() > 0.01
    assert roll_similarity(both, x, 2) == pytest.approx(1, abs=1e-9)
    assert roll_similarity(g, x, 2) < 0.9999


def test_the_gradient_is_the_mean_of_both_passes():
    x, read = normal(2, 8, 8, 8), normal(8, seed=1)

    def gradients(f):
        g = body(positions=1.0)
        (f(g)(x) @ read).sum().backward()
        return [p.grad for p in g.parameters()]

    plain = gradients(lambda g: g)
    moved = gradients(lambda g: lambda t: g(t.roll((-2, 2), (1, 2))).roll((2, -2), (1, 2)))
    for both, a, b in zip(gradients(lambda g: ShiftedWindowEnsemble(g, 2)), plain, moved, strict=True):
        torch.testing.assert_close(both, (a + b) / 2, atol=1e-10, rtol=1e-10)
    assert any((a - b).abs().max() > 0.01 for a, b in zip(plain, moved, strict=True))


def test_with_global_layers_alone_only_positions_tell_the_passes_apart():
    x = normal(1, 8, 8, 8)
    free = body(global_layers=(0, 1, 2))
    torch.testing.assert_close(ShiftedWindowEnsemble(free, 2)(x), free(x), atol=1e-12, rtol=0)
    placed = body(positions=1.0, global_layers=(0, 1, 2))
    assert (ShiftedWindowEnsemble(placed, 2)(x) - placed(x)).abs().max() > 0.01


def test_random_draws_one_of_the_passes():
    g, x = body(positions=1.0), normal(1, 4, 4, 8)
    layer = ShiftedWindowEnsemble(g, 1, mode="random", roll_sign=(1, 1))
    average = ShiftedWindowEnsemble(g, 1, roll_sign=(1, 1))
    assert torch.equal(layer.eval()(x), average(x))
    layer.train()
    torch.manual_seed(0)
    seen = [layer(x) for _ in range(20)]
    passes = [g(x), g(x.roll((1, 1), (1, 2))).roll((-1, -1), (1, 2))]
    drawn = [[torch.equal(one, out) for out in passes].index(True) for one in seen]
    assert {0, 1} == set(drawn)


def test_windows_do_not_see_each_other():
    g = body(global_layers=())
    x = normal(1, 6, 4, 8).requires_grad_()
    (grad,) = torch.autograd.grad(g(x)[0, 0, 0].sum(), x)
    assert (grad[0, :3, :2].abs().sum(-1) > 0).all()
    assert not grad[0, 3:].any()
    assert not grad[0, :, 2:].any()


def test_backbone_shift_grid_and_positions():
    model = noisy(WindowedViT(8, 2, 4, patch=2, grid=(4, 4), windows_per_side=2, num_classes=3, shift=1))
    half = noisy(WindowedViT(8, 2, 4, patch=2, grid=(4, 4), windows_per_side=2, num_classes=3))
    image = normal(2, 3, 8, 8)
    assert torch.equal(model(image), half(image))  # half of a window of two
    (whole,) = model.forward_features(image)
    tokens = model.patches(image).permute(0, 2, 3, 1)
    assert torch.equal(whole, model.last_norm(model.ensemble(tokens)).permute(0, 3, 1, 2))
    assert model(normal(1, 3, 12, 20)).shape == (1, 3)
    assert (
        half.float().bfloat16()(image.bfloat16()).dtype == torch.bfloat16
    )  # no attribute hides a Module's method
    assert half.half().patches.weight.dtype == torch.float16
    half.double()
    assert model.ensemble.module.global_layers == {0, 1, 2, 3}
    features = WindowedViT(8, 2, 2, patch=2, windows_per_side=2, features_only=True)
    assert [tuple(m.shape) for m in features(normal(1, 3, 8, 12, dtype=torch.float32))] == [(1, 8, 4, 6)]


@pytest.mark.parametrize(
    ("dim", "heads", "depth", "wanted"), [(768, 12, 12, (2, 5, 8, 11)), (1024, 16, 24, (5, 11, 17, 23))]
)
def test_the_papers_sizes(dim, heads, depth, wanted):
    with torch.device("meta"):
        model = WindowedViT(dim, heads, depth, grid=(64, 64), num_classes=0)
    assert sorted(model.ensemble.module.global_layers) == list(wanted)
    layer = 12 * dim * dim + 13 * dim  # four square maps and two MLP maps, their biases, two norms
    assert parameters_of(model) == depth * layer + 3 * 16 * 16 * dim + dim + 64 * 64 * dim + 2 * dim
    assert model.ensemble.module.window((64, 64)) == (16, 16)


def test_transformers_vit_and_clip():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32,
             "image_size": 16, "patch_size": 4}  # fmt: skip
    torch.manual_seed(0)
    vit = noisy(transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False))
    clip = noisy(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)))
    image = normal(2, 3, 16, 16)
    for model, first in ((vit, None), (clip, "pre_layrnorm")):
        core = getattr(model, "vision_model", model)
        made = windowed_vit(model, windows_per_side=2, global_layers=range(4), shift=0)
        patches = made.patches(image).flatten(2).mT
        table = core.embeddings.position_embedding.weight if first else core.embeddings.position_embeddings[0]
        x = patches + table[1:]
        layers = core.encoder.layers if first else core.layers
        x = getattr(core, first)(x) if first else x
        for layer in layers:
            out = layer(x, None)
            x = out[0] if isinstance(out, tuple) else out
        wanted = (core.post_layernorm if first else core.layernorm)(x)
        (got,) = made(image)
        torch.testing.assert_close(got.flatten(2).mT, wanted, atol=1e-10, rtol=1e-10)
        large = windowed_vit(model, windows_per_side=4, global_layers=(3,))(normal(1, 3, 64, 32))
        assert large[0].shape == (1, 16, 16, 8)
    ours = noisy(WindowedViT(16, 2, 4, patch=4, grid=(4, 4), windows_per_side=2, num_classes=0, mlp_ratio=2))
    with torch.no_grad():  # the same weights in both
        for mine, theirs in zip(ours.ensemble.module.layers, vit.layers, strict=True):
            att = theirs.attention
            for name in ("weight", "bias"):
                parts = [getattr(p, name) for p in (att.q_proj, att.k_proj, att.v_proj)]
                getattr(mine.qkv, name).copy_(torch.cat(parts))
                getattr(mine.proj, name).copy_(getattr(att.o_proj, name))
                for a, b in ((mine.norm1, theirs.layernorm_before), (mine.norm2, theirs.layernorm_after),
                             (mine.mlp.fc1, theirs.mlp.fc1), (mine.mlp.fc2, theirs.mlp.fc2)):  # fmt: skip
                    getattr(a, name).copy_(getattr(b, name))
        ours.patches.load_state_dict(vit.embeddings.patch_embeddings.projection.state_dict())
        ours.last_norm.load_state_dict(vit.layernorm.state_dict())
        ours.ensemble.module.positions.copy_(vit.embeddings.position_embeddings[:, 1:].view(1, 4, 4, 16))
    (theirs,) = windowed_vit(vit, windows_per_side=2)(image)
    torch.testing.assert_close(ours.forward_features(image)[0], theirs, atol=1e-6, rtol=1e-6)  # eps differs
    with pytest.raises(TypeError, match="ViT or CLIP vision model, got Linear"):
        windowed_vit(nn.Linear(2, 2))


def test_window_bias_is_adjusted_r_squared():
    x = normal(2, 6, 4, 3)
    values = {}
    for b in range(2):
        for i in range(6):
            for j in range(4):
                values.setdefault((i % 3, j % 2), []).append(x[b, i, j])
    within = sum((torch.stack(v) - torch.stack(v).mean(0)).square().sum() for v in values.values())
    total = (x - x.mean((0, 1, 2))).square().sum()
    wanted = 1 - (within / (48 - 6)) / (total / 47)
    assert window_bias(x, (3, 2)) == pytest.approx(float(wanted), abs=1e-12)
    phase = torch.arange(6)[:, None] % 3 + torch.arange(4) % 2
    assert window_bias(phase[None, :, :, None].double(), (3, 2)) == pytest.approx(1)
    assert abs(window_bias(normal(50, 8, 8, 8), 4)) < 0.01  # noise


def test_errors_name_what_came():
    g = body()
    with pytest.raises(ValueError, match="mode must be 'average' or 'random', got 'both'"):
        ShiftedWindowEnsemble(g, 1, mode="both")
    with pytest.raises(ValueError, match="roll_sign"):
        ShiftedWindowEnsemble(g, 1, roll_sign=(0, 1))
    with pytest.raises(ValueError, match="shift must be an int >= 0"):
        ShiftedWindowEnsemble(g, -1)
    with pytest.raises(ValueError, match="x must be \\(B, H, W, C\\)"):
        ShiftedWindowEnsemble(g, 1)(normal(2, 16, 8))
    with pytest.raises(ValueError, match="indices below 3, got \\(3,\\)"):
        body(global_layers=(3,))
    with pytest.raises(ValueError, match="must divide the map's sides, got \\(5, 4\\)"):
        g(normal(1, 5, 4, 8))
    with pytest.raises(ValueError, match="multiples of 8, got \\(17, 16\\)"):
        WindowedViT(8, 2, 2, patch=4, windows_per_side=2)(normal(1, 3, 17, 16))
    with pytest.raises(ValueError, match="multiple of heads, got 8 and 3"):
        ViTLayer(8, 3)
    with pytest.raises(ValueError, match="several windows of 4 x 4"):
        window_bias(normal(1, 4, 4, 2), 4)
