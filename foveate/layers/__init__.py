"""Layers: `nn.Module`s with parameters of their own (gates, predictors, centroids), built on the other rooms."""

from __future__ import annotations

from foveate.layers.hierarchical import HierarchicalSelfAttention
from foveate.layers.seer_attention import (
    BlockGate,
    SeerAttention,
    gate_layout,
    gate_loss,
    load_gates,
    pooled_attention_target,
    save_gates,
)

__all__ = [
    "BlockGate",
    "HierarchicalSelfAttention",
    "SeerAttention",
    "gate_layout",
    "gate_loss",
    "load_gates",
    "pooled_attention_target",
    "save_gates",
]
