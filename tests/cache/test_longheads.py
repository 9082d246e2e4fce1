"""LongHeads against a brute-force oracle, query by query; its cache, token by token."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch.nn import functional as F

import foveate as fv
from foveate.cache import (
    LongHeadsCache,
    LongHeadsPolicy,
    chunk_representation,
    longheads_attention,
    select_chunks,
)
from foveate.core.rotary import Rotary

module = import_module("foveate.cache.longheads")
ROPE = Rotary(base=100.0)
SMALL = LongHeadsPolicy(chunk=8, attn_length=40, begin=16)


def tensors(batch, heads, kv_heads, n, dim=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, h, n, dim, generator=g, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


# ------------------------------------------------------------------------------------------ the oracle
def softmax_sum(q, k, v, scale):
    return torch.softmax(scale * (k @ q), 0) @ v


def oracle_representation(q, k, v, w, scale):
    """q, k, v (w, D) of one chunk, not rotated."""
    place = torch.arange(w)
    q, k = ROPE(q[None], place)[0], ROPE(k[None], place)[0]
    mean = torch.stack([softmax_sum(x, k, v, scale) for x in q]).mean(0)
    return softmax_sum(mean, k, k, scale)


def oracle_chunks(q, r, own, policy):
    """Chunks that one query reads; q (G, D) its heads' vectors, r (G, C, D)."""
    if own + 1 <= policy.chunks:
        return list(range(own + 1))
    forced = {0} | {own - i for i in range(policy.forced_recent)}
    score = {c: max(float(q[g] @ r[g, c]) for g in range(len(q))) for c in range(own) if c not in forced}
    best = sorted(score, key=lambda c: -score[c])[: policy.chunks - len(forced)]
    return sorted(forced | set(best))


