"""FlexPrefill against a brute-force oracle written from the paper's steps, head by head, pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import foveate as fv
from foveate.core.layout import BlockLayout
from foveate.core.selectors import flexprefill as module
from foveate.core.selectors.flexprefill import FlexPrefill, diagonal_sums, js_divergence, probe


def tensors(batch, heads, kv_heads, n, m, dim, seed=0, sharp=3.0):
    """Random q and k whose attention is far from flat."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, m, dim, generator=generator, dtype=torch.float64)
    return q * sharp, k


# ------------------------------------------------------------ the oracle
def oracle_strip(q, k, c, scale):
    """P of the last c queries, (R, M) numpy."""
    n, m = len(q), len(k)
    rows = min(c, n)
    strip = np.zeros((rows, m))
    for i in range(rows):
        position = m - rows + i
        logits = [scale * float(q[n - rows + i] @ k[j]) for j in range(position + 1)]
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        strip[i, : position + 1] = np.array(weights) / sum(weights)
    return strip


def oracle_sums(strip):
    rows, m = strip.shape
    vertical, slash = np.zeros(m), np.zeros(m)
    for i in range(rows):
        for j in range(m):
            vertical[j] += strip[i, j] / rows
            distance = (m - rows + i) - j
            if distance >= 0:
                slash[distance] += strip[i, j] / rows
    return vertical, slash


def oracle_pooled(mass, c):
    return np.array([mass[at : at + c].sum() for at in range(0, len(mass), c)])


