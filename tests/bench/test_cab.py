"""CAB: the validator, the index with the official constants, the break-even length, the small tasks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import foveate as fv
from foveate.bench.cab import (
    CAB_TASKS,
    AttentionPattern,
    Metric,
    Task,
    compositional_index,
    efficiency_length,
    refusal,
    supported_patterns,
)
from foveate.bench.cab_mini import CabMini
from foveate.linear import LightningAttention, LinearAttention

NS, CS, NC, CC = AttentionPattern
SMALL = {"dim": 16, "heads": 2, "n": 14, "m": 23}


def softmax(pattern):
    return lambda q, k, v: fv.attention(q, k, v, is_causal=pattern is CS)


def pooled(q, k, v):
    agents = (
        F.adaptive_avg_pool1d(q.flatten(0, 1).transpose(1, 2), 4).transpose(1, 2).unflatten(0, q.shape[:2])
    )
    return (q @ agents.transpose(2, 3)).softmax(-1) @ ((agents @ k.transpose(2, 3)).softmax(-1) @ v)


def names(found):
    return [p.name for p, fine in found.items() if fine]


# ------------------------------------------------------------------------------------------------ the validator
def test_softmax_has_all_four_uses():
    assert names(supported_patterns(softmax)) == ["NS", "CS", "NC", "CC"]


def test_what_it_refuses():
    assert names(supported_patterns(lambda p: softmax(NS), **SMALL)) == ["NS", "NC", "CC"]
    assert names(supported_patterns(lambda p: pooled, **SMALL)) == ["NS", "NC"]
    assert names(supported_patterns(lambda p: softmax(p) if p.causal else None, **SMALL)) == ["CS", "CC"]
    assert "row 7 changes with what comes after it" in refusal(softmax(NS), CS, **SMALL)
    assert "row 7 changes" in refusal(pooled, CC, **SMALL)


def test_operators_with_a_state_are_also_decoded():
    for op in (LightningAttention(), LightningAttention(variant="parallel", block=4), LinearAttention()):
        assert refusal(op, CS, **SMALL) is None
        assert names(supported_patterns(lambda p, op=op: op, **SMALL)) == ["NS", "CS"]

    class Forgets:
        def __call__(self, q, k, v, *, state=None):
            out = LightningAttention()(q, k, v)
            return out if state is None else (out, state)

        def initial_state(self, q, k, v):
            return 0

    assert "row 1 differs when decoded token by token" in refusal(Forgets(), CS, **SMALL)


def test_a_leak_from_the_last_token_alone_is_found():
    def leaks(q, k, v):
        out = fv.attention(q, k, v, is_causal=True)
        return out + 1e-3 * v[:, :, -1:] * (torch.arange(q.shape[2]) == 9)[:, None]

    assert "row 9 changes" in refusal(leaks, CS, **SMALL)


def test_refusals_of_the_operator_itself():
    def picky(q, k, v):
        if q.shape[2] != k.shape[2]:
            raise ValueError("as many queries as keys")
        return q

    assert refusal(picky, NS, **SMALL) is None
    assert "refuses 14 queries and 23 keys: as many queries as keys" in refusal(picky, NC, **SMALL)
    assert "numbers that are not finite" in refusal(lambda q, k, v: q / 0, NS, **SMALL)
    assert "returns (1, 2, 23, 8)" in refusal(lambda q, k, v: v, NC, **SMALL)
    with pytest.raises(RuntimeError):  # a defect is not a refusal
        refusal(lambda q, k, v: q @ k, NS, **SMALL)
    with pytest.raises(
        ValueError, match="dim must be a multiple of heads, n >= 2, m >= 1; got dim=10, heads=4"
    ):
        supported_patterns(softmax, dim=10)


# ------------------------------------------------------------------------------------------------ the index
def means(pattern):
    return [m.mu for task in CAB_TASKS[pattern] for m in task.metrics]


def test_the_official_constants():
    assert {p.name: [len(t.metrics) for t in tasks] for p, tasks in CAB_TASKS.items()} == {
        "NS": [4, 3, 2, 1],
        "CS": [2, 3, 1],
        "NC": [3, 6],
        "CC": [2, 3],
    }
    lower = {p.name: [m.lower for t in tasks for m in t.metrics] for p, tasks in CAB_TASKS.items()}
    assert lower["NS"] == [True] * 4 + [False] * 5 + [True]
    assert lower["NC"] == [True, True, False, *[True] * 6]
    spreads = [m.sigma for m in CAB_TASKS[NS][3].metrics + CAB_TASKS[CC][0].metrics]
    assert spreads == [62.30827, 1.29239, 0.42726]


@pytest.mark.parametrize("pattern", list(AttentionPattern))
def test_the_mean_counts_nothing_and_a_spread_one(pattern):
    values, at = means(pattern), 0
    assert compositional_index({pattern: values}) == {pattern: 0}
    for task in CAB_TASKS[pattern]:
        for metric in task.metrics:
            better = list(values)
            better[at] += -metric.sigma if metric.lower else metric.sigma
            found = compositional_index({pattern: better})[pattern]
            assert found == pytest.approx(1 / len(task.metrics) / len(CAB_TASKS[pattern]))
            at += 1


def test_a_metric_twice_leaves_the_other_tasks_alone():
    first, *rest = CAB_TASKS[CS]
    twice = {CS: (replace(first, metrics=(first.metrics[0], *first.metrics)), *rest)}
    values = means(CS)
    values[-1] -= 2 * rest[-1].metrics[0].sigma  # perplexity, two spreads better
    want = compositional_index({CS: values})[CS]
    assert compositional_index({CS: [values[0], *values]}, twice)[CS] == pytest.approx(want)
    assert want == pytest.approx(2 / 3)
    own = {NS: (Task("one", (Metric("x", False, 1.0, 2.0),)),)}
    assert compositional_index({NS: [5.0]}, own) == {NS: 2.0}


def test_the_index_checks_its_values():
    with pytest.raises(
        ValueError, match="4 values for CC; accepted: 5, one for each of TTS MCD, TTS MSD, Sum"
    ):
        compositional_index({CC: [1.0] * 4})
    with pytest.raises(ValueError, match="0 values for NS; accepted: 0"):
        compositional_index({NS: []}, {})


# ------------------------------------------------------------------------------------------------ break-even
LENGTHS = [256, 512, 1024, 2048, 4096, 8192]


@pytest.mark.parametrize("skip_first", [False, True])
def test_the_larger_root(skip_first):
    vanilla, line = [3 * n * n + 5 * n + 7 for n in LENGTHS], [600 * n + 1000 for n in LENGTHS]
    b, c = 5 - 600, 7 - 1000
    want = (-b + (b * b - 4 * 3 * c) ** 0.5) / 6
    got = efficiency_length(LENGTHS, vanilla, line, skip_first=skip_first)
    assert abs(got - want) < 1e-6


def test_the_first_cost_may_be_an_outlier():
    vanilla, line = [n * n for n in LENGTHS], [1000 * n for n in LENGTHS]
    line[0] *= 50
    assert efficiency_length(LENGTHS, vanilla, line, skip_first=True) == pytest.approx(1000)
    assert abs(efficiency_length(LENGTHS, vanilla, line) - 1000) > 100


def test_lines_that_are_always_below_and_curves_that_do_not_bend():
    vanilla = [n * n + 10 for n in LENGTHS]
    assert efficiency_length(LENGTHS, vanilla, [1] * 6) == 0
    assert efficiency_length(LENGTHS, vanilla, [-n for n in LENGTHS]) == 0
    with pytest.raises(ValueError, match="do not bend upwards"):
        efficiency_length(LENGTHS, LENGTHS, LENGTHS)
    with pytest.raises(ValueError, match="at least 3 lengths; got 2 lengths, 2 and 2 costs"):
        efficiency_length([1, 2], [1, 4], [1, 2])
    with pytest.raises(ValueError, match="at least 4 lengths"):
        efficiency_length([1, 2, 3], [1, 4, 9], [1, 2, 3], skip_first=True)


# ------------------------------------------------------------------------------------------------ the small tasks
def test_batches_of_the_four_tasks():
    g = torch.Generator().manual_seed(0)
    shapes = {}
    for pattern, task in CabMini().tasks().items():
        assert task.pattern is pattern
        x, memory, targets = task.draw(3, g, False)
        assert (memory is not None) == pattern.cross
        shapes[pattern.name] = [None if t is None else tuple(t.shape) for t in (x, memory, targets)]
    assert shapes == {
        "NS": [(3, 16, 4), None, (3,)],
        "CS": [(3, 64, 128), None, (3, 64)],
        "NC": [(3, 16, 8), (3, 256, 9), (3, 16)],
        "CC": [(3, 24, 9), (3, 24, 8), (3, 24)],
    }


def test_reversal_is_of_the_memory_and_given_one_late():
    x, memory, targets = CabMini().tasks()[CC].draw(5, torch.Generator().manual_seed(0), False)
    assert torch.equal(memory.argmax(-1).flip(1), targets)
    assert torch.equal(x.argmax(-1)[:, 1:], targets[:, :-1])
    assert (x.argmax(-1)[:, 0] == 8).all()


def test_digits_are_held_out_and_patches_are_of_the_image():
    pytest.importorskip("sklearn")
    draw = CabMini().tasks()[NS].draw
    x, _, y = draw(1, torch.Generator(), True)
    assert x.shape == (360, 16, 4)
    seen, _, _ = draw(3000, torch.Generator().manual_seed(0), False)
    assert not {tuple(r.flatten().tolist()) for r in x[:50]} & {tuple(r.flatten().tolist()) for r in seen}
    assert y.bincount().min() > 20


def test_training_is_repeatable_and_learns_from_the_memory():
    found = []
    for seed in (3, 3, 4):
        torch.rand(1)  # other random numbers do not reach it
        found.append(CabMini(steps=8).trained(softmax(CC), CC, seed))
    assert found[0] == found[1] != found[2]
    sees, blind = (
        CabMini(steps=steps).trained(op, CC, 3)
        for op, steps in ((softmax(CC), 100), (lambda q, k, v: torch.zeros_like(q), 20))
    )
    assert sees > 0.4 > 0.2 > blind  # guessing: 1/8
    only = CabMini(steps=1, batch=2).run(lambda p: softmax(p) if p.cross else None)
    assert list(only) == [NC, CC]
