"""HiP against a brute-force search with loops; its invariants; decoding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import foveate as fv
from foveate.core.selectors import hip as module
from foveate.core.selectors.hip import HiPNear
from foveate.selectors import HiP, HiPDecodeState, hip_attention

SMALL = {"keys": 12, "block_q": 16, "stride_q": 3, "block_k": 2, "sink": 3, "window": 17}


def tensors(batch, heads, kv_heads, n, m, dim=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return make(batch, heads, n, dim), make(batch, kv_heads, m, dim), make(batch, kv_heads, m, dim)


# ------------------------------------------------------------ the oracle
def oracle_search(queries, k, end, cfg):
    """Key positions chosen for a query block that ends at `end`; None: it sees everything. queries (R, D)."""
    region = end - cfg.window - cfg.sink
    if region <= cfg.keys:
        return None
    n_b, many = region // cfg.block_k, cfg.keys // cfg.block_k
    begins = [i * n_b // many for i in range(many + 1)]
    ranges = [(begins[i], begins[i + 1] - begins[i]) for i in range(many)]

    def score(start, size):
        if size == 0:
            return -math.inf
        block = start + (size // 2 if cfg.representative == "center" else 0)
        begin = cfg.sink + block * cfg.block_k
        return max(float(q @ k[j]) for q in queries for j in range(begin, begin + cfg.block_k))

    while any(size > 1 for _, size in ranges):
        halves = []
        for start, size in ranges:
            halves += [(start, size // 2), (start + size // 2, size - size // 2)]
        ranges = sorted(halves, key=lambda r: -score(*r))[:many]
    chosen = {cfg.sink + start * cfg.block_k + j for start, _ in ranges for j in range(cfg.block_k)}
    assert len(chosen) == cfg.keys
    return chosen


def oracle_near(position, m, cfg):
    """Keys that the search leaves out."""
    end = min((position // cfg.block_q + 1) * cfg.block_q, m)
    region = end - cfg.window - cfg.sink
    edge = 0 if region <= cfg.keys else cfg.sink + region // cfg.block_k * cfg.block_k
    return {j for j in range(position + 1) if j < cfg.sink or j >= edge}


def oracle_mask(q, k, h, cfg):
    """bool (N, M) of query head h; q (H, N, D), k (Hkv, M, D) numpy."""
    (heads, n, _), (kv_heads, m, _) = q.shape, k.shape
    kv, each = h // (heads // kv_heads), heads // kv_heads
    mask = np.zeros((n, m), bool)
    for block in range((m - n) // cfg.block_q, (m - 1) // cfg.block_q + 1):
        end = min((block + 1) * cfg.block_q, m)
        begin = max(block * cfg.block_q, m - n)
        sampled = [i - (m - n) for i in range(end - 1, begin - 1, -cfg.stride_q)]
        mine = range(kv * each, (kv + 1) * each) if cfg.shared else [h]
        chosen = oracle_search([q[p, i] for p in mine for i in sampled], k[kv], end, cfg)
        for position in range(begin, end):
            near = oracle_near(position, m, cfg)
            assert not near & (chosen or set())  # no key twice
            mask[position - (m - n), sorted(near | (chosen or set()))] = True
    return mask


def check(q, k, cfg):
    dense = cfg.layout(q, k).expand(q.shape[0], q.shape[1]).to_dense()
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            want = oracle_mask(q[b].numpy(), k[b].numpy(), h, cfg)
            assert torch.equal(dense[b, h], torch.from_numpy(want)), (b, h)


# ------------------------------------------------------------ the choice
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "n", "m"), [(2, 4, 2, 131, 131), (1, 3, 1, 75, 149), (1, 2, 2, 1, 173)]
)
def test_equals_the_oracle(batch, heads, kv_heads, n, m, shared):
    q, k, _ = tensors(batch, heads, kv_heads, n, m)
    for representative in ("center", "first"):
        check(q, k, HiP(**SMALL, representative=representative, shared=shared))


@pytest.mark.parametrize(
    "settings",
    [
        {"keys": 5, "block_q": 64, "stride_q": 64, "block_k": 5, "sink": 0, "window": 64},  # one range
        {"keys": 21, "block_q": 8, "stride_q": 1, "block_k": 3, "sink": 1, "window": 8},
        {"keys": 64, "block_q": 128, "stride_q": 16, "block_k": 8, "sink": 16, "window": 130},
        {"keys": 7, "block_q": 1, "stride_q": 2, "block_k": 1, "sink": 2, "window": 5},
    ],
)
def test_equals_the_oracle_in_other_blocks(settings):
    q, k, _ = tensors(1, 2, 1, 307, 307, seed=1)
    check(q[:, :, 150:], k, HiP(**settings))


def test_what_is_gathered_at_once_does_not_matter(monkeypatch):
    q, k, _ = tensors(2, 4, 2, 331, 331)
    whole = HiP(**SMALL).layout(q, k)
    for buffer in (1, 9000):
        monkeypatch.setattr(module, "BUFFER", buffer)
        assert HiP(**SMALL).layout(q, k) == whole


@pytest.mark.parametrize("n", [1, 75, 123])
def test_a_budget_for_everything_is_causal_attention(n):
    q, k, v = (t.float() for t in tensors(2, 4, 2, n, 123))
    want = fv.attention(q, k, v, is_causal=True, engine="reference")
    for settings in ({"keys": 124}, {"keys": 88, "sink": 5, "window": 30}):  # 88 + 5 + 30 = 123
        cfg = HiP(**{**SMALL, **settings})
        torch.testing.assert_close(hip_attention(q, k, v, cfg), want, atol=1e-5, rtol=0)
        assert len(cfg.search(q, k)[0].idx) == 0
    assert len(HiP(**{**SMALL, "keys": 86, "sink": 5, "window": 30}).search(q, k)[0].idx) > 0


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_are_distinct_and_inside_the_region(shared):
    q, k, _ = tensors(2, 4, 2, 389, 389)
    cfg = HiP(**SMALL, shared=shared)
    lists, _ = cfg.search(q, k)
    searched = 0
    for number, keys in enumerate(lists.idx.split(lists.ptr.diff().tolist())):
        end = min((number // (2 * lists.lists) + 1) * 16, 389)
        if end - 17 - 3 <= 12:
            assert len(keys) == 0
            continue
        searched += 1
        assert len(keys.unique()) == 12
        assert (keys.diff() > 0).all()
        assert keys.min() >= 3
        assert keys.max() < end - 17
        first = keys[::2]
        assert ((first - 3) % 2 == 0).all()  # whole blocks
        assert torch.equal(keys[1::2], first + 1)
    assert searched > 80
    assert (lists.layout() & cfg.near.layout(389)).nnz == 0
    assert lists.area + 8 * cfg.near.layout(389).area == cfg.layout(q, k).expand(2, 4).area


def test_the_search_is_exact_where_initial_ranges_are_constant():
    """8 ranges of 4 blocks: of the 32 blocks those of the best two ranges, by an exhaustive search."""
    g = torch.Generator().manual_seed(0)
    q = torch.zeros(1, 1, 64 + 16, 4)
    q[..., 0] = 1.0
    for _ in range(20):
        k = torch.zeros(1, 1, 64 + 16, 4)
        k[0, 0, :64, 0] = torch.randperm(8, generator=g).float().repeat_interleave(8)
        cfg = HiP(keys=16, block_q=16, stride_q=4, block_k=2, sink=0, window=16)
        lists, _ = cfg.search(q, k)
        best = k[0, 0, :64, 0].unflatten(0, (-1, 2)).amax(1).topk(8).indices.sort().values
        want = (best[:, None] * 2 + torch.arange(2)).flatten()
        assert lists.idx[-16:].tolist() == want.tolist()


def test_a_lone_high_key_is_found_only_where_representatives_lead_to_it():
    """Ranges of 4 blocks: the halves' centres are blocks 1 and 3, so block 0 of a range is never looked at first."""
    found = []
    for block in range(32):
        k = torch.zeros(1, 1, 64 + 16, 4)
        k[0, 0, :64, 0] = torch.arange(64) * 1e-3  # otherwise the later the better
        k[0, 0, 2 * block, 0] = 5.0
        q = torch.zeros(1, 1, 64 + 16, 4)
        q[..., 0] = 1.0
        cfg = HiP(keys=8, block_q=16, stride_q=4, block_k=2, sink=0, window=16)  # 4 ranges of 8 blocks
        found.append(2 * block in cfg.search(q, k)[0].idx[-8:].tolist())
    assert not all(found)
    assert any(found[:24])  # far from where it would have looked anyway


