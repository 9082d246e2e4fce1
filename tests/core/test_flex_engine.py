"""FlexAttention as an engine: exact exchange of masks, results within the error budget, honest refusals.

Each new combination of shapes and scores is one compilation of several seconds, so the tests share them.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

import foveate as fv
from foveate.catalogue.conformance.budget import assert_within_budget
from foveate.core import engines
from foveate.core.engines import flex
from foveate.core.layout import BlockLayout
from foveate.core.request import EngineRefusal, make_request


def random_mask(shape, density, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def patchy_mask(shape, seed=0):
    """Empty, full and partial tiles, rows that see nothing."""
    generator = torch.Generator().manual_seed(seed)
    n, m = shape[-2:]
    tiles = torch.rand((*shape[:-2], -(-n // 64), -(-m // 64)), generator=generator)
    chance = tiles.repeat_interleave(64, -2).repeat_interleave(64, -1)[..., :n, :m]
    mask = torch.rand(shape, generator=generator) < (chance * 3 - 1)
    mask[..., n // 2, :] = False
    return mask


def tensors(batch, heads, kv_heads, n, m, dim, v_dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, heads, n, dim), (batch, kv_heads, m, dim), (batch, kv_heads, m, v_dim)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


# ---------------------------------------- exch
shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 200), st.integers(1, 200))


@settings(max_examples=40, deadline=None)
@given(shape=shapes, density=st.sampled_from([0.0, 0.0005, 0.3, 1.0]), seed=st.integers(0, 99))
def test_a_layout_survives_the_round_trip(shape, density, seed):
    layout = BlockLayout.from_mask(random_mask(shape, density, seed))
    assert BlockLayout.from_flex(layout.to_flex()) == layout


block_sizes = st.sampled_from([16, 48, 64, 96, 128, (32, 128), (128, 80)])


@settings(max_examples=15, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99), block=block_sizes)
def test_a_block_mask_of_any_block_size_is_read_exactly(shape, seed, block):
    mask = patchy_mask(shape, seed)
    batch, heads, n, m = shape

    def rule(b, h, q, k):
        return mask[b, h, q, k]

    block_mask = create_block_mask(rule, batch, heads, n, m, device="cpu", BLOCK_SIZE=block)
    assert torch.equal(BlockLayout.from_flex(block_mask).to_dense(), mask)


def test_the_lists_decide_where_the_rule_says_more():
    """A BlockMask allows what its lists and its mask_mod allow; the mask_mod alone may allow more."""
    everything = create_block_mask(lambda b, h, q, k: q >= 0, None, None, 256, 256, device="cpu")
    one = torch.ones(1, 1, 2, dtype=torch.int32)
    first = torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    cut = BlockMask.from_kv_blocks(one, first, BLOCK_SIZE=128, mask_mod=everything.mask_mod)
    want = torch.zeros(1, 1, 256, 256, dtype=torch.bool)
    want[..., :128] = True
    assert torch.equal(BlockLayout.from_flex(cut).to_dense(), want)


def test_the_mask_mod_is_exact_on_its_own():
    mask = patchy_mask((2, 3, 130, 200))
    rule = BlockLayout.from_mask(mask).to_flex().mask_mod
    assert torch.equal(create_mask(rule, 2, 3, 130, 200, device="cpu"), mask)


def test_axes_that_broadcast_stay_short():
    for batch, heads in ((1, 1), (3, 1), (1, 2)):
        mask = patchy_mask((batch, heads, 100, 100))
        block_mask = BlockLayout.from_mask(mask).to_flex()
        assert block_mask.shape == (batch, heads, 100, 100)
        wide = create_mask(block_mask.mask_mod, 3, 2, 100, 100, device="cpu")
        assert torch.equal(wide, mask.expand(3, 2, 100, 100))


@pytest.mark.parametrize("block", [64, 128, 192, 320])
def test_lists_of_any_block_size_are_those_of_torch(block):
    """Including the lists by key block, which FlexAttention's backward reads."""
    mask = patchy_mask((2, 2, 300, 200))
    mask[1, 1] = True
    ours = flex.to_flex(BlockLayout.from_mask(mask), block=block)
    padded = torch.nn.functional.pad(
        mask, (0, -200 % block, 0, -300 % block), value=True
    )  # as the plane ends
    inside = torch.nn.functional.pad(mask, (0, -200 % block, 0, -300 % block))
    tiles = (t.unflatten(3, (-1, block)).unflatten(2, (-1, block)).transpose(3, 4) for t in (padded, inside))
    every, some = next(tiles).all(-1).all(-1), next(tiles).any(-1).any(-1)
    assert every.any()
    for prefix, blocks in (("full_", every), ("", some & ~every)):
        for axis, listed in (("kv", blocks), ("q", blocks.transpose(2, 3))):
            count, index = (
                getattr(ours, f"{prefix}{axis}_num_blocks"),
                getattr(ours, f"{prefix}{axis}_indices"),
            )
            assert torch.equal(count, listed.sum(-1, dtype=torch.int32))
            found = torch.zeros_like(listed)
            b, h, r, slot = (torch.arange(index.shape[-1]) < count.unsqueeze(-1)).nonzero(as_tuple=True)
            found[b, h, r, index[b, h, r, slot].long()] = True
            assert torch.equal(found, listed)
            assert (index.diff(dim=-1)[torch.arange(1, index.shape[-1]) < count.unsqueeze(-1)] > 0).all()
    assert torch.equal(BlockLayout.from_flex(ours).to_dense(), mask)
    with pytest.raises(ValueError, match="block must be a positive multiple of 64, got 100"):
        flex.to_flex(BlockLayout.from_mask(mask), block=100)


