"""MoA: the influence of attention entries, the search against enumeration, plans and what decoding under them reads."""

from __future__ import annotations

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch

import foveate as fv
from foveate.cache import (
    MoAPlan,
    SpanRule,
    attention_influence,
    group_influence,
    moa,
    predicted_loss,
    search_spans,
    span_rules,
)
from foveate.patterns import Causal


def inputs(n, m=None, batch=2, heads=4, kv_heads=2, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, n), (kv_heads, m or n), (kv_heads, m or n), (heads, n))
    return [torch.randn(batch, h, length, 5, generator=g).to(dtype) for h, length in shapes]


def entries(q, k, v, grad, scale=None):
    """E, (B, H, N, M), by masking every entry and renormalising its row, one after another."""
    batch, heads, n, dim = q.shape
    m, groups = k.shape[2], heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    made = torch.zeros(batch, heads, n, m, dtype=torch.float64)
    for b, h, i in itertools.product(range(batch), range(heads), range(n)):
        last = i + m - n
        logits = k[b, h // groups, : last + 1] @ q[b, h, i] * scale
        gain = v[b, h // groups, : last + 1] @ grad[b, h, i]
        whole = logits.softmax(0) @ gain
        for j in range(last + 1):
            rest = torch.arange(last + 1) != j
            without = logits[rest].softmax(0) @ gain[rest] if last else gain.new_zeros(())
            made[b, h, i, j] = without - whole
    return made


# ------------------------------------------------------------------------------------------------- influence
@pytest.mark.parametrize(("n", "m", "block"), [(13, 13, 4), (7, 7, 1), (5, 11, 3), (1, 1, 2)])
@pytest.mark.parametrize("average", [True, False])
def test_influence_is_what_masking_an_entry_changes(n, m, block, average):
    q, k, v, grad = inputs(n, m)
    exact = entries(q, k, v, grad, scale=0.6)
    exact = (exact.mean(0, keepdim=True) if average else exact).abs()
    rows, columns = torch.arange(n) // block, torch.arange(m) // block
    want = torch.zeros(*exact.shape[:2], rows[-1] + 1, columns[-1] + 1, dtype=torch.float64)
    for i, j in itertools.product(range(n), range(m)):
        want[:, :, rows[i], columns[j]] += exact[:, :, i, j]
    got = attention_influence(q, k, v, grad, block=block, scale=0.6, average=average)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)


def test_rows_balance():
    """sum_j (1 - a_ij) E_ij = 0, and the loss is that of a real backward pass."""
    q, k, v, _ = inputs(9, heads=2)
    v.requires_grad_()
    out = fv.attention(q, k, v, is_causal=True)
    out.retain_grad()
    out.square().sum().backward()
    a = (q @ k.mT * 5**-0.5).masked_fill(~torch.ones(9, 9).tril().bool(), -math.inf).softmax(-1)
    made = moa._entries(q, k, v.detach(), out.grad, 0, 5**-0.5, 2)
    assert ((1 - a) * made).sum(-1)[:, :, 1:].abs().max() < 1e-12
    assert made[:, :, 3].abs().max() > 0.01
    assert (made.masked_select(~torch.ones(9, 9).tril().bool()) == 0).all()


def test_influence_is_streamed_in_blocks_of_rows(monkeypatch):
    given = inputs(75, 90, batch=1)
    whole = attention_influence(*given, block=8)
    monkeypatch.setattr(moa, "HELD", 1)
    widest = []
    kept = moa._entries
    monkeypatch.setattr(moa, "_entries", lambda q, *rest: widest.append(q.shape[2]) or kept(q, *rest))
    torch.testing.assert_close(attention_influence(*given, block=8), whole, atol=1e-6, rtol=1e-6)
    assert widest == [8] * 9 + [3]


def test_influence_of_entries_that_take_all_weight_is_finite():
    q, k, v, grad = inputs(11, dtype=torch.float32)
    assert attention_influence(1e3 * q, 1e3 * k, v, grad, block=4).isfinite().all()
    low = attention_influence(*(t.bfloat16() for t in (q, k, v, grad)), block=4)
    near = attention_influence(*(t.bfloat16().double() for t in (q, k, v, grad)), block=4)
    torch.testing.assert_close(low, near, atol=1e-4, rtol=1e-4)


def test_the_largest_head_of_a_group_counts():
    made = torch.rand(3, 6, 4, 4)
    grouped = group_influence(made, 2)
    assert torch.equal(grouped[:, 1], torch.maximum(torch.maximum(made[:, 3], made[:, 4]), made[:, 5]))
    with pytest.raises(ValueError, match="kv_heads must divide the 6 heads, got 4"):
        group_influence(made, 4)


# ----------------------------------------------------------------------------------------------------- rules
@pytest.mark.parametrize(
    ("alpha", "beta", "sink", "block"), [(8, 0.25, 4, 8), (-5, 0.5, 0, 1), (3, 0, 9, 4), (0, 1, 2, 16)]
)
@pytest.mark.parametrize("n", [1, 7, 31, 75])
def test_a_rule_its_pattern_density_and_cache(alpha, beta, sink, block, n):
    rule = SpanRule(alpha, beta, sink, block)
    span = rule.span(n)
    assert span % block == 0
    assert span >= alpha + beta * n
    assert span == block or span - block < alpha + beta * n
    dense = rule.pattern(n).layout(n).to_dense()[0, 0]
    for i, j in itertools.product(range(n), range(n)):
        assert dense[i, j] == (j <= i and (j < sink or i - j < span))
    assert rule.density(n) == pytest.approx(float(dense.sum()) / (n * (n + 1) / 2))
    assert rule.kept(n) == dense.sum(1).max()


def test_a_rule_that_reaches_back_to_the_start_is_dense():
    q, k, v, _ = inputs(131, dtype=torch.float32)
    plan = MoAPlan(((SpanRule(0, 1.0, 4, 8), SpanRule(64, 1.0, 0, 8)),))
    out = fv.attention(q, k, v, plan.patterns(131, 4)[0])
    torch.testing.assert_close(out, fv.attention(q, k, v, Causal()), atol=1e-5, rtol=0)
    assert plan.density(131) == 1.0


def test_candidates():
    rules = span_rules([256, 512], 1024, block=1)
    assert len({(rule.alpha, rule.beta) for rule in rules}) == len(rules)
    want = [(a, b / 8) for a in (-256, -128, 0, 128, 256, 384, 512) for b in range(9)
            if a + b / 8 * 256 > 0 and all(a + b / 8 * n <= n for n in (256, 512, 1024))]  # fmt: skip
    assert [(rule.alpha, rule.beta) for rule in rules] == want
    assert len(span_rules([2048, 4096, 8192], 16384, step=1024)) == 18


@pytest.mark.parametrize("span", [64, 128, 320, 512])
def test_predicted_loss_is_what_lies_outside(span):
    made = torch.rand(2, 3, 8, 8).tril()
    rule = SpanRule(span, 0.0, 64, 64)
    want = sum(
        made[..., i, j].double() for i in range(8) for j in range(i) if j >= 1 and (i - j + 1) * 64 > span
    )
    torch.testing.assert_close(predicted_loss(made, rule, 512), want + torch.zeros(2, 3).double())


# ---------------------------------------------------------------------------------------------------- search
SPANS = ((32, 0), (64, 0), (128, 0), (0, 0.25), (0, 0.5), (64, 0.5), (0, 1))
RULES = tuple(SpanRule(a, b, 32, 32) for a, b in SPANS)


def influences(layers, heads, lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = {}
    near = torch.rand(layers, heads, 1, 1, generator=g)
    for n in lengths:
        place = torch.arange(n // 32)
        decay = torch.exp(-near * (place[:, None] - place).clamp_min(0))
        made[n] = (decay * (0.2 + torch.rand(layers, heads, n // 32, n // 32, generator=g))).tril()
    return made


def loss_of(plan, made):
    """Summed shares of influence outside, head by head."""
    return sum(
        float(predicted_loss(made[n][x, h], rule, n, block=32) / made[n].double().sum())
        for n in made for x, layer in enumerate(plan.rules) for h, rule in enumerate(layer)
    )  # fmt: skip


def by_enumeration(made, lengths, density, most, rules=RULES, block=32):
    """The least loss of all plans within the bound."""
    layers, heads = next(iter(made.values())).shape[:2]
    outside = [[[sum(float(predicted_loss(made[n][x, h], rule, n, block=32) / made[n].double().sum()) for n in made)
                 for rule in rules] for h in range(heads)] for x in range(layers)]  # fmt: skip
    pairs = np.array([[rule.density(n) for n in lengths] for rule in rules])
    best = math.inf
    for picked in itertools.product(range(len(rules)), repeat=layers * heads):
        if any(len(set(picked[x * heads : (x + 1) * heads])) > most for x in range(layers)):
            continue
        if (pairs[list(picked)].mean(0) <= density + 1e-12).all():
            best = min(best, sum(outside[i // heads][i % heads][r] for i, r in enumerate(picked)))
    return best


@pytest.mark.parametrize("method", ["lagrangian", "exact"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("layers", "heads", "profiled", "longer", "most"),
                         [(1, 2, [512], [], 2), (2, 1, [512], [], 1), (2, 2, [256, 512], [1024], 2),
                          (1, 4, [256, 512], [1024], 2), (2, 2, [512], [1024], 1)])  # fmt: skip
def test_the_plan_is_the_best_of_all(method, seed, layers, heads, profiled, longer, most):
    made = influences(layers, heads, profiled, seed)
    plan = search_spans(
        made, longer, 0.6, rules=RULES, block=32, max_rules_per_layer=most, method=method, least=0.0
    )
    best = by_enumeration(made, [*profiled, *longer], 0.6, most)
    assert loss_of(plan, made) == pytest.approx(best, abs=1e-12)
    assert all(plan.density(n) <= 0.6 + 1e-9 for n in (*profiled, *longer))
    assert all(len(set(layer)) <= most for layer in plan.rules)


def test_every_head_for_itself():
    made = influences(1, 3, [512], 3)
    plan = search_spans(
        made, [], 0.6, rules=RULES, block=32, max_rules_per_layer=None, method="exact", least=0.0
    )
    assert loss_of(plan, made) == pytest.approx(by_enumeration(made, [512], 0.6, 3), abs=1e-12)


@pytest.mark.parametrize("density", [0.4, 0.5, 0.8])
def test_bounds_hold_at_every_length_from_both_sides(density):
    made = influences(6, 4, [256, 512], 7)
    lengths = (256, 512, 1024, 2048)
    narrow = span_rules([256, 512], 2048, step=32, sink=16, block=16)
    plan = search_spans(made, [1024, 2048], density, block=32, rules=narrow)
    for n in lengths:
        exact = plan.patterns(n)[0].layout(n) if n == 512 else None
        assert exact is None or exact.area / (4 * n * (n + 1) / 2) == pytest.approx(
            np.mean([rule.density(n) for rule in plan.rules[0]])
        )
        assert 0.9 * density - 1e-9 <= plan.density(n) <= density + 1e-9
    assert all(len(set(layer)) <= 2 for layer in plan.rules)


def test_pricing_comes_near_the_exact_plan_of_many_layers():
    made = influences(5, 2, [256, 512], 1)
    plans = [
        search_spans(made, [1024], 0.6, rules=RULES, block=32, method=m, least=0.0)
        for m in ("lagrangian", "exact")
    ]
    losses = [loss_of(plan, made) for plan in plans]
    assert losses[1] - 1e-12 <= losses[0] <= 1.02 * losses[1]
    uniform = min(loss_of(MoAPlan(((rule,) * 2,) * 5), made) for rule in RULES
                  if all(rule.density(n) <= 0.6 for n in (256, 512, 1024)))  # fmt: skip
    assert losses[0] < 0.95 * uniform


def test_equal_heads_get_equal_rules_and_local_heads_the_narrowest():
    made = influences(1, 4, [512], 2)
    far = torch.zeros(16, 16)
    far[:, 3] = 1.0  # every query needs a block that is no sink
    local = torch.diag(torch.rand(16))
    made[512][0] = torch.stack([far.tril(), local, far.tril(), local])
    plan = search_spans(made, [1024], 0.7, block=32, least=0.0)
    rules = plan.rules[0]
    assert rules[0] == rules[2]
    assert rules[1] == rules[3]
    assert rules[1].span(512) == min(rule.span(512) for rule in span_rules([512], 1024))
    assert loss_of(plan, made) < 0.25 < 0.4 < loss_of(MoAPlan(((rules[1],) * 4,)), made)


# ----------------------------------------------------------------------------------------------------- plans
PLAN = MoAPlan(
    ((SpanRule(16, 0.0, 3, 8), SpanRule(-8, 0.5, 3, 8)), (SpanRule(0, 1.0, 3, 8), SpanRule(8, 0.25, 0, 8)))
)


def test_what_decoding_reads_is_what_the_pattern_holds():
    """A cache of the first `sink` and the latest `span` keys gives the last row of attention under the pattern."""
    n = 75
    q, k, v, _ = inputs(n)
    for layer, pattern in enumerate(PLAN.patterns(n, heads=4)):
        parallel = fv.attention(q, k, v, pattern)[:, :, -1:]
        for head in range(4):
            sinks, span = PLAN.spans(n)[layer][head // 2]
            held = sorted({*range(min(sinks, n)), *range(max(0, n - span), n)})
            assert len(held) == PLAN.kept(n)[layer][head // 2]
            one = slice(head // 2, head // 2 + 1)
            out = fv.attention(q[:, head : head + 1, -1:], k[:, one][:, :, held], v[:, one][:, :, held])
            torch.testing.assert_close(out, parallel[:, head : head + 1], atol=1e-12, rtol=0)


def test_plans_are_saved_and_loaded(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert MoAPlan.load(tmp_path / "plan.json") == PLAN
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    data = json.loads((tmp_path / "plan.json").read_text())
    assert data["layers"][0]["alpha"] == [16, -8]
    assert PLAN.layers == PLAN.kv_heads == 2
    for wrong in ({**data, "schema": 2}, {**data, "layers": [{"alpha": [1]}]}, {}, []):
        (tmp_path / "bad.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=r"bad.json is no plan .*accepted: what MoAPlan.save wrote"):
            MoAPlan.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: SpanRule(math.nan, 0), "alpha must be a finite number"),
        (lambda: SpanRule(0, True), "beta must be a finite number, got True"),
        (lambda: SpanRule(0, 0, sink=-1), "sink must be an int >= 0, got -1"),
        (lambda: span_rules([], 5), "profiled is empty"),
        (lambda: span_rules([64], 32), "longest must be an int >= 64, got 32"),
        (lambda: MoAPlan(((SpanRule(0, 1),), ())), "equally many heads, got [1, 0]"),
        (lambda: MoAPlan(((3,),)), "rules must be SpanRule, got int"),  # type: ignore[arg-type]
        (lambda: PLAN.patterns(9, heads=3), "heads must be a multiple of 2, got 3"),
        (lambda: search_spans({}, []), "influence is empty"),
        (lambda: search_spans({128: torch.zeros(1, 1, 3, 3)}, []), "must be (1, 1, 2, 2), layers"),
        (lambda: search_spans({128: torch.zeros(2, 2)}, []), "must be (2, 2, 2, 2)"),
        (lambda: search_spans({256: torch.ones(1, 1, 4, 4)}, [], 1.5), "density must lie in (0, 1]"),
        (lambda: search_spans({256: torch.ones(1, 1, 4, 4)}, [], max_rules_per_layer=3), "must be 1, 2 or None, got 3"),
        (lambda: search_spans({256: torch.ones(1, 1, 4, 4)}, [], method="milp"), "lagrangian or exact, got 'milp'"),
        (lambda: search_spans({256: torch.ones(1, 1, 4, 4)}, [], rules=[]), "rules is empty"),
        (lambda: search_spans({256: torch.ones(1, 1, 4, 4)}, [], 0.1), "the narrowest rules exceed density 0.1"),
        (lambda: search_spans({256: torch.ones(1, 1, 4, 4)}, [], 0.9, rules=RULES[:1]), "between 0.81 and 0.9"),
        (lambda: attention_influence(*inputs(4)[:3], torch.zeros(2, 4, 4, 3)), "must fit each other"),
        (lambda: attention_influence(*inputs(4)[:3], torch.zeros(4)), "grad_out must be a tensor"),
        (lambda: attention_influence(*inputs(5, 4)), "M >= N"),
    ],
)  # fmt: skip
def test_what_is_refused(call, says):
    with pytest.raises((ValueError, TypeError), match=re.escape(says)):
        call()
