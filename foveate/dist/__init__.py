"""Dist: attention shared out over devices: plans, schedules and their simulation."""

from __future__ import annotations

from foveate.dist.streamed import distributed_attention, ring_bytes, run_workers, streamed_attention

__all__ = [
    "distributed_attention",
    "ring_bytes",
    "run_workers",
    "streamed_attention",
]