def test_a_sliced_or_wrong_mask_is_refused():
    whole = create_block_mask(lambda b, h, q, k: q >= k, None, None, 300, 300, device="cpu")
    with pytest.raises(ValueError, match="mask_mod of block_mask cannot be"):
        BlockLayout.from_flex(whole[:, :, :1])
    with pytest.raises(TypeError, match="must be a torch BlockMask, got Tensor"):
        BlockLayout.from_flex(torch.ones(3, 3))


# ---------------------------------------- compi
def test_one_compilation_serves_every_mask_of_a_shape():
    """Random, patchy, empty, full and causal masks, dictionaries of many sizes, NaN in masked places."""
    batch, heads, n, m = 2, 4, 131, 200
    q, k, v = tensors(batch, heads, 2, n, m, 8, 5)
    full = torch.ones(batch, heads, n, m, dtype=torch.bool)
    masks = [patchy_mask(full.shape), random_mask(full.shape, 0.4), full & False, full, full.tril(m - n)]
    before = counters["stats"]["unique_graphs"]
    for mask in masks:
        layout = BlockLayout.from_mask(mask)
        out = fv.attention(q, k, v, layout, engine="flex")
        assert_within_budget(out, q, k, v, mask)
    mask = masks[1].clone()
    mask[..., 70:90] = False
    mask[0, 0, :50, 120] = False
    k[:, :, 70:75], v[:, :, 75:80], v[:, :, 80:90] = torch.nan, torch.inf, torch.nan
    out = fv.attention(q, k, v, mask, engine="flex")
    assert_within_budget(out, q, k, v, mask)
    v[0, 0, 120] = torch.nan
    q[1, 1, 3], q[1, 1, n // 2] = torch.nan, torch.nan
    mask[1, 1, n // 2] = False  # sees nothing, so even its own NaN is invisible
    out = fv.attention(q, k, v, mask, engine="flex")
    visible = torch.zeros(batch, heads, n, dtype=torch.bool)
    visible[0, :2] = mask[0, :2, :, 120]
    visible[1, 1, 3] = True
    assert torch.equal(out.isnan().any(-1), visible)
    assert (out[1, 1, n // 2] == 0).all()
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(fv.attention(*strided, mask, engine="flex").nan_to_num(7), out.nan_to_num(7))
    assert counters["stats"]["unique_graphs"] - before == 1


def test_scores_in_their_order():
    q, k, v = tensors(1, 2, 1, 70, 130, 16, 16, seed=1)
    mask = patchy_mask((1, 2, 70, 130), seed=3)[:, :1]
    row = torch.randn(2, 1, 130)
    row[0, 0, ::3] = -torch.inf
    before = counters["stats"]["unique_graphs"]
    for cap in (2.0, 5.0):
        for bias in (row, row * 0.5):
            scores = (fv.SoftCap(cap), fv.Bias(bias))
            out = fv.attention(q, k, v, mask, score=scores, scale=0.7, engine="flex")
            assert_within_budget(out, q, k, v, mask, scores=scores, scale=0.7)
    assert counters["stats"]["unique_graphs"] - before == 1


def test_without_compilation_it_refuses_to_run():
    """FlexAttention alone would silently compute the dense matrix."""
    q, k, v = tensors(1, 1, 1, 70, 70, 16, 16)
    eager = torch.compiler.set_stance("force_eager")
    with eager, pytest.raises(EngineRefusal, match=r"torch\.compile is disabled"):
        fv.attention(q, k, v, is_causal=True, engine="flex")


def test_a_recompile_limit_is_an_error(monkeypatch):
    def limited(*_):
        raise torch._dynamo.exc.FailOnRecompileLimitHit("limit")

    monkeypatch.setattr(flex, "_compiled", lambda variant: limited)
    q, k, v = tensors(1, 1, 1, 70, 70, 16, 16)
    with pytest.raises(EngineRefusal, match="refuses another recompilation"):
        fv.attention(q, k, v, is_causal=True, engine="flex")


def test_auto_never_picks_it_on_cpu():
    q, k, v = tensors(1, 1, 1, 70, 70, 16, 16)
    for request in (make_request(q, k, v), make_request(q, k, v, random_mask((70, 70), 0.5))):
        assert engines.choose(request).name != "flex"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "not float64"),
        ({"grad": True}, "no backward on CPU"),
        ({"dropout_p": 0.1}, "no dropout"),
        ({"sinks": torch.zeros(2)}, "sinks need the log-sum-exp"),
    ],
)
def test_refusals_name_the_reason(change, words):
    q, k, v = tensors(1, 2, 1, 70, 70, 16, 16, dtype=change.pop("dtype", torch.float32))
    q.requires_grad_(change.pop("grad", False))
    with pytest.raises(EngineRefusal, match=words):
        fv.attention(q, k, v, engine="flex", **change)


def test_lse_is_refused_on_cpu():
    q, k, v = tensors(1, 1, 1, 70, 70, 16, 16)
    assert "log-sum-exp" in (flex.why_not_lse(make_request(q, k, v)) or "")
    with pytest.raises(EngineRefusal, match="log-sum-exp"):
        fv.attention(q, k, v, return_lse=True, engine="flex")


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(flex, "_cpu_obstacle", lambda: "no compiler")
    q, k, v = tensors(1, 1, 1, 70, 70, 16, 16)
    with pytest.raises(EngineRefusal, match="no compiler"):
        fv.attention(q, k, v, engine="flex")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "n", "m", "dim", "v_dim"),
    [
        (1, 2, 2, 1, 700, 16, 16),
        (3, 4, 1, 7, 5, 3, 1),
        (1, 2, 1, 700, 501, 33, 64),
        (2, 1, 1, 63, 129, 64, 75),
        (1, 3, 3, 320, 320, 1, 7),
    ],
)
def test_shapes_and_dtypes(batch, heads, kv_heads, n, m, dim, v_dim, dtype):
    q, k, v = tensors(batch, heads, kv_heads, n, m, dim, v_dim, dtype=dtype)
    for mask in (patchy_mask((1, 1, n, m)), torch.zeros(1, 1, n, m, dtype=torch.bool)):
        out = fv.attention(q, k, v, mask, engine="flex")
        assert_within_budget(out, q, k, v, mask)


