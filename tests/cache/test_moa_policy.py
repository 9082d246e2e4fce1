"""MoA while decoding: each head holds its sinks and its span, and gives what the pattern gives."""

from __future__ import annotations

import pytest
import torch

import foveate as fv
from foveate.cache import Budget, Geometry, LayerCache, MoA, MoAPlan, SpanRule, load

RULES = (((0.0, 0.25), (4.0, 0.0)),)
POLICY = MoA(RULES, sink=2, block=1)


def tensors(n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, heads, n, 6, generator=g) for heads in (4, 2, 2))


def test_decoding_equals_the_pattern_of_the_prompts_length():
    """Spans 8 and 4 of a prompt of 32; 28 more tokens, each equal to one call under the fixed pattern."""
    q, k, v = tensors()
    assert POLICY.spans(0, 32) == [8, 4]
    plan = MoAPlan(tuple(tuple(SpanRule(a, b, 2, 1) for a, b in row) for row in RULES))
    wanted = fv.attention(q, k, v, plan.patterns(32, 4)[0], scale=0.4)
    cache = LayerCache(POLICY, Budget(1.0), 1, 0)
    prompt = (slice(None), slice(None), slice(0, 32))
    real = torch.ones(2, 32, dtype=torch.bool)
    cache.prefill(q[prompt], k[prompt], v[prompt], q[prompt], real, Geometry(0.4))
    for at in range(32, 60):
        one = (slice(None), slice(None), slice(at, at + 1))
        out = cache.extend(q[one], k[one], v[one], real[:, :1], Geometry(0.4), lambda *_: None)
        torch.testing.assert_close(out, wanted[one], atol=1e-5, rtol=1e-5)
        assert cache.store.count.tolist() == [9, 5] * 2  # sinks and span, less the query's own token to come


def test_rows_of_a_batch_have_spans_of_their_own_length():
    q, k, v = tensors()
    cache = LayerCache(POLICY, Budget(1.0), 1, 0)
    real = torch.arange(60)[None] >= torch.tensor([[0], [20]])
    cache.prefill(q, k, v, q, real, Geometry(0.4))
    assert cache.store.count.tolist() == [16, 5, 11, 5]  # spans of 60 and of 40 tokens
    assert cache.store.tokens(2).tolist() == [20, 21, *range(51, 60)]


def test_a_plan_becomes_a_policy_and_a_file(tmp_path):
    plan = MoAPlan(((SpanRule(64, 0.5), SpanRule(0, 1.0)),))
    policy = MoA.of(plan)
    assert policy.rules == (((64, 0.5), (0, 1.0)),)
    assert policy.spans(0, 1000) == [plan.spans(1000)[0][0][1], plan.spans(1000)[0][1][1]]
    policy.save(tmp_path)
    assert load(tmp_path) == policy
    with pytest.raises(ValueError, match="one sink and one block"):
        MoA.of(MoAPlan(((SpanRule(64, 0.5, sink=1), SpanRule(0, 1.0)),)))
    with pytest.raises(ValueError, match="the model has 4 of 2"):
        policy.check(4, 8, 2)
    with pytest.raises(ValueError, match="rules must be a table"):
        MoA(())
