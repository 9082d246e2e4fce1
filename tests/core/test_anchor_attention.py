"""AnchorAttention against a brute-force oracle written from the paper's steps, query by query, key by key."""

from __future__ import annotations

import math
from importlib import import_module

import numpy as np
import pytest
import torch

import foveate as fv
from foveate.core.layout import BlockLayout
from foveate.core.selectors.anchor_attention import AnchorAttention, Anchors, anchor_attention

module = import_module("foveate.core.selectors.anchor_attention")
INF = math.inf


def tensors(batch, heads, kv_heads, n, m, dim, seed=0, sharp=2.0):
    """Random q, k, v (float64) whose attention is far from flat; neighbouring queries resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(batch, heads, n // 16 + 1, dim, generator=generator, dtype=torch.float64)
    q = torch.randn(batch, heads, n, dim, generator=generator, dtype=torch.float64) / 2
    q += common.repeat_interleave(16, 2)[:, :, :n]
    k, v = (torch.randn(batch, kv_heads, m, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return q * sharp, k, v


# ------------------------------------------------------------ the oracle
def oracle_anchors(position, cfg):
    """Keys that a query at this position always sees."""
    start = position // (cfg.block * cfg.step) * (cfg.block * cfg.step)
    first = range(min(cfg.init, position + 1))
    return set(first) | set(range(max(start - cfg.block, 0), position + 1))


def oracle_stripes(queries, k, cfg, scale):
    """{group: set of key positions} of one list; queries: [(position, vector)], of one head or of several."""
    size = cfg.block * cfg.step
    blocks: dict[tuple, list] = {}
    for head, position, vector in queries:
        blocks.setdefault((head, position // cfg.block), []).append((position, vector))
    stripes: dict[int, set] = {}
    for (_, number), members in blocks.items():
        group = number // cfg.step
        mean_q = np.mean([vector for _, vector in members], axis=0)
        tops = [
            max(scale * float(vector @ k[j]) for j in oracle_anchors(position, cfg))
            for position, vector in members
        ]
        wanted = stripes.setdefault(group, set())
        for j in range(cfg.init, group * size - cfg.block):
            if scale * float(mean_q @ k[j]) + cfg.theta >= np.mean(tops):
                wanted.add(j)
    return stripes


def oracle_mask(q, k, h, cfg, scale):
    """bool (N, M) of query head h; q (H, N, D), k (Hkv, M, D) numpy."""
    (heads, n, _), (kv_heads, m, _) = q.shape, k.shape
    if n == 1:
        return np.ones((1, m), bool)
    kv = h // (heads // kv_heads)
    partners = range(kv * heads // kv_heads, (kv + 1) * heads // kv_heads) if cfg.shared else [h]
    queries = [(p, m - n + i, q[p, i]) for p in partners for i in range(n)]
    stripes = oracle_stripes(queries, k[kv], cfg, scale)
    mask = np.zeros((n, m), bool)
    for i in range(n):
        position = m - n + i
        far = stripes[position // (cfg.block * cfg.step)]
        near = oracle_anchors(position, cfg)
        assert not far & near  # no key twice
        mask[i, sorted(far | near)] = True
    return mask


def check(q, k, cfg, scale=None):
    """The layout equals the oracle; returns the share of far pairs that was kept."""
    dense = cfg.layout(q, k, scale=scale).expand(q.shape[0], q.shape[1]).to_dense()
    used = q.shape[-1] ** -0.5 if scale is None else scale
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            want = oracle_mask(q[b].numpy(), k[b].numpy(), h, cfg, used)
            assert torch.equal(dense[b, h], torch.from_numpy(want)), (b, h)
    least = cfg.anchors.layout(q.shape[2], k.shape[2]).density
    most = (torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2])).mean().item()
    return (dense.double().mean().item() - least) / (most - least)


# ------------------------------------------------------------ the choice
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "n", "m"),
    [(2, 4, 2, 331, 331), (1, 3, 1, 257, 257), (1, 2, 2, 131, 449), (1, 2, 1, 63, 321), (1, 2, 1, 200, 264)],
)
def test_equals_the_oracle(batch, heads, kv_heads, n, m, shared):
    q, k, _ = tensors(batch, heads, kv_heads, n, m, 8)
    for theta in (1.0, 4.0):
        kept = check(q, k, AnchorAttention(16, 4, theta, 16, shared))
        assert 0.02 < kept < 0.98  # neither bound of theta


def test_equals_the_oracle_in_other_blocks_and_scales():
    q, k, _ = tensors(1, 2, 1, 500, 500, 4, seed=1)
    assert 0 < check(q, k, AnchorAttention(64, 2, 0.5, 3), scale=0.9) < 1
    assert 0 < check(q, k, AnchorAttention(32, 2, 0.5, 0), scale=0.3) < 1  # no first keys
    q, k, _ = tensors(1, 2, 1, 1000, 1000, 4, seed=2, sharp=4.0)
    assert 0 < check(q, k, AnchorAttention(7, 64, 1.0, 5)) < 1  # blocks that share no border with tiles
    q, k, _ = tensors(1, 2, 1, 200, 200, 4, seed=3)
    assert 0 < check(q, k, AnchorAttention(1, 64, 1.0, 5)) < 1  # every query its own block


def test_in_strips_and_chunks_it_is_the_same(monkeypatch):
    q, k, _ = tensors(2, 4, 2, 331, 331, 8)
    cfg = AnchorAttention(16, 8, 2.0, 16)
    whole = cfg.layout(q, k)
    monkeypatch.setattr(module, "CHUNK", 1)
    monkeypatch.setattr(module, "STRIP", 7)
    assert cfg.layout(q, k) == whole


def test_infinite_theta_keeps_all_or_nothing():
    q, k, _ = tensors(1, 4, 2, 333, 333, 8)
    causal = torch.ones(333, 333, dtype=torch.bool).tril()
    everything, nothing = (AnchorAttention(16, 4, theta, 16).layout(q, k) for theta in (INF, -INF))
    assert torch.equal(everything.expand(1, 4).to_dense()[0], causal.expand(4, -1, -1))
    i, j = torch.arange(333)[:, None], torch.arange(333)
    anchors = causal & ((j < 16) | (j >= i // 64 * 64 - 16))
    assert torch.equal(nothing.expand(1, 4).to_dense()[0], anchors.expand(4, -1, -1))


@pytest.mark.parametrize(("theta", "who"), [(INF, None), (-INF, "anchors")])
def test_infinite_theta_equals_dense_or_anchor_attention(theta, who):
    q, k, v = (t.float() for t in tensors(1, 4, 2, 333, 333, 8))
    pattern = AnchorAttention(16, 4, theta, 16).anchors if who else None
    want = fv.attention(q, k, v, pattern, is_causal=True, engine="reference")
    got = anchor_attention(q, k, v, block=16, step=4, theta=theta, init=16)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_anchors_and_stripes_do_not_meet_and_stripes_stay_before_the_group(shared):
    for theta in (-3.0, 0.0, 3.0, INF):
        q, k, _ = tensors(2, 4, 2, 389, 389, 4)
        cfg = AnchorAttention(16, 4, theta, 10, shared)
        stripes = cfg.stripes(q, k)
        assert (stripes.layout() & cfg.anchors.layout(389)).nnz == 0
        lists = stripes.idx.split(stripes.ptr.diff().tolist())
        for number, keys in enumerate(lists):
            group = number // (2 * stripes.lists)
            assert (keys >= 10).all()
            assert (keys < max(group * 64 - 16, 10)).all()
            assert (keys.diff() > 0).all()
        assert stripes.area + 8 * cfg.anchors.layout(389).area == cfg.layout(q, k).expand(2, 4).area


@pytest.mark.parametrize("shared", [False, True])
def test_counts_rise_with_theta(shared):
    q, k, _ = tensors(2, 4, 2, 500, 500, 8)
    thetas = [-INF, -2.0, 0.0, 1.0, 2.0, 4.0, 8.0, INF]
    counts = torch.stack([AnchorAttention(16, 4, t, 16, shared).stripes(q, k).counts for t in thetas])
    assert (counts.diff(dim=0) >= 0).all()
    assert (counts[:6].flatten(1).sum(1).diff() > 0).all()
    assert (counts[0] == 0).all()
    assert counts.shape == (8, 2, 2 if shared else 4, 8)


def test_a_constant_added_to_all_logits_changes_nothing():
    q, k, _ = tensors(1, 2, 1, 333, 333, 8)
    q[..., 0] = 1.0
    moved = k.clone()
    moved[..., 0] += 5.0  # q . k grows by 5 everywhere
    cfg = AnchorAttention(16, 4, 2.0, 16)
    assert cfg.layout(q, moved) == cfg.layout(q, k)
    assert 0 < len(cfg.stripes(q, k).idx) < len(AnchorAttention(16, 4, INF, 16).stripes(q, k).idx)


def test_planted_columns():
    """One block's far key serves its whole group; keys more than theta below every block's anchor are not kept."""
    n, dim, size = 320, 8, 64
    q, k = torch.zeros(1, 1, n, dim, dtype=torch.float64), torch.zeros(1, 1, n, dim, dtype=torch.float64)
    q[..., 0] = math.sqrt(dim)  # logits are k[0] ...
    k[..., 100, 1] = 6.0  # ... but one block of group 3 asks for key 100
    q[..., 3 * size + 16 : 3 * size + 32, 1] = math.sqrt(dim)
    k[..., 1, 0] = 4.0  # the anchor of all: logit 4 on a first key
    k[..., 30, 0] = 1.9  # below it by 2.1
    k[..., 40, 0] = 2.1  # below it by 1.9
    stripes = AnchorAttention(16, 4, 2.0, 16).stripes(q, k)
    lists = [keys.tolist() for keys in stripes.idx.split(stripes.ptr.diff().tolist())]
    assert lists == [[], [40], [40], [40, 100], [40]]
    dense = AnchorAttention(16, 4, 2.0, 16).layout(q, k).to_dense()[0, 0]
    assert dense[3 * size : 4 * size, 100].all()
    assert not dense[4 * size :, 100].any()


def test_a_dropped_column_of_a_constant_block_weighs_less_than_exp_minus_theta():
    """For the block's last query, whose anchors hold those of the others."""
    q, k, _ = tensors(1, 2, 1, 384, 384, 8)
    q = q[:, :, ::16].repeat_interleave(16, 2)  # equal queries in each block
    causal = torch.ones(384, 384, dtype=torch.bool).tril()
    logits = (q @ k.transpose(-1, -2) * 8**-0.5).masked_fill(~causal, -INF)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()[:, :, 15::16]  # of the largest one
    for theta in (0.5, 2.0, 4.0):
        dropped = (causal & ~AnchorAttention(16, 4, theta, 16).layout(q, k).to_dense())[:, :, 15::16]
        assert dropped.any()
        assert (weights[dropped] < math.exp(-theta)).all()