@pytest.mark.slow
def test_full_and_causal_kinds():
    q, k, v = tensors(1, 4, 2, 100, 150, 16, 16)
    assert_within_budget(fv.attention(q, k, v, engine="flex"), q, k, v)
    causal = torch.ones(100, 150, dtype=torch.bool).tril(50)
    assert_within_budget(fv.attention(q, k, v, is_causal=True, engine="flex"), q, k, v, causal)
    k[0, 0, 3] = torch.nan
    broken = fv.attention(q, k, v, engine="flex").isnan().all(-1).all(-1)
    assert broken.tolist() == [[True, True, False, False]]


@pytest.mark.slow
def test_very_negative_logits_with_one_query():
    """The split-key decoding kernel of FlexAttention would return 0 here."""
    q, k, v = tensors(1, 1, 1, 1, 1024, 16, 16)
    k = k * 0.01 - 20 * q
    mask = torch.zeros(1, 1024, dtype=torch.bool)
    mask[:, [3, 70]] = True
    out = fv.attention(q, k, v, mask, engine="flex")
    assert_within_budget(out, q, k, v, mask)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_forward_backward_lse_and_sinks(dtype):
    q, k, v = (t.cuda().requires_grad_() for t in tensors(2, 4, 2, 131, 200, 32, 16, dtype=dtype))
    sinks = torch.randn(4, device="cuda", requires_grad=True)
    mask = patchy_mask((2, 4, 131, 200)).cuda()
    out, lse = fv.attention(q, k, v, mask, sinks=sinks, return_lse=True, engine="flex")
    with torch.device("cuda"):
        assert_within_budget(out.detach(), q, k, v, mask, sinks=sinks, lse=lse)
    given_grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v, sinks), given_grad)
    want = fv.attention(q, k, v, mask, sinks=sinks, engine="reference")
    for a, b in zip(got, torch.autograd.grad(want, (q, k, v, sinks), given_grad), strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, atol=2e-2 if dtype == torch.bfloat16 else 2e-3, rtol=2e-2)
