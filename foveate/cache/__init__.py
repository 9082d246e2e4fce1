"""Cache: which keys and values to keep while a model generates, per layer and head."""

from __future__ import annotations

from foveate.cache.longheads import (
    LongHeadsCache,
    LongHeadsPolicy,
    chunk_representation,
    longheads_attention,
    select_chunks,
)

__all__ = [
    "LongHeadsCache",
    "LongHeadsPolicy",
    "chunk_representation",
    "longheads_attention",
    "select_chunks",
]
