"""TopBlocks against scores computed block by block in Python."""

from __future__ import annotations

import math

import pytest
import torch

import foveate as fv
from foveate.bench.recall import attention_recall
from foveate.core.selectors import top_blocks as module
from foveate.selectors import TopBlocks

SCORES = ("mean", "bounds", "peak", "mass")


def tensors(batch=1, heads=4, kv_heads=2, n=300, m=None, dim=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, n, dim, generator=g, dtype=torch.float64)
    k = torch.randn(batch, kv_heads, n if m is None else m, dim, generator=g, dtype=torch.float64)
    return (2 * q).to(dtype), k.to(dtype)


def score(kind, q, k, i, j, c, scale):
    """Of one head: query block i, key block j."""
    n, m = len(q), len(k)
    rows, cols = range(i * c, min((i + 1) * c, n)), range(j * c, min((j + 1) * c, m))
    mean = sum(q[r] for r in rows) / len(rows) * scale
    if kind == "mean":
        return float(mean @ (sum(k[x] for x in cols) / len(cols)))
    if kind == "peak":
        return max(float(mean @ k[x]) for x in cols)
    if kind == "bounds":
        return sum(
            max(float(mean[d] * max(k[x, d] for x in cols)), float(mean[d] * min(k[x, d] for x in cols)))
            for d in range(q.shape[1])
        )
    total = 0.0
    for r in rows:
        seen = (k[: r + m - n + 1] @ q[r] * scale).tolist()
        norm = sum(math.exp(x) for x in seen)
        total += sum(math.exp(seen[x]) / norm for x in cols if x < len(seen))
    return total


def oracle(q, k, cfg, scale):
    """bool (B, H, nq, nk), by sorting."""
    batch, heads, n, _ = q.shape
    m, c = k.shape[2], cfg.block
    nq, nk = -(-n // c), -(-m // c)
    out = torch.zeros(batch, heads, nq, nk, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // (heads // k.shape[1])]
            for i in range(nq):
                first, last = i * c + m - n, min((i + 1) * c, n) - 1 + m - n  # positions
                seen = [j for j in range(nk) if j * c <= last]
                always = [j for j in seen if j < cfg.first or j > first // c - cfg.local]
                rest = [j for j in seen if j not in always]
                rest.sort(key=lambda j: -score(cfg.score, q[b, h], keys, i, j, c, scale))
                for j in always + rest[: max(0, cfg.keep - len(always))]:
                    out[b, h, i, j] = True
    return out


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(
    ("n", "m", "settings"),
    [
        (331, None, {"keep": 3}),
        (450, None, {"keep": 4, "first": 0, "local": 2}),
        (130, 443, {"keep": 3}),  # M - N is no multiple of the block
        (600, None, {"keep": 2, "block": 128}),
    ],
)
def test_the_blocks_are_those_of_the_definition(kind, n, m, settings):
    q, k = tensors(2 if n == 331 else 1, 4, 2, n, m, dim=3)
    chosen = TopBlocks(score=kind, **settings)
    want = oracle(q, k, chosen, 3**-0.5)
    assert torch.equal(chosen.select(q, k), want)
    layout = chosen.layout(q, k)
    c, m = chosen.block, k.shape[2]
    pairs = want.repeat_interleave(c, 2).repeat_interleave(c, 3)[:, :, :n, :m]
    assert torch.equal(layout.to_dense(), pairs & torch.ones(n, m, dtype=torch.bool).tril(m - n))


@pytest.mark.parametrize("kind", SCORES)
def test_chunks_do_not_matter(kind, monkeypatch):
    q, k = tensors(n=500)
    whole = TopBlocks(keep=4, score=kind).select(q, k)
    monkeypatch.setattr(module, "CHUNK", 1)
    assert torch.equal(TopBlocks(keep=4, score=kind).select(q, k), whole)


@pytest.mark.parametrize("kind", SCORES)
def test_enough_blocks_are_dense_attention(kind):
    q, k = tensors(n=300, dtype=torch.float32)
    out = fv.attention(q, k, k, TopBlocks(keep=5, score=kind), is_causal=True)
    assert torch.allclose(out, fv.attention(q, k, k, is_causal=True), atol=1e-5)


def test_no_other_blocks_hold_more_than_the_oracles():
    q, k = tensors(n=640, dtype=torch.float32)
    held = {kind: attention_recall(q, k, TopBlocks(keep=3, score=kind).layout(q, k)) for kind in SCORES}
    best = held["mass"].unflatten(2, (-1, 64)).sum(3)
    for kind in ("mean", "bounds", "peak"):
        assert bool((held[kind].unflatten(2, (-1, 64)).sum(3) <= best + 1e-6).all())
    assert float(best.mean()) > float(held["mean"].unflatten(2, (-1, 64)).sum(3).mean())


def test_bounds_are_bounds():
    q, k = tensors(n=256, heads=2)
    chosen = TopBlocks(score="bounds")
    q_sum, k_sum = chosen._summaries(0.5 * q.unflatten(2, (-1, 64)).mean(3), k)
    scores = torch.matmul(q_sum, k_sum.mT)
    exact = torch.matmul(0.5 * q.unflatten(2, (-1, 64)).mean(3), k.mT).unflatten(3, (-1, 64)).amax(4)
    assert bool((scores >= exact - 1e-9).all())


def test_dtypes_strides_and_the_sign_of_the_scale():
    q, k = tensors(n=320)
    for kind in SCORES:
        chosen = TopBlocks(keep=3, score=kind)
        turned = q.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(chosen.select(turned, k), chosen.select(q, k))
        assert torch.equal(chosen.select(q, k, scale=-1.0), chosen.select(-q, k, scale=1.0))
        half = chosen.select(q.bfloat16(), k.bfloat16())
        assert torch.equal(half, chosen.select(q.bfloat16().float(), k.bfloat16().float()))


def test_a_single_query_sees_its_best_blocks():
    q, k = tensors(n=1, m=400)
    assert TopBlocks(keep=3).select(q, k).sum(-1).tolist() == [[[3]] * 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 96}, "block must be a multiple of 64, got 96"),
        ({"keep": 0}, "keep"),
        ({"score": "max"}, "score must be one of mean, bounds, peak, mass, got 'max'"),
        ({"local": 0}, "local"),
        ({"first": -1}, "first"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        TopBlocks(**change)


def test_wrong_tensors():
    q, k = tensors(n=100)
    with pytest.raises(ValueError, match="causal"):
        TopBlocks().layout(q, k, is_causal=False)
    with pytest.raises(ValueError, match="must share B and D"):
        TopBlocks().layout(q[:, :3], k)
    with pytest.raises(ValueError, match="100 queries and 50 keys"):
        TopBlocks().layout(q, k[:, :, :50])
