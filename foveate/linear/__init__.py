"""Linear: a state instead of a cache: the chunked scan, feature maps, memories that learn while reading."""

from __future__ import annotations

from foveate.linear.feature_maps import RandomFeatures, elu_plus_one
from foveate.linear.operators import LinearAttention
from foveate.linear.scan import LinearState, linear_attention, recurrence

__all__ = [
    "LinearAttention",
    "LinearState",
    "RandomFeatures",
    "elu_plus_one",
    "linear_attention",
    "recurrence",
]