def oracle_means(x, c, offset):
    """Block means by absolute position; row 0 stands at `offset`."""
    groups: dict[int, list] = {}
    for i, row in enumerate(x):
        groups.setdefault((offset + i) // c, []).append(row)
    return {number: np.mean(rows, axis=0) for number, rows in groups.items()}


def oracle_js(p, q):
    total = 0.0
    for a, b in zip(p, q, strict=True):
        mid = (a + b) / 2
        total += 0.5 * (a * math.log(a / mid) if a > 0 else 0.0)
        total += 0.5 * (b * math.log(b / mid) if b > 0 else 0.0)
    return math.sqrt(max(total, 0.0))


def oracle_count(mass, c, cfg):
    running, columns = 0.0, 1
    for value in sorted(mass, reverse=True):
        running += value
        if running > cfg.gamma:
            break
        columns += 1
    blocks = columns // c + 1
    blocks = max(blocks, -(-cfg.min_budget // c))
    return blocks if cfg.max_budget is None else min(blocks, cfg.max_budget // c)


def oracle_top(pooled, count):
    values = pooled.copy()
    values[0] = math.inf
    return set(sorted(range(len(values)), key=lambda i: -values[i])[:count])


def oracle_head(q, k, cfg, scale):
    """(element mask (N, M), query_aware, D) of one head."""
    n, m, c = len(q), len(k), cfg.block
    offset = m - n
    allowed = np.zeros((n, m), bool)
    strip = oracle_strip(q, k, c, scale)
    vertical, slash = oracle_sums(strip)
    kbar, qbar = oracle_means(k, c, 0), oracle_means(q, c, offset)
    nb = len(kbar)
    mean_q = q[-c:].mean(0)
    logits = np.array([scale * mean_q @ kbar[j] for j in range(nb)])
    estimate = np.exp(logits - logits.max())
    estimate /= estimate.sum()
    distance = oracle_js(estimate, oracle_pooled(vertical, c))
    query_aware = distance < cfg.tau
    least = -(-cfg.min_budget // c)
    counts = (least, least) if query_aware else (oracle_count(vertical, c, cfg), oracle_count(slash, c, cfg))
    columns = oracle_top(oracle_pooled(vertical, c), counts[0])
    distances = oracle_top(oracle_pooled(slash, c), counts[1])
    kept = {(i, j) for i in qbar for j in range(nb) if j <= i and (j in columns or i - j in distances)}
    if query_aware:
        entries = []
        for i in qbar:
            row = np.array([scale * qbar[i] @ kbar[j] for j in range(i + 1)])
            row = np.exp(row - row.max())
            entries += [(value, i, j) for j, value in enumerate(row / row.sum())]
        running = 0.0
        for value, i, j in sorted(entries, reverse=True):
            running += value
            if running > cfg.gamma * len(qbar):
                break
            kept.add((i, j))
    for i in range(n):
        for j in range(offset + i + 1):
            allowed[i, j] = ((offset + i) // c, j // c) in kept
    return allowed, query_aware, distance


def check(q, k, cfg, scale=None):
    layout, info = cfg.select(q, k, scale=scale)
    dense = layout.to_dense()
    groups = q.shape[1] // k.shape[1]
    used = q.shape[-1] ** -0.5 if scale is None else scale
    assert layout.density < FlexPrefill(block=cfg.block, gamma=1.01).layout(q, k).density  # not all was kept
    kinds = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            mask, aware, distance = oracle_head(q[b, h].numpy(), k[b, h // groups].numpy(), cfg, used)
            assert torch.equal(dense[b, h], torch.from_numpy(mask)), (b, h)
            assert bool(info["query_aware"][b, h]) == aware
            assert float(info["js"][b, h]) == pytest.approx(distance, abs=1e-9)
            assert float(info["density"][b, h]) == pytest.approx(mask.mean())
            kinds.append(aware)
    return kinds


# ------------------------------------------------------------ the tests
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "n", "m"),
    [(2, 4, 2, 500, 500), (1, 3, 1, 449, 449), (1, 2, 2, 130, 450), (1, 2, 1, 64, 512), (1, 2, 1, 33, 353)],
)
def test_equals_the_oracle(batch, heads, kv_heads, n, m):
    q, k = tensors(batch, heads, kv_heads, n, m, 8)
    kinds = []
    for tau in (0.0, 0.3, 1.0):
        kinds += check(q, k, FlexPrefill(block=64, gamma=0.7, tau=tau, min_budget=64))
    assert True in kinds
    assert False in kinds


def test_equals_the_oracle_in_larger_blocks_and_with_budgets():
    q, k = tensors(1, 2, 1, 700, 700, 4, seed=1)
    check(q, k, FlexPrefill(block=128, gamma=0.5, tau=0.3, min_budget=100, max_budget=300), scale=0.9)
    q, k = tensors(1, 2, 1, 500, 692, 4, seed=2)  # chunk that starts inside a block of 128
    check(q, k, FlexPrefill(block=128, gamma=0.6, tau=0.3, min_budget=128))


def test_strip_sums_are_the_diagonal_means():
    q, k = tensors(1, 2, 1, 150, 150, 4)
    vertical, slash = probe(q, k, 64, 0.5)
    ones = torch.ones(1, 2, dtype=torch.float64)
    torch.testing.assert_close(vertical.sum(-1), ones)
    torch.testing.assert_close(slash.sum(-1), ones)
    for h in range(2):
        want = oracle_sums(oracle_strip(q[0, h].numpy(), k[0, 0].numpy(), 64, 0.5))
        torch.testing.assert_close(vertical[0, h], torch.from_numpy(want[0]))
        torch.testing.assert_close(slash[0, h], torch.from_numpy(want[1]))


@pytest.mark.parametrize(("rows", "m"), [(1, 1), (1, 7), (3, 3), (5, 11), (13, 500)])
def test_diagonal_sums(rows, m):
    strip = torch.randn(2, rows, m, dtype=torch.float64)
    got = diagonal_sums(strip)
    for d in range(m):
        want = sum(strip[:, i, m - rows + i - d] for i in range(rows) if 0 <= m - rows + i - d < m)
        torch.testing.assert_close(got[:, d], want)


def test_the_probe_in_chunks_of_heads_is_the_same(monkeypatch):
    q, k = tensors(2, 6, 3, 200, 200, 4)
    cfg = FlexPrefill(block=64, tau=0.3, min_budget=64, gamma=0.6)
    whole = cfg.select(q, k)
    monkeypatch.setattr(module, "CHUNK", 1)
    parts = cfg.select(q, k)
    assert whole[0] == parts[0]
    assert torch.equal(whole[1]["js"], parts[1]["js"])


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_gamma_above_one_is_dense_causal(tau):
    q, k = tensors(1, 2, 1, 333, 333, 8)
    layout = FlexPrefill(block=64, gamma=1.01, tau=tau, min_budget=64).layout(q, k)
    assert torch.equal(layout.to_dense()[0], torch.ones(2, 333, 333, dtype=torch.bool).tril())


def test_gamma_above_one_equals_dense_attention():
    q, k = (t.float() for t in tensors(1, 4, 2, 333, 333, 8))
    v = torch.randn(1, 2, 333, 8)
    cfg = FlexPrefill(block=64, gamma=1.01, min_budget=64)
    out = fv.attention(q, k, v, cfg, is_causal=True, engine="reference")
    torch.testing.assert_close(
        out, fv.attention(q, k, v, is_causal=True, engine="reference"), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("n", "m", "cfg"),
    [
        (128, 128, FlexPrefill(block=64, gamma=0.1, min_budget=64)),
        (300, 300, FlexPrefill(block=64, gamma=0.1, min_budget=300)),
        (1, 999, FlexPrefill(block=64, gamma=0.1, min_budget=64)),
        (90, 100, FlexPrefill(gamma=0.1)),
    ],
)
def test_short_inputs_and_decoding_are_dense(n, m, cfg):
    q, k = tensors(2, 2, 1, n, m, 4)
    layout, info = cfg.select(q, k)
    want = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    assert torch.equal(layout.expand(2, 2).to_dense(), want.expand(2, 2, n, m))
    assert torch.isnan(info["js"]).all()
    assert not info["query_aware"].any()
    torch.testing.assert_close(info["density"], torch.full((2, 2), want.double().mean(), dtype=torch.float64))


def test_sink_and_diagonal_are_kept_and_nothing_is_acausal():
    for seed in range(4):
        q, k = tensors(1, 4, 2, 389, 389, 4, seed=seed, sharp=6.0)
        for tau in (0.0, 1.0):
            dense = FlexPrefill(block=64, gamma=0.05, tau=tau, min_budget=1).layout(q, k).to_dense()[0]
            causal = torch.ones(389, 389, dtype=torch.bool).tril()
            block = torch.arange(389) // 64
            always = causal & ((block[:, None] == block) | (block == 0))
            assert not (dense & ~causal).any()
            assert dense[:, always].all()


def test_tau_zero_and_tau_beyond_the_largest_distance():
    q, k = tensors(1, 8, 4, 300, 300, 4, sharp=8.0)
    none = FlexPrefill(block=64, tau=0.0, min_budget=64).select(q, k)[1]
    every = FlexPrefill(block=64, tau=math.sqrt(math.log(2)) + 1e-6, min_budget=64).select(q, k)[1]
    assert not none["query_aware"].any()
    assert every["query_aware"].all()


def test_a_probability_that_underflows_gives_a_distance():
    """x log x is 0 at 0: float32 weights that vanish must not turn D into NaN, which is never < tau."""
    q, k = (t.float() for t in tensors(1, 2, 1, 512, 512, 4, sharp=400.0))
    info = FlexPrefill(block=64, tau=1.0, min_budget=64).select(q, k)[1]
    assert torch.isfinite(info["js"]).all()
    assert info["query_aware"].all()


def test_divergence_of_vanishing_probabilities():
    p = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
    q = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], dtype=torch.float64)
    got = js_divergence(p, q).sqrt().tolist()
    want = [oracle_js(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
    assert got == pytest.approx(want)


def test_planted_heads_are_told_apart():
    """Equal last queries over block-constant keys: pooling is exact. Mass on a lone column: it is blind."""
    c, blocks, dim = 64, 8, 4
    generator = torch.Generator().manual_seed(0)
    per_block = torch.randn(blocks, dim, generator=generator, dtype=torch.float64)
    smooth = per_block.repeat_interleave(c, 0)
    query = torch.randn(dim, generator=generator, dtype=torch.float64)
    smooth[-c:] = -20 * query  # the partly visible last block carries no mass
    lone = torch.zeros(blocks * c, dim, dtype=torch.float64)
    lone[5] = 40 * query / query.norm()
    lone[6:64] = -40 / 58 * query / query.norm()  # block 0 has mean 0: its column is invisible in the means
    q = query.expand(1, 2, blocks * c, dim).clone()
    k = torch.stack([smooth, lone])[None]
    info = FlexPrefill(block=c, min_budget=64).select(q, k)[1]
    assert info["js"][0, 0] < 1e-6
    assert info["js"][0, 1] > 0.1
    assert info["query_aware"].tolist() == [[True, False]]


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_density_rises_with_gamma(tau):
    q, k = tensors(2, 4, 2, 640, 640, 8, sharp=5.0)
    gammas = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 1.01]
    found = torch.stack(
        [FlexPrefill(block=64, gamma=g, tau=tau, min_budget=64).select(q, k)[1]["density"] for g in gammas]
    )
    assert (found.diff(dim=0) >= 0).all()
    assert (found[-1] > found[0]).all()


def test_each_query_head_selects_on_its_own_within_its_group():
    q, k = tensors(1, 4, 2, 700, 700, 8, sharp=6.0)
    cfg = FlexPrefill(block=64, gamma=0.5, tau=0.3, min_budget=64)
    whole = cfg.layout(q, k).to_dense()
    for h in range(4):
        alone = cfg.layout(q[:, h : h + 1], k[:, h // 2 : h // 2 + 1]).to_dense()
        assert torch.equal(whole[:, h : h + 1], alone)
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_batch_rows_are_independent():
    q, k = tensors(3, 2, 1, 320, 320, 8, sharp=6.0)
    cfg = FlexPrefill(block=64, gamma=0.5, tau=0.3, min_budget=64)
    whole = cfg.layout(q, k).to_dense()
    for b in range(3):
        assert torch.equal(whole[b : b + 1], cfg.layout(q[b : b + 1], k[b : b + 1]).to_dense())


def test_low_precision_and_strides_do_not_matter():
    q, k = (t.to(torch.bfloat16) for t in tensors(1, 4, 2, 320, 320, 8))
    cfg = FlexPrefill(block=64, gamma=0.6, tau=0.3, min_budget=64)
    base = cfg.select(q, k)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(2, 3).contiguous().transpose(2, 3)
    assert cfg.layout(*strided) == base[0]
    assert torch.equal(cfg.select(q.float(), k.float())[1]["js"], base[1]["js"])
    q.requires_grad_()
    assert cfg.layout(q, k) == base[0]


def test_attention_with_the_selector_is_attention_with_its_layout():
    q, k = (t.float() for t in tensors(1, 4, 2, 320, 320, 8))
    v = torch.randn(1, 2, 320, 8)
    cfg = FlexPrefill(block=64, gamma=0.6, min_budget=64)
    layout = cfg.layout(q, k, scale=0.25)
    assert isinstance(layout, BlockLayout)
    out = fv.attention(q, k, v, cfg, is_causal=True, scale=0.25, engine="reference")
    assert torch.equal(out, fv.attention(q, k, v, layout, scale=0.25, engine="reference"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block": 96}, "FlexPrefill.block must be a positive multiple of 64, got 96"),
        ({"block": 0}, "FlexPrefill.block"),
        ({"gamma": -0.1}, "FlexPrefill.gamma"),
        ({"gamma": math.nan}, "FlexPrefill.gamma"),
        ({"tau": "0.1"}, "FlexPrefill.tau"),
        ({"min_budget": 0}, "FlexPrefill.min_budget"),
        ({"max_budget": 100}, "FlexPrefill.max_budget"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(ValueError, match=words):
        FlexPrefill(**settings)


def test_inputs_are_checked():
    q, k = tensors(1, 4, 2, 300, 300, 4)
    cfg = FlexPrefill(block=64, min_budget=64)
    with pytest.raises(ValueError, match="is_causal=False"):
        cfg.layout(q, k, is_causal=False)
    with pytest.raises(ValueError, match="H a multiple of Hkv"):
        cfg.layout(q[:, :3], k)
    with pytest.raises(ValueError, match="q must be a tensor"):
        cfg.layout(q[0], k)
    with pytest.raises(ValueError, match="at least as many keys as queries"):
        cfg.layout(q, k[:, :, :299])
    with pytest.raises(ValueError, match="multiple of 64, got 300 - 299 = 1"):
        cfg.layout(q[:, :, :299], k)
    with pytest.raises(TypeError, match="unexpected keyword"):
        FlexPrefill(blocks=64)