def oracle(q, k, v, policy, scale=None):
    """(output (H, N, D), {(key head, t): chunks}, largest distance) of one batch row."""
    (heads, n, dim), kv_heads, w = q.shape, len(k), policy.chunk
    scale = dim**-0.5 if scale is None else scale
    group = heads // kv_heads
    r = torch.zeros(heads, n // w, dim, dtype=q.dtype)
    for h in range(heads):
        for c in range(n // w):
            part = slice(c * w, c * w + w)
            r[h, c] = oracle_representation(q[h, part], k[h // group, part], v[h // group, part], w, scale)
    out, chosen, furthest = torch.zeros_like(q), {}, 0
    for kv in range(kv_heads):
        mine = slice(kv * group, kv * group + group)
        for t in range(n):
            own = t // w
            ids = (
                list(range(own + 1)) if t < policy.begin else oracle_chunks(q[mine, t], r[mine], own, policy)
            )
            chosen[kv, t] = ids
            keys = torch.cat([torch.arange(c * w, min(c * w + w, t + 1)) for c in ids])
            place = torch.arange(len(keys))
            turned = ROPE(k[kv, keys][None], place)[0]
            furthest = max(furthest, len(keys) - 1)
            for h in range(mine.start, mine.stop):
                query = ROPE(q[h, t][None, None], place[-1:])[0, 0]
                out[h, t] = softmax_sum(query, turned, v[kv, keys], scale)
    return out, chosen, furthest


# --------------------------------------------------------------------------------------- the function
@pytest.mark.parametrize(("heads", "kv_heads", "n"), [(4, 2, 107), (3, 3, 96), (2, 1, 41), (2, 2, 7)])
@pytest.mark.parametrize(
    "policy",
    [
        SMALL,
        LongHeadsPolicy(chunk=8, attn_length=40, begin=0),
        LongHeadsPolicy(chunk=4, attn_length=16, begin=16, forced_recent=3),
        LongHeadsPolicy(chunk=5, attn_length=20, forced_recent=1),
    ],
)
def test_equals_the_oracle(heads, kv_heads, n, policy):
    q, k, v = tensors(2, heads, kv_heads, n)
    for scale in (None, 0.3):
        want = torch.stack([oracle(*row, policy, scale)[0] for row in zip(q, k, v, strict=True)])
        got = longheads_attention(q, k, v, policy, ROPE, scale=scale)
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


def test_in_pieces_and_strides_it_is_the_same(monkeypatch):
    q, k, v = tensors(2, 4, 2, 107)
    want = longheads_attention(q, k, v, SMALL, ROPE)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(longheads_attention(*strided, SMALL, ROPE), want, atol=1e-12, rtol=0)
    monkeypatch.setattr(module, "GATHERED", 1)
    torch.testing.assert_close(longheads_attention(q, k, v, SMALL, ROPE), want, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("n", "length", "begin"), [(61, 64, 64), (64, 64, 0), (61, 64, 0), (61, 128, 16)])
def test_short_texts_are_ordinary_attention(n, length, begin):
    q, k, v = (t.float() for t in tensors(2, 4, 2, n))
    got = longheads_attention(q, k, v, LongHeadsPolicy(8, length, begin), ROPE)
    want = fv.attention(ROPE(q, torch.arange(n)), ROPE(k, torch.arange(n)), v, is_causal=True)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [107, 203])
def test_no_distance_reaches_the_attention_length(n):
    q, k, v = tensors(1, 2, 1, n)
    seen = []

    def rope(x, positions):
        seen.append(int(positions.max()))
        return ROPE(x, positions)

    out = longheads_attention(q, k, v, SMALL, rope)
    assert max(seen) == SMALL.attn_length - 1  # what rotates keys and queries stays within, for any N
    want, _, furthest = oracle(q[0], k[0], v[0], SMALL)
    assert furthest == SMALL.attn_length - 1
    torch.testing.assert_close(out[0], want, atol=1e-9, rtol=0)


def test_selections_hold_first_own_and_previous_chunk_in_order():
    q, k, v = tensors(2, 4, 2, 160)
    r = chunk_representation(q, k, v, 8, ROPE)
    own = torch.arange(160) // 8
    chosen = select_chunks(q, r, own, SMALL, 2)
    assert chosen.shape == (2, 2, 160, 5)
    for kv in range(2):
        for t in range(160):
            ids = [c for c in chosen[0, kv, t].tolist() if c >= 0]
            assert ids == oracle_chunks(
                q[0, 2 * kv : 2 * kv + 2, t], r[0, 2 * kv : 2 * kv + 2], t // 8, SMALL
            )
            assert ids == sorted(set(ids))
            assert {0, max(t // 8 - 1, 0), t // 8} <= set(ids)
            assert len(ids) == min(5, t // 8 + 1)


def test_later_tokens_do_not_change_earlier_results():
    q, k, v = tensors(1, 4, 2, 107)
    want = longheads_attention(q, k, v, SMALL, ROPE)
    for t in (15, 16, 50, 71, 103):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t + 1 :] = 9.0
        got = longheads_attention(*changed, SMALL, ROPE)
        torch.testing.assert_close(got[:, :, : t + 1], want[:, :, : t + 1], atol=1e-10, rtol=0)
        alone = longheads_attention(*(x[:, :, : t + 1] for x in (q, k, v)), SMALL, ROPE)
        torch.testing.assert_close(alone, want[:, :, : t + 1], atol=1e-10, rtol=0)


def test_a_chunk_moved_elsewhere_has_the_same_representation():
    q, k, v = tensors(1, 4, 2, 80)
    r = chunk_representation(q, k, v, 8, ROPE)
    moved = [t.roll(24, 2) for t in (q, k, v)]
    torch.testing.assert_close(chunk_representation(*moved, 8, ROPE), r.roll(3, 2), atol=1e-12, rtol=0)
    one = oracle_representation(q[0, 3, 16:24], k[0, 1, 16:24], v[0, 1, 16:24], 8, 8**-0.5)
    torch.testing.assert_close(r[0, 3, 2], one, atol=1e-12, rtol=0)
    assert chunk_representation(q[:, :, :7], k[:, :, :7], v[:, :, :7], 8, ROPE).shape == (1, 4, 0, 8)


def test_a_chunk_made_for_one_head_is_chosen_by_that_head_only():
    q, k, v = tensors(1, 4, 4, 160)
    r = chunk_representation(q, k, v, 8, ROPE)
    query = F.normalize(torch.randn(8, dtype=torch.float64), dim=0)
    q[:, :, -1] = 10 * query
    r[0, :, 7] = -100 * query  # no head's choice ...
    r[0, 2, 7] = 100 * query  # ... but head 2's
    chosen = select_chunks(q[:, :, -1:], r, torch.tensor([19]), SMALL, 4)[0, :, 0]
    assert (chosen == 7).any(1).tolist() == [False, False, True, False]


def test_gradients_equal_those_of_the_oracle():
    q, k, v = (t.requires_grad_() for t in tensors(1, 2, 1, 61))
    weight = torch.randn(1, 2, 61, 8, dtype=torch.float64)
    ours = torch.autograd.grad((longheads_attention(q, k, v, SMALL, ROPE) * weight).sum(), (q, k, v))
    with torch.no_grad():
        chosen = oracle(q[0], k[0], v[0], SMALL)[1]
    total = 0
    for t in range(61):
        keys = torch.cat([torch.arange(c * 8, min(c * 8 + 8, t + 1)) for c in chosen[0, t]])
        place = torch.arange(len(keys))
        turned = ROPE(k[0, 0, keys][None], place)[0]
        for h in range(2):
            query = ROPE(q[0, h, t][None, None], place[-1:])[0, 0]
            total = total + (softmax_sum(query, turned, v[0, 0, keys], 8**-0.5) * weight[0, h, t]).sum()
    for a, b in zip(ours, torch.autograd.grad(total, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_low_precision():
    q, k, v = (t.bfloat16() for t in tensors(1, 2, 1, 30))  # all chunks are read: nothing to choose
    got = longheads_attention(q, k, v, SMALL, ROPE)
    want = longheads_attention(q.double(), k.double(), v.double(), SMALL, ROPE)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, atol=0.15, rtol=0)


# ------------------------------------------------------------------------------------------ the cache
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
@pytest.mark.parametrize("steps", [[1] * 107, [50, 1, 1, 6, 30, 1, 18], [107]])
def test_the_cache_gives_what_the_function_gives(heads, kv_heads, steps):
    q, k, v = tensors(2, heads, kv_heads, 107)
    want = longheads_attention(q, k, v, SMALL, ROPE)
    cache = LongHeadsCache(SMALL, ROPE)
    for n in steps:
        part = slice(cache.length, cache.length + n)
        cache.append(q[:, :, part], k[:, :, part], v[:, :, part])
        last = cache.length - 1
        got = cache.attend(q[:, :, last : last + 1])
        torch.testing.assert_close(got, want[:, :, last : last + 1], atol=1e-9, rtol=0)
    made = chunk_representation(q, k, v, 8, ROPE)
    torch.testing.assert_close(cache.representations, made, atol=1e-12, rtol=0)
    assert cache.nbytes == 8 * 8 * 2 * (
        2 * kv_heads * 107 + heads * (13 + 3)
    )  # keys, values; chunks, waiting


def test_gathered_keys_stand_side_by_side():
    q, k, v = tensors(1, 2, 2, 99)
    cache = LongHeadsCache(SMALL, ROPE)
    cache.append(q, k, v)
    ids = torch.tensor([[[0, 4, 7, 11, 12], [0, 1, 2, 11, 12]]])
    keys, values, position = cache.gather(ids)
    assert keys.shape == (1, 2, 35, 8)
    assert position == 34
    torch.testing.assert_close(keys[0, 0, 8:16], ROPE(k[0, 0, 32:40][None], torch.arange(8, 16))[0])
    torch.testing.assert_close(values[0, 1, -3:], v[0, 1, 96:99])


def test_offloaded_keys_give_the_same():
    q, k, v = tensors(1, 2, 2, 99)
    caches = [LongHeadsCache(LongHeadsPolicy(8, 40, 16, offload=off), ROPE) for off in (False, True)]
    for cache in caches:
        cache.append(q, k, v)
    a, b = (cache.attend(q[:, :, -1:]) for cache in caches)
    assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk": 0}, "chunk must be an int >= 1, got 0"),
        ({"chunk": 100}, "attn_length must be a multiple of chunk = 100, got 4096"),
        ({"begin": 100}, "begin must be a multiple of chunk = 256, got 100"),
        ({"begin": 8192}, "begin must be an int >= 0 and <= 4096, got 8192"),
        ({"attn_length": 512}, "must hold the first chunk and forced_recent = 2 more of 256, got 512"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LongHeadsPolicy(**settings)


def test_wrong_inputs():
    q, k, v = tensors(1, 4, 2, 20)
    with pytest.raises(ValueError, match="q_pre must be \\(B, H, N, D\\)"):
        longheads_attention(q, k[:, :, :9], v[:, :, :9], SMALL, ROPE)
    with pytest.raises(ValueError, match="v must be a tensor"):
        longheads_attention(q, k, v[0], SMALL, ROPE)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        chunk_representation(q[:, :3], k, v, 8, ROPE)
    with pytest.raises(TypeError, match="offload must be True or False, got 1"):
        LongHeadsPolicy(offload=1)  # pyright: ignore[reportArgumentType]
    cache = LongHeadsCache(SMALL, ROPE)
    for use in (lambda: cache.representations, lambda: cache.gather(torch.zeros(1, 2, 1, dtype=torch.int64))):
        with pytest.raises(ValueError, match="holds no tokens"):
            use()
    cache.append(q, k, v)
    with pytest.raises(
        ValueError, match="must be the last token's query \\(1, 4, 1, 8\\), got \\(1, 4, 2, 8\\)"
    ):
        cache.select(q[:, :, :2])
