"""Core attention disaggregation: balance of packed documents, the bytes it costs, and the same results."""

from __future__ import annotations

import heapq
import random
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from foveate import attention
from foveate.catalogue import pictures
from foveate.catalogue.lab import FAILS, HOLDS, Figure, Finding, Lab, all_of, bars, interval, judge
from foveate.dist import CAShard, plan_core_attention, plan_traffic, run_plan, simulate_plan

RANKS, TOKENS, SHORTEST, TILE, BATCHES = 16, 1 << 16, 1 << 10, 128, 16
Q_BYTES, KV_BYTES, FLOPS = 32 * 128 * 2, 2 * 8 * 128 * 2, 4 * 32 * 128  # a layer of Llama 3 8B in bfloat16
DEVICE = {
    "flops_per_s": 5e14,
    "bytes_per_s": 5e10,
    "flops_per_pair": FLOPS,
    "q_bytes": Q_BYTES,
    "kv_bytes": KV_BYTES,
}
FIRST = 50_000  # of the seeds of batches, each drawn independently of the others
SCALED = 128  # times shorter, where results are compared
COUNTS_IF = (
    "16 ranks of 65,536 tokens, documents of 1,024 to 65,536 tokens, 16 batches for each of three seeds: the fullest "
    "rank has at least 1.5 times the mean of query-key pairs before planning (else there is nothing to balance), at "
    "most 1.1 times in every batch after it, where the best of whole documents stays above 1.2; queries, keys, values "
    "and results sent are below 0.3 of what an all-gather of keys and values over all ranks sends; and on documents "
    "128 times shorter the results and gradients equal attention document by document to 1e-5 of the largest one."
)


def run(lab: Lab) -> Finding:
    """Does cutting the core of attention into token-level tasks balance packed documents at few bytes?"""
    batches = lab.pick(BATCHES, 2)
    rows = [
        [lab.once(f"batch-{seed}-{i}", lambda s=seed, i=i: one(s, i)) for i in range(batches)]
        for seed in lab.seeds
    ]
    mean = {name: interval(name, [row[name] for seed in rows for row in seed]) for name in rows[0][0]}
    worst = Figure("planned, worst batch", max(row["planned"] for seed in rows for row in seed))
    error = Figure("largest error", max(row["error"] for seed in rows for row in seed))
    shown = [mean["packed"], mean["whole documents"], mean["planned"], worst]
    return Finding(
        question="Does cutting the core of attention into token-level tasks balance packed documents at few bytes?",
        counts_if=COUNTS_IF,
        verdict=all_of(
            judge(mean["packed"], above=1.5),
            HOLDS if worst.value <= 1.1 else FAILS,
            judge(mean["whole documents"], above=1.2),
            judge(mean["bytes saved"], above=0.7),
            HOLDS if error.value <= 1e-5 else FAILS,
        ),
        summary=f"The fullest of {RANKS} ranks has {mean['packed']} times the mean of pairs, {mean['whole documents']} "
        f"with whole documents moved and {mean['planned']} with the plan (worst batch {worst}), which sends "
        f"{mean['bytes']} of the bytes of an all-gather; the modelled step is {mean['step']} of the packed one.",
        figures=(*shown, *(mean[name] for name in mean if name.startswith(("bytes", "step"))), error),
        plot=bars("Pairs of the fullest rank", "over the mean", shown, ["packed", "whole documents"]),
    )  # fmt: skip


