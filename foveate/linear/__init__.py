"""Linear: a state instead of a cache: the chunked scan, feature maps, memories that learn while reading."""

from __future__ import annotations

from foveate.linear.feature_maps import RandomFeatures, elu_plus_one
from foveate.linear.inline import (
    CausalInLine,
    InLineState,
    inline_attention,
    inline_weights,
    local_mass,
    query_confusion,
)
from foveate.linear.local_linear import global_ridge, local_linear_attention
from foveate.linear.neural_memory import MemoryState, memorise, memory_read, surprise
from foveate.linear.operators import LinearAttention
from foveate.linear.scan import LinearState, linear_attention, recurrence

__all__ = [
    "CausalInLine",
    "InLineState",
    "LinearAttention",
    "LinearState",
    "MemoryState",
    "RandomFeatures",
    "elu_plus_one",
    "global_ridge",
    "inline_attention",
    "inline_weights",
    "linear_attention",
    "local_linear_attention",
    "local_mass",
    "memorise",
    "memory_read",
    "query_confusion",
    "recurrence",
    "surprise",
]
