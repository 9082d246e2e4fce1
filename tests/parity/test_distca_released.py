"""Core attention disaggregation against what the authors' released planner moves.

The shards were made by running `Planner.plan_items` of github.com/hao-ai-lab/distca (commit 039f2e4) on documents of
even lengths; shards of one document on one server that touch are joined. The released planner may leave a server with
more than (1 + tolerance) times the mean. Then a last pass of `plan_core_attention` goes on, and only the load is
compared.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foveate.dist import causal_cost, plan_core_attention
from foveate.dist.core_attention import _joined

CASES = json.loads(Path(__file__).with_name("distca_released.json").read_text())["cases"]


def overfull(case) -> bool:
    load = [0] * len(case["docs"])
    for server, _, start, end in case["shards"]:
        load[server] += causal_cost(end - start, end)
    return max(load) > (1 + case["tolerance"]) * sum(load) / len(load)


def joined(plan):
    found = []
    for server, shards in enumerate(plan):
        for doc in sorted({s.doc for s in shards}):
            found += [[server, doc, *ends] for ends in _joined([s for s in shards if s.doc == doc])]
    return found


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_moves_what_the_released_planner_moves(case):
    plan = plan_core_attention(
        case["docs"], q_bytes=case["q"], kv_bytes=case["kv"], tolerance=case["tolerance"]
    )
    if not overfull(case):
        assert joined(plan) == case["shards"]
    theirs = [0] * len(plan)
    for server, _, start, end in case["shards"]:
        theirs[server] += causal_cost(end - start, end)
    assert max(sum(s.cost for s in shards) for shards in plan) <= max(theirs)


def test_most_cases_are_compared_shard_by_shard():
    assert sum(not overfull(case) for case in CASES) >= 12
