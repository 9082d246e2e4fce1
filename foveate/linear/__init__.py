"""Linear: a state instead of a cache: the chunked scan, feature maps, memories that learn while reading."""

from __future__ import annotations

from foveate.linear.feature_maps import RandomFeatures, elu_plus_one
from foveate.linear.lightning import (
    LightningAttention,
    LightningFunction,
    alibi_decay,
    lightning_attention,
    lightning_step,
)
from foveate.linear.operators import LinearAttention
from foveate.linear.scan import LinearState, linear_attention, recurrence

__all__ = [
    "LightningAttention",
    "LightningFunction",
    "LinearAttention",
    "LinearState",
    "RandomFeatures",
    "alibi_decay",
    "elu_plus_one",
    "lightning_attention",
    "lightning_step",
    "linear_attention",
    "recurrence",
]
