"""Core attention disaggregation between processes: every rank is at once a trainer and a server."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from foveate.dist.core_attention import Plan, check_plan, serve


class _Exchange(torch.autograd.Function):
    """Rows to every rank and from every rank; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Any) -> Tensor:  # pyright: ignore
        ctx.sizes = send, receive, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        send, receive, group = ctx.sizes
        return _Exchange.apply(grad, receive, send, group), None, None, None


class CoreAttentionPool:
    """Runs a plan on the ranks of a process group.

    All-to-all of queries, keys and values, one call of attention on each rank, all-to-all of the results. Backward
    takes the same ways back, so every rank must call it.

    Args:
        group: process group of torch.distributed (gloo, NCCL); None: the default one.

    Source: Efficient Long-context Language Model Training by Core Attention Disaggregation (2025). Plain collectives,
    one after another; the authors' are NVSHMEM kernels, hidden behind the computation of another nano-batch.
    """

    def __init__(self, group: Any = None) -> None:
        self.attach(group)

    def attach(self, group: Any) -> None:
        """Use another process group."""
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def __call__(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *, engine: str = "auto") -> Tensor:
        """q (rows, H, D), k, v (rows, Hkv, D) of the documents of this rank, one after another -> (rows, H, D).

        All ranks call it with the same plan. Raises ValueError where plan, group and rows do not fit.
        """
        lengths: dict[int, int] = {}
        homes: dict[int, int] = {}
        for s in (s for shards in plan for s in shards):
            lengths[s.doc], homes[s.doc] = max(lengths.get(s.doc, 0), s.q_end), s.home
        check_plan(plan, [lengths.get(doc, 0) for doc in range(max(lengths) + 1)])
        first, total = {}, 0
        for doc in sorted(lengths):
            if homes[doc] == self.rank:
                first[doc], total = total, total + lengths[doc]
        if len(plan) != self.ranks or len(q) != total or len(k) != total or len(v) != total:
            raise ValueError(
                f"CoreAttentionPool: plan of {len(plan)} servers and {total} rows of rank {self.rank}; got "
                f"{self.ranks} ranks and {len(q)}, {len(k)} and {len(v)} rows"
            )
        # what this rank sends: by server, in the server's order. What it receives: by home, so it serves by home
        out_of = [[s for s in shards if s.home == self.rank] for shards in plan]
        into = [[s for s in plan[self.rank] if s.home == home] for home in range(self.ranks)]
        q_rows = [first[s.doc] + i for shards in out_of for s in shards for i in range(s.q_start, s.q_end)]
        k_rows = [first[s.doc] + i for shards in out_of for s in shards for i in range(s.kv_end)]
        at = torch.tensor(q_rows, dtype=torch.int64, device=q.device)
        keys = torch.tensor(k_rows, dtype=torch.int64, device=q.device)
        q_out, q_in = ([sum(s.q_end - s.q_start for s in part) for part in parts] for parts in (out_of, into))
        k_out, k_in = ([sum(s.kv_end for s in part) for part in parts] for parts in (out_of, into))
        q_here: Tensor = _Exchange.apply(q[at], q_out, q_in, self.group)  # pyright: ignore
        k_here: Tensor = _Exchange.apply(k[keys], k_out, k_in, self.group)  # pyright: ignore
        v_here: Tensor = _Exchange.apply(v[keys], k_out, k_in, self.group)  # pyright: ignore
        if plan[self.rank]:
            found = serve([s for part in into for s in part], q_here, k_here, v_here, engine=engine)
        else:  # nothing to do, but backward has to reach the exchanges
            found = q_here[..., :1].expand(-1, -1, v.shape[2]) + (k_here.sum() + v_here.sum())
        back: Tensor = _Exchange.apply(found, q_in, q_out, self.group)  # pyright: ignore
        return back[at.argsort()]
