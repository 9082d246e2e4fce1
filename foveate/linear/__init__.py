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
from foveate.linear.lightning import (
    LightningAttention,
    LightningFunction,
    alibi_decay,
    lightning_attention,
    lightning_step,
)
from foveate.linear.local_linear import global_ridge, local_linear_attention
from foveate.linear.neural_memory import MemoryState, memorise, memory_read, surprise
from foveate.linear.operators import LinearAttention
from foveate.linear.scan import LinearState, linear_attention, recurrence
from foveate.linear.taylor import TaylorFeatures, taylor_linear_attention

__all__ = [
    "CausalInLine",
    "InLineState",
    "LightningAttention",
    "LightningFunction",
    "LinearAttention",
    "LinearState",
    "MemoryState",
    "RandomFeatures",
    "TaylorFeatures",
    "alibi_decay",
    "elu_plus_one",
    "global_ridge",
    "inline_attention",
    "inline_weights",
    "lightning_attention",
    "lightning_step",
    "linear_attention",
    "local_linear_attention",
    "local_mass",
    "memorise",
    "memory_read",
    "query_confusion",
    "recurrence",
    "surprise",
    "taylor_linear_attention",
]
