"""What a plan of core attention costs: the bytes between ranks, and the time of a step, with ping-pong and without."""

from __future__ import annotations

from typing import Any

import numpy as np

from foveate.dist.core_attention import Plan


def plan_traffic(plan: Plan, *, q_bytes: float, kv_bytes: float) -> tuple[np.ndarray, np.ndarray]:
    """Bytes from rank (row) to rank (column) in the forward pass: (dispatch, collect), each (S, S), 0 on the diagonal.

    Dispatch sends the query rows of a task from its home to its server, and keys and values of its document up to the
    last one that any task of the document on that server needs, once. Collect sends as many rows of results back.

    >>> from foveate.dist import plan_core_attention
    >>> plan = plan_core_attention([[8], [2, 2]], q_bytes=10, kv_bytes=1)
    >>> [x.tolist() for x in plan_traffic(plan, q_bytes=10, kv_bytes=1)]  # 2 rows, 5 keys
    [[[0.0, 25.0], [0.0, 0.0]], [[0.0, 0.0], [20.0, 0.0]]]
    """
    dispatch, collect = np.zeros((2, len(plan), len(plan)))
    for server, shards in enumerate(plan):
        prefix: dict[tuple[int, int], int] = {}
        for s in shards:
            if s.home != server:
                dispatch[s.home, server] += (s.q_end - s.q_start) * q_bytes
                collect[server, s.home] += (s.q_end - s.q_start) * q_bytes
                prefix[s.home, s.doc] = max(prefix.get((s.home, s.doc), 0), s.kv_end)
        for (home, _), keys in prefix.items():
            dispatch[home, server] += keys * kv_bytes
    return dispatch, collect


def simulate_plan(
    plan: Plan,
    flops_per_s: float,
    bytes_per_s: float,
    overlap: bool = True,
    *,
    flops_per_pair: float,
    q_bytes: float,
    kv_bytes: float,
    layers: int = 1,
    other_s: float = 0.0,
) -> dict[str, Any]:
    """The time of a forward pass over layers of (dispatch, core attention, collect, the rest of the layer).

    Dispatch and collect are collectives: they begin when every rank is ready, one at a time, and last as long as the
    rank that sends or receives most. A rank computes one thing at a time. With overlap the micro-batch is two
    nano-batches of half the work each, and one communicates while the other computes (ping-pong); without, all follow
    one another. A free resource takes the operation that can begin first.

    Args:
        flops_per_s, bytes_per_s: of one rank; bytes each way.
        overlap: ping-pong.
        flops_per_pair: of a query-key pair, 4 H D forward.
        q_bytes, kv_bytes: as in `plan_core_attention`.
        layers: how many layers run one after another, >= 1.
        other_s: seconds of the rest of a layer, the same on every rank.

    Returns:
        "step": seconds of all layers; "compute", "comm": seconds of core attention of each server, and of what it sends
        or receives, over all layers; "balance": the largest "compute" over the mean; "wait": seconds of the step, as a
        mean over ranks, in which a rank computes nothing.

    >>> from foveate.dist import plan_core_attention
    >>> plan, size = plan_core_attention([[8], [2, 2]], q_bytes=1, kv_bytes=1), {"q_bytes": 1, "kv_bytes": 1}
    >>> both = [simulate_plan(plan, 1.0, 1.0, o, flops_per_pair=1, layers=4, **size) for o in (False, True)]
    >>> [found["step"] for found in both]
    [144.0, 112.5]
    """
    if layers < 1 or not (flops_per_s > 0 and bytes_per_s > 0 and other_s >= 0):
        raise ValueError(
            "simulate_plan: flops_per_s and bytes_per_s must be > 0, layers >= 1 and other_s >= 0; got "
            f"{flops_per_s}, {bytes_per_s}, {layers} and {other_s}"
        )
    nanos = 2 if overlap else 1
    attend = np.array([sum(s.cost for s in shards) for shards in plan]) * (
        flops_per_pair / flops_per_s / nanos
    )
    moves = plan_traffic(plan, q_bytes=q_bytes, kv_bytes=kv_bytes)
    busy = [
        np.maximum(x.sum(0), x.sum(1)) / bytes_per_s / nanos for x in moves
    ]  # of each rank, both ways at once
    rest = np.full(len(plan), other_s / nanos)
    stages = [("network", busy[0]), ("rank", attend), ("network", busy[1])]
    stages = (stages + [("rank", rest)] * (other_s > 0)) * layers
    free = {"network": np.zeros(len(plan)), "rank": np.zeros(len(plan))}
    ready, at = [np.zeros(len(plan)) for _ in range(nanos)], [0] * nanos
    while min(at) < len(stages):
        starts = []
        for i in range(nanos):
            if at[i] < len(stages):
                what, _ = stages[at[i]]
                start = np.maximum(ready[i], free[what])
                start = np.full(len(plan), start.max()) if what == "network" else start
                starts.append((float(start.min()), at[i], i, start))
        _, _, i, start = min(starts, key=lambda s: s[:3])
        what, seconds = stages[at[i]]
        end = start + (seconds.max() if what == "network" else seconds)
        ready[i] = free[what] = end
        at[i] += 1
    step = float(max(r.max() for r in ready))
    compute, comm = attend * nanos * layers, (busy[0] + busy[1]) * nanos * layers
    return {
        "step": step,
        "compute": compute.tolist(),
        "comm": comm.tolist(),
        "balance": float(compute.max() / compute.mean()),
        "wait": float(step - (compute + rest * nanos * layers).mean()),
    }
