"""Linear: a state instead of a cache: the chunked scan, feature maps, memories that learn while reading."""

from __future__ import annotations

from foveate.linear.lightning import (
    LightningAttention,
    LightningFunction,
    alibi_decay,
    lightning_attention,
    lightning_step,
)

__all__ = [
    "LightningAttention",
    "LightningFunction",
    "alibi_decay",
    "lightning_attention",
    "lightning_step",
]
