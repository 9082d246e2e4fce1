"""Linear: a state instead of a cache: the chunked scan, feature maps, memories that learn while reading."""

from __future__ import annotations

from foveate.linear.taylor import TaylorFeatures, TaylorState, taylor_linear_attention

__all__ = [
    "TaylorFeatures",
    "TaylorState",
    "taylor_linear_attention",
]
