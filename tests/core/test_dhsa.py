"""DHSA against a brute-force oracle, key by key; boundaries, lists, the layout and the gathered form."""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

import foveate as fv
from foveate.core.selectors.boundaries import fixed_boundaries, select_boundaries
from foveate.core.selectors.dhsa import DHSA, chunk_means, dhsa_attention

dhsa = import_module("foveate.core.selectors.dhsa")
token_lists = import_module("foveate.core.selectors.token_lists")
SMALL: dict[str, Any] = {"block": 16, "budget": 48, "local": 20, "sink": 5, "chunk": 7, "instruction": 11}


def tensors(batch, heads, kv_heads, n, m, dim=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, h, length, dim, generator=g, dtype=dtype)
        for h, length in ((heads, n), (kv_heads, m), (kv_heads, m))
    ]


# ------------------------------------------------------------------------------------------ the oracle
def oracle_list(queries, keys, cuts, start, end, cfg):
    """Kept keys of the block of queries (n, D) at positions [start, end); keys (M, D) of one list."""
    low = 0 if cfg.window is None else max(0, start - cfg.window + 1)
    if end - low <= cfg.budget:
        return set(range(low, end))
    kept = set(range(low, low + cfg.sink)) | set(range(end - cfg.local, end))
    norm = cfg.pooling == "avgpool_norm"
    query = queries.mean(0) * (len(queries) ** 0.5 if norm else 1)
    scored = []
    for a, b in itertools.pairwise(cuts):
        if b > a:
            scored.append((float(query @ keys[a:b].mean(0)) * ((b - a) ** 0.5 if norm else 1), a, b))
    for _, a, b in sorted(scored, reverse=True):
        for j in range(a, b):
            if low + cfg.sink <= j < end - cfg.local and len(kept) < cfg.budget:
                kept.add(j)
    return kept


