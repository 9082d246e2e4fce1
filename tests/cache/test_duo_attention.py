"""DuoAttention: kinds of heads in one call, in the cache, and as tables."""

from __future__ import annotations

import pytest
import torch

from foveate.cache import (
    Budget,
    DuoAttention,
    Geometry,
    LayerCache,
    duo_attention,
    duo_pattern,
    head_table,
    load,
)

SCALE = 0.5


def tensors(n=37, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 4, n, 4, generator=g)
    k, v = (torch.randn(2, 2, n, 4, generator=g) for _ in range(2))
    return q, k, v


def dense(q, k, v, row, sink, recent):
    """Float64, per head and query: everything, or sinks and the last ``recent`` keys with the query's own."""
    batch, heads, n, _ = q.shape
    out = torch.zeros(batch, heads, n, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(n):
                js = [j for j in range(i + 1) if row[h // 2] or j < sink or i - j < recent]
                x = torch.stack([q[b, h, i].double() @ k[b, h // 2, j].double() * SCALE for j in js])
                out[b, h, i] = sum(
                    w * v[b, h // 2, j].double() for w, j in zip(torch.softmax(x, 0), js, strict=True)
                )
    return out


@pytest.mark.parametrize("row", [(True, False), (False, True), (False, False)])
def test_one_call_equals_the_mask(row):
    q, k, v = tensors()
    got = duo_attention(q, k, v, row, sink=3, recent=5)
    torch.testing.assert_close(got.double(), dense(q, k, v, row, 3, 5), atol=1e-5, rtol=1e-5)


def test_every_head_true_is_full_attention():
    q, k, v = tensors()
    torch.testing.assert_close(
        duo_attention(q, k, v, (True, True), sink=0, recent=1).double(),
        dense(q, k, v, (True, True), 0, 1),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("row", [(True, False), (False, False)])
def test_token_by_token_the_cache_gives_what_one_call_gives(row):
    """Chunks of one token, then decoding: equal to the one-shot form; streaming heads hold no more than they may."""
    sink, recent = 3, 5
    q, k, v = tensors()
    wanted = dense(q, k, v, row, sink, recent)
    cache = LayerCache(DuoAttention((row,), sink, recent), Budget(1.0), 1, 0)
    one = (slice(None), slice(None), slice(0, 1))
    real = torch.ones(2, 1, dtype=torch.bool)
    cache.prefill(q[one], k[one], v[one], v[one].repeat_interleave(2, 1), real, Geometry(SCALE))
    for at in range(1, 37):
        one = (slice(None), slice(None), slice(at, at + 1))
        out = cache.extend(q[one], k[one], v[one], real, Geometry(SCALE), lambda *_: None)
        torch.testing.assert_close(out[:, :, 0].double(), wanted[:, :, at], atol=1e-5, rtol=1e-5)
        held = cache.store.count.view(2, 2)
        for h, flag in enumerate(row):
            assert (held[:, h] == (at + 1 if flag else min(at + 1, sink + recent - 1))).all()


def test_a_long_prompt_is_cut_at_once():
    q, k, v = tensors()
    cache = LayerCache(DuoAttention(((True, False),), 3, 5), Budget(1.0), 1, 0)
    real = torch.arange(37)[None] >= torch.tensor([[0], [9]])
    cache.prefill(q, k, v, q, real, Geometry(SCALE))
    assert cache.store.tokens(0).tolist() == list(range(37))
    assert cache.store.tokens(1).tolist() == [0, 1, 2, 33, 34, 35, 36]
    assert cache.store.tokens(3).tolist() == [9, 10, 11, 33, 34, 35, 36]  # padding is no sink


def test_tables(tmp_path):
    table = head_table("0.5, 0.49\n1 0\n")
    assert table == ((True, False), (True, False))
    policy = DuoAttention(table, 8, 16)
    assert policy.share == 0.5
    policy.save(tmp_path)
    assert load(tmp_path) == policy
    with pytest.raises(ValueError, match="lines of one length"):
        head_table("1 2\n3\n")


def test_errors():
    with pytest.raises(ValueError, match="retrieval must be a table"):
        DuoAttention(((True,), (True, False)))
    with pytest.raises(ValueError, match="sink must be >= 0 and recent >= 1, got 0 and 0"):
        DuoAttention(((True,),), 0, 0)
    with pytest.raises(ValueError, match="for 1 layers of 2 KV heads, the model has 4 of 2"):
        DuoAttention(((True, False),)).check(4, 8, 2)
    with pytest.raises(ValueError, match="must be a multiple of 2 KV heads, got 3"):
        duo_pattern((True, False), 3)
    q, k, v = tensors()
    with pytest.raises(ValueError, match="must name 2 KV heads, got 3"):
        duo_attention(q, k, v, (True, False, True))
