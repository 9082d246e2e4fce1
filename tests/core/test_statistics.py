"""Statistics of the attention map against the map itself, in float64; and that none of them holds it."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.core import statistics as st
from foveate.core.layout import BlockLayout
from foveate.patterns import Causal, SlidingWindow

SIZES = [(13, 13), (75, 75), (5, 31), (31, 5), (1, 29), (130, 130), (67, 131)]  # queries, keys


def qk(n, m, heads=4, kv_heads=2, batch=2, dim=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, heads, n, dim, generator=g, dtype=torch.float64)
    return q, torch.randn(batch, kv_heads, m, dim, generator=g, dtype=torch.float64)


def whole_map(q, k, is_causal=True, scale=None):
    """P (B, H, N, M), rows that see nothing 0."""
    n, m = q.shape[2], k.shape[2]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.transpose(-1, -2) * (q.shape[3] ** -0.5 if scale is None else scale)
    if is_causal:
        hidden = torch.arange(m) > torch.arange(n)[:, None] + m - n
        logits = logits.masked_fill(hidden, -torch.inf)
    return torch.softmax(logits, -1).nan_to_num(0.0)


@pytest.fixture(params=[1 << 19, 3000, 120], ids=["one piece", "pieces of 3000", "pieces of 120"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(st, "CHUNK", request.param)


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("reduce", "block"), [("max", 1), ("max", 8), ("sum", 8), ("max", 64), ("sum", 200)])
def test_block_map(n, m, is_causal, reduce, block, chunk):
    q, k = qk(n, m)
    p = whole_map(q, k, is_causal, scale=0.7)
    got = st.block_map(q, k, block, reduce=reduce, scale=0.7, is_causal=is_causal)
    assert got.shape == (2, 4, -(-n // block), -(-m // block))
    for i in range(got.shape[2]):
        for j in range(got.shape[3]):
            piece = p[:, :, i * block : (i + 1) * block, j * block : (j + 1) * block]
            want = piece.amax((2, 3)) if reduce == "max" else piece.sum((2, 3))
            torch.testing.assert_close(got[:, :, i, j], want, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_columns_and_diagonals(n, m, chunk):
    q, k = qk(n, m)
    p = whole_map(q, k)
    vertical, slash = st.vertical_slash_sums(q, k)
    want = torch.zeros_like(slash)
    for i in range(n):
        for j in range(m):
            if i + m - n - j >= 0:
                want[:, :, i + m - n - j] += p[:, :, i, j]
    torch.testing.assert_close(vertical, p.sum(2), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(slash, want, atol=1e-12, rtol=1e-10)
    seeing = torch.full((2, 4), float(min(n, m)), dtype=torch.float64)
    torch.testing.assert_close(vertical.sum(-1), seeing)
    torch.testing.assert_close(slash.sum(-1), seeing)
    torch.testing.assert_close(st.column_sums(q, k, is_causal=False), whole_map(q, k, False).sum(2))


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("count", [1, 6, 500])
def test_top_keys(n, m, is_causal, count, chunk):
    q, k = qk(n, m)
    p = whole_map(q, k, is_causal)
    keys, weights = st.top_keys(q, k, count, is_causal=is_causal)
    assert keys.shape == weights.shape == (2, 4, n, min(count, m))
    value, index = p.topk(min(count, m))
    torch.testing.assert_close(weights, value, atol=1e-12, rtol=1e-10)
    seen = torch.full((n,), m) if not is_causal else torch.arange(n).add(m - n + 1).clamp(min=0)
    there = torch.arange(keys.shape[3]) < seen[:, None]
    assert (keys[~there.expand_as(keys)] == -1).all()
    assert (keys == index)[there.expand_as(keys)].all()


@pytest.mark.parametrize(("n", "m"), SIZES)
def test_kept_mass_and_recall(n, m):
    q, k = qk(n, m)
    p = whole_map(q, k)
    mask = torch.rand(2, 4, n, m, generator=torch.Generator().manual_seed(3)) < 0.3
    kept = st.kept_mass(q, k, BlockLayout.from_mask(mask))
    blind = p.sum(-1) == 0
    torch.testing.assert_close(kept, torch.where(blind, 1.0, (p * mask).sum(-1)), atol=1e-12, rtol=1e-10)
    recall = st.attention_recall(q, k, BlockLayout.from_mask(mask))
    torch.testing.assert_close(recall, kept.mean(-1))
    assert (st.attention_recall(q, k, None) == 1).all()
    assert (st.attention_recall(q, k, Causal() & SlidingWindow(max(n, m))) == 1).all()


def test_a_query_whose_keys_are_all_left_out_keeps_nothing():
    q, k = qk(9, 9)
    assert (st.kept_mass(q, k, torch.zeros(9, 9, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_given_lse_is_used(is_causal):
    q, k = qk(40, 40)
    lse = fv.attention(q, k, k, is_causal=is_causal, return_lse=True)[1]
    options = {"is_causal": is_causal}
    for ask in (
        lambda **o: st.block_map(q, k, 8, **o),
        lambda **o: st.column_sums(q, k, **o),
        lambda **o: st.top_keys(q, k, 3, **o)[1],
        lambda **o: st.kept_mass(q, k, SlidingWindow(5), **o),
    ):
        torch.testing.assert_close(ask(lse=lse, **options), ask(**options))
        less = ask(lse=lse + 1, **options)  # every weight by e
        torch.testing.assert_close(less, ask(**options) / torch.e)


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("is_causal", [True, False])
def test_block_scores(n, m, is_causal):
    q, k = qk(n, m)
    got = st.block_scores(q, k, 8, scale=0.3, is_causal=is_causal)
    for i in range(got.shape[2]):
        for j in range(got.shape[3]):
            a, b = q[:, :, 8 * i : 8 * i + 8].mean(2), k[:, :, 8 * j : 8 * j + 8].mean(2)
            want = 0.3 * (a * b.repeat_interleave(2, 1)).sum(-1)
            seen = not is_causal or min(8 * i + 8, n) - 1 + m - n >= 8 * j
            assert seen or (got[:, :, i, j] == -torch.inf).all()
            if seen:
                torch.testing.assert_close(got[:, :, i, j], want)


@pytest.mark.parametrize("how", ["mean", "max", "min"])
def test_the_last_block_pools_its_real_tokens(how):
    x = qk(13, 13)[0]
    got = st.block_pool(x, 5, how)
    reduce = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}[how]
    torch.testing.assert_close(got, torch.stack([reduce(x[:, :, s : s + 5], 2) for s in (0, 5, 10)], 2))


def test_extreme_logits_nan_in_keys_that_nobody_sees_and_strides():
    q, k = qk(20, 20)
    p = whole_map(400 * q, k)
    torch.testing.assert_close(st.block_map(400 * q, k, 4, reduce="sum").sum((2, 3)), p.sum((2, 3)))
    spoilt = k.clone()
    spoilt[:, :, 12:] = torch.nan
    for ask in (lambda k: st.block_map(q, k, 4)[:, :, :3, :3], lambda k: st.top_keys(q, k, 2)[1][:, :, :12]):
        torch.testing.assert_close(ask(spoilt), ask(k))
    turned = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k)]
    for ask in (lambda q, k: st.block_map(q, k, 4), lambda q, k: st.vertical_slash_sums(q, k)[1]):
        torch.testing.assert_close(ask(*turned), ask(q, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_float32_at_least(dtype):
    q, k = (t.to(dtype) for t in qk(75, 75))
    wide = q.double(), k.double()
    for ask in (
        lambda q, k: st.block_map(q, k, 8),
        lambda q, k: st.vertical_slash_sums(q, k)[1],
        lambda q, k: st.attention_recall(q, k, SlidingWindow(9)),
    ):
        got = ask(q, k)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, ask(*wide).float(), atol=1e-5, rtol=1e-4)


def test_memory_is_bounded(monkeypatch):
    """No piece is larger than CHUNK, and together they cover the causal map once."""
    seen = []
    honest = st._pieces

    def pieces(*args, **options):
        for at, row, key, logits in honest(*args, **options):
            seen.append(logits.shape)
            yield at, row, key, logits

    monkeypatch.setattr(st, "_pieces", pieces)
    monkeypatch.setattr(st, "CHUNK", 1 << 15)
    q, k = qk(1500, 1500, batch=1)
    for ask in (lambda: st.column_sums(q, k), lambda: st.top_keys(q, k, 2), lambda: st.block_map(q, k, 64)):
        seen.clear()
        ask()
        assert max(s.numel() for s in seen) <= 1 << 15
        pairs = sum(s.numel() for s in seen)
        assert 4 * 1500 * 1501 / 2 <= pairs < 1.15 * 4 * 1500 * 1501 / 2


def test_errors():
    q, k = qk(9, 9)
    for wrong, message in (
        (lambda: st.block_map(q, k, 0), "block_map: block must be an int >= 1, got 0"),
        (lambda: st.block_map(q, k, 4, reduce="mean"), "reduce must be 'max' or 'sum', got 'mean'"),
        (lambda: st.top_keys(q, k, True), "top_keys: count must be an int >= 1, got True"),
        (lambda: st.block_pool(q, 4, "sum"), "how must be 'mean', 'max' or 'min', got 'sum'"),
        (lambda: st.column_sums(q[0], k), r"q must be a float tensor .* got torch.float64 \(4, 9, 7\)"),
        (lambda: st.column_sums(q, k[:, :, :0]), "no empty dimension"),
        (lambda: st.column_sums(q[:, :3], k), "H a multiple of Hkv"),
        (lambda: st.block_map(q, k, 4, lse=q[..., :2]), r"lse must be a tensor \(2, 4, 9\)"),
        (lambda: st.block_map(q, k, 4, scale=float("inf")), "scale must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
