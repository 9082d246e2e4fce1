"""Dist: attention shared out over devices: plans, schedules and their simulation."""

from __future__ import annotations

from foveate.dist.core_attention import CAShard, causal_cost, plan_core_attention, run_plan
from foveate.dist.core_attention_cost import plan_traffic, simulate_plan
from foveate.dist.core_attention_pool import CoreAttentionPool

__all__ = [
    "CAShard",
    "CoreAttentionPool",
    "causal_cost",
    "plan_core_attention",
    "plan_traffic",
    "run_plan",
    "simulate_plan",
]