# ------------------------------------------------------------ the attention
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("n", "m"), [(331, 331), (131, 449), (200, 264), (1, 300), (7, 7)])
def test_gathered_attention_is_attention_over_the_set(n, m, shared):
    q, k, v = tensors(2, 4, 2, n, m, 8)
    v = torch.cat([v, v[..., :3]], -1)  # Dv = 11
    settings = {"block": 16, "step": 4, "theta": 1.0, "init": 5, "shared": shared}
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    got, lse = anchor_attention(q, k, v, scale=0.4, return_lse=True, **settings)
    layout = AnchorAttention(**settings).layout(q, k, scale=0.4)
    want, want_lse = fv.attention(q, k, v, layout, scale=0.4, return_lse=True, engine="reference")
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=0)
    seed = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((got * seed).sum(), (q, k, v))
    for a, b in zip(found, torch.autograd.grad((want * seed).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_attention_on_the_native_engine(dtype):
    q, k, v = (t.to(dtype) for t in tensors(2, 4, 2, 331, 331, 8))
    settings = {"block": 16, "step": 4, "theta": 1.0, "init": 5}
    layout = AnchorAttention(**settings).layout(q, k)
    want = fv.attention(q.double(), k.double(), v.double(), layout, engine="reference")
    eager = fv.attention(q, k, v, layout, engine="reference")
    got = anchor_attention(q, k, v, engine="native", **settings)
    assert got.dtype == dtype
    # three roundings to the dtype (two states and their merge) where the eager form has one
    assert (got - want).abs().max() <= 3 * (eager - want).abs().max()


def test_a_selector_in_attention():
    q, k, v = (t.float() for t in tensors(1, 4, 2, 331, 331, 8))
    cfg = AnchorAttention(16, 4, 1.0, 16)
    layout = cfg.layout(q, k, scale=0.25)
    assert isinstance(layout, BlockLayout)
    out = fv.attention(q, k, v, cfg, is_causal=True, scale=0.25, engine="reference")
    assert torch.equal(out, fv.attention(q, k, v, layout, scale=0.25, engine="reference"))


def test_what_a_masked_key_holds_does_not_matter():
    q, k, v = tensors(1, 2, 1, 331, 331, 8)
    settings = {"block": 16, "step": 4, "theta": 1.0, "init": 16}
    seen = AnchorAttention(**settings).layout(q, k).expand(1, 2).to_dense()[0].any(0)  # (N, M), by some head
    row = 320  # of the last group
    hidden = ~seen[320:].any(0)
    assert hidden[:320].any()
    want = anchor_attention(q, k, v, **settings)[:, :, row:]
    v[:, :, hidden] = torch.nan
    assert torch.equal(anchor_attention(q, k, v, **settings)[:, :, row:], want)


# ------------------------------------------------------------ independence
def test_heads_and_batch_rows_choose_on_their_own():
    q, k, _ = tensors(3, 4, 2, 331, 331, 8)
    cfg = AnchorAttention(16, 4, 1.0, 16)
    whole = cfg.layout(q, k).to_dense()
    for b in range(3):
        for h in range(4):
            alone = cfg.layout(q[b : b + 1, h : h + 1], k[b : b + 1, h // 2 : h // 2 + 1])
            assert torch.equal(whole[b, h], alone.expand(1, 1).to_dense()[0, 0])
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_shared_lists_are_the_union_of_their_heads():
    q, k, _ = tensors(2, 4, 2, 331, 331, 8)
    apart = AnchorAttention(16, 4, 1.0, 16).layout(q, k).to_dense()
    shared = AnchorAttention(16, 4, 1.0, 16, shared=True).layout(q, k).to_dense()
    union = apart.unflatten(1, (2, 2)).any(2).repeat_interleave(2, 1)
    assert torch.equal(shared, union)
    assert shared.sum() > apart.sum()


def test_low_precision_strides_and_gradients_do_not_matter():
    q, k, _ = (t.to(torch.bfloat16) for t in tensors(1, 4, 2, 331, 331, 8))
    cfg = AnchorAttention(16, 4, 1.0, 16)
    base = cfg.layout(q, k)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(2, 3).contiguous().transpose(2, 3)
    assert cfg.layout(*strided) == base
    assert cfg.layout(q.float(), k.float()) == base
    assert cfg.layout(q.clone().requires_grad_(), k) == base


def test_no_query_reads_a_later_value():
    q, k, v = tensors(1, 2, 1, 331, 331, 8)
    settings = {"block": 16, "step": 4, "theta": 1.0, "init": 16}
    want = anchor_attention(q, k, v, **settings)
    v[:, :, 200:] += 1.0
    got = anchor_attention(q, k, v, **settings)
    assert torch.equal(got[:, :, :200], want[:, :, :200])
    assert not torch.equal(got[:, :, 200:], want[:, :, 200:])


# ------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block": 0}, "block must be"),
        ({"block": 2.5}, "block must be"),
        ({"step": 0}, "step must be"),
        ({"init": -1}, "init must be"),
        ({"block": 16, "step": 3}, r"block \* step must be a multiple of 64, got 16 \* 3"),
        ({"theta": math.nan}, "theta must be a number, inf or -inf, got nan"),
        ({"theta": "12"}, "theta must be a number"),
        ({"shared": 1}, "shared must be True or False, got 1"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises((ValueError, TypeError), match=f"AnchorAttention.*{words}"):
        AnchorAttention(**settings)


def test_inputs_are_checked():
    q, k, _ = tensors(1, 4, 2, 300, 300, 4)
    cfg = AnchorAttention(16, 4)
    with pytest.raises(ValueError, match="is_causal=False"):
        cfg.layout(q, k, is_causal=False)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        cfg.layout(q[:, :3], k)
    with pytest.raises(ValueError, match="q must be a tensor"):
        cfg.layout(q[0], k)
    with pytest.raises(ValueError, match="at least as many keys as queries, got 300 queries and 299 keys"):
        cfg.layout(q, k[:, :, :299])
    with pytest.raises(TypeError, match="unexpected keyword"):
        AnchorAttention(blocks=64)


# ------------------------------------------------------------ the anchors as a pattern
@pytest.mark.parametrize(("n", "m"), [(1, 1), (63, 63), (331, 331), (131, 449), (500, 500)])
@pytest.mark.parametrize(
    ("block", "group", "init"), [(16, 64, 16), (128, 128, 3), (1, 192, 0), (64, 64, 200)]
)
def test_anchors_are_classified_truly(n, m, block, group, init):
    want = np.zeros((n, m), bool)
    cfg = AnchorAttention(block, group // block, 0.0, init)
    for i in range(n):
        want[i, sorted(oracle_anchors(m - n + i, cfg))] = True
    assert cfg.anchors == Anchors(block, group, init)
    assert np.array_equal(cfg.anchors.layout(n, m).to_dense()[0, 0].numpy(), want)
