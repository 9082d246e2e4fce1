"""Attention variants against loops in float64: each one's weights, sizes, reference streams and indicators."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from foveate.core.rotary import Rotary
from foveate.layers import (
    AttentionVariant,
    VariantLM,
    attention_indicators,
    build_layout,
    per_order_taylor,
    prefix_pooling,
)
from foveate.layers.attention_variants import LAYOUTS, VARIANTS

FIXED = ("rnd_emb_qk", "fixed_seq_qk")
MIXING = tuple(v for v in VARIANTS if v != "mlp")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(variant, dim=24, heads=3, **options):
    torch.manual_seed(2)
    layer = AttentionVariant(dim, heads, variant, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p *= 2
    return layer


def extras(variant, n, dim=24):
    return {"emb": normal(2, n, dim, seed=5) if variant == "static_emb_qk" else None,
            "reference": normal(n + 3, dim, seed=6) if variant in FIXED else None}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- weights
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("variant", MIXING)
def test_weights_and_output_are_the_formulas(variant, rotary):
    layer, h, n = layer_of(variant, rotary=rotary), normal(2, 13, 24), 13
    given = extras(variant, n)
    source = {"static_emb_qk": given["emb"]}.get(variant, h)
    source = given["reference"][:n].expand(2, -1, -1) if variant in FIXED else source
    with torch.no_grad():
        q, k, v = ((x @ m.weight.T).view(2, n, 3, 8).transpose(1, 2)
                   for x, m in ((source, layer.q_proj), (source, layer.k_proj), (h, layer.v_proj)))  # fmt: skip
        if rotary and variant != "non_approximate":
            q, k = (Rotary()(t, torch.arange(n)) for t in (q, k))
        want = torch.zeros(2, 3, n, n, dtype=torch.float64)
        for b, head, i in itertools.product(range(2), range(3), range(n)):
            row = []
            for j in range(i + 1):
                query = F.silu(q[b, head, j]) if variant == "non_approximate" else q[b, head, i]
                z = float(query @ k[b, head, j]) / math.sqrt(8)
                row.append(1 + z + z * z / 2 if variant == "approximate" else math.exp(z))
            want[b, head, i, : i + 1] = torch.tensor(row, dtype=torch.float64) / math.fsum(row)
        out = (want @ v).transpose(1, 2).reshape(2, n, 24) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer.weights(h, **given), want, atol=1e-10, rtol=0)
    torch.testing.assert_close(layer(h, **given), out, atol=1e-10, rtol=0)


def test_mlp_sees_its_own_token_alone():
    layer, h = layer_of("mlp"), normal(1, 11, 24)
    changed = torch.cat([h[:, :4] + 1, h[:, 4:5], h[:, 5:] - 1], 1)
    assert torch.equal(layer(changed)[:, 4], layer(h)[:, 4])
    assert not torch.equal(layer(changed)[:, 3], layer(h)[:, 3])
    gate, up, down = (layer.mlp.gate.weight, layer.mlp.up.weight, layer.mlp.down.weight)
    torch.testing.assert_close(layer(h), (F.silu(h @ gate.T) * (h @ up.T)) @ down.T)


def test_per_order_is_three_means():
    q, k, v = (normal(1, 2, 9, d, seed=s).abs() for s, d in ((1, 4), (2, 4), (3, 5)))  # sums far from 0
    z = (q @ k.mT / 2).tril()
    mean = torch.ones(9, 9).double().tril()
    want = sum((w / w.sum(-1, keepdim=True)) @ v for w in (mean, z, z * z))
    torch.testing.assert_close(per_order_taylor(q, k, v, eps=0.0), want, atol=1e-11, rtol=0)
    layer = layer_of("approximate", normalize="per_order")
    assert layer(normal(1, 7, 24)).shape == (1, 7, 24)
    with pytest.raises(ValueError, match="per_order' carries no state"):
        layer(normal(1, 7, 24), state=layer.initial_state(normal(1, 7, 24)))


# ------------------------------------------------------------------------------------------- scores of keys alone
def test_rows_are_prefix_softmaxes_of_one_score():
    weights = layer_of("non_approximate").weights(normal(1, 19, 24))
    for i in range(1, 18):
        assert (weights[:, :, i, : i + 1] > 0).all()
        assert not weights[:, :, i, i + 1 :].any()
        ratio, after = (weights[:, :, r, : i + 1] / weights[:, :, r, :1] for r in (i, i + 1))
        torch.testing.assert_close(ratio, after, atol=0, rtol=1e-9)
    last = weights[:, :, -1].log().softmax(-1)
    torch.testing.assert_close(last, weights[:, :, -1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_pooling_equals_a_loop_also_for_large_scores(size):
    s, v = size * normal(2, 3, 131, seed=1), normal(2, 3, 131, 5, seed=2)
    out, state = prefix_pooling(s, v)
    for i in (0, 1, 64, 130):
        p = s[..., : i + 1].softmax(-1)
        torch.testing.assert_close(
            out[:, :, i], torch.einsum("bhj,bhje->bhe", p, v[:, :, : i + 1]), atol=1e-11, rtol=0
        )
    before, parts = None, []
    for a, b in itertools.pairwise([0, 1, 2, 70, 131]):
        part, before = prefix_pooling(s[..., a:b], v[:, :, a:b], state=before)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), out, atol=1e-11, rtol=0)
    assert before is not None
    assert before.position == 131
    assert before.nbytes == state.nbytes == 2 * 3 * (5 + 1 + 1) * 8


def test_pooling_gradients():
    s, v = normal(1, 2, 9, seed=1).requires_grad_(), normal(1, 2, 9, 3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, v: prefix_pooling(s, v)[0], (s, v), fast_mode=True)


# ------------------------------------------------------------------------------------------------------- states
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_in_pieces(variant):
    layer, x = layer_of(variant), normal(2, 37, 24)
    given, whole = extras(variant, 37), None
    whole = layer(x, **given)
    for cuts in ([0, 1, 2, 30, 37], list(range(38))):
        state, parts = layer.initial_state(x), []
        for a, b in itertools.pairwise(cuts):
            emb = None if given["emb"] is None else given["emb"][:, a:b]
            out, state = layer(x[:, a:b], emb=emb, reference=given["reference"], state=state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-11, rtol=0)


# ------------------------------------------------------------------------------------------------------ models
def test_all_variants_have_one_size():
    size = {v: sum(p.numel() for p in AttentionVariant(64, 4, v).parameters()) for v in VARIANTS}
    assert all(size[v] == size["standard"] == 4 * 64 * 64 for v in MIXING)
    assert abs(size["mlp"] / size["standard"] - 1) < 0.005


@pytest.mark.parametrize("variant", MIXING)
def test_which_weights_depend_on_the_input(variant):
    torch.manual_seed(0)
    model = VariantLM(30, 16, 3, heads=2, variant=variant, layout="uniform", tokens=12, sigma=1.0)
    a, b = (torch.randint(30, (1, 11), generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    for one, other in zip(model.weights(a), model.weights(b), strict=True):
        assert one is not None
        assert torch.equal(one, other) == (variant in FIXED)
        torch.testing.assert_close(one.sum(-1), torch.ones(1, 2, 11))


@pytest.mark.parametrize("variant", FIXED)
def test_the_stream_passes_through_the_same_layers(variant):
    """A model whose stream is the embeddings of a sequence has, for that sequence, the weights of self-attention."""
    torch.manual_seed(0)
    model = VariantLM(30, 16, 4, heads=2, variant=variant, tokens=12).double()
    plain = VariantLM(30, 16, 4, heads=2, variant="standard").double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k not in ("noise", "sequence")})
    ids = torch.randint(30, (1, 9))
    if variant == "rnd_emb_qk":
        model.noise = torch.cat([model.embed(ids)[0].detach(), model.noise[9:].double()])
    else:
        model.sequence[:9] = ids[0]
    torch.testing.assert_close(model(ids), plain(ids), atol=1e-12, rtol=0)
    assert not torch.allclose(model(ids.flip(1)), plain(ids.flip(1)), atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_are_causal_and_train(variant):
    torch.manual_seed(0)
    model = VariantLM(30, 16, 4, heads=2, variant=variant, tokens=20)
    ids = torch.randint(30, (2, 13))
    logits = model(ids)
    torch.testing.assert_close(model(ids[:, :7]), logits[:, :7], atol=1e-5, rtol=0)
    F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_skipping_leaves_the_standard_layers():
    torch.manual_seed(0)
    model = VariantLM(30, 16, 4, heads=2, variant="approximate")
    ids = torch.randint(30, (2, 13))
    before = model(ids)
    model.skip = True
    without = model(ids)
    for layer in (1, 3):
        torch.nn.init.zeros_(model.blocks[layer].mixer.o_proj.weight)
    model.skip = False
    torch.testing.assert_close(model(ids), without)
    assert not torch.allclose(before, without, atol=1e-3)


def test_layouts():
    def kept(layout, depth=8):
        return [i for i, kind in enumerate(build_layout(depth, "mlp", layout)) if kind == "standard"]

    assert {layout: kept(layout) for layout in LAYOUTS} == {
        "uniform": [],
        "hybrid": [0, 2, 4, 6],
        "odd": [1, 3, 5, 7],
        "top": [4, 5, 6, 7],
        "middle": [2, 3, 4, 5],
        "bottom": [0, 1, 2, 3],
        "every_4th": [0, 4],
        "first": [0],
        "last": [7],
        "first_last": [0, 7],
    }
    assert kept("first_last", 1) == [0]


# -------------------------------------------------------------------------------------------------- indicators
def test_indicators_of_a_uniform_map():
    n = 37
    attn = torch.ones(n, n).double().tril() / torch.arange(1, n + 1).double()[:, None]
    found = attention_indicators(attn.expand(2, 3, n, n))
    assert math.isclose(found["sink"], sum(1 / (i + 1) for i in range(n)) / n)
    assert math.isclose(found["entropy"], sum(math.log(i + 1) for i in range(n)) / n)
    assert math.isclose(found["concentration"], math.sqrt(sum(1 / (i + 1) for i in range(n))))
    assert found["head_diversity"] < 1e-12
    for m in range(4):
        assert math.isclose(found["local_focus"][m], sum(1 / (i + 1) for i in range(m, n)) / (n - m))


def test_indicators_of_heads_that_differ():
    n = 5
    own, first = torch.eye(n).double(), torch.zeros(n, n).double()
    first[:, 0] = 1
    found = attention_indicators(torch.stack([own, first])[None])
    assert found["entropy"] == 0
    assert math.isclose(found["sink"], (1 / n + 1) / 2)
    # the 4 own entries and the 4 first ones of rows 1 .. 4 differ by 1: std 1/2 of 8 of 15 entries
    assert math.isclose(found["head_diversity"], 8 * 0.5 / 15)
    assert [round(x, 6) for x in found["local_focus"]] == [0.6, 0.125, round(1 / 6, 6), 0.25]
    assert len(attention_indicators(torch.eye(2).expand(1, 1, 2, 2))["local_focus"]) == 2


# ------------------------------------------------------------------------------------------------------ errors
def test_errors_name_the_argument():
    for arguments, says in (
        ({"variant": "linear"}, "variant must be one of standard, mlp, .*, got 'linear'"),
        ({"heads": 5}, "dim must be a multiple of heads, got dim=24, heads=5"),
        ({"normalize": "rows"}, "normalize must be joint or per_order, got 'rows'"),
    ):
        with pytest.raises(ValueError, match=says):
            AttentionVariant(**{"dim": 24, "heads": 3, **arguments})
    h = normal(2, 9, 24)
    with pytest.raises(ValueError, match=r"emb must have shape \(2, 9, 24\) for static_emb_qk, got None"):
        layer_of("static_emb_qk")(h)
    with pytest.raises(
        ValueError, match=r"reference must be \(L, dim\) with L >= 9 for rnd_emb_qk, got \(8, 24\)"
    ):
        layer_of("rnd_emb_qk")(h, reference=h[0, :8])
    with pytest.raises(ValueError, match="variant 'mlp' has no weights"):
        layer_of("mlp").weights(h)
    with pytest.raises(ValueError, match=r"s must be \(B, H, N\) and v \(B, H, N, E\), got"):
        prefix_pooling(h, h)
    with pytest.raises(ValueError, match=r"attn must be \(B, H, N, N\), got \(2, 9, 24\)"):
        attention_indicators(h)
    for variant, layout in (("x", "hybrid"), ("mlp", "x")):
        with pytest.raises(ValueError, match=r"variant must be one of .* and layout of .*, got"):
            build_layout(4, variant, layout)
    with pytest.raises(ValueError, match="13 tokens, but a reference stream of tokens=12"):
        VariantLM(30, 16, 2, heads=2, variant="rnd_emb_qk", tokens=12)(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(
        ValueError, match="one reference stream, but the layout has fixed_seq_qk and rnd_emb_qk"
    ):
        VariantLM(30, 16, 2, heads=2, layout=list(FIXED))
