"""Core attention disaggregation: exact pieces, balance, the same attention, and the time of a step by hand."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.dist import CAShard, causal_cost, plan_core_attention, plan_traffic, run_plan, simulate_plan

ROOT = Path(__file__).parents[2]
SIZES = {"q_bytes": 64.0, "kv_bytes": 16.0}


def packed(seed: int, ranks: int, longest: int, *, even: bool = False) -> list[list[int]]:
    """Documents of each rank: full up to `longest` rows a rank."""
    g, out = random.Random(seed), []
    for _ in range(ranks):
        docs, left = [], longest
        while left > 1:
            n = min(left, g.randint(1, longest))
            docs.append(n := n - n % 2 if even and n > 1 else n)
            left -= n
        out.append(docs)
    return out


def loads(plan) -> list[int]:
    return [sum(s.cost for s in shards) for shards in plan]


def before(docs) -> list[int]:
    return [sum(n * (n + 1) // 2 for n in lengths) for lengths in docs]


# ------------------------------------------------------------------------------------------------------- the cost
@pytest.mark.parametrize(("q", "kv"), [(0, 0), (1, 1), (1, 9), (4, 9), (9, 9), (31, 131)])
def test_the_cost_counts_pairs(q, kv):
    assert causal_cost(q, kv) == sum(row + 1 for row in range(kv - q, kv))


@pytest.mark.parametrize("length", [2, 8, 130, 7, 131])
def test_a_head_row_and_a_tail_row_always_cost_the_same(length):
    half, pair = length // 2, length + 1 - length % 2
    for m in range(half + 1):
        assert causal_cost(m, half) + causal_cost(m, half + m) == m * pair
        for cut in range(half - m + 1):  # after `cut` row pairs are gone
            assert causal_cost(m, half - cut) + causal_cost(m, half + cut + m) == m * pair


# ------------------------------------------------------------------------------------------------------- the plan
@pytest.mark.parametrize("tile", [1, 3, 8])
@pytest.mark.parametrize("seed", range(8))
def test_every_row_of_every_document_is_in_one_shard(seed, tile):
    docs = packed(seed, 2 + seed, 397)
    plan = plan_core_attention(docs, tolerance=0.01 * seed, tile=tile, **SIZES)
    flat = [(home, n) for home, lengths in enumerate(docs) for n in lengths]
    seen = [[0] * n for _, n in flat]
    for server, shards in enumerate(plan):
        assert shards == sorted(shards, key=lambda s: (s.doc, s.kv_end))
        for s in shards:
            assert (s.server, s.home, s.kv_end) == (server, flat[s.doc][0], s.q_end)
            assert s.q_start < s.q_end
            for row in range(s.q_start, s.q_end):
                seen[s.doc][row] += 1
    assert all(count == 1 for rows in seen for count in rows)
    assert sum(loads(plan)) == sum(before(docs))
    if tile > 1:  # what was cut off is whole tiles; the outer rest stays at home
        inner = [s for shards in plan for s in shards if s.q_start > 0 and s.q_end < flat[s.doc][1]]
        assert inner
        assert all((s.q_end - s.q_start) % tile == 0 for s in inner)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(6))
def test_no_server_has_more_than_the_tolerance_and_a_row_pair(seed, tolerance, even):
    docs = packed(seed, 8, 1000, even=even)
    plan = plan_core_attention(docs, tolerance=tolerance, **SIZES)
    mean, longest = sum(before(docs)) / 8, max(max(lengths) for lengths in docs)
    assert max(loads(plan)) <= mean + max(tolerance * mean, longest + 1)
    assert max(before(docs)) > 1.3 * mean  # there was something to do


def test_one_rank_with_everything_shares_it_out():
    plan = plan_core_attention([[4096]] + [[2]] * 15, tolerance=0.01, **SIZES)
    assert max(loads(plan)) <= 1.01 * sum(loads(plan)) / 16


def test_many_small_lacks_do_not_add_up():
    """15 servers lack just less than the tolerance: nobody takes, and the last one would keep 15 times as much."""
    docs = [[1000, 560]] + [[930]] * 15
    mean = sum(before(docs)) / 16
    assert min(before(docs)) > 0.9 * mean
    assert max(before(docs)) > 1.4 * mean
    assert max(loads(plan_core_attention(docs, **SIZES))) <= 1.1 * mean


@pytest.mark.parametrize("docs", [[[8, 3], [3, 8], [8, 3]], [[5]], [[100], [99, 2], [100]]])
def test_what_is_balanced_stays(docs):
    plan = plan_core_attention(docs, **SIZES)
    assert all(s.home == s.server for shards in plan for s in shards)
    assert [len(shards) for shards in plan] == [len(lengths) for lengths in docs]
    assert not any(x.any() for x in plan_traffic(plan, **SIZES))


def test_the_cheapest_bytes_move():
    """A long document gives more pairs for its keys and values, a short one fewer; with costly queries it turns."""
    docs = [[4000, 400, 400], [400], [400]]
    cheap_queries = plan_core_attention(docs, q_bytes=1, kv_bytes=100)
    assert {s.doc for shards in cheap_queries for s in shards if s.home != s.server} == {0}
    docs = [[100] * 40, [1000]]  # 202000 and 500500 pairs
    costly = plan_core_attention(docs, q_bytes=1, kv_bytes=100)
    assert {s.doc for shards in costly for s in shards if s.home != s.server} == {40}


# -------------------------------------------------------------------------------------------------- the attention
def by_hand(q, k, v, lengths):
    """Every document by itself, in float64."""
    parts, at = [], 0
    for n in lengths:
        a, b, c = (x[at : at + n].double().transpose(0, 1) for x in (q, k, v))
        b, c = (x.repeat_interleave(len(a) // len(x), 0) for x in (b, c))
        logits = a @ b.transpose(1, 2) / q.shape[2] ** 0.5
        weights = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
        parts.append((weights @ c).transpose(0, 1))
        at += n
    return torch.cat(parts)


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_gives_attention_and_its_gradients(seed):
    docs = packed(seed, 4, 61)
    lengths = [n for rank in docs for n in rank]
    cu, g = [0, *np.cumsum(lengths).tolist()], torch.Generator().manual_seed(seed)
    wide = torch.randn(3, cu[-1], 8, 2, generator=g)  # strided: heads last
    q, k, v = wide[0, :, :4].transpose(1, 2), wide[1, :, :4].transpose(1, 2), wide[2, :, :6].transpose(1, 2)
    q = torch.cat([q, -q.roll(1, 0)], 1)  # 4 query heads, 2 key/value heads
    plan = plan_core_attention(docs, tolerance=0.0, **SIZES)
    assert sum(s.home != s.server for shards in plan for s in shards) >= 3
    up = torch.randn(cu[-1], 4, 6, generator=g)
    results = []
    for run in (
        lambda *x: run_plan(plan, *x, torch.tensor(cu)),
        lambda *x: by_hand(*x, lengths).float(),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = run(*leaves)
        (out * up).sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_a_server_without_work():
    q = torch.randn(2, 1, 8)
    plan = [[CAShard(0, 0, 2, 2, 0, 0)], []]
    torch.testing.assert_close(run_plan(plan, q, q, q, [0, 2]), by_hand(q, q, q, [2]).float())


# ------------------------------------------------------------------------------------------- bytes and the time
def test_traffic_counts_rows_and_the_longest_prefix_once():
    plan = [
        [CAShard(0, 0, 3, 3, 0, 0), CAShard(0, 7, 9, 9, 0, 0), CAShard(1, 2, 4, 4, 1, 0)],
        [CAShard(0, 3, 5, 5, 0, 1), CAShard(0, 5, 7, 7, 0, 1), CAShard(1, 0, 2, 2, 1, 1)],
    ]
    dispatch, collect = plan_traffic(plan, q_bytes=10, kv_bytes=1)
    assert dispatch.tolist() == [[0, 4 * 10 + 7], [2 * 10 + 4, 0]]
    assert collect.tolist() == [[0, 20], [40, 0]]


PLAN = plan_core_attention(
    [[8], [2, 2]], q_bytes=1, kv_bytes=1
)  # 27 and 15 pairs; 2 rows and 5 keys move, 2 return
UNIT = {"flops_per_pair": 1, "q_bytes": 1, "kv_bytes": 1}


def test_without_overlap_the_stages_add_up():
    found = simulate_plan(PLAN, 2.0, 0.5, False, layers=3, other_s=4.0, **UNIT)
    assert found["step"] == 3 * (7 / 0.5 + 27 / 2 + 2 / 0.5 + 4)
    assert found["compute"] == [3 * 27 / 2, 3 * 15 / 2]
    assert found["comm"] == [3 * 9 / 0.5] * 2
    assert found["balance"] == pytest.approx(27 / 21)
    assert found["wait"] == pytest.approx(found["step"] - 3 * (21 / 2 + 4))


def test_ping_pong_hides_what_is_shorter():
    for layers in (1, 2, 7):
        bound = simulate_plan(PLAN, 1.0, 1.0, layers=layers, **UNIT)  # 27 of computing, 9 of bytes
        assert (
            bound["step"] == 27 * layers + (7 + 2) / 2
        )  # only the first and the last transfer of a half are seen
        wire = simulate_plan(PLAN, 100.0, 1.0, layers=layers, **UNIT)  # bytes are what takes long
        assert 9 * layers <= wire["step"] <= 9 * layers + 27 / 100 * layers + 9 / 2
    apart = simulate_plan(PLAN, 1.0, 1.0, False, layers=7, **UNIT)
    assert apart["step"] == 7 * 36


@pytest.mark.parametrize("seed", range(5))
def test_bounds_of_the_step(seed):
    docs = packed(seed, 6, 500)
    plan = plan_core_attention(docs, **SIZES)
    for bandwidth in (0.5, 2.0, 8.0, 1e9):
        args = {"flops_per_pair": 4, "layers": 5, "other_s": 1000.0, **SIZES}
        apart = simulate_plan(plan, 1e3, bandwidth * 1e3, False, **args)
        both = simulate_plan(plan, 1e3, bandwidth * 1e3, **args)
        least = max(max(both["compute"]) + 5 * 1000.0, max(both["comm"]))
        assert least * (1 - 1e-9) <= both["step"] <= apart["step"] * (1 + 1e-9)
        assert both["compute"] == pytest.approx(apart["compute"])
        assert both["comm"] == pytest.approx(apart["comm"])
    assert both["balance"] < 1.11 < simulate_plan(home(docs), 1e3, 1e3, **args)["balance"]


def home(docs):
    """Every document where it is."""
    out, doc = [], 0
    for rank, lengths in enumerate(docs):
        out.append([CAShard(doc + i, 0, n, n, rank, rank) for i, n in enumerate(lengths)])
        doc += len(lengths)
    return out


# ------------------------------------------------------------------------------------------------- two processes
WORKER = """
import sys, torch, torch.distributed as dist
from foveate.dist import CAShard, CoreAttentionPool, plan_core_attention, run_plan
rank, store = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
pool = CoreAttentionPool()
docs, cu = [[61, 7], [9, 12, 4]], [0, 61, 68, 77, 89, 93]
plans = [plan_core_attention(docs, q_bytes=1, kv_bytes=1, tolerance=0.0)]
plans.append([[], [CAShard(i, 0, b - a, b - a, int(i > 1), 1) for i, (a, b) in enumerate(zip(cu, cu[1:]))]])
assert any(s.home != s.server for s in plans[0][1])
mine = slice(0, 68) if rank == 0 else slice(68, 93)
q, k, v, up = (torch.randn(93, h, 8, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2, 4))
for plan in plans:
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    part = [x[mine].clone().requires_grad_() for x in (q, k, v)]
    want = run_plan(plan, *whole, cu)
    out = pool(plan, *part)
    torch.testing.assert_close(out, want[mine], atol=1e-5, rtol=1e-5)
    (want * up).sum().backward()
    (out * up[mine]).sum().backward()
    for a, b in zip(part, whole):
        torch.testing.assert_close(a.grad, b.grad[mine], atol=1e-5, rtol=1e-5)