def test_a_smooth_needle_outside_the_window_is_found():
    q, k, _ = tensors(1, 1, 1, 2048, 2048, 16)
    q, k = q.float(), k.float() * 0.1
    direction = torch.nn.functional.normalize(
        torch.randn(16, generator=torch.Generator().manual_seed(3)), dim=0
    )
    q[...] = direction
    for at in (100, 777, 1500):
        bump = torch.exp(-((torch.arange(2048) - at).abs() / 16.0))
        field = k + 3 * bump[:, None] * direction
        cfg = HiP(keys=64, block_q=64, block_k=2, sink=16, window=64)
        assert at in cfg.search(q, field)[0].idx[-64:].tolist()
        assert not cfg.near.layout(2048).to_dense()[0, 0, -1, at]


def test_the_number_of_scored_blocks_is_bounded(monkeypatch):
    seen = []
    real = HiP._scores

    def counting(self, q, blocks, start, size):
        seen.append((start.shape[-2], start.shape[-1], len(blocks)))
        return real(self, q, blocks, start, size)

    monkeypatch.setattr(HiP, "_scores", counting)
    monkeypatch.setattr(module, "BUFFER", 1)  # one group at a time
    q, k, _ = tensors(1, 1, 1, 1999, 1999, 4)
    cfg = HiP(keys=32, block_q=64, block_k=2, sink=3, window=64)
    _, scored = cfg.search(q, k)
    assert sum(groups * ranges for groups, ranges, _ in seen) == int(scored.sum())
    many, ends = 16, np.minimum((np.arange(32) + 1) * 64, 1999)
    n_b = np.maximum(ends - 64 - 3, 0) // 2
    rounds = np.where(n_b * 2 > 32, np.ceil(np.log2(np.maximum(n_b, 1) / many)), 0)
    assert (scored.numpy() <= 2 * many * rounds).all()
    assert scored[-1] == 2 * many * 6  # 966 blocks in 16 ranges