def oracle_mask(q, k, h, cuts, cfg):
    """bool (N, M) of head h; q (H, N, D), k (Hkv, M, D) numpy; cuts: where chunks start, and M."""
    (heads, n, _), (kv_heads, m, _) = q.shape, k.shape
    group = heads // kv_heads
    if cfg.per_head is False:
        query, key = q.mean(0), np.mean([k[x // group] for x in range(heads)], 0)
    else:
        mine = [h] if cfg.per_head is True else range(h // group * group, h // group * group + group)
        query, key = np.mean([q[x] for x in mine], 0), k[h // group]
    rows = 0 if n == 1 else max(n - cfg.instruction, 0)
    mask = np.zeros((n, m), bool)
    for first in range(0, rows, cfg.block):
        last = min(first + cfg.block, rows)
        kept = oracle_list(query[first:last], key, cuts, m - n + first, m - n + last, cfg)
        mask[first:last, sorted(kept)] = True
    mask[rows:] = True
    distance = (m - n + np.arange(n))[:, None] - np.arange(m)
    return mask & (distance >= 0) & (distance < (cfg.window or m))


def check(q, k, v, cfg, cuts=None):
    """Layout and gathered attention equal the oracle; returns the share of causal pairs that was kept."""
    lists = cfg.select(q, k, boundaries=cuts)
    if cuts is None:
        cuts = cfg.boundaries(k)
    want = torch.stack(
        [
            torch.stack(
                [
                    torch.from_numpy(
                        oracle_mask(q[b].numpy(), k[b].numpy(), h, cuts[b % len(cuts)].tolist(), cfg)
                    )
                    for h in range(q.shape[1])
                ]
            )
            for b in range(len(q))
        ]
    )
    layout = lists.layout().expand(len(q), q.shape[1])
    assert torch.equal(layout.to_dense(), want)
    assert lists.area == int(want.sum())
    out, lse = dhsa_attention(q, k, v, cfg, boundaries=cuts, return_lse=True)
    wanted, wanted_lse = fv.attention(q, k, v, want, return_lse=True, engine="reference")
    torch.testing.assert_close(out, wanted, atol=1e-10, rtol=0)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-10, rtol=0)
    n, m = want.shape[-2:]
    return want.double().mean().item() / torch.ones(n, m).tril(m - n).mean().item()


# ---------------------------------------------------------------------------------- choice and attention
@pytest.mark.parametrize("per_head", [False, True, "kv"])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "n", "m"),
    [(2, 4, 2, 197, 197), (1, 3, 1, 131, 131), (1, 2, 2, 61, 173), (1, 2, 1, 7, 97), (1, 2, 2, 1, 89)],
)
def test_equals_the_oracle(batch, heads, kv_heads, n, m, per_head):
    q, k, v = tensors(batch, heads, kv_heads, n, m)
    kept = check(q, k, v, DHSA(**SMALL, per_head=per_head))
    assert kept == pytest.approx(1) if n <= 11 else 0.2 < kept < 0.8


@pytest.mark.parametrize("pooling", ["avgpool_norm", "avgpool"])
@pytest.mark.parametrize("window", [None, 77, 30, 3])
def test_equals_the_oracle_under_a_window_and_other_pooling(window, pooling):
    q, k, v = tensors(2, 4, 2, 211, 211, seed=1)
    check(q, k, v, DHSA(**SMALL, window=window, pooling=pooling, per_head="kv"))


def test_equals_the_oracle_without_sink_instruction_or_room_between():
    q, k, v = tensors(1, 2, 1, 150, 150, seed=2)
    check(q, k, v, DHSA(block=16, budget=20, local=20, sink=0, instruction=0))
    check(q, k, v, DHSA(block=16, budget=25, local=20, sink=5, instruction=0))
    check(q, k, v, DHSA(block=13, budget=26, local=13, sink=0, instruction=3, chunk=1))
    check(q, k, v, DHSA(block=64, budget=90, local=64, sink=1, instruction=0, chunk=1000))
    for chunk in (21, 24, 29, 40):  # the first keys and the last ones cut chunks that alone would suffice
        check(q, k, v, DHSA(block=16, budget=48, local=20, sink=5, instruction=0, chunk=chunk, per_head=True))


def test_equals_the_oracle_on_given_boundaries_with_empty_chunks():
    q, k, v = tensors(2, 4, 2, 160, 160, seed=3)
    cuts = torch.tensor([[0, 1, 30, 33, 90, 160, 160, 160], [0, 5, 6, 50, 80, 81, 120, 160]])
    check(q, k, v, DHSA(**SMALL), cuts)
    check(q, k, v, DHSA(**SMALL, per_head=True), cuts[1:])  # one for all batch rows


def test_in_pieces_it_is_the_same(monkeypatch):
    q, k, v = tensors(2, 4, 2, 197, 197)
    cfg = DHSA(**SMALL)
    whole, out = cfg.select(q, k).tokens, dhsa_attention(q, k, v, cfg)
    monkeypatch.setattr(dhsa, "CHUNK", 1)
    monkeypatch.setattr(token_lists, "GATHERED", 1)
    assert torch.equal(cfg.select(q, k).tokens, whole)
    torch.testing.assert_close(dhsa_attention(q, k, v, cfg), out, atol=1e-12, rtol=0)


@pytest.mark.parametrize("per_head", [False, True, "kv"])
def test_a_budget_of_the_length_is_dense_attention(per_head):
    q, k, v = (t.float() for t in tensors(2, 4, 2, 197, 197))
    cfg = DHSA(block=16, budget=197, local=20, sink=5, per_head=per_head)
    want = fv.attention(q, k, v, is_causal=True)
    torch.testing.assert_close(dhsa_attention(q, k, v, cfg), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(fv.attention(q, k, v, cfg, is_causal=True), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("per_head", [False, True])
def test_no_output_reads_a_later_token(per_head):
    q, k, v = tensors(1, 4, 2, 150, 150, dtype=torch.float32)
    cfg = DHSA(**SMALL, per_head=per_head)
    lists = cfg.select(q, k)
    ends = lists.dense + torch.arange(16, 150, 16)[: lists.tokens.shape[2]]
    assert (lists.tokens[..., -1] < ends.clamp(max=lists.rows)).all()
    before = lists.attend(q, k, v)  # the same choice, other later keys and values
    for t in (40, 79, 80, 100, 148):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, t + 1 :], v2[:, :, t + 1 :] = 7.0, torch.nan
        assert not lists.layout().to_dense()[..., t, t + 1 :].any()
        after = fv.attention(q, k2, v2, lists.layout(), engine="native")[:, :, : t + 1]
        torch.testing.assert_close(after, before[:, :, : t + 1], atol=1e-6, rtol=0)


def test_lists_hold_the_budget_once_each_and_ascend():
    q, k, _ = tensors(2, 4, 2, 301, 301)
    tokens = DHSA(**SMALL, per_head=True).select(q, k).tokens
    assert tokens.shape[-1] == 48
    assert (tokens.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("per_head", [False, True, "kv"])
def test_gradients_equal_those_of_the_masked_attention(per_head):
    q, k, v = (t.requires_grad_() for t in tensors(1, 4, 2, 101, 101))
    cfg = DHSA(**SMALL, per_head=per_head)
    mask = cfg.layout(q, k).expand(1, 4).to_dense()
    weight = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    ours = torch.autograd.grad((dhsa_attention(q, k, v, cfg) * weight).sum(), (q, k, v))
    want = torch.autograd.grad((fv.attention(q, k, v, mask, engine="reference") * weight).sum(), (q, k, v))
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_strides_and_low_precision():
    q, k, v = tensors(2, 4, 2, 131, 131)
    cfg = DHSA(**SMALL)
    want = dhsa_attention(q, k, v, cfg)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(dhsa_attention(*strided, cfg), want, atol=1e-12, rtol=0)
    low = [t.bfloat16() for t in (q, k, v)]
    same = [t.double() for t in low]
    out = dhsa_attention(*low, cfg)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), dhsa_attention(*same, cfg), atol=0.05, rtol=0)


# ------------------------------------------------------------------------------------------ boundaries
def oracle_boundaries(score, theta, most, nms, forced):
    n = len(score)
    taken = [] if forced in (None, 0, n) else [forced - 1]
    for t in sorted(range(n - 1), key=lambda t: -score[t]):
        if len(taken) >= most:
            break
        allowed = forced is None or t < forced
        if score[t] > theta and allowed and all(abs(t - other) > nms for other in taken):
            taken.append(t)
    return sorted({0, n} | {t + 1 for t in taken})


@pytest.mark.parametrize("nms", [0, 1, 3, 8])
@pytest.mark.parametrize(
    ("forced", "most"), [(None, None), (None, 5), (80, 5), (80, None), (97, 9), (0, 3), (1, 3)]
)
def test_boundaries_are_the_oracles(nms, forced, most):
    score = torch.randn(3, 97, generator=torch.Generator().manual_seed(nms))
    found = select_boundaries(score, 0.3, most, nms, forced)
    longest = 0
    for row, values in zip(found.tolist(), score.tolist(), strict=True):
        want = oracle_boundaries(values, 0.3, 97 if most is None else most, nms, forced)
        assert row[: len(want)] == want
        assert set(row[len(want) :]) <= {97}
        longest = max(longest, len(want))
        inner = want[1:-1]
        assert all(b - a > nms for a, b in itertools.pairwise(inner))
        assert most is None or len(want) - 1 <= most + 2
    assert found.shape[1] == longest


def test_boundaries_without_a_high_score_are_one_chunk():
    assert select_boundaries(torch.zeros(1, 9), 1.1).tolist() == [[0, 9]]
    assert select_boundaries(torch.zeros(1, 1), -1.0).tolist() == [[0, 1]]
    assert fixed_boundaries(9, 3).tolist() == [0, 3, 6, 9]
    assert fixed_boundaries(2, 3, forced=0).tolist() == [0, 2]


@pytest.mark.parametrize(("norm", "times"), [(True, 2.0), (False, 1.0)])
def test_a_chunk_four_times_as_long_scores_twice_as_high(norm, times):
    k = torch.ones(1, 2, 10, 3, dtype=torch.float64)
    short, long = chunk_means(k, torch.tensor([[0, 2, 10]]), norm=norm).unbind(2)
    torch.testing.assert_close(long, times * short)


def test_a_predictor_cuts_the_chunks():
    def predictor(keys):  # a boundary after a key whose first channel of the second head is largest
        return keys[:, 4] * 10

    k = torch.zeros(2, 2, 60, 4)
    k[0, 1, 19, 0], k[0, 1, 40, 0], k[1, 1, 30, 0] = 1, 2, 1
    cfg = DHSA(block=8, budget=24, local=8, sink=2, predictor=predictor, instruction=5)
    assert cfg.boundaries(k).tolist() == [[0, 20, 41, 55, 60], [0, 31, 55, 60, 60]]
    q, k, v = tensors(2, 4, 2, 131, 131)
    check(q, k, v, DHSA(**SMALL, predictor=lambda keys: keys[:, 0] + keys[:, 9], theta=0.5, nms=4))


def test_at_most_beta_boundaries_per_block():
    cfg = DHSA(block=10, budget=40, local=10, sink=2, predictor=lambda x: x[:, 0], theta=-9.0, nms=0, beta=2)
    k = torch.randn(1, 1, 105, 4)
    assert cfg.boundaries(k).shape == (1, 2 * 10 + 2)


# ---------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 0}, "DHSA: block must be an int >= 1, got 0"),
        ({"local": 63}, "local must be at least block = 64, got 63"),
        ({"budget": 255}, "budget must be at least sink \\+ local = 256, got 255"),
        ({"window": 0}, "DHSA: window must be an int >= 1, got 0"),
        ({"pooling": "max"}, "pooling must be one of avgpool_norm, avgpool, got 'max'"),
        ({"per_head": "all"}, "per_head must be False, True or 'kv', got 'all'"),
        ({"per_head": 1}, "per_head must be False, True or 'kv', got 1"),
        ({"theta": float("nan")}, "theta must be a number, got nan"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DHSA(**settings)


def test_wrong_inputs():
    q, k, _ = tensors(1, 4, 2, 90, 90)
    cfg = DHSA(**SMALL)
    with pytest.raises(TypeError, match="predictor must be None or callable, got int"):
        DHSA(predictor=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="is_causal=False, accepted is True"):
        cfg.layout(q, k, is_causal=False)
    with pytest.raises(ValueError, match="at least as many keys as queries, got 90 queries and 89 keys"):
        cfg.layout(q, k[:, :, :89])
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        cfg.layout(q[:, :3], k)
    with pytest.raises(ValueError, match="q must be a tensor"):
        cfg.layout(q[0], k)
    for cuts in ([[0, 89]], [[1, 90]], [[0, 50, 40, 90]], [[0, 90]] * 3):
        with pytest.raises(ValueError, match="boundaries must rise from 0 to 90"):
            cfg.select(q, k, boundaries=torch.tensor(cuts))
    with pytest.raises(ValueError, match="boundaries must be int64"):
        cfg.select(q, k, boundaries=torch.tensor([0.0, 90.0]))
    with pytest.raises(ValueError, match="must return logits \\(1, 90\\) for 90 keys, got \\(1, 16, 90\\)"):
        DHSA(**SMALL, predictor=lambda x: x).layout(q, k)
    with pytest.raises(ValueError, match="score must be a float tensor"):
        select_boundaries(torch.zeros(3))
    with pytest.raises(ValueError, match="forced must be an int >= 0 and <= 9, got 10"):
        select_boundaries(torch.zeros(1, 9), forced=10)
