"""Linear: a state instead of a cache: the chunked scan, feature maps, memories that learn while reading."""

from __future__ import annotations

from foveate.linear.feature_maps import RandomFeatures, elu_plus_one
from foveate.linear.operators import LinearAttention
from foveate.linear.scan import LinearState, linear_attention, recurrence
from foveate.linear.taylor import TaylorFeatures, taylor_linear_attention

__all__ = [
    "LinearAttention",
    "LinearState",
    "RandomFeatures",
    "TaylorFeatures",
    "elu_plus_one",
    "linear_attention",
    "recurrence",
    "taylor_linear_attention",
]