# ------------------------------------------------------------ the attention
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("n", "m"), [(331, 331), (75, 149), (1, 173)])
def test_gathered_attention_is_attention_over_the_set(n, m, shared):
    q, k, v = tensors(2, 4, 2, n, m)
    v = torch.cat([v, v[..., :3]], -1)  # Dv = 11
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    cfg = HiP(**SMALL, shared=shared)
    got, lse = hip_attention(q, k, v, cfg, scale=0.4, return_lse=True)
    want, want_lse = fv.attention(q, k, v, cfg.layout(q, k), scale=0.4, return_lse=True, engine="reference")
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=0)
    seed = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((got * seed).sum(), (q, k, v))
    for a, b in zip(found, torch.autograd.grad((want * seed).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_no_query_reads_a_later_value():
    q, k, v = tensors(1, 2, 1, 331, 331)
    want = hip_attention(q, k, v, HiP(**SMALL))
    v[:, :, 200:] += 1.0
    got = hip_attention(q, k, v, HiP(**SMALL))
    assert torch.equal(got[:, :, :200], want[:, :, :200])
    assert not torch.equal(got[:, :, 200:], want[:, :, 200:])


def test_heads_and_batch_rows_search_on_their_own_unless_shared():
    q, k, _ = tensors(3, 4, 2, 199, 199)
    whole = HiP(**SMALL).layout(q, k).to_dense()
    together = HiP(**SMALL, shared=True).layout(q, k).to_dense()
    for b in range(3):
        for h in range(4):
            alone = HiP(**SMALL).layout(q[b : b + 1, h : h + 1], k[b : b + 1, h // 2 : h // 2 + 1])
            assert torch.equal(whole[b, h], alone.expand(1, 1).to_dense()[0, 0])
    assert torch.equal(together[:, 0], together[:, 1])
    assert not torch.equal(together[:, 0], together[:, 2])
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_low_precision_strides_scale_and_gradients_do_not_matter():
    q, k, _ = (t.to(torch.bfloat16) for t in tensors(1, 4, 2, 199, 199))
    base = HiP(**SMALL).layout(q, k)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(2, 3).contiguous().transpose(2, 3)
    assert HiP(**SMALL).layout(*strided) == base
    assert HiP(**SMALL).layout(q.float(), k.float(), scale=0.01) == base
    assert HiP(**SMALL).layout(q.clone().requires_grad_(), k) == base


# ------------------------------------------------------------ decoding
def test_decoding_with_refresh_1_is_prefill_with_blocks_of_one_query():
    q, k, v = tensors(2, 4, 2, 150, 150)
    one = HiP(**{**SMALL, "block_q": 1})
    want = hip_attention(q, k, v, one)
    lists, _ = one.search(q, k)
    chosen = lists.idx.split(lists.ptr.diff().tolist())
    for shared in (False, True):
        state = HiPDecodeState(HiP(**SMALL, shared=shared), refresh=1)
        for i in (0, 5, 31, 32, 33, 34, 80, 149):
            got = state.step(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
            if shared:
                continue
            torch.testing.assert_close(got, want[:, :, i : i + 1], atol=1e-12, rtol=0)
            if i > 31:
                assert torch.equal(state.chosen.flatten(0, 1), torch.stack(chosen[i * 8 : i * 8 + 8]))
            else:
                assert state.age is None


@pytest.mark.parametrize("shared", [False, True])
def test_a_choice_is_reused_while_the_window_moves(shared):
    q, k, v = tensors(1, 4, 2, 150, 150)
    cfg = HiP(**SMALL, shared=shared)
    state = HiPDecodeState(cfg, refresh=3)
    previous = None
    for step, i in enumerate(range(100, 110)):
        got = state.step(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], scale=0.3)
        if step % 3:
            assert torch.equal(state.chosen, previous)
        else:
            assert previous is None or not torch.equal(state.chosen, previous)
        previous = state.chosen
        assert state.age == step % 3 + 1
        mask = torch.zeros(1, 4, 1, i + 1, dtype=torch.bool)
        mask[..., :3] = True
        edge = 3 + (i + 1 - 17 - 3) // 2 * 2
        mask[..., edge:] = True
        for h in range(4):
            mask[0, h, 0, state.chosen[0, h // (4 // state.chosen.shape[1])]] = True
        want = fv.attention(
            q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], mask, scale=0.3, engine="reference"
        )
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


def test_several_new_tokens_are_one_query_block_and_a_new_sequence_is_searched():
    q, k, v = tensors(1, 2, 1, 176, 176)
    cfg = HiP(**SMALL)
    state = HiPDecodeState(cfg, refresh=100)
    got = state.step(q[:, :, 160:], k, v)  # just the query block 160 .. 175
    torch.testing.assert_close(got, hip_attention(q, k, v, cfg)[:, :, 160:], atol=1e-12, rtol=0)
    old = state.chosen
    state.step(q[:, :, 150:151], k[:, :, :151], v[:, :, :151])
    assert state.age == 1
    assert not torch.equal(state.chosen, old)
    with pytest.raises(ValueError, match="at most window = 17 queries, got 18"):
        state.step(q[:, :, :18], k, v)


# ------------------------------------------------------------ errors
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keys": 0}, "keys must be"),
        ({"keys": 13}, "keys must be a multiple of block_k = 2, got 13"),
        ({"block_q": 48, "window": 64}, "block_q must be a multiple or a divisor of 64, got 48"),
        ({"stride_q": 0}, "stride_q must be"),
        ({"block_k": 0}, "block_k must be"),
        ({"sink": -1}, "sink must be"),
        ({"window": 15}, "window must be at least block_q = 16, got 15"),
        ({"window": 17.0}, "window must be"),
        ({"representative": "last"}, "representative must be 'center' or 'first', got 'last'"),
        ({"shared": 1}, "shared must be True or False, got 1"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises((ValueError, TypeError), match=f"HiP.*{words}"):
        HiP(**{**SMALL, **settings})


def test_inputs_are_checked():
    q, k, v = tensors(1, 4, 2, 100, 100)
    cfg = HiP(**SMALL)
    with pytest.raises(ValueError, match="is_causal=False"):
        cfg.layout(q, k, is_causal=False)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        cfg.layout(q[:, :3], k)
    with pytest.raises(ValueError, match="k must be a tensor"):
        cfg.layout(q, k[0])
    with pytest.raises(ValueError, match="at least as many keys as queries, got 100 queries and 99 keys"):
        cfg.layout(q, k[:, :, :99])
    with pytest.raises(ValueError, match=r"scale must be at least 0, got -1\.0"):
        cfg.layout(q, k, scale=-1.0)
    with pytest.raises(ValueError, match=r"scale must be at least 0, got -1\.0"):
        hip_attention(q, k, v, cfg, scale=-1.0)
    with pytest.raises(TypeError, match="hip must be a HiP, got int"):
        HiPDecodeState(8)
    with pytest.raises((TypeError, ValueError), match="refresh must be"):
        HiPDecodeState(cfg, refresh=0)


# ------------------------------------------------------------ what is not searched, as a pattern
@pytest.mark.parametrize(("n", "m"), [(1, 1), (63, 63), (131, 449), (331, 331)])
@pytest.mark.parametrize(
    "settings", [{}, {"keys": 64, "block_q": 128, "sink": 0, "window": 200}, {"block_q": 1, "sink": 70}]
)
def test_near_is_classified_truly(n, m, settings):
    cfg = HiP(**{**SMALL, **settings})
    want = np.zeros((n, m), bool)
    for i in range(n):
        want[i, sorted(oracle_near(m - n + i, m, cfg))] = True
    assert isinstance(cfg.near, HiPNear)
    assert np.array_equal(cfg.near.layout(n, m).to_dense()[0, 0].numpy(), want)
