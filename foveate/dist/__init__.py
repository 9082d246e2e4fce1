"""Dist: attention shared out over devices: plans, schedules and their simulation."""

from __future__ import annotations

from foveate.dist.core_attention import CAShard, causal_cost, plan_core_attention, run_plan
from foveate.dist.core_attention_cost import plan_traffic, simulate_plan
from foveate.dist.core_attention_pool import CoreAttentionPool
from foveate.dist.streamed import distributed_attention, ring_bytes, run_workers, streamed_attention

__all__ = [
    "CAShard",
    "CoreAttentionPool",
    "causal_cost",
    "distributed_attention",
    "plan_core_attention",
    "plan_traffic",
    "ring_bytes",
    "run_plan",
    "run_workers",
    "simulate_plan",
    "streamed_attention",
]
