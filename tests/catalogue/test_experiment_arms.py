"""What the experiments of S2-Attention and PowerAttention compare with what."""

from __future__ import annotations

import pytest
import torch

from foveate.catalogue.experiments import power_attention, s2_attention
from foveate.catalogue.lab.controls import causal_share
from foveate.patterns import Causal, Shards, reachability


def test_cache_of_the_fullest_head_and_its_bound():
    shards = Shards(4, 2, 4)
    kept, bound = s2_attention.cache_share(80, shards)
    assert kept.value == max(len(shards.kv_keep(h, 80)) for h in range(4)) / 80
    assert bound.value == pytest.approx((2 * 4 + 5 * 4) / 80)


def test_arms_are_comparable():
    """The window is not wider in pairs than a percent, and cannot reach what is called far in two layers."""
    tokens, arms = s2_attention.TOKENS, s2_attention.arms(0)
    share = causal_share(arms["own shards"], tokens)
    assert causal_share(arms["window"], tokens) >= share
    assert causal_share(arms["window"], tokens) < share + 0.01
    assert causal_share(arms["random blocks"], tokens) == pytest.approx(share, rel=0.1)
    reach = reachability(arms["window"], tokens, 2)[0, 0, -1].flip(0)
    assert not reach[s2_attention.REACH + 1 :].any()
    union = arms["own shards"].layout(tokens).to_dense()[0].any(0)
    assert torch.equal(union, Causal().layout(tokens).to_dense()[0, 0])
    assert not arms["one shard for all"].layout(tokens).to_dense()[0].any(0)[-1, 128:136].any()


def test_static_patterns_beside_the_power_of_two():
    tokens, arms = power_attention.TOKENS, power_attention.arms(0)
    share = causal_share(arms["power of two"], tokens)
    assert share <= causal_share(arms["window + stride"], tokens) <= causal_share(arms["window"], tokens)
    assert causal_share(arms["random"], tokens) == pytest.approx(share, rel=0.1)
    reach = reachability(arms["window"], tokens, power_attention.LAYERS)[0, 0, -1].flip(0)
    assert reach[: power_attention.REACH + 1].all()
    assert not reach[power_attention.REACH + 1 :].any()
    short = sum(1 for d in range(1, 255) if d.bit_count() <= power_attention.LAYERS)
    assert power_attention.reached("", arms["power of two"]).value == pytest.approx(short / 254)