try:
    pool(plan, q, k, v)
except ValueError as error:
    assert "rows of rank" in str(error)
else:
    raise AssertionError("accepted")
dist.destroy_process_group()
print("the same")
"""


@pytest.mark.slow
def test_two_processes_give_the_same(tmp_path):
    command = [sys.executable, "-c", WORKER]
    started = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], cwd=ROOT, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in started:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            assert "the same" in out
    finally:
        for process in started:
            process.kill()


# --------------------------------------------------------------------------------------------------------- errors
def test_errors_name_the_argument():
    for docs in ([], [[], []]):
        with pytest.raises(ValueError, match="docs_per_rank must hold a document"):
            plan_core_attention(docs, **SIZES)
    with pytest.raises(ValueError, match=r"docs_per_rank\[1\]: a length must be an int >= 1, got 0"):
        plan_core_attention([[3], [4, 0]], **SIZES)
    with pytest.raises(ValueError, match="tile must be an int >= 1, got 0"):
        plan_core_attention([[3]], tile=0, **SIZES)
    for name in ("tolerance", "q_bytes", "kv_bytes"):
        for value in (-1.0, float("nan")):
            with pytest.raises(ValueError, match=f"{name} must be >= 0, got"):
                plan_core_attention([[3]], **{**SIZES, name: value})
    q = torch.randn(5, 1, 8)
    good = [[CAShard(0, 0, 3, 3, 0, 0)], [CAShard(0, 3, 5, 5, 0, 1)]]
    run_plan(good, q, q, q, [0, 5])
    for bad, says in (
        ([good[0], []], r"document 0 of 5 rows is in shards \[\(0, 3\)\]; accepted: every row once"),
        ([[*good[0], CAShard(0, 2, 3, 3, 0, 0)], good[1]], "every row once"),
        ([good[1], good[0]], "the server's own number"),
        ([good[0], [CAShard(0, 3, 5, 4, 0, 1)]], "kv_end = q_end"),
        ([good[0], [CAShard(1, 3, 5, 5, 0, 1)]], "accepted: documents 0 to 0"),
    ):
        with pytest.raises(ValueError, match=says):
            run_plan(bad, q, q, q, [0, 5])
    with pytest.raises(ValueError, match=r"must be \(5, heads, width\).*got \(4, 1, 8\)"):
        run_plan(good, q[:4], q, q, [0, 5])
    for bad in ({"flops_per_s": 0.0}, {"bytes_per_s": -1.0}, {"layers": 0}, {"other_s": -1.0}):
        with pytest.raises(ValueError, match="simulate_plan: flops_per_s and bytes_per_s must be > 0"):
            simulate_plan(PLAN, **{"flops_per_s": 1.0, "bytes_per_s": 1.0, **UNIT, **bad})