def one(seed: int, batch: int) -> dict[str, float]:
    """One batch: balance, bytes and modelled steps, and the error on short documents."""
    docs = packed(random.Random(FIRST + 1000 * seed + batch), TOKENS, SHORTEST)
    plan = plan_core_attention(docs, q_bytes=Q_BYTES, kv_bytes=KV_BYTES, tile=TILE)
    sent = sum(x.sum() for x in plan_traffic(plan, q_bytes=Q_BYTES, kv_bytes=KV_BYTES))
    moved = [s for shards in plan for s in shards if s.home != s.server]
    flat = [n for rank in docs for n in rank]
    bound = sum((s.q_end - s.q_start) * 2 * Q_BYTES + (flat[s.doc] + 1) * KV_BYTES for s in moved)
    gathered = (RANKS - 1) * sum(flat) * KV_BYTES
    packed_step = simulate_plan(at_home(docs), overlap=False, layers=32, **DEVICE)
    apart, both = (simulate_plan(plan, overlap=overlap, layers=32, **DEVICE) for overlap in (False, True))
    return {
        "packed": packed_step["balance"],
        "whole documents": whole_documents(flat),
        "planned": both["balance"],
        "bytes": float(sent / gathered),
        "bytes saved": 1 - float(sent / gathered),
        "bytes, upper bound": bound / gathered,
        "step": both["step"] / packed_step["step"],
        "step without overlap": apart["step"] / packed_step["step"],
        "error": error(seed, batch),
    }


def packed(g: random.Random, tokens: int, shortest: int) -> list[list[int]]:
    """Documents of every rank, lengths even on a logarithmic scale; the last of a rank is cut off at its end."""
    out = []
    for _ in range(RANKS):
        docs = []
        while (left := tokens - sum(docs)) > 0:
            docs.append(min(left, round(shortest * (tokens / shortest) ** g.random())))
        out.append(docs)
    return out


def at_home(docs: list[list[int]]) -> list[list[CAShard]]:
    """The plan that moves nothing."""
    first = list(accumulate((len(rank) for rank in docs), initial=0))
    return [[CAShard(first[r] + i, 0, n, n, r, r) for i, n in enumerate(rank)] for r, rank in enumerate(docs)]


def whole_documents(lengths: list[int]) -> float:
    """Fullest server over the mean when each document, the longest first, goes to the emptiest one, wherever it was."""
    load = [0] * RANKS
    for n in sorted(lengths, reverse=True):
        heapq.heapreplace(load, load[0] + n * (n + 1) // 2)
    return max(load) * RANKS / sum(load)


def error(seed: int, batch: int) -> float:
    """The largest difference from attention document by document, over the largest entry, on short documents."""
    docs = packed(random.Random(FIRST + 1000 * seed + batch), TOKENS // SCALED, SHORTEST // SCALED)
    cu = list(accumulate((n for rank in docs for n in rank), initial=0))
    plan = plan_core_attention(docs, q_bytes=Q_BYTES, kv_bytes=KV_BYTES)
    g = torch.Generator().manual_seed(FIRST + 1000 * seed + batch)
    q, k, v, up = (torch.randn(cu[-1], heads, 16, generator=g) for heads in (4, 2, 2, 4))
    found = []
    for whole in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        if whole:
            parts = []
            for a, b in pairwise(cu):
                q, k, v = (x[a:b].transpose(0, 1)[None] for x in leaves)
                parts.append(cast(Tensor, attention(q, k, v, is_causal=True)))
            out = torch.cat([part[0].transpose(0, 1) for part in parts])
        else:
            out = run_plan(plan, *leaves, cu)
        (out * up).sum().backward()
        found.append([out.detach(), *(x.grad for x in leaves)])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))


def picture() -> dict[str, Any]:
    """The pairs that each of four servers computes."""
    docs = [[40], [10, 14], [8, 8, 8], [24]]
    plan = plan_core_attention(docs, q_bytes=4, kv_bytes=1, tolerance=0.05)
    starts = list(accumulate((n for rank in docs for n in rank), initial=0))
    frames = []
    for planned, shared in (("planned", plan), ("packed", at_home(docs))):
        for server, shards in enumerate(shared):
            seen = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
            for s in shards:
                for row in range(s.q_start, s.q_end):
                    seen[starts[s.doc] + row, starts[s.doc] : starts[s.doc] + row + 1] = True
            code = f"plan[{server}]: {sum(s.cost for s in shards)} of {sum(n * (n + 1) // 2 for r in docs for n in r)}"
            frames.append(({"tasks": planned, "server": server}, seen, f"{code} pairs"))
    return pictures.pairs(
        "Documents of 40, 10, 14, 8, 8, 8 and 24 tokens lie on four ranks. Rows around the middle of the longest one "
        "are computed elsewhere, so that every server has as many pairs.",
        frames,
    )
