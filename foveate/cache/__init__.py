"""Cache: which keys and values to keep while a model generates, per layer and head."""

from __future__ import annotations

from foveate.cache.moa import (
    MoAPlan,
    SpanRule,
    attention_influence,
    group_influence,
    predicted_loss,
    search_spans,
    span_rules,
)

__all__ = [
    "MoAPlan",
    "SpanRule",
    "attention_influence",
    "group_influence",
    "predicted_loss",
    "search_spans",
    "span_rules",
]
